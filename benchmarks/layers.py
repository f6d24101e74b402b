"""Whole recurrent layers and training steps against other libraries, all in turns in one process.

python -m benchmarks.layers                    # prints, and writes docs/benchmarks/layers.md and its picture
python -m benchmarks.layers --quick            # a smoke run of small layers that writes nothing
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
from pathlib import Path

from benchmarks import _peers  # first: it sets thread counts, which libraries read as they load
from benchmarks._peers import RNNWeights
from benchmarks._report import Bar, Table, bars_table, console, machine, page, time_text, write
from benchmarks._timing import Limits, Work, in_turns

# isort: split
import numpy as np

import keras_blocksparse as kbs
from keras_blocksparse.blocks import BlockGrid
from keras_blocksparse.sparse import BlockSparseMatrix, _native, get_isa, set_num_threads

BLOCK, SPARSITY = (16, 16), 0.9
LIBRARY, LAYER = "ours, libkbs", "ours, Keras layer"
NOTHING = "a tf.function that does next to nothing"
TOLERANCE = {"float32": 1e-3, "int8": 0.1}
SUFFIX = {"float32": "", "int8": ", int8"}
SHARED_STEP = 100e-6  # a step with less work than this need not be shared between threads


@dataclasses.dataclass(frozen=True)
class Setting:
    """A layer over as many inputs as it has units, and the bars it has to hold."""

    cell: str
    units: int
    batch: int
    steps: int = 50
    best_dense: float = 0.0  #: how many times faster than the best dense peer
    keras: float = 0.0  #: how many times faster than the Keras layer

    @property
    def name(self) -> str:
        """As in the bars."""
        kind = {"gru": "GRU", "simple_rnn": "SimpleRNN"}[self.cell]
        return f"{kind} {self.units}, T {self.steps}, batch {self.batch}"


SETTINGS = (
    Setting("gru", 2560, 1, best_dense=25, keras=50),
    Setting("gru", 2560, 8, best_dense=20, keras=40),
    Setting("simple_rnn", 1760, 1, best_dense=20),
    Setting("simple_rnn", 1760, 8),
)
TRAINING = Setting("gru", 2560, 32, steps=20)


def pruned_layer(setting: Setting) -> RNNWeights:
    """Weights whose blocks are zero at random, small enough that the state neither explodes nor saturates."""
    rng, units, gates = np.random.default_rng(7), setting.units, 3 if setting.cell == "gru" else 1
    grid = BlockGrid((units, gates * units), BLOCK, gates)

    def matrix() -> np.ndarray:
        keep = rng.permutation(int(np.prod(grid.grid_shape))).reshape(grid.grid_shape)
        dense = rng.standard_normal(grid.shape) * 0.5 / np.sqrt((1 - SPARSITY) * units)
        return (dense * grid.expand(keep >= SPARSITY * keep.size)).astype(np.float32)

    bias = 0.1 * rng.standard_normal((2, gates * units) if gates == 3 else units)
    return RNNWeights(setting.cell, matrix(), matrix(), bias.astype(np.float32))


def outputs(layer: RNNWeights, x: np.ndarray) -> np.ndarray:
    """What everybody has to compute, in plain numpy."""

    def sigmoid(a: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-a))

    h, steps = np.zeros((len(x), layer.units), np.float32), []
    inner = layer.bias if layer.cell == "simple_rnn" else layer.bias[0]
    for projected in (x @ layer.kernel + inner).swapaxes(0, 1):
        if layer.cell == "simple_rnn":
            h = np.tanh(projected + h @ layer.recurrent)
        else:
            xz, xr, xh = np.split(projected, 3, axis=1)
            hz, hr, hh = np.split(h @ layer.recurrent + layer.bias[1], 3, axis=1)
            z = sigmoid(xz + hz)
            h = z * h + (1 - z) * np.tanh(xh + sigmoid(xr + hr) * hh)
        steps.append(h)
    return np.stack(steps, 1)


class LibraryRNN:
    """The layer as the library's C interface has it, without TensorFlow."""

    def __init__(self, layer: RNNWeights, x: np.ndarray, dtype: str) -> None:
        self.kernel, self.recurrent = (
            BlockSparseMatrix.from_dense(w, BLOCK, layer.gates, dtype) for w in (layer.kernel, layer.recurrent)
        )
        self.x, self.y = x, np.empty((*x.shape[:2], layer.units), np.float32)
        config = _native.RNNConfig(
            cell=_native.CELLS[layer.cell],
            activation=_native.ACTIVATIONS["tanh"],
            recurrent_activation=_native.ACTIVATIONS["sigmoid"],
            reset_after=1,
            kernel=self.kernel._handle,
            recurrent=self.recurrent._handle,
            bias=layer.bias.ctypes.data_as(_native.FloatPointer),
        )
        self._handle, self._library = ctypes.c_void_p(), _native.library()
        _native.call("kbs_rnn_create", ctypes.byref(config), ctypes.byref(self._handle))
        self._call = _native.RNNCall(
            batch=x.shape[0],
            steps=x.shape[1],
            x=x.ctypes.data_as(_native.FloatPointer),
            return_sequences=1,
            y=self.y.ctypes.data_as(_native.FloatPointer),
        )

    def __call__(self) -> np.ndarray:
        """All outputs."""
        self._library.kbs_rnn_run(self._handle, ctypes.byref(self._call))
        return self.y

    def __del__(self) -> None:
        if self._handle:
            self._library.kbs_rnn_destroy(self._handle)


