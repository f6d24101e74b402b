"""Networks that learn from a trained one beside their own targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import keras
from keras import ops


@dataclass(frozen=True)
class Teacher:
    """Trained networks to learn from, whose probabilities count by their mean (Hinton, Vinyals, Dean 2015, section 3).

    Of what it was trained on a network is too sure, and says little beyond the targets. With its dropout on it doubts
    again where it knows things by heart only (dropout distillation: Bulò, Porzi, Kontschieder 2016).

    Attributes:
        models: each maps inputs to logits.
        passes: through each network with dropout, over whose probabilities the mean is taken; 0: one without dropout.
    """

    models: tuple[keras.Model, ...]
    passes: int = 0

    def __call__(self, x: Any) -> Any:
        """Logits for a batch; of several networks, and with dropout, logarithms of probabilities."""
        if len(self.models) == 1 and not self.passes:
            return self.models[0](x, training=False)
        said = [
            ops.softmax(model(x, training=bool(self.passes))) for model in self.models for _ in range(self.passes or 1)
        ]
        return ops.log(sum(said) / len(said) + keras.config.epsilon())


class Student(keras.Model):
    """A functional model whose loss is also how far it is from a teacher (Hinton, Vinyals, Dean 2015, section 2).

    Its targets are then `(targets, the teacher's logits)`, and its loss is
    `(1 - share) * loss + share * KL(teacher || student)`, outputs being logits, at temperature 1. Where all of the
    teacher's logits are 0, as in padding, nothing is learned from it.

    Attributes:
        share: of the teacher in the loss, from 0 to 1; `None` if there is no teacher.
        sums: whether the loss is a sum over an example's time steps, as CTC's is, or a mean.
    """

    share: float | None = None
    sums = False

    def compute_loss(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None, training: bool = True) -> Any:
        """Keras calls this."""
        if self.share is None:
            return super().compute_loss(x, y, y_pred, sample_weight, training)
        y, meant = y
        loss = super().compute_loss(x, y, y_pred, sample_weight, training)
        said = ops.any(meant != 0, axis=-1)
        meant = ops.log_softmax(ops.cast(meant, y_pred.dtype))
        divergence = ops.sum(ops.exp(meant) * (meant - ops.log_softmax(y_pred)), axis=-1)
        divergence = divergence * ops.cast(said, divergence.dtype)
        if self.sums:
            divergence = ops.sum(divergence, axis=-1)
        return (1 - self.share) * loss + self.share * ops.mean(divergence)

    def plain(self) -> keras.Model:
        """The same network without a teacher, whose file loads anywhere."""
        return keras.Model(self.inputs, self.outputs, name=self.name)
