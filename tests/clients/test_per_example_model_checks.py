"""`check_model` refuses what cannot be clipped by example, in one sentence, accepts the rest, and changes nothing."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from per_example_checks import assert_naive
from random_models import CLASSES, TOKENS, Gated, SharesWeights, case

from dpfl.clients.per_example import check_model
from dpfl.errors import InputError

layers = tf.keras.layers


def dense(*between: Any, shape: tuple[int, ...] = (4,), **options: Any) -> tf.keras.Model:
    """A model with these layers between two dense ones."""
    inputs = layers.Input(shape, **options)
    return tf.keras.Sequential([inputs, layers.Dense(4, "tanh"), *between, layers.Flatten(), layers.Dense(CLASSES)])


def examples(model: tf.keras.Model) -> Any:
    """Three random examples."""
    generator = np.random.default_rng(0)

    def of(tensor: Any) -> tf.Tensor:
        shape = (3, *tensor.shape[1:])
        if tensor.dtype == tf.int32:
            return tf.constant(generator.integers(0, TOKENS, size=shape), tf.int32)
        return tf.constant(generator.normal(size=shape), tensor.dtype)

    subclassed = model.inputs is None
    return tf.nest.map_structure(of, tf.zeros((1, 4)) if subclassed else model.input)


class SubtractsTheMean(layers.Layer):
    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        return inputs - tf.reduce_mean(inputs, axis=0, keepdims=True)


class Passes(layers.Layer):
    """What is wrong is what a function does."""

    def __init__(self, function: Callable[..., tf.Tensor], *parts: Any) -> None:
        super().__init__()
        self.function, self.parts = function, list(parts)

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        return self.function(self, inputs)


class Drops(Gated):
    """Holds weights and drops: what is dropped would be something else when it is run again."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = layers.Dropout(0.5)

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        return self.dropout(super().call(inputs))


class AddsALoss(layers.Layer):
    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        self.add_loss(tf.reduce_mean(tf.square(inputs)))
        return inputs


class KeepsTheMean(layers.Layer):
    """Not trained, but released with the model: the examples' mean without noise."""

    def build(self, shape: Any) -> None:
        self.mean = self.add_weight("mean", shape=(shape[-1],), trainable=False)

    def call(self, inputs: tf.Tensor, training: Any = None) -> tf.Tensor:
        if training:
            self.mean.assign(tf.reduce_mean(inputs, axis=0))
        return inputs


class Fails(layers.Layer):
    def __init__(self, when: Callable[[Any], bool]) -> None:
        super().__init__()
        self.when = when

    def call(self, inputs: tf.Tensor, training: Any = None) -> tf.Tensor:
        if training and self.when(inputs):
            raise ValueError("this layer fails on purpose.")
        return inputs


class UsesAnothersTable(tf.keras.Model):
    """Logits from the embedding's own table, outside of the embedding."""

    def __init__(self, zeros: bool = False) -> None:
        super().__init__()
        self.table = layers.Embedding(CLASSES, 4)
        self.table.build(None)
        self.middle = layers.Dense(4)
        self.last = layers.Dense(CLASSES, kernel_initializer="zeros" if zeros else "glorot_uniform")

    def call(self, x: tf.Tensor) -> tf.Tensor:
        return self.last(tf.matmul(self.middle(x), self.table.embeddings, transpose_b=True))


def built(model: tf.keras.Model) -> tf.keras.Model:
    model(tf.zeros((1, 4)))
    return model


def with_another_call(inside: Callable[..., Any]) -> tf.keras.Model:
    return dense(Passes(lambda layer, x: inside(layer.parts[0], x), layers.Dense(4)))


def positions_for_all(layer: Any, x: tf.Tensor) -> tf.Tensor:
    return x + layer.parts[0](tf.range(4))