def keras_layer(layer: RNNWeights, x: np.ndarray, dtype: str) -> Work:
    """What a user runs: the converted model in a tf.function."""
    model = layer.keras_model(x.shape[1])
    return _peers.compiled(kbs.to_block_sparse(model, block_size=BLOCK, dtype=dtype, verbose=False), x)


def on_threads(work: Work, threads: int) -> Work:
    """The same on some threads of ours; setting their number costs nothing to speak of."""

    def call() -> object:
        set_num_threads(threads)
        try:
            return work()
        finally:
            set_num_threads(1)

    return call


@dataclasses.dataclass
class Result:
    """Times of one setting by who, and of ours on two threads."""

    setting: Setting
    seconds: dict[str, float]
    dense: list[str]
    recurrent_bytes: int
    useful_flops: tuple[float, float]  #: of the input projection, and of all steps

    @property
    def times(self) -> dict[str, float]:
        """Without those of the machine itself."""
        return {name: seconds for name, seconds in self.seconds.items() if name not in ("multiply-add", "read")}

    @property
    def ours(self) -> str:
        """The Keras layer, or the library's call where this version has no such layer."""
        return LAYER if LAYER in self.seconds else LIBRARY

    @property
    def best(self) -> tuple[str, float] | None:
        """The quickest dense peer."""
        found = [(self.seconds[name], name) for name in self.dense]
        return (min(found)[1], min(found)[0]) if found else None

    @property
    def bound(self) -> float:
        """The least time: multiply-adds of the projection, then for each step those or a read of the weights."""
        projection, steps = (flops / (Limits.FLOPS / self.seconds["multiply-add"]) for flops in self.useful_flops)
        return projection + max(steps, self.seconds["read"])


def measure(setting: Setting, rounds: int, limits: Limits, peers: list[_peers.Peer]) -> Result:
    """One layer, everybody in turns."""
    layer = pruned_layer(setting)
    x = np.random.default_rng(1).uniform(-1, 1, (setting.batch, setting.steps, setting.units)).astype(np.float32)
    expected, works = outputs(layer, x), dict[str, Work]()

    def add(name: str, make: object, *arguments: object, tolerance: float = 1e-3) -> None:
        try:
            work = make(layer, x, *arguments)  # type: ignore[operator]
            _peers.check(name, work(), expected, tolerance)
        except Exception as error:
            _peers.left_out(f"{name}, {setting.name}", error)
        else:
            works[name] = work

    library = LibraryRNN(layer, x, "float32")
    for dtype, tolerance in TOLERANCE.items():
        add(LIBRARY + SUFFIX[dtype], LibraryRNN, dtype, tolerance=tolerance)
        if hasattr(kbs, "to_block_sparse"):
            add(LAYER + SUFFIX[dtype], keras_layer, dtype, tolerance=tolerance)
    for name in [name for name in (LIBRARY, LAYER) if name in works]:
        works[f"{name}, 2 threads"] = on_threads(works[name], 2)
    works["multiply-add"] = limits.multiply_add()
    works["read"] = limits.read(library.recurrent.nbytes, setting.steps)
    for peer in peers:
        add(peer.name, peer.prepare)
    works[NOTHING] = _peers.compiled(lambda a: a[0, 0] + 1.0, x)
    seconds = in_turns(works, rounds, setting.name)
    flops = 2 * library.recurrent.density * layer.recurrent.size * setting.batch * setting.steps
    dense = [peer.name for peer in peers if peer.name in seconds]
    return Result(setting, seconds, dense, library.recurrent.nbytes, (flops, flops))


