"""How each kind of layer uses its weights.

A rule calls the layer, watches the tensor that comes out of its weights before anything else happens to it, and turns
the loss's gradient with respect to that tensor into a contribution for each weight.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from dpfl.clients.per_example.contributions import Contribution, Direct, Product, Rows

if TYPE_CHECKING:
    from dpfl.clients.per_example.capture import Capture

# Up to so many numbers in a patch, a convolution with an identity cuts patches out faster than copying does (CPU).
_LARGEST_PATCH_BY_CONVOLUTION = 100


@dataclasses.dataclass(frozen=True)
class Noted:
    """One call of a layer.

    Attributes:
        outputs: what the layer gives.
        watched: the tensors whose gradients are needed.
        contributions: from these gradients to pairs of a weight and its contribution; weights that are not trained
            may be among them.
    """

    outputs: Any
    watched: list[tf.Tensor]
    contributions: Callable[..., list[tuple[Any, Contribution]]]


Rule = Callable[..., Noted]
Pairs = list[tuple[Any, Contribution]]


@contextlib.contextmanager
def replaced(layer: tf.keras.layers.Layer, **attributes: Any) -> Iterator[None]:
    """Gives a layer other attributes for a while, behind the back of Keras' tracking."""
    before = {name: vars(layer)[name] for name in attributes if name in vars(layer)}
    for name, value in attributes.items():
        object.__setattr__(layer, name, value)
    try:
        yield
    finally:
        for name in attributes:
            if name in before:
                object.__setattr__(layer, name, before[name])
            else:
                object.__delattr__(layer, name)


def _called(layer: Any, call: Callable[..., Any], capture: Capture, inputs: tf.Tensor) -> tuple[Any, tf.Tensor]:
    """Calls a layer; returns its outputs and, watched, what its activation was applied to."""
    seen: list[tf.Tensor] = []
    activation = layer.activation

    def watching(products: tf.Tensor) -> tf.Tensor:
        # The identity makes a tensor of its own where the activation makes none.
        seen.append(capture.watch(tf.identity(products)))
        return activation(seen[-1])

    with replaced(layer, activation=watching):
        outputs = call(inputs)
    return outputs, seen[-1]


def _dense(layer: Any, call: Callable[..., Any], capture: Capture, inputs: tf.Tensor) -> Noted:
    outputs, products = _called(layer, call, capture, inputs)

    def contributions(gradients: tf.Tensor) -> Pairs:
        found: Pairs = [(layer.kernel, Product(capture.rows(inputs), capture.rows(gradients), layer.kernel.shape))]
        if layer.use_bias:
            found.append((layer.bias, capture.summed(gradients, layer.bias.shape)))
        return found

    return Noted(outputs, [products], contributions)


def _contracted_axes(layer: Any) -> int | None:
    """How many axes an EinsumDense contracts, where it is a projection at every position; else None.

    That is: inputs of positions then contracted axes, a kernel of contracted then new axes, outputs of positions then
    new axes.
    """
    inputs, _, rest = layer.equation.replace(" ", "").partition(",")
    kernel, _, outputs = rest.partition("->")
    contracted = "".join(letter for letter in kernel if letter not in outputs)
    new = "".join(letter for letter in kernel if letter in outputs)
    positions = "".join(letter for letter in inputs if letter not in kernel)
    projects = (inputs, kernel, outputs) == (positions + contracted, contracted + new, positions + new)
    return len(contracted) if projects and positions and "." not in layer.equation else None


def _einsum_dense(layer: Any, call: Callable[..., Any], capture: Capture, inputs: tf.Tensor) -> Noted:
    outputs, products = _called(layer, call, capture, inputs)
    contracted = _contracted_axes(layer) or 0
    new = layer.kernel.shape.rank - contracted

    def contributions(gradients: tf.Tensor) -> Pairs:
        kernel = Product(capture.rows(inputs, contracted), capture.rows(gradients, new), layer.kernel.shape)
        found: Pairs = [(layer.kernel, kernel)]
        if layer.bias is not None:
            # Along axes where the bias has length 1 or none, one number serves all.
            rank = layer.bias.shape.rank
            sizes = zip(gradients.shape[-rank:], layer.bias.shape, strict=True)
            shared = [axis - rank for axis, (size, of_bias) in enumerate(sizes) if of_bias == 1 and size != 1]
            if shared:
                gradients = tf.reduce_sum(gradients, axis=shared, keepdims=True)
            found.append((layer.bias, capture.summed(gradients, layer.bias.shape)))
        return found

    return Noted(outputs, [products], contributions)


