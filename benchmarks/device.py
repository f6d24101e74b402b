"""Exported files on the device's runtime: our delegate against stock dense and stock sparse files, and other runtimes.

python -m benchmarks.device                    # prints, and writes docs/benchmarks/device.md and its picture
python -m benchmarks.device --quick            # a smoke run of small layers that writes nothing
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import _peers  # first: it sets thread counts, which libraries read as they load
from benchmarks._report import Bar, Table, bars_table, console, machine, page, time_text, write
from benchmarks._timing import Limits, Work, in_turns
from benchmarks.layers import BLOCK, SPARSITY, Setting, outputs, pruned_layer

# isort: split
import numpy as np

import keras_blocksparse as kbs
from keras_blocksparse.blocks import BlockGrid
from keras_blocksparse.lite import convert, validation
from keras_blocksparse.lite.flatbuffer import Flatbuffer
from keras_blocksparse.lite.twin import make_dense
from keras_blocksparse.sparse import BlockSparseMatrix, get_isa

STEPS = 32
DENSE, HOISTED, DENSE_INT8 = "dense float32", "dense float32, projection hoisted", "dense int8"
SPARSE, SPARSE_INT8 = "stock 1x4-sparse float32", "stock 1x16-sparse int8"
STOCK_DELEGATED, STOCK_INT8_DELEGATED = "ours on the stock float32 file", "ours on the stock int8 file"
OURS, OURS_BFLOAT16, OURS_INT8 = "ours, float32", "ours, bfloat16", "ours, int8"
FALLBACK = "our float32 file without the delegate"
OURS_DTYPES = {OURS: None, OURS_BFLOAT16: "bfloat16", OURS_INT8: "int8"}
TOLERANCE = {"float32": 2e-5, "bfloat16": 0.02, "int8": 0.1}

#: How many times faster: float32 than stock dense and stock sparse float32, int8 than stock sparse int8.
BARS = {1024: (30, 6, 3), 512: (15, 5, 3)}
SIZE_BARS = {OURS: 8, OURS_INT8: 25}
BIDIRECTIONAL_BAR, STEP_BAR, OVERHEAD_BAR = 8, 1.3, 15e-6
BIDIRECTIONAL_UNITS, BIDIRECTIONAL_STEPS, DENSE_UNITS = 256, 100, 32
STREAM_UNITS, SMALLEST_UNITS = 512, 16


@dataclasses.dataclass
class Case:
    """A model's files, and the times of everybody who runs it."""

    name: str
    files: dict[str, Path]
    seconds: dict[str, float]
    inputs: dict[str, np.ndarray]
    bound: float | None = None  #: seconds that the machine's own limits allow, in float32

    def ratio(self, slow: str, fast: str) -> float:
        """How many times faster."""
        return self.seconds[slow] / self.seconds[fast]

    def detail(self, slow: str, fast: str) -> str:
        """Both times, and the ratio that the machine allows."""
        text = f"{fast} {time_text(self.seconds[fast])}, {slow} {time_text(self.seconds[slow])}"
        if self.bound and fast == OURS:
            text += f"; at the machine's bound it would be {self.seconds[slow] / self.bound:.3g}x"
        return text


class Runner:
    """A file in an interpreter with its inputs set."""

    def __init__(self, path: Path, inputs: dict[str, np.ndarray], delegate: bool) -> None:
        from ai_edge_litert.interpreter import Interpreter

        delegates = [kbs.lite.load_delegate(1)] if delegate else None
        self.interpreter = Interpreter(str(path), num_threads=1, experimental_delegates=delegates)
        self.interpreter.allocate_tensors()
        signature = self.interpreter.get_signature_list()["serving_default"]
        details = self.interpreter.get_signature_runner().get_input_details()
        self.indices = {name: details[name]["index"] for name in signature["inputs"]}
        outputs = self.interpreter.get_signature_runner().get_output_details()
        self.outputs = {name: outputs[name]["index"] for name in signature["outputs"]}
        for name, value in inputs.items():
            self.interpreter.set_tensor(self.indices[name], value)
        self.invoke: Work = self.interpreter.invoke

    def __call__(self) -> np.ndarray:
        """The first output."""
        self.invoke()
        return self.interpreter.get_tensor(next(iter(self.outputs.values())))

    def whole_call(self, inputs: dict[str, np.ndarray]) -> Work:
        """What a program does for a frame: inputs in, invoke, outputs out."""
        put, get, pairs = self.interpreter.set_tensor, self.interpreter.get_tensor, list(self.indices.items())

        def call() -> None:
            for name, index in pairs:
                put(index, inputs[name])
            self.invoke()
            for index in self.outputs.values():
                get(index)

        return call