# ---- training -------------------------------------------------------------------------------------------------------


def training(setting: Setting, rounds: int) -> dict[str, float] | None:
    """Seconds of a training step (forward, backward, Adam) of the dense and of the converted model."""
    if not hasattr(kbs, "to_block_sparse"):
        print("left out: training steps, since this version has no to_block_sparse")
        return None
    tf, layer = _peers.tensorflow(), pruned_layer(setting)
    rng, shape = np.random.default_rng(1), (setting.batch, setting.steps, setting.units)
    x, y = (tf.constant(rng.uniform(-1, 1, shape).astype(np.float32)) for _ in range(2))

    def step(model: object, jit_compile: bool = False) -> Work:
        model.compile("adam", "mse", jit_compile=jit_compile)  # type: ignore[attr-defined]
        return lambda: model.train_on_batch(x, y)  # type: ignore[attr-defined]

    works, losses = dict[str, Work](), dict[str, float]()

    def add(name: str, work: Work) -> None:
        try:
            losses[name] = float(np.ravel(work())[0])  # before the first update, so that all must agree
        except Exception as error:
            _peers.left_out(f"training step, {name}", error)
        else:
            works[name] = work

    dense = layer.keras_model(setting.steps)
    add("ours", step(kbs.to_block_sparse(dense, block_size=BLOCK, verbose=False)))
    add("Keras", step(dense))
    add("Keras, XLA", step(layer.keras_model(setting.steps), jit_compile=True))
    if not np.allclose(list(losses.values()), next(iter(losses.values())), rtol=1e-3):
        raise ValueError(f"the models compute different losses: {losses}")
    return in_turns(works, rounds, f"training step, {setting.name}")


# ---- two threads ----------------------------------------------------------------------------------------------------


