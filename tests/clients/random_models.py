"""Random Keras models over all layers that per-example clipping supports, with random minibatches."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from hypothesis import strategies as st

Draw = Callable[[st.SearchStrategy[Any]], Any]
layers = tf.keras.layers
TOKENS, CLASSES = 5, 3
ACTIVATIONS = st.sampled_from([None, "relu", "tanh", "softplus"])


@dataclasses.dataclass(frozen=True)
class Case:
    """A model with random weights and a minibatch for it."""

    model: tf.keras.Model
    x: tf.Tensor
    y: tf.Tensor
    example_weights: tf.Tensor

    def part(self, rows: Any) -> "Case":
        """The same with some of the examples."""
        return dataclasses.replace(
            self,
            x=tf.gather(self.x, rows),
            y=tf.gather(self.y, rows),
            example_weights=tf.gather(self.example_weights, rows),
        )


class Gated(layers.Layer):
    """A layer of the user's own, with two weights and two uses of one of them."""

    def build(self, shape: Any) -> None:
        self.gate = self.add_weight("gate", shape=(shape[-1],), initializer="ones")
        self.mixing = self.add_weight("mixing", shape=(shape[-1], shape[-1]))

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        return tf.tanh(tf.tensordot(inputs, self.mixing, 1)) * self.gate + inputs * tf.sigmoid(self.gate)


class SharesWeights(layers.Layer):
    """A projection that uses another layer's kernel, transposed."""

    def __init__(self, other: tf.keras.layers.Dense) -> None:
        super().__init__()
        self.kernel = other.kernel

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        return tf.matmul(inputs, self.kernel, transpose_b=True)


class TwoInputs(layers.Layer):
    """A layer whose call takes several tensors, one by keyword."""

    def build(self, shape: Any) -> None:
        self.scale = self.add_weight("scale", shape=(shape[-1],), initializer="ones")

    def call(self, one: tf.Tensor, other: tf.Tensor | None = None) -> tf.Tensor:
        return one * self.scale + tf.square(other) * tf.reverse(self.scale, [0])