def export(model: Any, folder: Path, target: str, quantize: str | None, **options: Any) -> tuple[Path, Any]:
    """Writes a file; what it computes is checked before it is timed."""
    path = folder / f"{target}-{quantize}-{len(list(folder.iterdir()))}.tflite"
    report = kbs.export_tflite(model, path, target, quantize, validate=False, measure_latency=False, **options)
    return path, report


def dense_file(model: Any, folder: Path, quantize: str | None) -> Path:
    """What TensorFlow's converter writes of the Keras model."""
    traced = convert.trace(model, convert.input_specs(model, 1, None, False), False)
    file = Flatbuffer(convert.to_tflite(traced, quantize))
    file.set_signature([s.name for s in traced.inputs], traced.output_names)
    path = folder / f"converter-{quantize}.tflite"
    path.write_bytes(file.tobytes())
    return path


def measure(
    name: str,
    model: Any,
    x: np.ndarray,
    expected: np.ndarray,
    folder: Path,
    rounds: int,
    peers: dict[str, Callable[[], Work]],
    limits: dict[str, Work] | None = None,
) -> Case:
    """All files of a model, and peers, in turns."""
    folder = Path(tempfile.mkdtemp(dir=folder))
    files = {DENSE: dense_file(model, folder, None), DENSE_INT8: dense_file(model, folder, "int8")}
    files[SPARSE], report = export(model, folder, "stock", None)
    files[SPARSE_INT8], _ = export(model, folder, "stock", "int8")
    file = Flatbuffer.read(files[SPARSE])
    make_dense(file)
    files[HOISTED] = folder / "hoisted.tflite"
    files[HOISTED].write_bytes(file.tobytes())
    files[STOCK_DELEGATED], files[STOCK_INT8_DELEGATED] = files[SPARSE], files[SPARSE_INT8]
    for label, quantize in OURS_DTYPES.items():
        files[label], _ = export(model, folder, "fast", quantize)
    files[FALLBACK] = files[OURS]

    (input_name,) = report.inputs
    works: dict[str, Work] = {}
    for label, path in files.items():
        runner = Runner(path, {input_name: x}, delegate=label.startswith("ours"))
        dtype = next((d for d in ("int8", "bfloat16") if d in label), "float32")
        _peers.check(f"{label}, {name}", runner(), expected, TOLERANCE[dtype])
        works[label] = runner.invoke
    for label, prepare in peers.items():
        try:
            work = prepare()
            _peers.check(label, work(), expected)
            works[label] = work
        except Exception as error:
            _peers.left_out(f"{label}, {name}", error)
    works.update(limits or {})
    return Case(name, files, in_turns(works, rounds, name), {input_name: x})


def gru(units: int, folder: Path, rounds: int, peers: list[_peers.Peer]) -> Case:
    """A GRU over as many features as it has units."""
    layer = pruned_layer(Setting("gru", units, 1, STEPS))
    x = np.random.default_rng(1).uniform(-1, 1, (1, STEPS, units)).astype(np.float32)
    others = {f"{peer.name}, dense": lambda peer=peer: peer.prepare(layer, x) for peer in peers}
    limits, recurrent = Limits(), BlockSparseMatrix.from_dense(layer.recurrent, BLOCK, layer.gates)
    works = {"multiply-add": limits.multiply_add(), "read": limits.read(recurrent.nbytes, STEPS)}
    case = measure(
        f"GRU {units}, T {STEPS}", layer.keras_model(STEPS), x, outputs(layer, x), folder, rounds, others, works
    )
    # The least time: multiply-adds of the projection, then for each step those or a read of the recurrent weights.
    products = 2 * recurrent.density * recurrent.shape[0] * recurrent.shape[1] * STEPS
    multiply = products / Limits.FLOPS * case.seconds.pop("multiply-add")
    return dataclasses.replace(case, bound=multiply + max(multiply, case.seconds.pop("read")))


