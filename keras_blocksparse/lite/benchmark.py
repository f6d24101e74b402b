"""How fast a TFLite file is and what memory it takes: with our delegate, without, and against its dense twin."""

import math
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from keras_blocksparse._text import bytes_text, text_table
from keras_blocksparse.lite import validation
from keras_blocksparse.lite.flatbuffer import Flatbuffer, text_of
from keras_blocksparse.lite.fuse import CUSTOM_CODE
from keras_blocksparse.lite.twin import make_dense

DENSE, STOCK, DELEGATE = "dense float32", "without delegate", "with delegate"
_MEMORY_CALLS = 3


@dataclass(frozen=True)
class BenchmarkRow:
    """One variant at one number of threads.

    Attributes:
        variant: `"dense float32"`, the same graph with every zero in its place; `"without delegate"`, the file as the
            runtime's own kernels run it; `"with delegate"`.
        num_threads: of the runtime and of the delegate.
        bytes: size of the file.
        calls: how many were timed.
        p50_ms: median milliseconds of a call.
        p90_ms: 90th percentile.
        p99_ms: 99th percentile.
        min_ms: quickest call.
        speedup: median of the dense twin over this one; None without a twin.
        peak_bytes: most memory of a process that does nothing but run this; None where the system does not tell.
        model_bytes: what of that came after the runtime was loaded: the file, the weights as kernels hold them, and
            activations.
        max_difference: largest absolute difference of its outputs from those of the dense twin, or else of the first
            variant.
    """

    variant: str
    num_threads: int
    bytes: int
    calls: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    min_ms: float
    speedup: float | None
    peak_bytes: int | None
    model_bytes: int | None
    max_difference: float