def _convolution(layer: Any, call: Callable[..., Any], capture: Capture, inputs: tf.Tensor) -> Noted:
    outputs, products = _called(layer, call, capture, inputs)
    shape = tuple(layer.kernel.shape)
    window, channels, filters = math.prod(shape[:-2]), shape[-2], shape[-1]

    def contributions(gradients: tf.Tensor) -> Pairs:
        rows, columns = capture.rows(_patches(layer, inputs, shape[:-2])), capture.rows(gradients)
        found: Pairs = []
        if layer.groups == 1:
            found.append((layer.kernel, Product(rows, columns, shape)))
        else:
            by_group = _split_last(rows, [window, layer.groups, channels])
            kernels = tf.einsum(
                "bpwgc,bpgf->bwcgf", by_group, _split_last(columns, [layer.groups, filters // layer.groups])
            )
            found.append((layer.kernel, Direct(tf.reshape(kernels, [-1, *shape]))))
        if layer.use_bias:
            found.append((layer.bias, capture.summed(gradients, (filters,))))
        return found

    return Noted(outputs, [products], contributions)


def _depthwise(layer: Any, call: Callable[..., Any], capture: Capture, inputs: tf.Tensor) -> Noted:
    outputs, products = _called(layer, call, capture, inputs)
    shape = tuple(layer.depthwise_kernel.shape)
    window, channels, multiplier = math.prod(shape[:-2]), shape[-2], shape[-1]

    def contributions(gradients: tf.Tensor) -> Pairs:
        rows = _split_last(capture.rows(_patches(layer, inputs, shape[:-2])), [window, channels])
        columns = _split_last(capture.rows(gradients), [channels, multiplier])
        kernels = tf.reshape(tf.einsum("bpwc,bpcm->bwcm", rows, columns), [-1, *shape])
        found: Pairs = [(layer.depthwise_kernel, Direct(kernels))]
        if layer.use_bias:
            found.append((layer.bias, capture.summed(gradients, layer.bias.shape)))
        return found

    return Noted(outputs, [products], contributions)


def _patches(layer: Any, inputs: tf.Tensor, window: Sequence[int]) -> tf.Tensor:
    """What each position of a convolution sees: (batch, *positions, window * channels), channels fastest."""
    strides, dilations, padding = list(layer.strides), list(layer.dilation_rate), layer.padding.upper()
    window = list(window)
    if len(window) == 1:
        if padding == "CAUSAL":
            inputs, padding = tf.pad(inputs, [[0, 0], [dilations[0] * (window[0] - 1), 0], [0, 0]]), "VALID"
        inputs, window, strides, dilations = inputs[:, None], [1, *window], [1, *strides], [1, *dilations]
    channels = inputs.shape[-1]
    size = math.prod(window) * channels
    if size <= _LARGEST_PATCH_BY_CONVOLUTION:
        identity = tf.reshape(tf.eye(size), [*window, channels, size])
        return tf.nn.conv2d(inputs, identity, strides, padding, dilations=dilations)
    return tf.image.extract_patches(inputs, [1, *window, 1], [1, *strides, 1], [1, *dilations, 1], padding)


def _split_last(tensor: tf.Tensor, sizes: Sequence[int]) -> tf.Tensor:
    return tf.reshape(tensor, [-1, tensor.shape[1] or tf.shape(tensor)[1], *sizes])


def _embedding(layer: Any, call: Callable[..., Any], capture: Capture, inputs: tf.Tensor) -> Noted:
    outputs = capture.watch(tf.identity(call(inputs)))

    def contributions(gradients: tf.Tensor) -> Pairs:
        looked_up = capture.rows(tf.cast(inputs, tf.int32), axes=0)[..., 0]
        return [(layer.embeddings, Rows(looked_up, capture.rows(gradients), tuple(layer.embeddings.shape)))]

    return Noted(outputs, [outputs], contributions)


def _normalization(layer: Any, call: Callable[..., Any], capture: Capture, inputs: tf.Tensor, **options: Any) -> Noted:
    """LayerNormalization and GroupNormalization: Keras normalises, the scale and the offset are applied here."""
    rank = inputs.shape.rank
    axes = [axis % rank for axis in (layer.axis if isinstance(layer.axis, Sequence) else [layer.axis])]
    shape = [int(inputs.shape[axis]) for axis in axes]
    broadcast = [int(inputs.shape[axis]) if axis in axes else 1 for axis in range(rank)]
    neutral: dict[str, tf.Tensor] = {}
    if layer.scale:
        neutral["gamma"] = tf.ones(shape)
    if layer.center:
        neutral["beta"] = tf.zeros(shape)
    with replaced(layer, **neutral):
        normalized = call(inputs, **options)
    outputs = normalized
    if layer.scale:
        outputs *= tf.reshape(layer.gamma, broadcast)
    if layer.center:
        outputs += tf.reshape(layer.beta, broadcast)
    outputs = capture.watch(tf.identity(outputs))
    positions = [axis for axis in range(1, rank) if axis not in axes]

    def by_row(values: tf.Tensor) -> tf.Tensor:
        return tf.reshape(tf.reduce_sum(values, axis=positions), [-1, *shape])

    def contributions(gradients: tf.Tensor) -> Pairs:
        found: Pairs = []
        if layer.scale:
            found.append((layer.gamma, capture.summed(by_row(gradients * normalized), shape)))
        if layer.center:
            found.append((layer.beta, capture.summed(by_row(gradients), shape)))
        return found

    return Noted(outputs, [outputs], contributions)


def again_by_example(
    layer: Any, call: Callable[..., Any], capture: Capture, *arguments: Any, trained: list[Any], **options: Any
) -> Noted:
    """The rule for every other layer: its gradients by running it again for each example, all of them side by side.

    Costs the layer's forward and backward pass once more, and the memory of its gradients for all examples.
    """

    def is_real(part: Any) -> bool:
        return tf.is_tensor(part) and part.dtype.is_floating

    outputs = tf.nest.map_structure(
        lambda part: capture.watch(tf.identity(part)) if is_real(part) else part, call(*arguments, **options)
    )
    watched = [part for part in tf.nest.flatten(outputs) if is_real(part)]
    given = tf.nest.flatten((arguments, options))
    # A tensor of rank 0 (the training phase, say) is the same for all examples.
    by_example = [index for index, part in enumerate(given) if tf.is_tensor(part) and part.shape.rank != 0]

    def of_one(parts: tuple[list[tf.Tensor], list[tf.Tensor]]) -> list[tf.Tensor]:
        inputs, gradients = parts
        one = list(given)
        for index, part in zip(by_example, inputs, strict=True):
            one[index] = part[None]
        its_arguments, its_options = tf.nest.pack_sequence_as((arguments, options), one)
        with capture.running_again(), tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(trained)
            results = [part for part in tf.nest.flatten(call(*its_arguments, **its_options)) if is_real(part)]
        found = tape.gradient(
            results,
            trained,
            output_gradients=[part[None] for part in gradients],
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
        return [tf.convert_to_tensor(part) for part in found]

    def contributions(*gradients: tf.Tensor) -> Pairs:
        found = tf.vectorized_map(of_one, ([given[index] for index in by_example], list(gradients)), warn=False)
        return [(weight, capture.summed(part, weight.shape)) for weight, part in zip(trained, found, strict=True)]

    return Noted(outputs, watched, contributions)


def _channels_last(layer: Any) -> bool:
    return layer.data_format == "channels_last"


# For each kind of layer, when its rule applies, and the rule.
LAYER_RULES: dict[type, tuple[Callable[[Any], bool], Rule]] = {
    tf.keras.layers.Dense: (lambda layer: True, _dense),
    tf.keras.layers.EinsumDense: (lambda layer: _contracted_axes(layer) is not None, _einsum_dense),
    tf.keras.layers.Conv1D: (_channels_last, _convolution),
    tf.keras.layers.Conv2D: (_channels_last, _convolution),
    tf.keras.layers.DepthwiseConv2D: (_channels_last, _depthwise),
    tf.keras.layers.Embedding: (lambda layer: True, _embedding),
    tf.keras.layers.LayerNormalization: (lambda layer: True, _normalization),
    tf.keras.layers.GroupNormalization: (lambda layer: True, _normalization),
}