def bidirectional(units: int, steps: int, folder: Path, rounds: int) -> Case:
    """Two bidirectional GRUs and a Dense layer."""
    import keras
    from keras import layers

    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((steps, units)),
            layers.Bidirectional(layers.GRU(units, return_sequences=True)),
            layers.Bidirectional(layers.GRU(units, return_sequences=True)),
            layers.Dense(DENSE_UNITS),
        ]
    )
    prune(model)
    x = np.random.default_rng(1).uniform(-1, 1, (1, steps, units)).astype(np.float32)
    name = f"2 x bidirectional GRU {units}, Dense {DENSE_UNITS}, T {steps}"
    return measure(name, model, x, np.asarray(model(x)), folder, rounds, {})


def prune(model: Any) -> None:
    """Sets random blocks of each kernel to zero, as many as `SPARSITY` says; no bias is zero."""
    rng = np.random.default_rng(7)
    for weight in model.weights:
        if "bias" in weight.path:
            weight.assign(rng.uniform(-0.5, 0.5, weight.shape))
            continue
        gates = 3 if "gru" in weight.path else 1
        grid = BlockGrid(tuple(weight.shape), BLOCK, gates)
        keep = rng.permutation(int(np.prod(grid.grid_shape))).reshape(grid.grid_shape)
        weight.assign(np.asarray(weight) * grid.expand(keep >= SPARSITY * keep.size))


# ---- streaming ------------------------------------------------------------------------------------------------------


def streaming(units: int, case: Case, folder: Path, rounds: int) -> dict[str, float]:
    """Seconds of one call that takes a frame and the state and gives both, and of the least such call there is."""
    folder = Path(tempfile.mkdtemp(dir=folder))
    works: dict[str, Work] = {}
    for size in (units, SMALLEST_UNITS):
        layer = pruned_layer(Setting("gru", size, 1, STEPS))
        model = layer.keras_model(STEPS)
        x = np.random.default_rng(1).uniform(-1, 1, (1, STEPS, size)).astype(np.float32)
        for label, quantize in OURS_DTYPES.items():
            path, report = export(model, folder, "fast", quantize, streaming=True)
            ((out_name, in_name),) = report.states.items()
            (frame_name,) = set(report.inputs) - {in_name}
            inputs = {frame_name: x[:, :1], in_name: np.zeros((1, size), np.float32)}
            runner = Runner(path, inputs, delegate=True)
            check_stream(runner, x, outputs(layer, x), frame_name, in_name, out_name, quantize or "float32")
            works[f"{label}, {size}"] = runner.invoke
            works[f"{label}, {size}, whole call"] = runner.whole_call(inputs)
            if size == units:
                (sequence_input,) = case.inputs
                sequence = Runner(case.files[label], {sequence_input: x}, delegate=True)
                works[f"{label}, {size}, sequence"] = sequence.invoke
    return in_turns(works, rounds, "streaming")


def check_stream(
    runner: Runner, x: np.ndarray, expected: np.ndarray, frame: str, state: str, new_state: str, dtype: str
) -> None:
    """Frame after frame is the whole sequence."""
    (y_name,) = set(runner.outputs) - {new_state}
    h, steps = np.zeros((1, expected.shape[-1]), np.float32), []
    for step in range(x.shape[1]):
        runner.interpreter.set_tensor(runner.indices[frame], x[:, step : step + 1])
        runner.interpreter.set_tensor(runner.indices[state], h)
        runner.invoke()
        h = runner.interpreter.get_tensor(runner.outputs[new_state])
        steps.append(runner.interpreter.get_tensor(runner.outputs[y_name]).reshape(1, -1))
    _peers.check("streaming", np.stack(steps, 1), expected, TOLERANCE[dtype])


# ---- memory ---------------------------------------------------------------------------------------------------------


def memory(case: Case, folder: Path) -> dict[str, tuple[int, int]]:
    """Most bytes of a process that does nothing but run a file, and of the same before it loads the file."""
    cases = validation.Cases({f"case0/step0/{name}": value for name, value in case.inputs.items()}, [1], {})
    found = {}
    for label in (DENSE, DENSE_INT8, SPARSE, SPARSE_INT8, OURS, OURS_BFLOAT16, OURS_INT8):
        result = validation.run(
            "ai_edge_litert", {label: case.files[label]}, [label] if label.startswith("ours") else [], cases, {},
            checked=[], timed=[label], workdir=folder, timeout=300, repeats=5,
        )  # fmt: skip
        if result.peak_bytes and result.idle_bytes:
            found[label] = result.peak_bytes, result.idle_bytes
    return found


