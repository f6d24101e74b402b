"""What the trained networks are worth: files with and without our delegate, a table, a verdict, and pictures."""

import dataclasses
import io
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter
from matplotlib.figure import Figure
from rich.table import Table

import keras_blocksparse as kbs
from examples.common.files import replace, write_json
from examples.common.quiet import quiet
from examples.japanese_vowels.data import Utterances
from examples.japanese_vowels.training import KINDS, Recipe, Run

RUNTIME = "ai_edge_litert"  # the stock interpreter; TensorFlow's own copy of it is deprecated in favour of this
#: How a file is run, by what the tables call it: which interpreter, and its key in an `ExportReport`.
WAYS: dict[str, tuple[Callable[..., Any], str]] = {
    "LiteRT": (Interpreter, RUNTIME),
    "our delegate": (kbs.lite.Interpreter, f"{RUNTIME} with delegate"),
}


@dataclass(frozen=True)
class Execution:
    """One file, run in one way: latency is of one utterance, on one thread.

    `speed` is over the dense float32 file of TensorFlow's converter on the stock interpreter, timed in turns with this.
    """

    accuracy: float
    latency_ms: float
    speed: float


@dataclass(frozen=True)
class File:
    """One exported file of the first seed's networks. `smaller` is than the dense float32 file of the converter."""

    kind: str
    quantize: str | None
    bytes: int
    smaller: float
    runs: dict[str, Execution]
    interpreter: str

    @property
    def name(self) -> str:
        """What it is called in pictures."""
        return f"{self.kind} {self.quantize or 'float32'}"


@dataclass(frozen=True)
class Outcome:
    """Everything that one run of the example found."""

    recipe: Recipe
    runs: list[Run]
    files: list[File]
    scored_on: str
    utterances: int
    seconds: float

    def accuracies(self, kind: str) -> list[float]:
        """The scores of all networks of one kind, in the order of their seeds."""
        return [run.accuracy for run in self.runs if run.kind == kind]

    def model(self, kind: str) -> keras.Model:
        """The first seed's network of one kind."""
        return next(run.model for run in self.runs if run.kind == kind)

    @property
    def difference(self) -> float:
        """Points of accuracy by which the sparse networks differ from the dense ones, in the mean."""
        dense, sparse = (statistics.mean(self.accuracies(kind)) for kind in KINDS)
        return 100 * (sparse - dense)

    @property
    def spread(self) -> float | None:
        """The larger of both kinds' standard deviations over the seeds, in points; None for one seed."""
        if len(self.accuracies("dense")) == 1:
            return None
        return 100 * max(statistics.stdev(self.accuracies(kind)) for kind in KINDS)

    @property
    def verdict(self) -> str:
        """Whether sparsity cost accuracy: more than the spread over seeds, or not."""
        if self.spread is None:
            return f"{self.difference:+.2f}, by ONE SEED"
        word = "WORSE" if self.difference < -self.spread else "not worse"
        return f"{word}: {self.difference:+.2f}, spread {self.spread:.2f}"

    def title(self) -> str:
        """What the table is of."""
        rows, columns = self.recipe.block_size
        return (
            f"JapaneseVowels, GRU({self.recipe.units}), {rows}x{columns} blocks by"
            f" {'GLP' if self.recipe.group_lasso else 'BP'}, {len(self.accuracies('dense'))} seeds of"
            f" {self.recipe.epochs} epochs, scored on the {self.scored_on} set"
        )

    def column(self, file: File) -> dict[str, str]:
        """What the table says of one file and the networks it comes from."""
        scores = [100 * score for score in self.accuracies(file.kind)]
        deviation = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
        sparse = file.kind == "sparse"
        return {
            "": f"{f'{self.recipe.sparsity:.0%} sparse' if sparse else 'dense'}, {file.quantize or 'float32'}",
            "accuracy, %": f"{statistics.mean(scores):.2f}{deviation}",
            "against dense": self.verdict if sparse else "",
            "parameters kept": f"{kbs.sparsity_report(self.model(file.kind)).model.kept_parameters:,}",
            "file, bytes": f"{file.bytes:,}",
            "times as small": f"{file.smaller:.1f}x",
            **{
                f"{way}: {what}": text
                for way, run in file.runs.items()
                for what, text in {
                    "accuracy, %": f"{100 * run.accuracy:.2f}",
                    "latency, ms": f"{run.latency_ms:.3f}",
                    "times as fast": f"{run.speed:.1f}x",
                }.items()
            },
        }

    def cells(self) -> list[list[str]]:
        """The table: a heading, then a line for each thing that was found, with a column for each file."""
        columns = [self.column(file) for file in self.files]
        return [[label, *(column[label] for column in columns)] for label in columns[0]]

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
                "Accuracy is the mean and standard deviation over the seeds, spread the larger of both. The files are"
                f" the first seed's. One of the {self.utterances} utterances is {100 / self.utterances:.2f} points."
                f" Latency is of one utterance, {self.files[0].interpreter}; each file is timed in turns with the dense"
                " float32 file that TensorFlow's converter writes, on LiteRT without our delegate. Times as fast and as"
                " small are over that file.",
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
            "difference_in_points": self.difference,
            "spread_in_points": self.spread,
            "verdict": self.verdict,
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
            write_json(folder / "results.json", facts),
        ]


