"""One loss per example from whatever Keras takes as a loss."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from dpfl.errors import InputError

LossOf = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]


class _FunctionLoss(tf.keras.losses.Loss):
    """A loss function as a Keras loss, which converts its Python control flow and applies masks."""

    def __init__(self, function: Callable[[Any, Any], tf.Tensor]) -> None:
        super().__init__(name=getattr(function, "__name__", "loss").strip("<>"))
        self._function = function

    def call(self, y_true: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
        """The function's value."""
        return self._function(y_true, y_pred)


def per_example_loss(loss: Any) -> LossOf:
    """Returns the function from a model's outputs and labels to each example's loss, (batch,), float32.

    A reduction over the batch is left out. Where the loss has a value for each position of an example, such as
    a time step, an example's loss is their mean; masked positions count as 0.

    Args:
        loss: a Keras loss, its name, or a function of labels and outputs.

    Raises:
        InputError: it is none of these.
    """
    if loss is None or tf.nest.is_nested(loss):
        raise InputError("loss must be one Keras loss, its name or a function: losses per output have no private form.")
    try:
        found = tf.keras.losses.get(loss)
    except (ValueError, TypeError):
        raise InputError(f"there is no Keras loss {loss!r}: give the name of one, a Loss or a function.") from None
    single = copy.copy(found) if isinstance(found, tf.keras.losses.Loss) else _FunctionLoss(found)
    single.reduction = tf.keras.losses.Reduction.NONE

    def losses_of(outputs: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        outputs, y = _same_rank(outputs, y)
        losses = tf.cast(single(y, outputs), tf.float32)
        if losses.shape.rank is not None and losses.shape.rank > 1:
            losses = tf.reduce_mean(losses, axis=list(range(1, losses.shape.rank)))
        return losses

    return losses_of


def _same_rank(outputs: tf.Tensor, y: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """As Keras does, labels (batch,) beside outputs (batch, k) are (batch, 1), and outputs likewise.

    Without, their difference would have shape (batch, batch), and mix the examples.
    """
    if y.shape.rank == 1 and outputs.shape.rank == 2:
        y = tf.expand_dims(y, -1)
    elif y.shape.rank == 2 and outputs.shape.rank == 1:
        outputs = tf.expand_dims(outputs, -1)
    return outputs, y