# ---- bars and tables ------------------------------------------------------------------------------------------------


def bars(
    cases: dict[int, Case], both: Case, stream: dict[str, float], units: int, used: dict[str, tuple[int, int]]
) -> list[Bar]:
    """Those of the project that are about the device."""
    rows = []
    for size, (dense, sparse, sparse_int8) in zip(cases, BARS.values(), strict=True):
        case = cases[size]
        for bound, slow, fast in ((dense, DENSE, OURS), (sparse, SPARSE, OURS), (sparse_int8, SPARSE_INT8, OURS_INT8)):
            rows.append(
                Bar(f"{case.name}, {fast}", "{} " + slow, bound, case.ratio(slow, fast), case.detail(slow, fast))
            )
    label = f"{OURS}, {units}"
    least = stream[f"{OURS}, {SMALLEST_UNITS}"]
    step, sequence = stream[label], stream[f"{label}, sequence"] / STEPS
    rows.append(
        Bar(f"streaming step, GRU {units}, beyond the overhead", "{} a step of the sequence", STEP_BAR,
            (step - least) / sequence, f"call {time_text(step)}, of it overhead {time_text(least)}; "
            f"step of the sequence {time_text(sequence)}", at_most=True)
    )  # fmt: skip
    whole = stream[f"{OURS}, {SMALLEST_UNITS}, whole call"]
    rows.append(
        Bar("call overhead from Python", "{}", 1e6 * OVERHEAD_BAR, 1e6 * whole,
            f"a step of GRU {SMALLEST_UNITS}: set_tensor of frame and state, invoke, get_tensor of both; "
            f"invoke alone {time_text(least)}", at_most=True, unit="us")
    )  # fmt: skip
    rows.append(
        Bar(f"{both.name}, {OURS}", "{} " + DENSE, BIDIRECTIONAL_BAR, both.ratio(DENSE, OURS), both.detail(DENSE, OURS))
    )
    largest = next(iter(cases.values()))
    sizes = {name: path.stat().st_size for name, path in largest.files.items()}
    for name, bound in SIZE_BARS.items():
        text = f"{sizes[name] / 1e6:.3f} MB, dense float32 {sizes[DENSE] / 1e6:.3f} MB"
        rows.append(
            Bar(
                f"file of {largest.name}, {name}",
                "{} smaller than dense float32",
                bound,
                sizes[DENSE] / sizes[name],
                text,
            )
        )
    for name, stock in ((OURS, SPARSE), (OURS_INT8, SPARSE_INT8)):
        text = f"{sizes[name]:,} and {sizes[stock]:,} bytes"
        rows.append(
            Bar(
                f"file of {largest.name}, {name}",
                "{} the stock sparse file",
                1.1,
                sizes[name] / sizes[stock],
                text,
                at_most=True,
            )
        )
    for name in OURS_DTYPES if used else ():
        ours, dense = used[name][0], used[DENSE][0]
        text = f"{ours / 1e6:.1f} MB and {dense / 1e6:.1f} MB"
        work = f"peak memory of a process, {largest.name}, {name}"
        rows.append(Bar(work, "{} that of the dense file", 1, ours / dense, text, at_most=True))
    return rows


def times_table(cases: list[Case]) -> Table:
    """Everybody's time of a call."""
    names = list(dict.fromkeys(name for case in cases for name in case.seconds))
    note = (
        "In brackets: how many times faster than the dense float32 file that TensorFlow's converter writes. "
        "*Projection hoisted* is the same with the input projection of all steps as one product, as our stock files "
        "have it. *Ours* is the delegate; *on the stock file* it takes the fully connected operators, one at a time. "
        "The machine's bound: multiply-adds of the input projection in registers, then for each step the longer of its "
        "multiply-adds and a read of a buffer as large as the packed recurrent weights, measured in the same turns."
    )
    table = Table("One call", ("", *(case.name for case in cases)), note=note)
    for name in names:
        cells = [
            f"{time_text(s)} ({case.seconds[DENSE] / s:.3g}x)" if (s := case.seconds.get(name)) else "-"
            for case in cases
        ]
        table.rows.append((name, *cells))
    return table


