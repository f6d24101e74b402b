"""What the trained networks are worth: files on the stock interpreter, a table, a verdict, and pictures."""

import dataclasses
import io
import json
import os
import statistics
from dataclasses import dataclass
from pathlib import Path

import keras
import matplotlib
import numpy as np
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter
from matplotlib.figure import Figure
from rich.table import Table

import keras_blocksparse as kbs
from examples.japanese_vowels.data import Utterances
from examples.japanese_vowels.quiet import quiet
from examples.japanese_vowels.training import KINDS, Recipe, Run

matplotlib.use("Agg")  # pictures go to files; there may be no screen

import matplotlib.pyplot as plt

RUNTIME = "ai_edge_litert"  # the stock interpreter; TensorFlow's own copy of it is deprecated in favour of this


@dataclass(frozen=True)
class File:
    """One exported file of the first seed's networks; latency is of one utterance, on one thread.

    `smaller` and `faster` compare with the same network's dense float32 file, timed in turns with this one.
    """

    kind: str
    quantize: str | None
    accuracy: float
    bytes: int
    smaller: float
    latency_ms: float
    faster: float
    interpreter: str


@dataclass(frozen=True)
class Outcome:
    """Everything that one run of the example found."""

    recipe: Recipe
    runs: list[Run]
    files: list[File]
    scored_on: str
    seconds: float

    def accuracies(self, kind: str) -> list[float]:
        """The scores of all networks of one kind, in the order of their seeds."""
        return [run.accuracy for run in self.runs if run.kind == kind]

    def verdict(self) -> str:
        """Whether sparsity cost accuracy, by the larger of the two kinds' spreads."""
        dense, sparse = (self.accuracies(kind) for kind in KINDS)
        if len(dense) < 2:
            return "One seed has no spread, so it does not tell whether sparsity costs accuracy."
        lost = 100 * (statistics.mean(dense) - statistics.mean(sparse))
        noise = 100 * max(statistics.stdev(dense), statistics.stdev(sparse))
        numbers = (
            f"{abs(lost):.2f} points {'below' if lost > 0 else 'above'} dense; the spread over seeds is {noise:.2f}"
        )
        if lost > noise:
            return f"WORSE: the sparse network is {numbers}."
        return f"Not worse: the sparse network is {numbers}."

    def title(self) -> str:
        """What the table is of."""
        rows, columns = self.recipe.block_size
        return (
            f"JapaneseVowels, GRU({self.recipe.units}), {rows}x{columns} blocks by GLP,"
            f" {len(self.accuracies('dense'))} seeds of {self.recipe.epochs} epochs, scored on the {self.scored_on} set"
        )

    def cells(self) -> list[list[str]]:
        """The table: a heading, then a line for each thing that was found, with a column for each file."""
        sparse = f"{self.recipe.sparsity:.0%} sparse"
        columns = [["", "accuracy, %", "accuracy of the file, %", "parameters kept", "file, bytes", "latency, ms"]]
        columns[0] += ["smaller than dense float32", "faster than dense float32"]
        for file in self.files:
            scores = [100 * score for score in self.accuracies(file.kind)]
            spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
            columns.append(
                [
                    f"{'dense' if file.kind == 'dense' else sparse}, {file.quantize or 'float32'}",
                    f"{statistics.mean(scores):.2f}{spread}",
                    f"{100 * file.accuracy:.2f}",
                    f"{kept(next(run.model for run in self.runs if run.kind == file.kind)):,}",
                    f"{file.bytes:,}",
                    f"{file.latency_ms:.3f}",
                    f"{file.smaller:.1f}x",
                    f"{file.faster:.1f}x",
                ]
            )
        return [list(line) for line in zip(*columns, strict=True)]

    def table(self) -> Table:
        """The table for a terminal."""
        heading, *lines = self.cells()
        table = Table(title=self.title())
        for n, name in enumerate(heading):
            table.add_column(name, justify="right" if n else "left")
        for line in lines:
            table.add_row(*line)
        return table

    def markdown(self) -> str:
        """The table for a page, with what has to be said beside it."""
        heading, *lines = self.cells()
        rows = [heading, ["---", *["---:"] * len(self.files)], *lines]
        return "\n".join(
            [
                f"{self.title()}.",
                "",
                *("| " + " | ".join(row) + " |" for row in rows),
                "",
                self.verdict(),
                "",
                "Accuracy is the mean and standard deviation over the seeds; the files are those of the first seed."
                f" Latency is of one utterance, {self.files[0].interpreter}; each file is timed in turns with its dense"
                " float32 twin.",
                "",
            ]
        )

    def write(self, folder: Path) -> list[Path]:
        """Write results.md and results.json."""
        facts = {
            "recipe": dataclasses.asdict(self.recipe),
            "scored_on": self.scored_on,
            "accuracy": {kind: self.accuracies(kind) for kind in KINDS},
            "zeros_in_recurrent_kernel": {
                kind: [run.zeros[-1] for run in self.runs if run.kind == kind] for kind in KINDS
            },
            "verdict": self.verdict(),
            "files": [dataclasses.asdict(file) for file in self.files],
            "versions": {
                "tensorflow": tf.__version__,
                "keras": keras.__version__,
                "keras_blocksparse": kbs.__version__,
            },
            "seconds": round(self.seconds, 1),
        }
        return [
            replace(folder / "results.md", self.markdown().encode()),
            replace(folder / "results.json", (json.dumps(facts, indent=2) + "\n").encode()),
        ]


