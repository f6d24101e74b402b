"""The command `kbs`: look into models, export them, and measure what came out, without a line of Python."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras_blocksparse as kbs
from keras_blocksparse.lite.export import COMPAT, QUANTIZE, TARGETS
from keras_blocksparse.lite.validation import RUNTIMES

_EXIT_CODES = """\
exit codes:
  0  done
  1  the work failed: the converter refused the model, or a file did not compute what it should
  2  wrong arguments or input, or something is not installed
"""


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Descriptions as they are written, and every default beside its option."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        arguments: those of the process by default.

    Returns:
        The exit code: 0, 1 if the work failed, 2 for wrong arguments or input, 130 if it was interrupted.
    """
    options = _parser().parse_args(arguments)
    try:
        report = options.run(options)
        text = json.dumps(report.to_dict(), indent=2) if options.json else str(report)
        print(text, flush=True)
    except kbs.ExportError as error:
        return _fail(error, 1)
    except (ValueError, TypeError, ImportError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # whoever read the output has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        return _fail(error, 2)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    return 0


def _fail(error: object, code: int) -> int:
    print(f"kbs: {error}", file=sys.stderr)
    return code


# ---- the commands


def _inspect(options: argparse.Namespace) -> Any:
    block_size = tuple(options.block_size) if options.block_size else None
    report: Any
    if _suffix(options.model) == ".tflite":
        if block_size:
            raise ValueError("--block-size is for Keras models; the blocks of a .tflite file are found from its zeros")
        report = kbs.tflite_report(options.model)
    else:
        report = kbs.sparsity_report(_load(options), block_size)
    if options.html:
        report.to_html(options.html)
        _say(f"wrote {options.html}")
    return report


def _export(options: argparse.Namespace) -> Any:
    model = _load(options)
    with contextlib.redirect_stdout(sys.stderr):  # steps are progress, and so is what the converter prints
        return kbs.export_tflite(
            model,
            options.output,
            options.target,
            options.quantize,
            batch_size=options.batch_size,
            timesteps=options.timesteps,
            streaming=options.streaming,
            compat=options.compat,
            validate=options.validate,
            measure_latency=options.measure_latency,
            tolerance=options.tolerance,
            runtimes=options.runtime,
            seed=options.seed,
            timeout=options.timeout,
            verbose=int(sys.stderr.isatty()),
        )


def _benchmark(options: argparse.Namespace) -> Any:
    if _suffix(options.model) != ".tflite":
        raise ValueError(f"kbs benchmark takes a .tflite file; kbs export writes one. Received: {options.model}")
    return kbs.lite.benchmark(
        options.model,
        num_threads=options.threads,
        runs=options.runs,
        seconds=options.seconds,
        runtime=options.runtime,
        seed=options.seed,
        timeout=options.timeout,
        progress=_say,
    )


# ---- what they share


def _suffix(path: str) -> str:
    suffix = Path(path).suffix.lower()
    if suffix not in (".tflite", ".keras", ".h5"):
        raise ValueError(f"A model is a .keras, .h5 or .tflite file. Received: {path}")
    if not Path(path).is_file():
        raise ValueError(f"There is no file {path}")
    return suffix


def _load(options: argparse.Namespace) -> Any:
    """The Keras model, after the modules that register its classes."""
    if _suffix(options.model) == ".tflite":
        raise ValueError(f"This needs a Keras model, .keras or .h5. Received: {options.model}")
    import keras

    sys.path.insert(0, os.getcwd())
    for module in options.imports or ():
        importlib.import_module(module)
    _say(f"loading {options.model}")
    try:
        return keras.models.load_model(options.model, compile=False)
    except Exception as error:  # Keras raises whatever its readers do
        raise ValueError(
            f"Keras cannot load {options.model}: {error}\nClasses of your own must be registered: "
            "--import MODULE names the module that does so"
        ) from error


def _say(text: str) -> None:
    """Progress goes to the terminal; a pipe gets results alone."""
    if sys.stderr.isatty():
        print(f"kbs: {text}", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kbs",
        formatter_class=_Help,
        description="Block-sparse Keras models: look into them, export them to TFLite, measure what came out.",
        epilog=_EXIT_CODES,
    )
    parser.add_argument("--version", action="version", version=f"keras_blocksparse {kbs.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[..., Any], text: str, example: str) -> argparse.ArgumentParser:
        epilog = f"example:\n  {example}\n\n{_EXIT_CODES}"
        made = commands.add_parser(name, help=text, description=text, epilog=epilog, formatter_class=_Help)
        made.set_defaults(run=run)
        made.add_argument("--json", action="store_true", help="print the result as JSON")
        return made

    inspect = command(
        "inspect",
        _inspect,
        "tell what is left of each weight of a model, and how a file stores it",
        "kbs inspect model.tflite --html model.html",
    )
    inspect.add_argument("model", help=".keras, .h5 or .tflite file")
    inspect.add_argument("--html", metavar="FILE", help="write a page with pictures of the blocks, too")
    inspect.add_argument(
        "--block-size",
        type=int,
        nargs=2,
        metavar=("ROWS", "COLS"),
        help="blocks of a Keras model to count in, instead of those it was pruned in or that explain its zeros",
    )
    _add_imports(inspect)

    export = command(
        "export",
        _export,
        "write a Keras model as a TFLite file in which zero blocks take no bytes, and prove that it computes the same",
        "kbs export model.keras model.tflite --target fast --quantize int8",
    )
    export.add_argument("model", help=".keras or .h5 file")
    export.add_argument("output", help=".tflite file to write")
    export.add_argument(
        "--target", choices=TARGETS, default="stock", help="stock: builtin operators; fast: for the delegate, too"
    )
    export.add_argument("--quantize", choices=[q for q in QUANTIZE if q], help="number format of the weights")
    export.add_argument("--streaming", action="store_true", help="states become inputs and outputs")
    export.add_argument("--batch-size", type=int, default=1, metavar="N", help="static batch")
    export.add_argument("--timesteps", type=int, metavar="N", help="static timesteps, if the model leaves them open")
    export.add_argument("--compat", choices=[c for c in COMPAT if c], help="custom: for runtimes without composites")
    export.add_argument("--no-validate", dest="validate", action="store_false", help="do not compare with Keras")
    export.add_argument("--no-latency", dest="measure_latency", action="store_false", help="do not time the file")
    export.add_argument("--tolerance", type=float, help="largest absolute difference from Keras to accept")
    export.add_argument("--runtime", action="append", choices=RUNTIMES, help="run on this one only; may be repeated")
    _add_imports(export)
    _add_common(export)

    benchmark = command(
        "benchmark",
        _benchmark,
        "time a TFLite file with the delegate, without it, and against its dense float32 twin",
        "kbs benchmark model.tflite --threads 1 2",
    )
    benchmark.add_argument("model", help=".tflite file, ours or anybody's")
    benchmark.add_argument("--threads", type=int, nargs="+", default=[1], metavar="N", help="numbers of threads to try")
    benchmark.add_argument("--runs", type=int, default=200, metavar="N", help="timed calls of each variant")
    benchmark.add_argument(
        "--seconds", type=float, default=5.0, help="time for all calls, after which there are fewer of them"
    )
    benchmark.add_argument("--runtime", choices=RUNTIMES, help="run on this one; by default the newest kind there is")
    _add_common(benchmark)
    return parser


def _add_imports(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        metavar="MODULE",
        help="import this first: it registers the model's own classes; may be repeated",
    )


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs")
    parser.add_argument("--timeout", type=float, default=300.0, metavar="SECONDS", help="for each run on a runtime")
