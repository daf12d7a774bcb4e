"""Recurrent layers with few operations at each step: Keras' numbers."""

from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpfl.models.functional import FunctionalModel
from dpfl.models.recurrent import run_faster

layers = tf.keras.layers
KINDS: list[tuple[type, dict[str, Any]]] = [
    (layers.LSTM, {}),
    (layers.GRU, {}),
    (layers.GRU, {"reset_after": False}),
    *((layers.SimpleRNN, {"activation": name}) for name in ("tanh", "sigmoid", "relu", None)),
]


def _built(layer: tf.keras.layers.Layer, x: np.ndarray, seed: int) -> tf.keras.layers.Layer:
    """The layer with random weights that neither die out over the steps nor grow."""
    layer(x[:1])
    rng = np.random.default_rng(seed)
    layer.set_weights([rng.normal(size=weight.shape) / np.sqrt(2 * weight.shape[0]) for weight in layer.get_weights()])
    return layer


def _values_and_gradients(layer: tf.keras.layers.Layer, x: np.ndarray, seed: int = 0, dynamic: bool = False) -> list:
    """The outputs, and the gradients of a random sum of them to the inputs and to each weight."""

    def run(x: tf.Tensor) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch(x)
            outputs = layer(x)
            counted = tf.random.stateless_normal(tf.shape(outputs), [seed, 1])
            total = tf.reduce_sum(outputs * counted)
        return [outputs, *tape.gradient(total, [x, *layer.trainable_variables])]

    shape = [None, *x.shape[1:]] if dynamic else x.shape
    return [value.numpy() for value in tf.function(run, [tf.TensorSpec(shape)], autograph=False)(tf.constant(x))]


def _is_replaced(layer: tf.keras.layers.Layer) -> bool:
    return "call" in vars(layer)


def _loops(layer: tf.keras.layers.Layer, x: tf.Tensor) -> bool:
    """Whether Keras' own layer runs, which calls a function with a loop inside."""
    graph = tf.function(layer, autograph=False).get_concrete_function(x).graph
    return any("Call" in operation.type for operation in graph.get_operations())


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_values_and_gradients_are_those_of_keras(data: st.DataObject) -> None:
    kind, extra = data.draw(st.sampled_from(KINDS))
    options = {name: data.draw(st.booleans()) for name in ("use_bias", "go_backwards", "return_sequences")}
    units, width, steps, batch = (data.draw(st.integers(1, most)) for most in (6, 4, 9, 4))
    seed = data.draw(st.integers(0, 99))
    x = np.random.default_rng(seed).normal(size=(batch, steps, width)).astype(np.float32)
    layer = _built(kind(units, **options, **extra), x, seed)
    expected = _values_and_gradients(layer, x, seed)
    run_faster(layer)
    assert _is_replaced(layer)
    for one, other in zip(_values_and_gradients(layer, x, seed, data.draw(st.booleans())), expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * max(1.0, np.abs(other).max()))


@pytest.mark.parametrize(("kind", "extra"), KINDS)
def test_every_cell_at_a_length_where_errors_would_add_up(kind: type, extra: dict[str, Any]) -> None:
    x = np.random.default_rng(0).normal(size=(3, 40, 5)).astype(np.float32)
    layer = _built(kind(16, return_sequences=True, **extra), x, seed=1)
    expected = _values_and_gradients(layer, x)
    run_faster(layer)
    for one, other in zip(_values_and_gradients(layer, x), expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5 * max(1.0, np.abs(other).max()))


def test_saturated_gates_are_those_of_keras() -> None:
    x = np.random.default_rng(0).normal(size=(4, 6, 3)).astype(np.float32)
    for kind in (layers.LSTM, layers.GRU):
        layer = _built(kind(4), x, seed=2)
        layer.set_weights([50 * weight for weight in layer.get_weights()])
        expected = _values_and_gradients(layer, x)
        run_faster(layer)
        for one, other in zip(_values_and_gradients(layer, x), expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5 * max(1.0, np.abs(other).max()))


def test_the_loop_over_steps_is_gone() -> None:
    x = tf.zeros((2, 5, 3))
    layer = layers.LSTM(4)
    layer(x)
    assert _loops(layer, x)
    run_faster(layer)
    assert not _loops(layer, x)


