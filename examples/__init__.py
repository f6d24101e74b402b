"""Whole programs on real data, each from one command: `python -m examples.NAME --help`."""
