"""Refuses models whose per-example gradients would be wrong: by their layers, and by trying."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import tensorflow as tf

from dpfl.clients.per_example.capture import owners, rule_for
from dpfl.clients.per_example.gradients import example_gradients
from dpfl.clients.per_example.rules import again_by_example, replaced
from dpfl.errors import InputError

# Relative to the largest gradient of the weight, and of all weights: what is wrong here is wrong by far more.
_TOLERANCE, _ROUNDING = 1e-3, 1e-5


def check_model(model: tf.keras.Model, x: Any) -> None:
    """Refuses a model for which clipping by example would not do what it says.

    Beside looking for layers that are known to mix examples, it compares the gradients of three examples with those of
    each of them alone, by Keras' own backward pass: a layer that uses its weights in a way that is not seen, or that
    lets one example change another's output, is found out.

    Args:
        model: a Keras model with its variables, built; left as it is.
        x: three examples, a nest of tensors with the examples along their first axis. Different ones: examples that are
            alike hide what mixes them.

    Raises:
        InputError: the sentence names what is wrong and what to use instead.
    """
    for layer in model._flatten_layers():
        _check_layer(layer)
    weights = list(model.trainable_variables)
    if not weights:
        raise InputError("the model has no trainable weights, so that nothing can be trained: add a layer that trains.")
    for layer, _ in owners(model, weights):
        _check_randomness(layer)
    try:
        with _without_randomness(model):
            together = _by_book_keeping(model, weights, x)
            alone = [_by_backward_pass(model, weights, x, example) for example in range(3)]
    except Exception as error:
        raise InputError(
            f"the gradients of single examples of the model {model.name} cannot be computed: "
            f"{str(error).strip().splitlines()[0].rstrip('.')}."
        ) from error
    largest = max(np.abs(part).max(initial=0.0) for gradients in alone for part in gradients)
    for weight, found, *expected in zip(weights, together, *alone, strict=True):
        difference = np.abs(found - np.stack(expected)).max(initial=0.0)
        if not difference <= _TOLERANCE * np.abs(expected).max(initial=0.0) + _ROUNDING * largest:
            raise InputError(
                f"the gradients of single examples come out wrong for the weight {weight.name}: the model lets "
                "examples change each other, draws random numbers, or uses the weight outside of the layer that holds "
                "it; let each layer use its own weights, and treat each example on its own."
            )


def _check_layer(layer: tf.keras.layers.Layer) -> None:
    if isinstance(layer, tf.keras.layers.BatchNormalization):
        raise InputError(
            f"the layer {layer.name} (BatchNormalization) mixes the examples of a minibatch, so that no gradient is "
            "one example's own: use GroupNormalization or LayerNormalization instead."
        )
    if getattr(layer, "activity_regularizer", None) is not None:
        raise InputError(
            f"the layer {layer.name} has an activity regularizer, which adds up over a minibatch and cannot be clipped "
            "by example: leave it out, or make it a part of the loss."
        )
    if isinstance(layer, tf.keras.layers.RNN) and layer.stateful:
        raise InputError(
            f"the layer {layer.name} keeps its state from one minibatch to the next, so that examples change each "
            "other's gradients: use stateful=False."
        )
    if layer.compute_dtype not in (None, "float32", "int32", "int64"):
        raise InputError(
            f"the layer {layer.name} computes in {layer.compute_dtype}, but gradients are clipped in float32: "
            "leave its dtype out."
        )


def _check_randomness(layer: tf.keras.layers.Layer) -> None:
    """Refuses random numbers in a layer that is run again, where they would be others."""
    if rule_for(layer) is not again_by_example:
        return
    for part in layer._flatten_layers():
        if _is_random(part):
            raise InputError(
                f"the layer {layer.name} holds weights and draws random numbers ({part.name}), so that its gradients "
                "cannot be computed example by example: use Dropout layers of their own, outside of it."
            )


def _is_random(layer: tf.keras.layers.Layer) -> bool:
    if hasattr(layer, "recurrent_dropout"):  # Recurrent layers and their cells have a generator that they may not use.
        return bool(layer.dropout or layer.recurrent_dropout)
    return hasattr(layer, "_random_generator")


class _NoRandomness:
    """In the place of a layer's generator: nothing is dropped, noise is zero."""

    def dropout(self, inputs: tf.Tensor, *_: Any, **__: Any) -> tf.Tensor:
        return inputs

    def random_normal(self, shape: Any, mean: float = 0.0, *_: Any, **__: Any) -> tf.Tensor:
        return tf.fill(shape, mean)

    random_uniform = truncated_normal = random_normal


def _without_randomness(model: tf.keras.Model) -> contextlib.ExitStack:
    stack = contextlib.ExitStack()
    for layer in model._flatten_layers():
        if hasattr(layer, "_random_generator"):
            stack.enter_context(replaced(layer, _random_generator=_NoRandomness()))
    return stack


def _probe(outputs: Any, rows: slice) -> tf.Tensor:
    """A loss for each example that depends on every output, of each in another way."""
    losses = []
    for number, output in enumerate(tf.nest.flatten(outputs)):
        size = int(np.prod(output.shape[1:]))
        factors = np.random.default_rng(number).normal(size=(3, size)).astype(np.float32)[rows]
        losses.append(tf.reduce_sum(tf.reshape(tf.cast(output, tf.float32), [-1, size]) * factors, axis=1))
    return tf.add_n(losses)


def _by_book_keeping(model: tf.keras.Model, weights: list[tf.Variable], x: Any) -> list[np.ndarray]:
    found = example_gradients(model, weights, lambda outputs, _: _probe(outputs, slice(3)), x, None, tf.ones(3))
    return [part.numpy() for part in found]


def _by_backward_pass(model: tf.keras.Model, weights: list[tf.Variable], x: Any, example: int) -> list[np.ndarray]:
    alone = slice(example, example + 1)
    with tf.GradientTape() as tape:
        outputs = model(tf.nest.map_structure(lambda part: part[alone], x), training=True)
        loss = _probe(outputs, alone)
    found = tape.gradient(loss, weights, unconnected_gradients=tf.UnconnectedGradients.ZERO)
    return [tf.convert_to_tensor(part).numpy() for part in found]
