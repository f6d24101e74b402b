"""The network, and how both kinds of it are trained: the same data, epochs, order and learning rates."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import keras
import numpy as np

import keras_blocksparse as kbs
from examples.japanese_vowels.data import Utterances

SPEAKERS = 9
CEPSTRA = 12
BATCH = 16
KINDS = ("dense", "sparse")


@dataclass(frozen=True)
class Recipe:
    """What the command line can change. `begin` and `end` are shares of all steps."""

    epochs: int
    units: int
    learning_rate: float
    block_size: tuple[int, int]
    sparsity: float
    group_lasso: float
    begin: float
    end: float


@dataclass(frozen=True)
class Run:
    """One trained network, and its loss and share of zeros in the recurrent kernel after every epoch."""

    kind: str
    seed: int
    model: keras.Model
    accuracy: float
    losses: list[float]
    zeros: list[float]


class EachEpoch(keras.callbacks.Callback):
    """Notes loss and zeros, and tells the progress bar."""

    def __init__(self, show: Callable[[float, float], None]) -> None:
        super().__init__()
        self.show = show
        self.losses: list[float] = []
        self.zeros: list[float] = []

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Keras calls this."""
        self.losses.append((logs or {})["loss"])
        self.zeros.append(zeros(self.model))
        self.show(self.losses[-1], self.zeros[-1])


def zeros(model: keras.Model) -> float:
    """The share of zeros in the recurrent kernel, counted plainly, for the dense network too."""
    return float(np.mean(np.asarray(model.get_layer("gru").cell.recurrent_kernel) == 0))


def build(units: int, frames: int) -> keras.Model:
    """The network of both kinds."""
    return keras.Sequential(
        [
            keras.Input((frames, CEPSTRA)),
            keras.layers.Masking(),
            keras.layers.GRU(units, name="gru"),
            keras.layers.Dense(SPEAKERS, name="speaker"),
        ]
    )


def prune(model: keras.Model, steps: int, recipe: Recipe) -> None:
    """Make `model` lose its blocks while it trains: group lasso and pruning together (GLP)."""
    with warnings.catch_warnings():
        # 12 cepstra are fewer rows than a block has: the input kernel stays dense, and is meant to.
        warnings.filterwarnings("ignore", message=".*kernel is not pruned. The block is larger")
        kbs.prune_low_magnitude_block(
            model,
            pruning_schedule=kbs.PolynomialDecay(
                initial_sparsity=0.0,
                final_sparsity=recipe.sparsity,
                begin_step=int(recipe.begin * steps),
                end_step=int(recipe.end * steps),
                frequency=max(1, steps // 100),
            ),
            block_size=recipe.block_size,
            group_lasso=recipe.group_lasso or None,
            filters="gru",
        )


def train(
    kind: str,
    seed: int,
    train_set: Utterances,
    scored: Utterances,
    recipe: Recipe,
    show: Callable[[float, float], None] = lambda loss, zeros: None,
) -> Run:
    """Train one network from nothing, strip it, and score it once."""
    keras.utils.set_random_seed(seed)
    model = build(recipe.units, train_set.x.shape[1])
    steps = recipe.epochs * -(-len(train_set) // BATCH)
    course = EachEpoch(show)
    callbacks: list[keras.callbacks.Callback] = [course]
    if kind == "sparse":
        prune(model, steps, recipe)
        callbacks.insert(0, kbs.UpdatePruningStep())
    model.compile(
        optimizer=keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(recipe.learning_rate, steps)),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    model.fit(train_set.x, train_set.y, batch_size=BATCH, epochs=recipe.epochs, verbose=0, callbacks=callbacks)
    if kind == "sparse":
        model = kbs.strip_pruning(model)
    guesses = np.asarray(model(scored.x)).argmax(axis=1)
    accuracy = float(np.mean(guesses == scored.y))
    return Run(kind, seed, model, accuracy, course.losses, course.zeros)
