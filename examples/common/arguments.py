"""Types of command line arguments that several examples take."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    """An argparse type: an integer from 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number. Received: {text}")
    return value


def share(text: str) -> float:
    """An argparse type: a number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1. Received: {text}")
    return value


def densities(text: str) -> dict[str, float]:
    """An argparse type: relative densities by gate, "z=1,r=1,h=4"."""
    try:
        return {name: float(value) for name, value in (pair.split("=") for pair in text.split(","))}
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected gates and numbers, as z=1,r=1,h=4. Received: {text}") from error
