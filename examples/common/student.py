"""Networks that learn from a trained one beside their own targets."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops


class Student(keras.Model):
    """A functional model whose loss is also how far it is from a teacher (Hinton, Vinyals, Dean 2015, section 2).

    The loss is `(1 - share) * loss + share * KL(teacher || student)`, outputs being logits, at temperature 1.
    """

    teacher: Any = None
    #: Whether the loss is a sum over an example's time steps, as CTC's is, or a mean.
    sums = False

    def teach(self, teacher: keras.Model, share: float) -> None:
        """Begins to learn from `teacher`, which is not trained.

        Args:
            teacher: model of the same inputs and outputs.
            share: of the teacher in the loss, from 0 to 1.
        """
        if teacher.output_shape != self.output_shape or teacher.input_shape != self.input_shape:
            raise SystemExit(
                f"The teacher is of another task: it maps {teacher.input_shape} to {teacher.output_shape}, expected"
                f" {self.input_shape} to {self.output_shape}."
            )
        teacher.trainable = False
        object.__setattr__(self, "teacher", teacher)  # so that Keras does not take it for a part of the model
        self.share = share

    def compute_loss(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None, training: bool = True) -> Any:
        """Keras calls this."""
        loss = super().compute_loss(x, y, y_pred, sample_weight, training)
        if self.teacher is None:
            return loss
        meant = ops.log_softmax(self.teacher(x, training=False))
        divergence = ops.sum(ops.exp(meant) * (meant - ops.log_softmax(y_pred)), axis=-1)
        if self.sums:
            divergence = ops.sum(divergence, axis=-1)
        return (1 - self.share) * loss + self.share * ops.mean(divergence)

    def plain(self) -> keras.Model:
        """The same network without a teacher, whose file loads anywhere."""
        return keras.Model(self.inputs, self.outputs, name=self.name)