@dataclass(frozen=True)
class BenchmarkReport:
    """Result of `benchmark`. `str(report)` is a table, `report.to_dict()` goes into JSON.

    Attributes:
        path: the file.
        runtime: what it ran on, with its version.
        cpu: model name of the processor.
        rows: one for each variant and number of threads.
        notes: which variants there are not, and why.
    """

    path: str
    runtime: str
    cpu: str
    rows: tuple[BenchmarkRow, ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The fields, in types JSON knows."""
        return {**asdict(self), "rows": [asdict(row) for row in self.rows], "notes": list(self.notes)}

    def __str__(self) -> str:
        lines = [("variant", "threads", "median ms", "p90", "p99", "faster", "file", "peak memory", "of it the model")]
        for row in self.rows:
            lines.append((
                row.variant,
                str(row.num_threads),
                f"{row.p50_ms:.3f}",
                f"{row.p90_ms:.3f}",
                f"{row.p99_ms:.3f}",
                "-" if row.speedup is None else f"{row.speedup:.1f}x",
                bytes_text(row.bytes),
                "-" if row.peak_bytes is None else bytes_text(row.peak_bytes),
                "-" if row.model_bytes is None else bytes_text(row.model_bytes),
            ))  # fmt: skip
        calls = ", ".join(sorted({str(row.calls) for row in self.rows}))
        worst = max(row.max_difference for row in self.rows)
        text = [
            f"{self.path} on {self.runtime}, {self.cpu}; {calls} calls each, in turns",
            "",
            *text_table(lines, 1),
            "",
        ]
        if len({row.variant for row in self.rows}) > 1:
            text.append(f"Outputs differ by at most {worst:.1e} from those of {self.rows[0].variant}.")
        return "\n".join([*text, *self.notes]).rstrip()


def benchmark(
    path: str | Path,
    *,
    num_threads: int | list[int] = 1,
    runs: int = 200,
    seconds: float = 5.0,
    runtime: str | None = None,
    seed: int = 0,
    timeout: float = 300.0,
    progress: Callable[[str], None] = lambda text: None,
) -> BenchmarkReport:
    """Times a TFLite file with our delegate, without it, and against its dense float32 twin.

    The twin is made from the file: its graph with dense float32 weights. All variants run in one process of its own,
    in short turns, so that all of them see the same machine; memory is that of one more process for each.

    Args:
        path: a `.tflite` file, ours or anybody's.
        num_threads: threads, or several numbers of them.
        runs: timed calls of each variant.
        seconds: time for the calls of all variants, at each number of threads, after which there are fewer.
        runtime: `"ai_edge_litert"`, `"tf.lite"` or `"tflite_runtime"`; None for the first of these that is installed
            and knows the file's operators.
        seed: seed of the random inputs.
        timeout: seconds a process may take.
        progress: is told what happens.

    Returns:
        A `BenchmarkReport`.

    Raises:
        ValueError: no TFLite file, a broken one, or an argument out of range.
        ImportError: no runtime is installed that can load the file.
        ExportError: the runtime cannot run the file.
    """
    threads = [num_threads] if isinstance(num_threads, int) else list(num_threads)
    for name, values in (("num_threads", threads), ("runs", [runs])):
        if not values or not all(isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in values):
            raise ValueError(f"{name} must be positive. Received: {name}={num_threads if values is threads else runs}")
    for name, value in (("seconds", seconds), ("timeout", timeout)):
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be positive. Received: {name}={value}")
    file = Flatbuffer.read(path)
    custom = CUSTOM_CODE in file.custom_ops()
    composites = next(file.operators("STABLEHLO_COMPOSITE"), None) is not None
    found = validation.installed_runtimes([runtime] if runtime else None, composites)
    runtime = "ai_edge_litert" if "ai_edge_litert" in found else found[0]

    _name_ends(file)
    cases = _inputs(file, seed)
    notes = []
    with tempfile.TemporaryDirectory(prefix="kbs-benchmark-") as folder:
        workdir = Path(folder)
        whole, dense = workdir / "model.tflite", workdir / "dense.tflite"
        whole.write_bytes(file.tobytes())
        files = {STOCK: whole, DELEGATE: whole}
        if custom:
            notes.append("compat='custom': nothing but the delegate runs it, and there is no dense twin in it")
            del files[STOCK]
        else:
            progress("making the dense twin")
            make_dense(file)
            dense.write_bytes(file.tobytes())
            files = {DENSE: dense, **files}
        rows: list[BenchmarkRow] = []
        for count in threads:
            common: dict[str, Any] = {"workdir": workdir, "timeout": timeout, "num_threads": count}
            memory = {}
            for name in files:
                progress(f"memory, {name}, threads: {count}")
                delegated = [name] if name == DELEGATE else []
                memory[name] = validation.run(
                    runtime, {name: files[name]}, delegated, cases, {}, checked=[], timed=[name],
                    repeats=_MEMORY_CALLS, **common,
                )  # fmt: skip
            progress(f"times, threads: {count}")
            result = validation.run(
                runtime, files, [DELEGATE], cases, {}, checked=list(files), timed=list(files), repeats=runs,
                seconds=seconds, **common,
            )  # fmt: skip
            rows += [_row(name, files, count, result, memory[name], Path(path)) for name in files]
    return BenchmarkReport(
        path=str(path),
        runtime=f"{runtime} {result.version}",
        cpu=validation.cpu_name(),
        rows=tuple(rows),
        notes=tuple(notes),
    )


def _row(
    name: str,
    files: dict[str, Path],
    num_threads: int,
    result: validation.RunResult,
    memory: validation.RunResult,
    path: Path,
) -> BenchmarkRow:
    times = np.asarray(result.times_ms[name])
    p50, p90, p99 = np.percentile(times, (50, 90, 99))
    first = next(iter(files))
    differences = [
        np.abs(value.astype(np.float64) - result.outputs[first + key.removeprefix(name)].astype(np.float64))
        for key, value in result.outputs.items()
        if key.startswith(f"{name}/")
    ]
    peak, idle = memory.peak_bytes, memory.idle_bytes
    return BenchmarkRow(
        variant=name,
        num_threads=num_threads,
        bytes=(files[name] if name == DENSE else path).stat().st_size,
        calls=len(times),
        p50_ms=float(p50),
        p90_ms=float(p90),
        p99_ms=float(p99),
        min_ms=float(times.min()),
        speedup=result.latency_ms(DENSE) / float(p50) if DENSE in files else None,
        peak_bytes=peak,
        model_bytes=None if peak is None or idle is None else peak - idle,
        max_difference=max((float(d.max(initial=0)) for d in differences), default=0.0),
    )


def _name_ends(file: Flatbuffer) -> None:
    """Gives a file that has no signature one; the runtime finds inputs by it."""
    if not file.tree.signatureDefs:
        main = file.tree.subgraphs[0]
        file.set_signature([f"x{i}" for i in range(len(main.inputs))], [f"y{i}" for i in range(len(main.outputs))])


def _inputs(file: Flatbuffer, seed: int) -> validation.Cases:
    """Random inputs of one call: normal floats, and 0 or 1 for whole numbers."""
    rng, main, types = np.random.default_rng(seed), file.tree.subgraphs[0], file.schema.TensorType
    dtypes = {
        types.FLOAT32: np.float32, types.INT32: np.int32, types.INT64: np.int64, types.BOOL: np.bool_,
        types.INT8: np.int8, types.UINT8: np.uint8, types.FLOAT16: np.float16,
    }  # fmt: skip
    arrays = {}
    for entry in file.tree.signatureDefs[0].inputs:
        tensor = main.tensors[entry.tensorIndex]
        name = text_of(entry.name)
        shape = [int(d) for d in tensor.shape] if tensor.shape is not None else []
        if tensor.type not in dtypes:
            raise ValueError(f"Input {name!r} has a dtype that no random input can be made for: {tensor.type}")
        dtype = np.dtype(dtypes[tensor.type])
        values = rng.standard_normal(shape) if dtype.kind == "f" else rng.integers(0, 2, shape)
        arrays[f"case0/step0/{name}"] = np.asarray(values).astype(dtype)
    return validation.Cases(arrays, [1], {})