def minibatch(shape: tuple[int, ...], size: int, seed: int) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Random examples, labels, and weights of which the second is 0; tokens where the shape has one axis of 0."""
    generator = np.random.default_rng(seed)
    if shape[-1] == 0:
        x = generator.integers(0, TOKENS, size=(size, *shape[:-1])).astype(np.int32)
    else:
        x = generator.normal(size=(size, *shape)).astype(np.float32)
    weights = generator.uniform(0.2, 2.0, size=size).astype(np.float32)
    weights[1:2] = 0.0
    return tf.constant(x), tf.constant(generator.integers(0, CLASSES, size=size)), tf.constant(weights)


def with_random_weights(model: tf.keras.Model, seed: int) -> tf.keras.Model:
    """The model with no weight left at zero or one."""
    generator = np.random.default_rng(seed)
    for weight in model.weights:
        fan_in = max(1, int(np.prod(weight.shape[:-1])))
        weight.assign(weight + generator.normal(size=weight.shape) * 0.5 / np.sqrt(fan_in))
    return model


def case(model: tf.keras.Model, shape: tuple[int, ...], size: int = 4, seed: int = 0) -> Case:
    """A case of a model that has been built."""
    return Case(with_random_weights(model, seed), *minibatch(shape, size, seed))


def random_case(draw: Draw, blocks: int = 3, kinds: Sequence[str] | None = None) -> Case:
    """A model of up to so many random blocks after a random input, and four examples.

    `draw` comes from `hypothesis.strategies.data`: a strategy must not build Keras models, which use `random`.
    """
    kind = draw(st.sampled_from(sorted(kinds or SHAPES)))
    inputs = tf.keras.Input(SHAPES[kind] if kind != "tokens" else (4,), dtype="int32" if kind == "tokens" else None)
    x, kind = _tokens(draw, inputs) if kind == "tokens" else (inputs, kind)
    for _ in range(draw(st.integers(1, blocks))):
        x, kind = BLOCKS[kind][draw(st.sampled_from(sorted(BLOCKS[kind])))](draw, x)
    if kind != "vector":
        x = layers.Flatten()(x)
    model = tf.keras.Model(inputs, layers.Dense(CLASSES, use_bias=draw(st.booleans()))(x))
    shape = (4, 0) if inputs.dtype == tf.int32 else tuple(inputs.shape[1:])
    return case(model, shape, seed=draw(st.integers(0, 999)))


def _width(x: Any) -> int:
    return int(x.shape[-1])


def _dense(draw: Draw, x: Any) -> Any:
    regularizer = draw(st.sampled_from([None, "l2"]))
    dense = layers.Dense(
        draw(st.integers(1, 5)), draw(ACTIVATIONS), use_bias=draw(st.booleans()), kernel_regularizer=regularizer
    )
    dense.trainable = draw(st.sampled_from([True, True, True, False]))
    return dense(x)


def _einsum(draw: Draw, x: Any) -> Any:
    equation, shape, axes = draw(
        st.sampled_from(
            [("...a,ab->...b", (3,), "b"), ("...a,abc->...bc", (2, 3), "c"), ("...a,abc->...bc", (2, 3), "b")]
        )
    )
    einsum = layers.EinsumDense(
        equation.replace("...", "zyx"[: x.shape.rank - 1]),
        (*x.shape[1:-1], *shape),
        bias_axes=draw(st.sampled_from([axes, None])),
        activation=draw(ACTIVATIONS),
    )
    return layers.Reshape((*x.shape[1:-1], int(np.prod(shape))))(einsum(x))


def _layer_norm(draw: Draw, x: Any) -> Any:
    axes = list(range(1, x.shape.rank))
    chosen = draw(st.sampled_from([-1, *([axes, axes[:1], axes[1:]] if len(axes) > 1 else [axes])]))
    norm = layers.LayerNormalization(axis=chosen, scale=draw(st.booleans()), center=draw(st.booleans()), epsilon=0.1)
    return norm(x)


def _group_norm(draw: Draw, x: Any) -> Any:
    groups = draw(st.sampled_from([size for size in (1, 2, 3, -1) if size < 0 or _width(x) % size == 0]))
    norm = layers.GroupNormalization(groups, scale=draw(st.booleans()), center=draw(st.booleans()), epsilon=0.1)
    return norm(x)


def _residual(draw: Draw, x: Any) -> Any:
    """The same layer twice, and around it."""
    shared = layers.Dense(_width(x), draw(ACTIVATIONS))
    return layers.Add()([x, shared(layers.Activation("tanh")(shared(x)))])


def _tied(draw: Draw, x: Any) -> Any:
    """A weight that lies in two layers."""
    first = layers.Dense(draw(st.integers(1, 4)), "tanh")
    middle = first(x)
    return SharesWeights(first)(middle) if x.shape.rank == 2 else first(layers.Dense(_width(x))(middle))


def _general(draw: Draw, x: Any) -> Any:
    if draw(st.booleans()):
        return Gated()(x)
    return TwoInputs()(x, other=layers.Activation("tanh")(x))


def _prelu(draw: Draw, x: Any) -> Any:
    return layers.PReLU()(x)


def _convolution(draw: Draw, x: Any) -> Any:
    one_axis = x.shape.rank == 3
    step = draw(st.sampled_from(["none", "stride", "dilation"]))
    groups = 2 if _width(x) % 2 == 0 and draw(st.booleans()) else 1
    padding = draw(st.sampled_from(["same", "causal"] if one_axis else ["same", "valid"]))
    size = draw(st.sampled_from([2, 3] if one_axis else [2, 3, (2, 1)]))
    if padding == "valid" and min(x.shape[1:-1]) < 3:
        padding = "same"
    options: dict[str, Any] = {"padding": padding, "activation": draw(ACTIVATIONS), "use_bias": draw(st.booleans())}
    if step == "stride":
        options["strides"] = 2
    elif step == "dilation" and padding != "valid":
        options["dilation_rate"] = 2
    if one_axis:
        return layers.Conv1D(2 * groups, size, groups=groups, **options)(x)
    kind = draw(st.sampled_from(["plain", "depthwise"]))
    if kind == "depthwise":
        return layers.DepthwiseConv2D(size, depth_multiplier=draw(st.integers(1, 2)), **options)(x)
    return layers.Conv2D(2 * groups, size, groups=groups, **options)(x)


def _general_convolution(draw: Draw, x: Any) -> Any:
    return layers.Conv2DTranspose(2, 2)(x) if draw(st.booleans()) else layers.SeparableConv2D(2, 2, padding="same")(x)


def _pool(draw: Draw, x: Any) -> Any:
    if min(x.shape[1:-1]) < 2:
        return x
    kinds = [layers.MaxPool1D, layers.AvgPool1D] if x.shape.rank == 3 else [layers.MaxPool2D, layers.AvgPool2D]
    return draw(st.sampled_from(kinds))()(x)


def _recurrent_layer(draw: Draw, sequences: bool) -> Any:
    kind = draw(st.sampled_from([layers.LSTM, layers.GRU, layers.SimpleRNN]))
    options = {"return_sequences": sequences, "use_bias": draw(st.booleans()), "go_backwards": draw(st.booleans())}
    if kind is layers.GRU:
        options["reset_after"] = draw(st.sampled_from([True, True, False]))
    recurrent = kind(draw(st.integers(1, 3)), **options)
    if draw(st.booleans()):
        del options["go_backwards"]
        return layers.Bidirectional(kind(2, **options), merge_mode=draw(st.sampled_from(["concat", "sum"])))
    return recurrent


def _recurrent(draw: Draw, x: Any) -> Any:
    return _recurrent_layer(draw, sequences=True)(x)


def _summary(draw: Draw, x: Any) -> Any:
    if draw(st.booleans()):
        return _recurrent_layer(draw, sequences=False)(x)
    return layers.GlobalAveragePooling1D()(x)


def _time_distributed(draw: Draw, x: Any) -> Any:
    if x.shape.rank == 3:
        return layers.TimeDistributed(layers.Dense(draw(st.integers(1, 3)), draw(ACTIVATIONS)))(x)
    inner = draw(st.sampled_from(["dense", "conv", "norm", "general", "twice"]))
    made = {
        "dense": lambda: layers.Dense(2, "tanh"),
        "conv": lambda: layers.Conv1D(2, 2, padding="same"),
        "norm": layers.LayerNormalization,
        "general": Gated,
        "twice": lambda: layers.TimeDistributed(layers.Dense(2)),
    }
    return layers.TimeDistributed(made[inner]())(x)


def _attention(draw: Draw, x: Any) -> Any:
    attention = layers.MultiHeadAttention(draw(st.integers(1, 2)), 2, use_bias=draw(st.booleans()))
    return layers.Add()([x, attention(x, x, use_causal_mask=draw(st.booleans()))])


def _tokens(draw: Draw, inputs: Any) -> tuple[Any, str]:
    masked = draw(st.booleans())
    x = layers.Embedding(TOKENS, draw(st.integers(1, 4)), mask_zero=masked)(inputs)
    if masked:
        return _recurrent_layer(draw, sequences=False)(x), "vector"
    return x, "sequence"


SHAPES = {"vector": (4,), "sequence": (4, 2), "image": (5, 4, 2), "tokens": (4, 0)}


def _stays(kind: str, make: Callable[[Draw, Any], Any]) -> Callable[[Draw, Any], tuple[Any, str]]:
    return lambda draw, x: (make(draw, x), kind)


EVERYWHERE = {
    "dense": _dense,
    "einsum": _einsum,
    "general": _general,
    "layer_norm": _layer_norm,
    "prelu": _prelu,
    "residual": _residual,
    "tied": _tied,
}
SPATIAL = {"convolution": _convolution, "group_norm": _group_norm, "pool": _pool, "time": _time_distributed}
# For each kind of tensor, the blocks that take it.
BLOCKS: dict[str, dict[str, Callable[[Draw, Any], tuple[Any, str]]]] = {
    "vector": {name: _stays("vector", make) for name, make in EVERYWHERE.items()},
    "sequence": {
        **{
            name: _stays("sequence", make)
            for name, make in {**EVERYWHERE, **SPATIAL, "recurrent": _recurrent, "attention": _attention}.items()
        },
        "summary": _stays("vector", _summary),
    },
    "image": {
        **{
            name: _stays("image", make)
            for name, make in {**EVERYWHERE, **SPATIAL, "other_convolution": _general_convolution}.items()
        },
        "flatten": _stays("vector", lambda draw, x: layers.Flatten()(x)),
    },
}
