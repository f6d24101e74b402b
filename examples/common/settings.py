"""What every training program can be told, and where it stands on the command line."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from examples.common import compression
from examples.common.arguments import positive, share
from examples.common.compression import Compression
from examples.common.packages import CACHE


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a training is asked to be; programs add their own. `--help` says what each is."""

    cell: str
    units: int
    layers: int
    dropout: float
    epochs: int
    batch: int
    learning_rate: float
    weight_decay: float
    seed: int
    start_from: str | None
    teacher: list[str] | None
    teacher_share: float
    teacher_dropout: bool
    native_loop: bool
    evaluate: str
    compression: Compression | None

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> Self:
        """What the command line asks for.

        Raises:
            SystemExit: it makes no sense.
        """
        for option, path in [("start-from", args.start_from), *(("teacher", path) for path in args.teacher or ())]:
            if path is not None and not Path(path).is_file():
                raise SystemExit(f"--{option}: there is no file {path}")
        if args.teacher_dropout and args.teacher is None:
            raise SystemExit("--teacher-dropout needs a --teacher")
        names = {field.name for field in dataclasses.fields(cls)} - {"compression"}
        return cls(compression=compression.from_arguments(args), **{name: getattr(args, name) for name in names})

    def scored(self) -> list[str]:
        """What to score: dev in any case."""
        return ["dev", "test"] if self.evaluate == "test" else ["dev"]

    @property
    def label(self) -> str:
        """What progress is called."""
        return f"{self.cell.upper()}({self.units}), seed {self.seed}"


def add_arguments(
    parser: argparse.ArgumentParser,
    *,
    cells: tuple[str, ...],
    units: int,
    layers: int,
    dropout: float,
    epochs: int,
    batch: int,
    learning_rate: float,
    output: str,
) -> None:
    """The options that all programs have, with a program's defaults."""
    add = parser.add_argument
    add("--cell", choices=cells, default=cells[0], help="(default: %(default)s)")
    add("--units", type=positive, default=units, help="of each recurrent layer (default: %(default)s)")
    add("--layers", type=positive, default=layers, help="recurrent layers (default: %(default)s)")
    add("--dropout", type=share, default=dropout, help="of the recurrent layers' outputs (default: %(default)s)")
    add("--epochs", type=positive, default=epochs, help="(default: %(default)s)")
    add("--batch", type=positive, default=batch, help="examples in a batch (default: %(default)s)")
    add("--learning-rate", type=float, default=learning_rate, help="of AdamW, at its highest (default: %(default)s)")
    add("--weight-decay", type=float, default=0.0, help="of AdamW (default: %(default)s)")
    add("--start-from", metavar="FILE", help="trained .keras file of the same network, whose weights to begin with")
    add(
        "--teacher", metavar="FILE", nargs="+",
        help="trained .keras file of the same task, to learn from beside the targets; of several, from the mean",
    )  # fmt: skip
    add("--teacher-share", type=share, default=0.5, help="of the teacher in the loss (default: %(default)s)")
    add("--teacher-dropout", action="store_true", help="ask the teacher with its dropout on: it is less sure then")
    add("--seed", type=int, default=0, help="of weights, order and dropout (default: %(default)s)")
    add(
        "--evaluate", choices=("dev", "test"), default="dev",
        help="what to score: test, too, once, at the very end (default: %(default)s)",
    )  # fmt: skip
    add("--native-loop", action="store_true", help="train on the native loop, quicker on a CPU for small batches")
    add("--threads", type=positive, help="that TensorFlow may use (default: all)")
    add("--output", type=Path, default=Path(output), help="folder for what is written (default: %(default)s)")
    add("--cache", type=Path, default=CACHE, help="folder for data that is made once (default: %(default)s)")
    add(
        "--export", action=argparse.BooleanOptionalAction, default=True,
        help="write and time .tflite files (default: %(default)s)",
    )  # fmt: skip
    compression.add_arguments(parser)