def kept(model: keras.Model) -> int:
    """How many of the model's weights are not zero."""
    return sum(int(np.count_nonzero(np.asarray(weight))) for weight in model.trainable_weights)


def export(runs: list[Run], scored: Utterances, folder: Path) -> list[File]:
    """Export the first network of each kind, in float32 and int8, and score the files themselves."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for kind in KINDS:
        model = next(run.model for run in runs if run.kind == kind)
        for quantize in (None, "int8"):
            path = folder / f"{kind}_{quantize or 'float32'}.tflite"
            report = kbs.export_tflite(model, path, target="stock", quantize=quantize, runtimes=[RUNTIME])
            files.append(
                File(
                    kind,
                    quantize,
                    score(path, scored),
                    report.bytes,
                    report.ratio,
                    report.latency_ms[RUNTIME],
                    report.speedup[RUNTIME],
                    f"{RUNTIME} {report.runtimes[RUNTIME]}, 1 thread, {report.cpu}",
                )
            )
    return files


def score(path: Path, scored: Utterances) -> float:
    """The accuracy of a .tflite file on the stock interpreter, one utterance at a time."""
    with quiet():
        interpreter = Interpreter(model_path=str(path), num_threads=1)
        interpreter.allocate_tensors()
    entry, result = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]
    right = 0
    for x, y in zip(scored.x, scored.y, strict=True):
        interpreter.set_tensor(entry, x[None])
        interpreter.invoke()
        right += int(interpreter.get_tensor(result)[0].argmax() == y)
    return right / len(scored)


def draw(runs: list[Run], recipe: Recipe, folder: Path) -> list[Path]:
    """Write masks.png, the blocks that are left, and training.png, how they went."""
    sparse = next(run for run in runs if run.kind == "sparse")
    masks = kbs.plot_masks(sparse.model)

    course, (left, right) = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
    for run in runs:
        colour, first = ("tab:blue", "tab:orange")[KINDS.index(run.kind)], run.seed == runs[0].seed
        epochs = range(1, len(run.losses) + 1)
        left.semilogy(epochs, run.losses, color=colour, alpha=0.7, label=run.kind if first else None)
        right.plot(
            epochs, [100 * share for share in run.zeros], color=colour, alpha=0.7, label=run.kind if first else None
        )
    left.set(xlabel="epoch", ylabel="training loss, with the group lasso")
    right.set(xlabel="epoch", ylabel="zeros in the recurrent kernel, %", ylim=(-3, 103))
    left.legend()
    right.legend()
    course.suptitle(f"Every network of the run, {recipe.block_size[0]}x{recipe.block_size[1]} blocks")
    return [save(masks, folder / "masks.png"), save(course, folder / "training.png")]


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120)
    plt.close(figure)
    return replace(path, png.getvalue())


def replace(path: Path, content: bytes) -> Path:
    """Write a file under a temporary name, then rename, so that no half-written file is ever there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    temporary.write_bytes(content)
    os.replace(temporary, path)
    return path