REFUSED: dict[str, tuple[Callable[[], tf.keras.Model], str]] = {
    "batch normalization": (lambda: dense(layers.BatchNormalization()), "use GroupNormalization or Layer"),
    "nested batch normalization": (
        lambda: dense(tf.keras.Sequential([layers.Dense(4), layers.BatchNormalization()])),
        "BatchNormalization.*use GroupNormalization",
    ),
    "activity regularizer": (lambda: dense(layers.Dense(3, activity_regularizer="l2")), "activity regularizer.*loss"),
    "stateful": (
        lambda: dense(layers.LSTM(2, stateful=True), shape=(4, 2), batch_size=3),
        "keeps its state.*use stateful=False",
    ),
    "mixed precision": (lambda: dense(layers.Dense(3, dtype="mixed_float16")), "computes in float16.*leave its dtype"),
    "float64": (lambda: dense(layers.Dense(3, dtype="float64")), "computes in float64.*leave its dtype out"),
    "mean of the minibatch": (lambda: dense(SubtractsTheMean()), "come out wrong.*each example on its own"),
    "mean behind zeros": (
        lambda: dense(SubtractsTheMean(), layers.Dense(3), layers.Dense(4, kernel_initializer="zeros")),
        "come out wrong.*each example on its own",
    ),
    "another's axis": (
        lambda: dense(layers.Lambda(lambda x: tf.reshape(tf.transpose(x), [-1, 4]))),
        "come out wrong.*each example on its own",
    ),
    "steps as examples": (
        lambda: dense(
            Passes(lambda layer, x: tf.reshape(layer.parts[0](tf.reshape(x, [-1, 4])), [-1, 5, 4]), layers.Dense(4)),
            shape=(5, 2),
        ),
        "come out wrong.*examples along its first axis.*each example on its own",
    ),
    "positions without examples": (
        lambda: dense(Passes(positions_for_all, layers.Embedding(4, 4)), shape=(4, 2)),
        "examples along its first axis.*each example on its own",
    ),
    "another's weight": (lambda: built(UsesAnothersTable()), "outside of the layer.*each layer use its own weights"),
    "another's weight behind zeros": (lambda: built(UsesAnothersTable(zeros=True)), "outside of the layer"),
    "dropout and weights": (lambda: dense(Drops()), "draws random numbers .*use Dropout layers"),
    "recurrent dropout": (lambda: dense(layers.LSTM(2, dropout=0.2), shape=(4, 2)), "random numbers .*use Dropout"),
    "noise": (lambda: dense(Passes(lambda _, x: x * tf.random.normal(tf.shape(x)))), "draws random numbers"),
    "loss of a layer": (lambda: dense(AddsALoss()), "add_loss.*a part of the loss"),
    "keeps the mean": (lambda: dense(KeepsTheMean()), "not trained but changes.*leave out what updates it"),
    "loop": (
        lambda: with_another_call(
            lambda part, x: tf.while_loop(lambda i, _: i < 2, lambda i, y: (i + 1, part(y)), (0, x))[1]
        ),
        "inside of a TensorFlow loop.*call it from Python",
    ),
    "map": (
        lambda: with_another_call(lambda part, x: tf.map_fn(lambda one: part(one[None])[0], x)),
        "inside of a TensorFlow loop.*call it from Python",
    ),
    "function": (
        lambda: with_another_call(lambda part, x: tf.function(lambda y: part(y))(x)),
        "inside of a TensorFlow loop, branch or function.*call it from Python",
    ),
    "stops custom gradients": (
        lambda: with_another_call(lambda part, x: tf.recompute_grad(lambda y: part(y))(x)),
        "come out wrong|cannot be computed",
    ),
    "no weights": (lambda: tf.keras.Sequential([layers.Input((4,)), layers.Flatten()]), "add a layer that trains"),
    "fails": (lambda: dense(Fails(lambda _: True)), "fails on purpose.*each example on its own"),
    "fails together": (lambda: dense(Fails(lambda x: x.shape[0] == 3)), "fails on purpose.*each example on its own"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str) -> None:
    make, words = REFUSED[name]
    model = make()
    x = (
        np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
        if hasattr(model, "input_of_tests")
        else examples(model)
    )
    before = state(model)
    with pytest.raises(InputError, match=words) as caught:
        check_model(model, x)
    sentence = str(caught.value)
    assert sentence.endswith(".")
    assert "\n" not in sentence
    assert ". " not in sentence
    assert_same(before, state(model))


def frozen_normalization() -> tf.keras.Model:
    frozen = layers.BatchNormalization()
    frozen.trainable = False
    return dense(frozen)


def shared_weights() -> tf.keras.Model:
    first = layers.Dense(3)
    inputs = tf.keras.Input((4,))
    hidden = first(inputs)
    return tf.keras.Model(inputs, SharesWeights(first)(hidden))


def attention() -> tf.keras.Model:
    inputs = tf.keras.Input((4, 2))
    x = layers.Attention(use_scale=True)([inputs, inputs])
    x = layers.AdditiveAttention()([x, inputs])
    return tf.keras.Model(inputs, layers.Dense(CLASSES)(layers.Flatten()(x)))


class Standardized(layers.Conv1D):
    """What Keras' documentation suggests to override."""

    def convolution_op(self, inputs: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
        return super().convolution_op(inputs, kernel - tf.reduce_mean(kernel, axis=[0, 1], keepdims=True))


class Doubles(layers.Dense):
    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        return 2.0 * super().call(inputs)


ACCEPTED: dict[str, Callable[[], tf.keras.Model]] = {
    "frozen batch normalization": frozen_normalization,
    "dropout": lambda: dense(layers.Dropout(0.5), layers.GaussianNoise(1.0), layers.AlphaDropout(0.5)),
    "attention": attention,
    "zeros": lambda: dense(layers.Dense(3, kernel_initializer="zeros")),
    "tied weights": shared_weights,
    "subclassed convolution": lambda: dense(Standardized(3, 2), shape=(4, 2)),
    "subclassed dense": lambda: dense(Doubles(3)),
    "general rule": lambda: dense(Gated(), layers.PReLU()),
    "recurrent cells": lambda: dense(layers.RNN(layers.SimpleRNNCell(3)), shape=(4, 2)),
    "time distributed": lambda: dense(layers.TimeDistributed(layers.Conv1D(2, 2)), shape=(3, 4, 2)),
    "tokens": lambda: tf.keras.Sequential(
        [
            layers.Input((4,), dtype="int32"),
            layers.Embedding(TOKENS, 3, mask_zero=True),
            layers.LSTM(2),
            layers.Dense(2),
        ]
    ),
    "a function as a layer's call": lambda: dense(
        Passes(lambda layer, x: layer.parts[0](x) + layer.parts[0](layer.parts[1](x)), layers.Dense(4), Gated())
    ),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepts(name: str) -> None:
    model = ACCEPTED[name]()
    x = examples(model)
    model(x, training=True)
    before = state(model)
    check_model(model, x)
    assert_same(before, state(model))


@pytest.mark.parametrize("name", ["frozen batch normalization", "attention", "subclassed convolution"])
def test_what_is_accepted_is_right(name: str) -> None:
    model = ACCEPTED[name]()
    assert_naive(case(model, tuple(model.input_shape[1:])))


def test_frozen_layers_are_left_alone() -> None:
    model = dense(layers.Dense(4), Gated())
    model.layers[0].trainable = False
    check_model(model, examples(model))


def state(model: tf.keras.Model) -> list[tuple[Any, dict[str, Any], list[np.ndarray]]]:
    """Every layer's attributes and weights."""
    return [(layer, dict(vars(layer)), [w.numpy() for w in layer.weights]) for layer in model._flatten_layers()]


# What Keras itself changes at any call.
_BY_KERAS = {"_losses", "_eager_losses", "_saved_model_inputs_spec", "_saved_model_arg_spec", "_thread_local"}


def assert_same(before: Any, after: Any) -> None:
    for (layer, attributes, weights), (same, others, other_weights) in zip(before, after, strict=True):
        assert layer is same
        assert attributes.keys() - _BY_KERAS == others.keys() - _BY_KERAS
        for name in attributes.keys() - _BY_KERAS:
            one, other = attributes[name], others[name]
            assert one is other or (not tf.is_tensor(one) and one == other), (layer.name, name)
        for one, other in zip(weights, other_weights, strict=True):
            np.testing.assert_array_equal(one, other)