def streaming_table(stream: dict[str, float], units: int) -> Table:
    """Calls with one frame."""
    columns = ("", "invoke", "with set_tensor and get_tensor", "step of the sequence", "least invoke")
    table = Table(f"Streaming, GRU {units}, one frame a call, state in and out", columns)
    for label in OURS_DTYPES:
        key = f"{label}, {units}"
        table.rows.append(
            (
                label,
                time_text(stream[key]),
                time_text(stream[f"{key}, whole call"]),
                time_text(stream[f"{key}, sequence"] / STEPS),
                time_text(stream[f"{label}, {SMALLEST_UNITS}"]),
            )
        )
    return table


def sizes_table(case: Case, used: dict[str, tuple[int, int]]) -> Table:
    """Bytes of files and processes."""
    table = Table(
        f"Bytes, {case.name}",
        ("", "file", "smaller", "peak memory", "of it after the runtime was loaded"),
        note="Memory is that of a Python process which loads numpy, LiteRT and the file, and calls it.",
    )
    dense = case.files[DENSE].stat().st_size
    for label in (DENSE, DENSE_INT8, SPARSE, SPARSE_INT8, OURS, OURS_BFLOAT16, OURS_INT8):
        size = case.files[label].stat().st_size
        peak, idle = used.get(label, (0, 0))
        text = (f"{peak / 1e6:.1f} MB", f"{(peak - idle) / 1e6:.1f} MB") if peak else ("-", "-")
        table.rows.append((label, f"{size / 1e6:.3f} MB", f"{dense / size:.1f}x", *text))
    return table


def main() -> None:
    """Measures, prints, and writes the page."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.device", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small layers, few rounds, nothing written by default")
    parser.add_argument("--rounds", type=int, help="turns of each piece of work (default: 25, or 3 with --quick)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where to write (default: docs/benchmarks)")
    options = parser.parse_args()
    rounds = options.rounds or (3 if options.quick else 25)
    output = options.output or (None if options.quick else Path("docs/benchmarks"))
    shrink = 4 if options.quick else 1

    peers = [peer for peer in _peers.installed(_peers.RNN) if peer.package != "keras"]
    packages = {"numpy", "tensorflow", "keras", "ai-edge-litert"} | {peer.package for peer in peers}
    facts = machine(get_isa(), packages)
    with tempfile.TemporaryDirectory(prefix="kbs-device-") as name:
        folder = Path(name)
        cases = {units: gru(units // shrink, folder, rounds, peers) for units in BARS}
        both = bidirectional(BIDIRECTIONAL_UNITS // shrink, BIDIRECTIONAL_STEPS // shrink, folder, rounds)
        units = STREAM_UNITS // shrink
        stream = streaming(units, cases[STREAM_UNITS], folder, rounds)
        used = memory(cases[max(cases)], folder)
        lead = (
            f"Files of `export_tflite` on LiteRT, batch 1, one thread; {SPARSITY:.0%} of each kernel zero in random "
            f"{BLOCK[0]}x{BLOCK[1]} blocks. Every file of a model, and every other library, takes turns in one "
            f"process; medians over {rounds} turns of up to 20 calls each."
        )
        title = "Bars, if they were for models of a quarter of the size" if options.quick else "Bars"
        tables = [
            bars_table(bars(cases, both, stream, units, used), title),
            times_table([*cases.values(), both]),
            streaming_table(stream, units),
            sizes_table(cases[max(cases)], used),
        ]
    console.print(f"{facts}\n{lead}\n")
    for table in tables:
        table.show()
    if output:
        from benchmarks._pictures import Bars, layer_pictures

        groups = [
            Bars(case.name, {name: 1e3 * s for name, s in case.seconds.items()}) for case in (*cases.values(), both)
        ]
        text = "One call of a file, on one thread. Shorter is better; the scale is logarithmic."
        pictures = layer_pictures(groups, output, "device.svg", text)
        write(output / "device.md", page("On the device", "python -m benchmarks.device", lead, facts, tables, pictures))


if __name__ == "__main__":
    main()
