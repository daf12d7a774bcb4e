"""Clipped sums of per-example gradients by book-keeping: one backward pass, to the layers' products only.

The norms of all examples' gradients come from what went into each layer and from the loss's gradients with respect to
what came out of its weights; the clipped sum is then one weighted product a layer (Bu et al. 2023, "Differentially
private optimization on large model at small cost", 2210.00038, algorithm 1). No second backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import tensorflow as tf

from dpfl.clients.per_example.capture import Capture
from dpfl.clients.per_example.contributions import Contribution, combined
from dpfl.errors import InputError

Clipping = Literal["flat", "per_layer", "automatic"]

_STABILITY = 0.01  # gamma of AUTO-S


class ClippedGradients(NamedTuple):
    """The outcome for one minibatch. All but `penalties` is private.

    Attributes:
        sums: for each weight, in its shape, the sum over examples of the clipped gradients; their joint L2
            sensitivity to adding or removing one example is the clip norm.
        norms: L2 norm of each example's gradient before clipping, (batch,); not finite where the gradient was not,
            which then counts as zero.
        losses: each example's loss, unweighted, (batch,).
        outputs: the model's outputs, (batch, ...).
        penalties: for each weight the gradient of its regularisation, or None where it has none; they depend on no
            data.
    """

    sums: list[tf.Tensor]
    norms: tf.Tensor
    losses: tf.Tensor
    outputs: Any
    penalties: list[tf.Tensor | None]


def clipped_gradients(
    model_of: Callable[[tf.Tensor], tf.keras.Model],
    weights: Sequence[tf.Tensor | tf.Variable],
    losses_of: Callable[[Any, Any], tf.Tensor],
    x: Any,
    y: Any,
    example_weights: tf.Tensor,
    *,
    clip_norm: tf.Tensor | float,
    clipping: Clipping = "flat",
    microbatch_size: int | None = None,
) -> ClippedGradients:
    """Clips each example's gradient and sums the clipped gradients.

    The model is called in training mode. The guarantee needs a model that treats each example on its own, which
    `check_model` tests.

    Args:
        model_of: from the index of a microbatch, int32 scalar, to the Keras model whose layers hold the weights. It may
            be the same model each time, or one whose random layers follow a seed of the microbatch's own.
        weights: the trainable weights, the very objects that the model's layers hold: variables, or tensors in their
            place.
        losses_of: from the model's outputs and `y` to each example's loss, (batch,).
        x: the examples, a nest of tensors with the examples along their first axis; at least one.
        y: the labels, likewise.
        example_weights: multiply each example's loss before its gradient is clipped, (batch,), float32; 0 leaves an
            example out.
        clip_norm: the largest L2 norm of an example's clipped gradient, all weights together.
        clipping: "flat" scales a gradient down to the clip norm (Abadi et al. 2016, 1607.00133); "per_layer" scales
            the part of each of the L layers with weights down to clip_norm / sqrt(L) on its own; "automatic" scales
            every gradient g by clip_norm / (|g| + 0.01), up or down (AUTO-S, Bu et al. 2023, 2206.07136).
        microbatch_size: how many examples are worked on at a time, which bounds the memory; None for all.

    Raises:
        InputError: `losses_of` does not give one number for each example.
    """
    clip_norm = tf.convert_to_tensor(clip_norm, tf.float32)

    def clipped(index: tf.Tensor, x: Any, y: Any, example_weights: tf.Tensor) -> ClippedGradients:
        model = model_of(index)
        outputs, losses, uses, layers = _backward(model, weights, losses_of, x, y, example_weights)
        norms, sums = _clipped_sums(uses, layers, weights, clip_norm, clipping)
        return ClippedGradients(sums, norms, losses, outputs, [])

    if microbatch_size is None:
        result = clipped(tf.constant(0), x, y, example_weights)
    else:
        result = _by_microbatches(clipped, x, y, example_weights, microbatch_size)
    return result._replace(penalties=_penalties(model_of(tf.constant(0)), weights))


def example_gradients(
    model: tf.keras.Model,
    weights: Sequence[tf.Tensor | tf.Variable],
    losses_of: Callable[[Any, Any], tf.Tensor],
    x: Any,
    y: Any,
    example_weights: tf.Tensor,
) -> list[tf.Tensor]:
    """Each example's gradient for each weight, (batch, *shape), by the same book-keeping; for tests. Private."""
    batch = tf.shape(example_weights)[0]
    _, _, uses, _ = _backward(model, weights, losses_of, x, y, example_weights)
    return [
        combined(parts).materialized() if parts else tf.zeros([batch, *weight.shape])
        for parts, weight in zip(uses, weights, strict=True)
    ]


