"""One example more or less changes the clipped sums by at most the clip norm, whatever the example is."""

from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st
from per_example_checks import CLIPPINGS, assert_bounded, clipped, dense_model, random, with_one_more
from random_models import CLASSES, Case, random_case, with_random_weights

layers = tf.keras.layers


@random(12)
@given(st.data(), st.sampled_from(CLIPPINGS), st.sampled_from([1e-3, 1.0, 30.0]), st.sampled_from([1.0, 1e3, 1e10]))
def test_neighbouring_minibatches(data: Any, clipping: str, clip_norm: float, scale: float) -> None:
    a = random_case(data.draw, blocks=2)
    example = a.x[0] if a.x.dtype == tf.int32 else scale * a.x[0]
    assert_bounded(a, with_one_more(a, example), clipping, clip_norm)


@pytest.mark.parametrize("clipping", CLIPPINGS)
@pytest.mark.parametrize("value", [1e20, 1e-20, 1e-38, 3e38, float("nan"), float("inf"), -float("inf")])
def test_extreme_examples(value: float, clipping: str) -> None:
    """One extreme feature or nothing else; one that makes the gradient not finite leaves nothing behind."""
    a = dense_model()
    before = clipped(a, clipping)
    for example in (tf.fill([5], value), tf.constant([value, 1.0, -2.0, 0.0, 0.5])):
        more = with_one_more(a, example)
        assert_bounded(a, more, clipping, 0.7)
        after = clipped(more, clipping)
        np.testing.assert_array_equal(np.isfinite(after.norms[:-1]), True)
        if not np.isfinite(after.norms[-1]):
            for one, other in zip(before.sums, after.sums, strict=True):
                np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)
        elif not np.isfinite(value):
            pytest.fail("an example that is not finite has a finite gradient")


@pytest.mark.parametrize("clipping", CLIPPINGS)
@pytest.mark.parametrize("loss", [1e20, 1e38, float("nan"), float("inf")])
def test_extreme_losses(loss: float, clipping: str) -> None:
    """The same where the labels are what is extreme."""
    a = dense_model()
    factors = tf.constant([1.0, 1.0, 1.0, 1.0, loss])

    def losses_of(outputs: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        return tf.reduce_sum(outputs, axis=1) * factors[: tf.shape(y)[0]]

    more = with_one_more(a, tf.ones(5))
    assert_bounded(a, more, clipping, 0.7, losses_of=losses_of)
    if not np.isfinite(loss):
        one, other = (clipped(case, clipping, losses_of=losses_of) for case in (a, more))
        for x, y in zip(one.sums, other.sums, strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-6)


def test_fast_and_slow_path_agree() -> None:
    """Beside an example that is not finite, the others are summed by another path: for every kind of contribution."""
    inputs = tf.keras.Input((4,))
    x = layers.Embedding(5, 6)(layers.Lambda(lambda z: tf.cast(tf.clip_by_value(z, 0.0, 4.0), tf.int32))(inputs))
    x = layers.Multiply()([x, layers.Reshape((4, 1))(inputs)])
    x = layers.LayerNormalization()(layers.Conv1D(2, 2, padding="same")(x))
    model = with_random_weights(tf.keras.Model(inputs, layers.Dense(CLASSES)(layers.LSTM(2)(x))), 0)
    values = tf.constant([[1.0, 2, 3, 1], [2, 2, 1, 4], [3, 1, 4, 2]])
    a = Case(model, values, tf.constant([0, 1, 2]), tf.ones(3))
    more = with_one_more(a, [2.0, float("inf"), 1.0, 3.0])
    for clipping in CLIPPINGS:
        one, other = clipped(a, clipping), clipped(more, clipping)
        assert not np.isfinite(other.norms[-1])
        for x, y in zip(one.sums, other.sums, strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-6)