@pytest.mark.parametrize(
    "layer",
    [
        layers.LSTM(4, activation="relu"),
        layers.GRU(4, recurrent_activation="hard_sigmoid"),
        layers.SimpleRNN(4, activation="softplus"),
        layers.LSTM(4, dropout=0.5),
        layers.GRU(4, recurrent_dropout=0.5),
        layers.LSTM(4, return_state=True),
        layers.LSTM(4, unroll=True),
        layers.LSTM(4, time_major=True),
        layers.LSTM(4, dtype="float64"),
        layers.RNN(layers.LSTMCell(4)),
        layers.Dense(4),
    ],
)
def test_what_is_not_covered_stays_with_keras(layer: tf.keras.layers.Layer) -> None:
    layer(tf.zeros((2, 5, 3)))
    run_faster(layer)
    assert not _is_replaced(layer)


def test_masks_given_states_and_long_sequences_run_as_before() -> None:
    rng = np.random.default_rng(0)
    x = tf.constant(rng.normal(size=(3, 6, 2)), tf.float32)
    mask = tf.constant(rng.integers(0, 2, size=(3, 6)), tf.bool)
    state = [tf.constant(rng.normal(size=(3, 4)), tf.float32) for _ in range(2)]
    layer = _built(layers.LSTM(4), x.numpy(), seed=3)
    calls = [{"mask": mask}, {"initial_state": state}]
    expected = [layer(x, **options).numpy() for options in calls]
    run_faster(layer)
    for options, before in zip(calls, expected, strict=True):
        np.testing.assert_array_equal(layer(x, **options), before)
        assert not np.allclose(layer(x), before)
    assert _loops(layer, tf.zeros((2, 201, 2)))


def _text(recurrent: Any) -> tf.keras.Model:
    return tf.keras.Sequential([layers.Input((6,), dtype="int32"), layers.Embedding(9, 3), recurrent, layers.Dense(5)])


def _stacked() -> tf.keras.Model:
    model = tf.keras.Sequential([layers.Input((6, 2)), layers.GRU(4, return_sequences=True), layers.SimpleRNN(3)])
    model.add(layers.Dense(5))
    return model


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: _text(layers.LSTM(4, kernel_regularizer="l2")), (6,)),
        (lambda: _text(layers.Bidirectional(layers.GRU(3))), (6,)),
        (_stacked, (6, 2)),
    ],
)
def test_models_that_train_by_it_have_keras_gradients(make: Any, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(5)
    functional = FunctionalModel(make, shape, 5)
    weights = [tf.constant(rng.normal(size=shape) / 2, tf.float32) for shape in functional.shapes]
    x = rng.integers(0, 9, size=(4, 6)).astype(np.int32) if len(shape) == 1 else rng.normal(size=(4, 6, 2))
    x, y = tf.constant(x, tf.int32 if len(shape) == 1 else tf.float32), tf.constant([0, 4, 2, 1])

    @tf.function(autograph=False)
    def gradients(weights: list[tf.Tensor]) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch(weights)
            losses, _, penalty = functional.losses_and_logits(weights, x, y, training_seed=tf.zeros(2, tf.int32))
            total = tf.reduce_sum(losses) + penalty
        return [tf.convert_to_tensor(gradient) for gradient in tape.gradient(total, weights)]

    keras = functional.to_keras([weight.numpy() for weight in weights])
    with tf.GradientTape() as tape:
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(y, keras(x))
        total = tf.reduce_sum(losses) + (tf.add_n(keras.losses) if keras.losses else 0.0)
    expected = {variable.ref(): value for variable, value in _of_variables(tape, total, keras)}
    found = gradients(weights)
    for weight, gradient in zip(weights, found, strict=True):
        variable = next(v for v in keras.trainable_variables if v.shape == weight.shape and np.allclose(v, weight))
        np.testing.assert_allclose(gradient, expected[variable.ref()], rtol=1e-4, atol=1e-5)


def _of_variables(tape: tf.GradientTape, total: tf.Tensor, keras: tf.keras.Model) -> Any:
    values = tape.gradient(total, keras.trainable_variables)
    return zip(keras.trainable_variables, map(tf.convert_to_tensor, values), strict=True)
