"""Whether a model and a loss can be trained privately, tried on three random examples."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from dpfl.clients.keras_door.losses import LossOf
from dpfl.clients.per_example import check_model
from dpfl.errors import InputError

_EXAMPLES = 3


def check_training(model: tf.keras.Model, loss_of: LossOf, x_specs: Any, y_specs: Any) -> tuple[tf.Tensor, tf.Tensor]:
    """Refuses what cannot be private; builds the model if need be.

    Args:
        model: a Keras model.
        loss_of: from outputs and labels to each example's loss.
        x_specs: a nest of `tf.TensorSpec` of a minibatch.
        y_specs: the specification of its labels.

    Returns:
        The model's outputs for the random examples, and random labels.

    Raises:
        InputError: the model cannot be applied to such examples, has several outputs, weights that are not float32 or
            none, or mixes examples in its layers or its loss.
    """
    if tf.nest.is_nested(y_specs):
        raise InputError("labels must be one array: a model with several outputs cannot be trained privately here.")
    if any(type(layer).__name__ == "PruneLowMagnitude" for layer in model.submodules):
        raise InputError(
            "layers are wrapped by tensorflow_model_optimization's prune_low_magnitude, which changes weights as it "
            "computes: give DPModel the model without it, and fit dpfl.PruningCallback, which prunes by the same masks."
        )
    draws = np.random.default_rng(0)
    x = tf.nest.map_structure(lambda spec: _random(draws, spec), x_specs)
    y = _random(draws, y_specs)
    try:
        outputs = model(x, training=False)
    except Exception as error:
        raise InputError(f"the model cannot be applied to examples like these: {_first_line(error)}") from error
    if tf.nest.is_nested(outputs):
        raise InputError("the model must have one output, but it has several: train one model for each.")
    if not model.trainable_weights:
        raise InputError("the model has no trainable weights: give it a layer that trains.")
    other = [weight for weight in model.trainable_weights if weight.dtype != tf.float32]
    if other or outputs.dtype != tf.float32:
        kind = (other[0].dtype if other else outputs.dtype).name
        raise InputError(f"the model must be float32 throughout, but it has {kind}: build it without mixed precision.")
    check_model(model, x)
    _check_loss(loss_of, outputs, y)
    return outputs, y


def _check_loss(loss_of: LossOf, outputs: tf.Tensor, y: tf.Tensor) -> None:
    try:
        together = loss_of(outputs, y)
        if together.shape == (_EXAMPLES,):
            rows = [slice(row, row + 1) for row in range(_EXAMPLES)]
            apart = tf.concat([loss_of(outputs[row], y[row]) for row in rows], axis=0)
    except Exception as error:
        raise InputError(
            f"the loss cannot be applied to outputs of shape {('batch', *outputs.shape[1:])} and labels of shape "
            f"{('batch', *y.shape[1:])}: {_first_line(error)}"
        ) from error
    if together.shape != (_EXAMPLES,):
        raise InputError(
            "the loss must give a value for each example, but it gave "
            f"one of shape {tuple(together.shape)} for {_EXAMPLES} examples: return the losses without reducing them."
        )
    if not np.allclose(together, apart, rtol=1e-3, atol=1e-6, equal_nan=True):
        raise InputError(
            "the loss of an example depends on the other examples of the minibatch: give a loss that treats each "
            "example on its own."
        )


def _random(draws: np.random.Generator, spec: tf.TensorSpec) -> tf.Tensor:
    """Random examples; integers are 0 or 1, which every embedding and every classifier knows."""
    shape = (_EXAMPLES, *spec.shape[1:])
    if spec.dtype.is_floating:
        return tf.constant(draws.uniform(size=shape), spec.dtype)
    return tf.constant(draws.integers(2, size=shape), spec.dtype)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"{lines[0].rstrip('.')}."
