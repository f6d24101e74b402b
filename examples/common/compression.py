"""How a network is made sparse: the paper's algorithms and ours, as plain settings with a place on the command line."""

from __future__ import annotations

import argparse
import dataclasses
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from examples.common.arguments import densities, positive, share

if TYPE_CHECKING:
    import keras


@dataclass(frozen=True)
class Compression:
    """Settings of one way to make a network sparse. Steps are given as shares of the whole training.

    Attributes:
        schedule: "threshold", the paper's ramp of a threshold; "ramp", a polynomial ramp of the sparsity; "cut", the
            smallest blocks are cut when the training is over.
        sparsity: share of zeros to reach; for "threshold", the share of weights below q in the dense network.
        block_size: inputs and outputs of a block.
        begin: where pruning begins.
        end: where it ends.
        power: exponent of the polynomial ramp.
        updates: how many times masks are updated between begin and end.
        group_lasso: lambda while the schedule runs; 0 for none.
        q_from: for "threshold": a `.keras` file, a trained dense network, of whose recurrent weights `sparsity` are
            smaller than the paper's q.
        q_scale: factor of q, to tune the sparsity that "threshold" reaches.
        score: see `kbs.prune_low_magnitude_block`.
        distribution: see there.
        max_sparsity: no gate gets sparser, for "global" and "per_layer_type".
        gate_density: relative densities of gates.
        keep_diagonal: see there.
        revival: see there.
        neighborhood: see there.
    """

    schedule: str = "ramp"
    sparsity: float = 0.9
    block_size: tuple[int, int] = (16, 16)
    begin: float = 0.01
    end: float = 0.2
    power: float = 3.0
    updates: int = 100
    group_lasso: float = 0.0
    q_from: str | None = None
    q_scale: float = 1.0
    score: str = "l2"
    distribution: str = "uniform"
    max_sparsity: float = 0.99
    gate_density: dict[str, float] | None = None
    keep_diagonal: bool = False
    revival: bool = True
    neighborhood: tuple[int, int] | None = None

    def prune(self, model: keras.Model, filters: str, epochs: int, steps_per_epoch: int) -> None:
        """Puts the pruning on a built model; `UpdatePruningStep` then drives it.

        Args:
            model: built model.
            filters: regex of the layers to prune.
            epochs: of the whole training.
            steps_per_epoch: updates in an epoch.
        """
        import keras_blocksparse as kbs

        with warnings.catch_warnings():
            # The first layer of a network may have fewer inputs than a block; it stays dense and is meant to.
            warnings.filterwarnings("ignore", message=".* is not pruned. The block is larger")
            kbs.prune_low_magnitude_block(
                model,
                self._schedule(epochs, steps_per_epoch),
                block_size=self.block_size,
                score=self.score,  # type: ignore[arg-type]
                distribution=self._distribution(),
                group_lasso=self.group_lasso or None,
                filters=filters,
                keep_diagonal=self.keep_diagonal,
                revival=self.revival,
                neighborhood=self.neighborhood,
            )

    def _schedule(self, epochs: int, steps_per_epoch: int) -> Any:
        import keras_blocksparse as kbs

        steps = epochs * steps_per_epoch
        begin, end = int(self.begin * steps), int(self.end * steps)
        frequency = max(1, (end - begin) // self.updates)
        if self.schedule == "ramp":
            return kbs.PolynomialDecay(
                final_sparsity=self.sparsity, power=self.power, begin_step=begin, end_step=end, frequency=frequency
            )
        if self.schedule == "cut":
            return None
        ramp = kbs.ThresholdRamp.from_epochs(
            self._read_q() * self.q_scale, epochs=epochs, steps_per_epoch=steps_per_epoch
        )
        return dataclasses.replace(ramp, frequency=max(1, (ramp.end_step - ramp.begin_step) // self.updates))

    def _read_q(self) -> float:
        import keras

        import keras_blocksparse as kbs

        if self.q_from is None:
            raise SystemExit(
                "A threshold is read off a dense network that was trained before: give it with --q-from FILE.keras"
            )
        dense = keras.saving.load_model(self.q_from, compile=False)
        q = kbs.ThresholdRamp.from_dense(dense, sparsity=self.sparsity, filters="gru|lstm|rnn", end_step=1).q
        assert isinstance(q, dict)
        return q["recurrent"]

    def _distribution(self) -> Any:
        import keras_blocksparse as kbs

        if self.distribution in ("global", "per_layer_type"):
            return kbs.Global(
                max_sparsity=self.max_sparsity,
                by_kind=self.distribution == "per_layer_type",
                gate_density=self.gate_density,
            )
        return {"uniform": kbs.Uniform, "erk": kbs.ERK}[self.distribution](gate_density=self.gate_density)


#: What `--algorithm` chooses from. Alone, the group lasso wants about three times the strength (the paper).
ALGORITHMS = {
    "dense": None,
    "bp": Compression(schedule="threshold", score="max"),
    "glp": Compression(schedule="threshold", score="max", group_lasso=3e-5),
    "gl": Compression(schedule="cut", score="max", group_lasso=1e-4),
    "ours": Compression(),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options by which a program is told how to make its network sparse."""
    add = parser.add_argument_group(
        "sparsity", "What is not given is as the algorithm has it. Shares are of the whole training."
    ).add_argument
    add(
        "--algorithm", choices=ALGORITHMS, default="ours",
        help="bp, glp, gl: block pruning, group lasso with pruning and group lasso alone, as in the paper"
        " (default: %(default)s)",
    )  # fmt: skip
    add("--sparsity", type=share, help="share of zeros in the recurrent layers")
    add("--block-size", type=positive, nargs=2, metavar=("ROWS", "COLS"), help="inputs and outputs of a block")
    add("--group-lasso", type=float, metavar="LAMBDA", help="strength of the group lasso; 0 for none")
    add("--begin", type=share, help="share after which pruning begins")
    add("--end", type=share, help="share at which it ends")
    add("--power", type=float, help="exponent of the ramp of the sparsity")
    add("--updates", type=positive, help="updates of the masks from begin to end")
    add("--q-from", metavar="FILE", help="trained dense .keras file that the threshold of bp and glp is read from")
    add("--q-scale", type=float, help="factor of that threshold, to tune the sparsity that is reached")
    add("--score", choices=("max", "mean", "l2"), help="what makes a block matter")
    add(
        "--neighborhood", type=positive, nargs=2, metavar=("ROWS", "COLS"),
        help="larger blocks whose score counts as much as the block's own",
    )  # fmt: skip
    add("--distribution", choices=("uniform", "erk", "global", "per_layer_type"), help="how sparsity is spread")
    add("--max-sparsity", type=share, help="bound for each gate, for global and per_layer_type")
    add("--gate-density", type=densities, metavar="GATE=NUMBER,...", help="relative densities, as z=1,r=1,h=4")
    add("--keep-diagonal", action=argparse.BooleanOptionalAction, help="keep the recurrent kernels' diagonals")
    add("--revival", action=argparse.BooleanOptionalAction, help="whether pruned blocks can come back")


def from_arguments(args: argparse.Namespace) -> Compression | None:
    """What the command line asks for; `None` for a dense network."""
    base = ALGORITHMS[args.algorithm]
    if base is None:
        return None
    given = {
        field.name: value
        for field in dataclasses.fields(Compression)
        if (value := getattr(args, field.name, None)) is not None
    }
    for pair in ("block_size", "neighborhood"):
        if pair in given:
            given[pair] = tuple(given[pair])
    compression = dataclasses.replace(base, **given)
    sides = compression.neighborhood or compression.block_size
    if any(side % block for side, block in zip(sides, compression.block_size, strict=True)):
        raise SystemExit(
            f"--neighborhood must be multiples of --block-size. Received: {sides} and {compression.block_size}"
        )
    if not compression.begin < compression.end:
        raise SystemExit(f"--begin must be less than --end. Received: {compression.begin} and {compression.end}")
    if compression.schedule == "cut" and not compression.group_lasso > 0:
        raise SystemExit(f"Group lasso alone needs --group-lasso above 0. Received: {compression.group_lasso}")
    if compression.q_from is not None and not Path(compression.q_from).is_file():
        raise SystemExit(f"--q-from: there is no file {compression.q_from}")
    return compression