def two_thread_limits(rounds: int, limits: Limits, nbytes: int) -> tuple[float, float]:
    """How much faster the machine itself is on two threads: at reading a buffer of `nbytes`, at multiply-adds."""
    # Some 30 ms: two threads that wake up on the same core are only moved apart after a while.
    times, count = max(2, int(3e9) // nbytes), 16_000_000
    works = {
        "read": limits.read(nbytes, times),
        "read by two": limits.by_two(limits.read(nbytes // 2, times), limits.read(nbytes // 2, times)),
        "add": limits.multiply_add(count),
        "add by two": limits.by_two(limits.multiply_add(count // 2), limits.multiply_add(count // 2)),
    }
    seconds = in_turns(works, rounds, "two threads")
    return seconds["read"] / seconds["read by two"], seconds["add"] / seconds["add by two"]


# ---- bars and tables ------------------------------------------------------------------------------------------------


def bars(results: list[Result], scaling: dict[str, tuple[float, float]], steps: dict[str, float] | None) -> list[Bar]:
    """Those of the project that are about layers."""
    rows = []
    for result in results:
        setting, mine = result.setting, result.seconds[result.ours]
        keras = ("Keras", result.seconds["Keras"]) if "Keras" in result.seconds else None
        for text, bound, peer in (("the best dense", setting.best_dense, result.best), ("Keras", setting.keras, keras)):
            for dtype in TOLERANCE if bound and peer else ():
                name = result.ours + SUFFIX[dtype]
                ratio = peer[1] / result.seconds[name]
                detail = f"{name} {time_text(result.seconds[name])}, {peer[0]} {time_text(peer[1])}"
                if dtype == "float32":
                    detail += f"; at the machine's bound it would be {peer[1] / result.bound:.3g}x"
                rows.append(Bar(setting.name + SUFFIX[dtype], "{} " + text, bound, ratio, detail))
        if mine / setting.steps >= SHARED_STEP:
            two = result.seconds[f"{result.ours}, 2 threads"]
            read, add = scaling[setting.name]
            text = f"1: {time_text(mine)}, 2: {time_text(two)}; the machine: read {read:.2f}x, multiply-add {add:.2f}x"
            rows.append(Bar(setting.name, "2 threads {}", 1.7, mine / two, text))
    work = f"training step, {TRAINING.name}"
    if steps is None or not {"ours", "Keras"} <= set(steps):
        return [*rows, Bar(work, "{} the dense Keras step", 3, None)]
    text = f"ours {time_text(steps['ours'])}, Keras {time_text(steps['Keras'])}"
    return [*rows, Bar(work, "{} the dense Keras step", 3, steps["Keras"] / steps["ours"], text)]


def layers_table(results: list[Result]) -> Table:
    """Everybody's time of a whole layer."""
    names = list(dict.fromkeys(name for result in results for name in result.times))
    table = Table(
        f"Whole layers, {BLOCK[0]}x{BLOCK[1]} blocks, {SPARSITY:.0%} zero",
        ("", *(result.setting.name for result in results)),
        note="In brackets: how many times longer than ours, the Keras layer in float32 if this version has it, else "
        "the library's call. The machine's bound: multiply-adds of the input projection at the FMA peak, then for each "
        "step the longer of its multiply-adds and a read of a buffer as large as the recurrent weights.",
    )
    for name in names:
        cells = [
            f"{time_text(s)} ({s / result.seconds[result.ours]:.3g}x)" if (s := result.seconds.get(name)) else "-"
            for result in results
        ]
        table.rows.append((name, *cells))
    bounds = [f"{time_text(result.bound)} ({result.bound / result.seconds[result.ours]:.2f}x)" for result in results]
    table.rows.append(("the machine's bound", *bounds))
    return table


def training_table(steps: dict[str, float], setting: Setting) -> Table:
    """Training steps."""
    table = Table(f"Training step, {setting.name}", ("", "step", "slower than ours"),
                  note="`train_on_batch`: forward, backward and Adam, mean square error.")  # fmt: skip
    table.rows += [
        (name, time_text(s), f"{s / steps['ours']:.2f}x" if "ours" in steps else "-") for name, s in steps.items()
    ]
    return table


def main() -> None:
    """Measures, prints, and writes the page."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.layers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small layers, few rounds, nothing written by default")
    parser.add_argument("--rounds", type=int, help="turns of each piece of work (default: 15, or 3 with --quick)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where to write (default: docs/benchmarks)")
    options = parser.parse_args()
    rounds = options.rounds or (3 if options.quick else 15)
    output = options.output or (None if options.quick else Path("docs/benchmarks"))
    settings, trained = list(SETTINGS), TRAINING
    if options.quick:
        settings = [dataclasses.replace(setting, units=setting.units // 4, steps=10) for setting in settings]
        trained = dataclasses.replace(TRAINING, units=TRAINING.units // 4, steps=5)

    set_num_threads(1)
    limits, peers = Limits(), _peers.installed(_peers.RNN)
    facts = machine(get_isa(), _peers.versions(peers))
    results = [measure(setting, rounds, limits, peers) for setting in settings]
    scaling = {r.setting.name: two_thread_limits(rounds, limits, r.recurrent_bytes) for r in results}
    steps = training(trained, rounds)

    lead = (
        f"Layers over as many inputs as they have units, all outputs returned; {SPARSITY:.0%} of kernel and recurrent "
        f"kernel zero in random {BLOCK[0]}x{BLOCK[1]} blocks. One thread where not said otherwise; medians over "
        f"{rounds} turns of up to 20 calls each."
    )
    title = "Bars, if they were for layers of a quarter of the size" if options.quick else "Bars"
    tables = [bars_table(bars(results, scaling, steps), title), layers_table(results)]
    if steps:
        tables.append(training_table(steps, trained))
    console.print(f"{facts}\n{lead}\n")
    for table in tables:
        table.show()
    if output:
        from benchmarks._pictures import Bars, layer_pictures

        groups = [
            Bars(result.setting.name, {name: 1e3 * s for name, s in result.times.items() if name != NOTHING})
            for result in results
        ]
        command = "python -m benchmarks.layers" + " --quick" * options.quick
        text = (
            "A whole layer, one call, on one thread where not said otherwise. Shorter is better; the scale is "
            "logarithmic."
        )
        pictures = layer_pictures(groups, output, "layers.svg", text)
        write(output / "layers.md", page("Layers", command, lead, facts, tables, pictures))


if __name__ == "__main__":
    main()
