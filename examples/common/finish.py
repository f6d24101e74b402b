"""What a training program says and writes when its network is trained: score, sizes, files for devices, pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from examples.common.files import write_json

if TYPE_CHECKING:
    import keras


def set_threads(threads: int | None) -> None:
    """Before anything is computed: lets TensorFlow use so many threads. One each is best for trainings side by side."""
    if threads is not None:
        import tensorflow as tf

        import keras_blocksparse as kbs

        kbs.set_num_threads(threads)
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(threads)


def report(
    model: keras.Model, result: dict[str, Any], output: Path, console: Console, *, export: bool, timesteps: int
) -> None:
    """Says what came out, and writes masks.png and, if asked, model.tflite and model_fast.tflite with export.json.

    Args:
        model: trained and stripped.
        result: what `result.json` holds.
        output: folder to write to.
        console: where to say it.
        export: whether to write .tflite files.
        timesteps: of an inference that is timed.
    """
    import keras_blocksparse as kbs

    kept, parameters = result["kept_parameters"], result["parameters"]
    scores = ", ".join(f"{score:.4f} on {split}" for split, score in result["scores"].items())
    console.print(
        f"{result['unit'].capitalize()}: {scores}. {parameters:,} parameters,"
        f" {kept:,} of them kept; recurrent layers {result['sparsity']:.1%} zero."
        f" Trained in {result['course']['seconds']:.0f} s.",
        soft_wrap=True,
    )
    written = [output / "result.json", output / "model.keras"]
    if result["settings"]["compression"] is not None:
        kbs.plot_masks(model, path=output / "masks.png")
        written.append(output / "masks.png")
    if export:
        reports = {}
        for target, file in (("stock", "model.tflite"), ("fast", "model_fast.tflite")):
            with console.status(f"Exporting for {target}, and running the file"):
                reports[target] = kbs.export_tflite(model, output / file, target=target, timesteps=timesteps)
            faster = ", ".join(f"{speed:.1f}x faster on {name}" for name, speed in reports[target].speedup.items())
            console.print(
                f"{file}: {reports[target].ratio:.1f}x smaller than dense float32, {faster} ({timesteps}"
                " steps, 1 thread)",
                soft_wrap=True,
            )
            written.append(output / file)
        written.append(
            write_json(output / "export.json", {target: report.to_dict() for target, report in reports.items()})
        )
    console.print("Written: " + ", ".join(map(str, written)), soft_wrap=True)
