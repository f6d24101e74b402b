"""What the trained networks are worth: files on the stock interpreter, a table, a verdict, and pictures."""

import dataclasses
import io
import statistics
from dataclasses import dataclass
from pathlib import Path

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


@dataclass(frozen=True)
class File:
    """One exported file of the first seed's networks; latency is of one utterance, on one thread.

    `smaller` and `speed` compare with the same network's dense float32 file, timed in turns with this one.
    """

    kind: str
    quantize: str | None
    accuracy: float
    bytes: int
    smaller: float
    latency_ms: float
    speed: float
    interpreter: str


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
            "the file's accuracy, %": f"{100 * file.accuracy:.2f}",
            "parameters kept": f"{kbs.sparsity_report(self.model(file.kind)).model.kept_parameters:,}",
            "file, bytes": f"{file.bytes:,}",
            "smaller than dense float32": f"{file.smaller:.1f}x",
            "latency, ms": f"{file.latency_ms:.3f}",
            "speed over dense float32": f"{file.speed:.1f}x",
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


def draw(runs: list[Run], folder: Path) -> list[Path]:
    """Write masks.png, the blocks that are left; sparsity.html, the same with numbers; and training.png."""
    sparse = next(run for run in runs if run.kind == "sparse")
    masks, page = folder / "masks.png", folder / "sparsity.html"
    kbs.plot_masks(sparse.model, path=masks)
    kbs.sparsity_report(sparse.model).to_html(page)

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
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120)
    return [masks, page, replace(folder / "training.png", png.getvalue())]
