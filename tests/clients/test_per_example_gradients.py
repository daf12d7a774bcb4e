"""Clipped sums by book-keeping equal those of a loop over the examples, for random models over all supported layers."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st
from naive_gradients import clip
from per_example_checks import CLIPPINGS, EVERY_CHECK, assert_naive, clipped, dense_model, losses_of, random
from random_models import BLOCKS, CLASSES, Case, Gated, case, random_case, with_random_weights

from dpfl.clients.per_example import check_model, clipped_gradients, contributions, rules
from dpfl.errors import InputError
from dpfl.models.functional import FunctionalModel

layers = tf.keras.layers


@random(40)
@given(st.data(), st.sampled_from(CLIPPINGS), st.sampled_from([0.05, 0.7, 50.0]), st.sampled_from([None, None, 1, 3]))
def test_random_models(data: Any, clipping: str, clip_norm: float, microbatch_size: int | None) -> None:
    assert_naive(random_case(data.draw), clipping, clip_norm, microbatch_size=microbatch_size)


@pytest.mark.parametrize("check", EVERY_CHECK, ids=lambda check: check.__name__)
def test_check(check: Callable[[], None]) -> None:
    check()


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(BLOCKS))
def test_every_block(kind: str) -> None:
    """Each kind of block on its own, several times."""

    @random(6 * len(BLOCKS[kind]))
    @given(st.data(), st.sampled_from(CLIPPINGS), st.sampled_from([None, 3]))
    def run(data: Any, clipping: str, microbatch_size: int | None) -> None:
        assert_naive(random_case(data.draw, blocks=1, kinds=(kind,)), clipping, microbatch_size=microbatch_size)

    run()


@pytest.mark.parametrize("microbatch_size", [None, 2])
def test_in_a_graph_without_retracing(microbatch_size: int | None) -> None:
    """One graph serves minibatches of every size."""
    model = tf.keras.Sequential(
        [
            layers.Input((4, 2)),
            layers.Conv1D(4, 2, groups=2, padding="causal"),
            Gated(),
            layers.TimeDistributed(layers.Dense(3, "tanh")),
            layers.SimpleRNN(3),
            layers.Dense(CLASSES),
        ]
    )
    a = case(model, (4, 2))
    traces = []

    @tf.function(input_signature=[tf.TensorSpec([None, *part.shape[1:]], part.dtype) for part in rows(a)])
    def found(x: tf.Tensor, y: tf.Tensor, example_weights: tf.Tensor) -> Any:
        traces.append(1)
        return clipped(Case(model, x, y, example_weights), microbatch_size=microbatch_size)

    for size in (4, 1, 3):
        part = a.part(list(range(size)))
        assert_naive(part, found=found(*rows(part)))
    assert len(traces) == 1


@pytest.mark.slow
@random(20)
@given(st.data(), st.sampled_from(CLIPPINGS), st.sampled_from([None, 2]))
def test_random_models_in_a_graph(data: Any, clipping: str, microbatch_size: int | None) -> None:
    a = random_case(data.draw)
    assert_naive(a, clipping, found=tf.function(lambda: clipped(a, clipping, microbatch_size=microbatch_size))())


def rows(a: Case) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    return a.x, a.y, a.example_weights


def test_masked_examples_count_as_absent() -> None:
    a = dense_model()
    for clipping in CLIPPINGS:
        masked = clipped(a, clipping)
        without = clipped(a.part([0, 2, 3]), clipping)
        for one, other in zip(masked.sums, without.sums, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_zero_gradients() -> None:
    a = dense_model()
    dead = tf.keras.Sequential([layers.Dense(4, "relu", input_shape=(5,)), layers.Dense(CLASSES, use_bias=False)])
    dead.layers[0].bias.assign(tf.fill([4], -1e3))
    for clipping in CLIPPINGS:
        nobody = clipped(Case(a.model, a.x, a.y, tf.zeros(4)), clipping)
        of_dead = clipped(Case(dead, a.x, a.y, a.example_weights), clipping)
        for found in (nobody, of_dead):
            assert all(np.array_equal(part, np.zeros(part.shape)) for part in found.sums)
            np.testing.assert_allclose(found.norms, 0.0, atol=1e-12)


def test_weights_that_the_loss_does_not_reach() -> None:
    inputs = tf.keras.Input((5,))
    hidden = layers.Dense(4, "tanh")(inputs)
    model = tf.keras.Model(inputs, [layers.Dense(CLASSES)(hidden), layers.Dense(2)(hidden)])
    for clipping in CLIPPINGS:
        assert_naive(case(model, (5,)), clipping, losses_of=lambda outputs, y: losses_of(outputs[0], y))


def test_penalties_depend_on_the_weights_alone() -> None:
    model = tf.keras.Sequential(
        [layers.Dense(4, input_shape=(5,), kernel_regularizer="l2"), layers.Dense(CLASSES, bias_regularizer="l1")]
    )
    a = case(model, (5,))
    with tf.GradientTape() as tape:
        penalty = tf.add_n(model.losses)
    expected = tape.gradient(penalty, model.trainable_variables)
    assert [part is None for part in expected] == [False, True, True, False]
    for options in ({}, {"microbatch_size": 3}):
        found = clipped(a, **options).penalties
        for one, other in zip(found, expected, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                np.testing.assert_allclose(one, other, rtol=1e-6)


def test_no_penalties() -> None:
    a = dense_model()
    assert clipped(a).penalties == [None] * len(a.model.trainable_variables)


def test_nested_inputs_and_outputs() -> None:
    one, other = tf.keras.Input((3,), name="one"), tf.keras.Input((2, 2), name="other")
    shared = layers.Dense(2, "tanh")
    hidden = layers.Concatenate()([layers.Dense(2)(one), layers.Flatten()(shared(shared(other)))])
    model = tf.keras.Model({"one": one, "other": other}, {"a": layers.Dense(CLASSES)(hidden), "b": hidden})
    with_random_weights(model, 0)
    generator = np.random.default_rng(0)
    x = {
        name: tf.constant(generator.normal(size=(5, *s)), tf.float32) for name, s in [("one", (3,)), ("other", (2, 2))]
    }
    a = Case(model, x, tf.constant([0, 1, 2, 0, 1]), tf.ones(5))

    def of_both(outputs: Any, y: tf.Tensor) -> tf.Tensor:
        return losses_of(outputs["a"], y) + tf.reduce_sum(tf.square(outputs["b"]), axis=1)

    for clipping in CLIPPINGS:
        for size in (None, 2):
            assert_naive(a, clipping, losses_of=of_both, microbatch_size=size)
    check_model(model, tf.nest.map_structure(lambda part: part[:3], x))
    outputs = clipped(a, losses_of=of_both, microbatch_size=2).outputs
    np.testing.assert_allclose(outputs["a"], model(x)["a"], rtol=1e-5, atol=1e-6)


class CalledInALoop(tf.keras.Model):
    """A model that takes one dense layer three times, and another model inside of it twice."""

    def __init__(self) -> None:
        super().__init__()
        self.step = layers.Dense(3, "tanh")
        self.inner = tf.keras.Sequential([layers.Dense(3, "tanh"), layers.LayerNormalization()])
        self.last = layers.Dense(CLASSES)

    def call(self, x: tf.Tensor) -> tf.Tensor:
        for _ in range(3):
            x = self.step(x)
        return self.last(self.inner(self.inner(x)))


def test_subclassed_model() -> None:
    model = CalledInALoop()
    model(tf.zeros((1, 3)))
    a = case(model, (3,))
    check_model(model, a.x[:3])
    for clipping in CLIPPINGS:
        assert_naive(a, clipping, clip_norm=0.1)


def test_sequential_that_builds_itself_anew_at_another_batch_size() -> None:
    """Keras then calls the layers on placeholders, which are no uses of the weights."""
    model = tf.keras.Sequential([layers.Dense(4, "tanh"), Gated(), layers.Dense(CLASSES)])
    model(tf.zeros((1, 5)))
    a = case(model, (5,))
    check_model(model, a.x[:3])
    for clipping in CLIPPINGS:
        assert_naive(a, clipping)


def test_unknown_sequence_lengths() -> None:
    inputs = tf.keras.Input((None, 2))
    x = layers.TimeDistributed(layers.Dense(3, "tanh"))(layers.Conv1D(2, 2, padding="causal")(inputs))
    x = layers.Add()([x, layers.MultiHeadAttention(1, 2)(x, x)])
    model = tf.keras.Model(inputs, layers.Dense(CLASSES)(layers.LSTM(3)(x)))
    a = case(model, (6, 2))
    spec = [tf.TensorSpec([None, None, 2]), tf.TensorSpec([None], tf.int64), tf.TensorSpec([None])]
    found = tf.function(lambda *parts: clipped(Case(model, *parts)), input_signature=spec)
    assert_naive(a, found=found(*rows(a)))


def test_recurrent_layers_that_start_from_given_states() -> None:
    inputs = tf.keras.Input((4, 2))
    _, *states = layers.LSTM(3, return_state=True)(inputs)
    x = layers.LSTM(3)(inputs, initial_state=states)
    a = case(tf.keras.Model(inputs, layers.Dense(CLASSES)(x)), (4, 2))
    check_model(a.model, a.x[:3])
    assert_naive(a)


def drops(rate: float = 0.5) -> tf.keras.Model:
    return tf.keras.Sequential(
        [
            layers.Input((4, 3)),
            layers.Dense(4, "tanh", kernel_regularizer="l2"),
            layers.Dropout(rate),
            layers.SpatialDropout1D(rate),
            Gated(),
            layers.Flatten(),
            layers.GaussianNoise(rate),
            layers.Dense(CLASSES),
        ]
    )


@pytest.mark.parametrize(("clipping", "size"), [("flat", None), ("flat", 2), ("per_layer", 2), ("automatic", 2)])
def test_functional_model(clipping: str, size: int | None) -> None:
    """Tensors in the place of variables, in a graph; random layers follow the microbatch's seed."""
    functional = FunctionalModel(drops, (4, 3), CLASSES)
    template = functional.to_keras(functional.initial_weights(0))
    generator = np.random.default_rng(1)
    start = [tf.constant(w + 0.3 * generator.normal(size=w.shape), tf.float32) for w in functional.initial_weights(0)]
    x = tf.constant(generator.normal(size=(4, 4, 3)), tf.float32)
    y, example_weights = tf.constant([0, 1, 2, 0]), tf.constant([1.0, 0.0, 2.0, 0.5])
    width = size or 4

    @tf.function(autograph=False)
    def by_book_keeping(start: Any) -> Any:
        return clipped_gradients(
            lambda index: functional.bind(start, tf.stack([3 + index, 7])),
            start,
            losses_of,
            x,
            y,
            example_weights,
            clip_norm=0.3,
            clipping=clipping,  # type: ignore[arg-type]
            microbatch_size=size,
        ).sums

    @tf.function(autograph=False)
    def by_backward_pass(start: Any, example: tf.Tensor) -> Any:
        """One example's gradient, within its microbatch: what is dropped depends on an example's place in it."""
        begin = example // width * width
        part = slice(begin, begin + width)
        with tf.GradientTape() as tape:
            tape.watch(start)
            model = functional.bind(start, tf.stack([3 + example // width, 7]))
            losses = losses_of(model(x[part], training=True), y[part]) * example_weights[part]
            loss = losses[example - begin]
        return tape.gradient(loss, start)

    names = [variable.name.rpartition("/")[0] for variable in template.trainable_variables]
    gradients = [by_backward_pass(start, tf.constant(example)) for example in range(4)]
    cut = [clip([np.float64(part) for part in gradient], 0.3, clipping, names) for gradient in gradients]
    for one, *others in zip(by_book_keeping(start), *cut, strict=True):
        np.testing.assert_allclose(one, np.sum(others, axis=0), rtol=0, atol=3e-6)


def test_losses_without_an_example_axis_are_refused() -> None:
    a = dense_model()
    for wrong in (lambda o, y: tf.reduce_mean(losses_of(o, y)), lambda o, y: losses_of(o, y)[:, None]):
        with pytest.raises(InputError, match="one number for each example"):
            clipped(a, losses_of=wrong)


@pytest.mark.parametrize("by_positions", [True, False])
@pytest.mark.parametrize("by_convolution", [True, False])
def test_both_ways_of_norms_and_of_patches(
    by_positions: bool, by_convolution: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contributions, "_MULTIPLICATIONS_PER_ELEMENT", 1e9 if by_positions else 0)
    monkeypatch.setattr(rules, "_LARGEST_PATCH_BY_CONVOLUTION", 10**9 if by_convolution else 0)
    for options in (
        {"padding": "same", "strides": 2},
        {"padding": "same", "dilation_rate": 2},
        {"padding": "valid", "groups": 2, "dilation_rate": (1, 2)},
    ):
        model = tf.keras.Sequential(
            [
                layers.Input((5, 6, 2)),
                layers.Conv2D(4, (2, 3), activation="tanh", **options),
                layers.DepthwiseConv2D(2, padding="same", depth_multiplier=2, strides=2),
                layers.Reshape((-1, 8)),
                layers.Conv1D(3, 2, padding="causal", dilation_rate=2, activation="tanh"),
                layers.Dense(2, "tanh"),
                layers.Flatten(),
                layers.Dense(CLASSES),
            ]
        )
        assert_naive(case(model, (5, 6, 2)))