def _backward(
    model: tf.keras.Model,
    weights: Sequence[tf.Tensor | tf.Variable],
    losses_of: Callable[[Any, Any], tf.Tensor],
    x: Any,
    y: Any,
    example_weights: tf.Tensor,
) -> tuple[Any, tf.Tensor, list[list[Contribution]], list[int]]:
    """The forward pass with all uses of the weights noted, and one backward pass to them.

    Returns:
        The outputs, the losses, for each weight its uses, and for each weight the number of the layer that owns it.
    """
    batch = tf.shape(example_weights)[0]
    with tf.GradientTape(watch_accessed_variables=False) as tape, Capture(model, weights, tape, batch) as capture:
        outputs = model(x, training=True)
        losses = tf.cast(losses_of(outputs, y), tf.float32)
        if losses.shape.rank != 1:
            raise InputError(
                "the loss must give one number for each example, (batch,), so that examples can be clipped on their "
                f"own, but it gives shape {losses.shape}: use a loss without reduction."
            )
        total = tf.reduce_sum(tf.ensure_shape(losses, example_weights.shape) * example_weights)
    gradients = tape.gradient(total, capture.watched, unconnected_gradients=tf.UnconnectedGradients.ZERO)
    return outputs, losses, capture.contributions(gradients), capture.layers


def _clipped_sums(
    uses: list[list[Contribution]],
    layers: list[int],
    weights: Sequence[tf.Tensor | tf.Variable],
    clip_norm: tf.Tensor,
    clipping: Clipping,
) -> tuple[tf.Tensor, list[tf.Tensor]]:
    """Norms before clipping, (batch,), and the clipped sum for each weight."""
    used = {index: combined(parts) for index, parts in enumerate(uses) if parts}
    squares = {index: part.squared_norms() for index, part in used.items()}
    norms = tf.sqrt(tf.add_n(list(squares.values())))
    finite = tf.math.is_finite(norms)
    if clipping == "per_layer":
        share = clip_norm / tf.sqrt(float(len(set(layers))))
        by_layer = {
            layer: tf.sqrt(tf.add_n([square for index, square in squares.items() if layers[index] == layer]))
            for layer in {layers[index] for index in used}
        }
        factors = {index: _scale_down(by_layer[layers[index]], share) for index in used}
    elif clipping == "automatic":
        factors = dict.fromkeys(used, clip_norm / (norms + _STABILITY))
    else:
        factors = dict.fromkeys(used, _scale_down(norms, clip_norm))

    def sums(parts: dict[int, Contribution]) -> list[tf.Tensor]:
        return [
            parts[index].weighted_sum(tf.where(finite, factors[index], 0.0))
            if index in parts
            else tf.zeros(weight.shape)
            for index, weight in enumerate(weights)
        ]

    # Zero times NaN is NaN: where some example is not finite, its parts are taken out before they are summed.
    summed = tf.cond(
        tf.reduce_all(finite),
        lambda: sums(used),
        lambda: sums({index: part.of(finite) for index, part in used.items()}),
    )
    return norms, list(summed)


def _scale_down(norms: tf.Tensor, clip_norm: tf.Tensor) -> tf.Tensor:
    return tf.where(norms > clip_norm, clip_norm / norms, 1.0)


def _by_microbatches(
    clipped: Callable[..., ClippedGradients], x: Any, y: Any, example_weights: tf.Tensor, size: int
) -> ClippedGradients:
    """The same, so many examples at a time; only one microbatch's activations and gradients are ever in memory."""
    examples = tf.shape(example_weights)[0]
    count = (examples + size - 1) // size

    def one(index: tf.Tensor) -> ClippedGradients:
        start = index * size
        part_of_x, part_of_y = tf.nest.map_structure(lambda part: part[start : start + size], (x, y))
        return clipped(index, part_of_x, part_of_y, example_weights[start : start + size])

    first = one(tf.constant(0))
    arrays = [
        tf.TensorArray(part.dtype, count, infer_shape=False, element_shape=[None, *part.shape[1:]]).write(0, part)
        for part in tf.nest.flatten((first.norms, first.losses, first.outputs))
    ]

    def body(index: tf.Tensor, sums: list[tf.Tensor], arrays: list[Any]) -> tuple[tf.Tensor, list[tf.Tensor], Any]:
        part = one(index)
        rows = tf.nest.flatten((part.norms, part.losses, part.outputs))
        written = [array.write(index, row) for array, row in zip(arrays, rows, strict=True)]
        return index + 1, [total + new for total, new in zip(sums, part.sums, strict=True)], written

    _, sums, arrays = tf.while_loop(
        lambda index, *_: index < count, body, (tf.constant(1), first.sums, arrays), parallel_iterations=1
    )
    rows = [array.concat() for array in arrays]
    norms, losses, outputs = tf.nest.pack_sequence_as((first.norms, first.losses, first.outputs), rows)
    return ClippedGradients(sums, norms, losses, outputs, [])


def _penalties(model: tf.keras.Model, weights: Sequence[tf.Tensor | tf.Variable]) -> list[tf.Tensor | None]:
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(weights)
        # Keras evaluates the penalties when it is asked for them.
        penalties = [tf.cast(loss, tf.float32) for loss in model.losses]
        total = tf.add_n(penalties) if penalties else tf.constant(0.0)
    return tape.gradient(total, list(weights))
