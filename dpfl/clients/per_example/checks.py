"""Refuses models whose per-example gradients would be wrong: by their layers, and by trying."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
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
    with _unchanged(model), _without_randomness(model):
        _perturb(weights)
        frozen = [(variable, variable.numpy()) for variable in model.non_trainable_variables]
        try:
            alone = [_by_backward_pass(model, weights, x, example) for example in range(3)]
            _check_traces(model, frozen)
            together = _by_book_keeping(model, weights, x)
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"the gradients of single examples of the model {model.name} cannot be computed, as a layer cannot be "
                "run for one example or gets something that has not the examples along its first axis "
                f"({_in_short(error)}): let each layer treat each example on its own."
            ) from error
    largest = max(np.abs(part).max(initial=0.0) for gradients in alone for part in gradients)
    for weight, found, *expected in zip(weights, together, *alone, strict=True):
        is_close = (
            found.shape == (3, *weight.shape)
            and np.abs(found - np.stack(expected)).max(initial=0.0)
            <= _TOLERANCE * np.abs(expected).max(initial=0.0) + _ROUNDING * largest
        )
        if not is_close:
            raise InputError(
                f"the gradients of single examples come out wrong for the weight {weight.name}: the model lets "
                "examples change each other, draws random numbers, calls a layer on something that has not the "
                "examples along its first axis, or uses the weight outside of the layer that holds it; let each layer "
                "use its own weights, and treat each example on its own."
            )


def _check_layer(layer: tf.keras.layers.Layer) -> None:
    # A frozen one takes its kept statistics.
    if isinstance(layer, tf.keras.layers.BatchNormalization) and layer.trainable:
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
    if not hasattr(layer, "_random_generator"):
        return False
    rates = [getattr(layer, name) for name in ("rate", "dropout", "recurrent_dropout") if hasattr(layer, name)]
    return not rates or any(rates)  # Attention, recurrent layers and their cells have a generator they may not use.


def _check_traces(model: tf.keras.Model, frozen: list[tuple[tf.Variable, np.ndarray]]) -> None:
    """Refuses what a call leaves behind: it would be released without noise, or silently not be trained on."""
    for variable, before in frozen:
        if not np.array_equal(variable.numpy(), before, equal_nan=True):
            raise InputError(
                f"the weight {variable.name} is not trained but changes when the model is called in training mode, so "
                "that it would keep what the examples are without noise: leave out what updates it."
            )
    for layer in model._flatten_layers():
        if layer._losses or layer._eager_losses:
            raise InputError(
                f"the layer {layer.name} adds a loss of its own (add_loss) for each minibatch, which cannot be clipped "
                "by example: make it an output of the model and a part of the loss."
            )


@contextlib.contextmanager
def _unchanged(model: tf.keras.Model) -> Iterator[None]:
    """Gives the model back its weights, and forgets the losses of its last call."""
    before = [(variable, variable.numpy()) for variable in model.variables]
    try:
        yield
    finally:
        for variable, value in before:
            variable.assign(value)
        for layer in model._flatten_layers():
            layer._clear_losses()


def _perturb(weights: list[tf.Variable]) -> None:
    """Moves the weights a little away from where they are: a zero would hide everything before it."""
    generator = np.random.default_rng(0)
    for weight in weights:
        value = weight.numpy()
        spread = 0.1 * np.sqrt(np.mean(np.square(value))) if value.any() else 0.1
        weight.assign(value + spread * generator.normal(size=value.shape))


def _in_short(error: Exception) -> str:
    """The line that says what went wrong, without where Keras and AutoGraph were."""
    lines = [line.strip().rstrip(".:") for line in str(error).splitlines() if line.strip()]
    plain = [line for line in lines if "Exception encountered" not in line and not line.startswith("in user code")]
    named = [line for line in plain if re.match(r"\w+Error: ", line)]
    return (named or plain or [type(error).__name__])[0]


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
    def found() -> list[tf.Tensor]:
        return example_gradients(model, weights, lambda outputs, _: _probe(outputs, slice(3)), x, None, tf.ones(3))

    # What Keras' own layers do is the same at once and in a graph; what others do need not be.
    of_keras = all(type(layer).__module__.startswith("keras.") for layer in model._flatten_layers())
    return [part.numpy() for part in (found if of_keras else tf.function(found))()]


def _by_backward_pass(model: tf.keras.Model, weights: list[tf.Variable], x: Any, example: int) -> list[np.ndarray]:
    alone = slice(example, example + 1)
    with tf.GradientTape() as tape:
        outputs = model(tf.nest.map_structure(lambda part: part[alone], x), training=True)
        loss = _probe(outputs, alone)
    found = tape.gradient(loss, weights, unconnected_gradients=tf.UnconnectedGradients.ZERO)
    return [tf.convert_to_tensor(part).numpy() for part in found]