def export(runs: list[Run], scored: Utterances, folder: Path) -> list[File]:
    """Export the first network of each kind, in float32 and int8, and score the files themselves."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for kind in KINDS:
        model = next(run.model for run in runs if run.kind == kind)
        for quantize in (None, "int8"):
            path = folder / f"{kind}_{quantize or 'float32'}.tflite"
            report = kbs.export_tflite(model, path, target="fast", quantize=quantize, runtimes=[RUNTIME])
            files.append(
                File(
                    kind,
                    quantize,
                    report.bytes,
                    report.ratio,
                    {
                        way: Execution(score(path, scored, interpreter), report.latency_ms[key], report.speedup[key])
                        for way, (interpreter, key) in WAYS.items()
                    },
                    f"{RUNTIME} {report.runtimes[RUNTIME]}, 1 thread, {report.cpu}",
                )
            )
    return files


def score(path: Path, scored: Utterances, interpreter_of: Callable[..., Any]) -> float:
    """The accuracy of a .tflite file, one utterance at a time."""
    with quiet():
        interpreter = interpreter_of(model_path=str(path), num_threads=1)
        interpreter.allocate_tensors()
    entry, result = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]
    right = 0
    for x, y in zip(scored.x, scored.y, strict=True):
        interpreter.set_tensor(entry, x[None])
        interpreter.invoke()
        right += int(interpreter.get_tensor(result)[0].argmax() == y)
    return right / len(scored)


def draw(runs: list[Run], files: list[File], folder: Path) -> list[Path]:
    """Write masks.png, the blocks that are left; sparsity.html, the same with numbers; training.png; and files.png."""
    sparse = next(run for run in runs if run.kind == "sparse")
    masks, page = folder / "masks.png", folder / "sparsity.html"
    kbs.plot_masks(sparse.model, path=masks)
    kbs.sparsity_report(sparse.model).to_html(page)
    return [masks, page, draw_training(runs, folder), draw_files(files, folder)]


def draw_training(runs: list[Run], folder: Path) -> Path:
    """Write training.png: losses and zeros, epoch by epoch."""
    figure = Figure(figsize=(10, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for run in runs:
        look = {"color": "tab:orange" if run.kind == "sparse" else "tab:blue", "alpha": 0.7}
        if run.seed == runs[0].seed:
            look["label"] = run.kind
        epochs = range(1, len(run.losses) + 1)
        left.semilogy(epochs, run.losses, **look)
        right.plot(epochs, [100 * share for share in run.zeros], **look)
    left.set(xlabel="epoch", ylabel="training loss, with the group lasso's")
    right.set(xlabel="epoch", ylabel="zeros in the recurrent kernel, %", ylim=(-3, 103))
    right.legend()
    return save(figure, folder / "training.png")


def draw_files(files: list[File], folder: Path) -> Path:
    """Write files.png: how large each file is, and how long an utterance takes with it."""
    figure = Figure(figsize=(10, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = [file.name for file in files]
    bars = left.barh(names, [file.bytes / 1024 for file in files], color="tab:gray")
    left.bar_label(bars, [f"{file.bytes / 1024:.0f}" for file in files], padding=3)
    left.set(xlabel="file, KiB")
    height = 0.8 / len(WAYS)
    for n, (way, color) in enumerate(zip(WAYS, ("tab:blue", "tab:orange"), strict=True)):
        latencies = [file.runs[way].latency_ms for file in files]
        bars = right.barh([k + n * height for k in range(len(files))], latencies, height, color=color, label=way)
        right.bar_label(bars, [f"{ms:.2f}" for ms in latencies], padding=3)
    right.set(xlabel="latency of one utterance, ms", yticks=[k + height / 2 for k in range(len(files))])
    right.set_yticklabels(names)
    right.legend(loc="lower right")
    for axes in (left, right):
        axes.invert_yaxis()
        axes.margins(x=0.15)
    return save(figure, folder / "files.png")


def save(figure: Figure, path: Path) -> Path:
    """Write a picture."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120)
    return replace(path, png.getvalue())
