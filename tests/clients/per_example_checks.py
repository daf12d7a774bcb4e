"""What must hold of clipped sums, as checks that can be run on the true code and on code that is broken on purpose."""

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
from hypothesis import HealthCheck, Phase, settings
from naive_gradients import layer_names, naive_clipped_gradients, norm
from random_models import CLASSES, TOKENS, Case, Gated, case

from dpfl.clients.per_example import ClippedGradients, clipped_gradients

layers = tf.keras.layers
CLIPPINGS = ("flat", "per_layer", "automatic")


def random(examples: int) -> settings:
    """The same examples at every run; a failure is not shrunk, which would take longer than looking at it."""
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )


def losses_of(outputs: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
    """Cross-entropies."""
    return tf.nn.sparse_softmax_cross_entropy_with_logits(labels=y, logits=outputs)


def clipped(a: Case, clipping: Any = "flat", clip_norm: float = 0.7, **options: Any) -> ClippedGradients:
    """The code under test, on a case."""
    return clipped_gradients(
        lambda _: a.model,
        a.model.trainable_variables,
        options.pop("losses_of", losses_of),
        a.x,
        a.y,
        a.example_weights,
        clip_norm=clip_norm,
        clipping=clipping,
        **options,
    )


def assert_naive(a: Case, clipping: str = "flat", clip_norm: float = 0.7, found: Any = None, **options: Any) -> None:
    """The clipped sums, norms and losses are those of a loop over the examples.

    To 1e-5 of the largest element of all clipped gradients. Not of each element, nor of each weight: where
    contributions cancel, as they do exactly for the bias of attention's keys, only rounding errors are left to compare.
    """
    found = found or clipped(a, clipping, clip_norm, **options)
    expected = naive_clipped_gradients(
        lambda x: a.model(x, training=True),
        a.model.trainable_variables,
        options.get("losses_of", losses_of),
        a.x,
        a.y,
        a.example_weights,
        clip_norm=clip_norm,
        clipping=clipping,
        layers=layer_names(a.model),
    )
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.norms, expected.norms, rtol=1e-4, atol=1e-6)
    for variable, one, other in zip(a.model.trainable_variables, found.sums, expected.sums, strict=True):
        assert one.shape == variable.shape
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * expected.largest + 1e-12, err_msg=variable.name)


def assert_bounded(a: Case, changed: Case, clipping: str, clip_norm: float, **options: Any) -> None:
    """The sums of `a` and of `changed`, which has one example more, differ by the clip norm at most."""
    one, other = clipped(a, clipping, clip_norm, **options), clipped(changed, clipping, clip_norm, **options)
    difference = [np.float64(x) - np.float64(y) for x, y in zip(one.sums, other.sums, strict=True)]
    assert norm(difference) <= clip_norm * (1 + 1e-5)


def dense_model() -> Case:
    """Two dense layers with biases."""
    model = tf.keras.Sequential([layers.Dense(4, "tanh", input_shape=(5,)), layers.Dense(CLASSES)])
    return case(model, (5,))


def check_dense() -> None:
    for clipping in CLIPPINGS:
        assert_naive(dense_model(), clipping)


def check_example_weights() -> None:
    a = dense_model()
    for weights in ([0.3, 0.0, 3.0, 1.0], [5.0, 0.1, 0.0, 0.0]):
        for clipping in CLIPPINGS:
            assert_naive(Case(a.model, a.x, a.y, tf.constant(weights)), clipping)


def check_shared_layer() -> None:
    inputs = tf.keras.Input((4,))
    shared = layers.Dense(4, "tanh")
    a = case(tf.keras.Model(inputs, layers.Dense(CLASSES)(shared(shared(inputs)))), (4,))
    for clipping in CLIPPINGS:
        assert_naive(a, clipping, clip_norm=0.3)


def check_repeated_tokens() -> None:
    model = tf.keras.Sequential([layers.Embedding(TOKENS, 3, input_length=7), layers.Flatten(), layers.Dense(CLASSES)])
    for clipping in CLIPPINGS:
        assert_naive(case(model, (7, 0)), clipping, clip_norm=0.3)


def check_microbatches() -> None:
    a = dense_model()
    for size in (1, 2, 3, 4, 9):
        assert_naive(a, microbatch_size=size)


def check_convolution() -> None:
    model = tf.keras.Sequential(
        [layers.Conv2D(2, 2, activation="tanh", input_shape=(4, 4, 2)), layers.Flatten(), layers.Dense(CLASSES)]
    )
    for clipping in CLIPPINGS:
        assert_naive(case(model, (4, 4, 2)), clipping)


def check_recurrent() -> None:
    model = tf.keras.Sequential([layers.GRU(3, input_shape=(4, 2)), layers.Dense(CLASSES)])
    assert_naive(case(model, (4, 2)))


def check_normalization() -> None:
    model = tf.keras.Sequential([layers.LayerNormalization(input_shape=(5,)), layers.Dense(CLASSES)])
    assert_naive(case(model, (5,)))


def check_general_rule() -> None:
    model = tf.keras.Sequential([layers.Dense(3, input_shape=(5,)), Gated(), layers.Dense(CLASSES)])
    assert_naive(case(model, (5,)))


def check_sensitivity() -> None:
    a = dense_model()
    for clipping in CLIPPINGS:
        for clip_norm in (0.01, 1.0):
            for scale in (1e-20, 1e-3, 1.0, 1e3, 1e20):
                more = with_one_more(a, tf.fill([5], scale))
                assert_bounded(a, more, clipping, clip_norm)


def with_one_more(a: Case, example: Any, label: int = 0) -> Case:
    """The neighbouring minibatch with this example as well."""
    return Case(
        a.model,
        tf.concat([a.x, tf.cast(example, a.x.dtype)[None]], axis=0),
        tf.concat([a.y, tf.cast([label], a.y.dtype)], axis=0),
        tf.concat([a.example_weights, [1.0]], axis=0),
    )


def check_not_finite() -> None:
    """An example that is not finite counts as zero, and leaves the others as they are."""
    a = dense_model()
    for bad in (float("nan"), float("inf"), -float("inf")):
        for clipping in CLIPPINGS:
            one, other = clipped(a, clipping), clipped(with_one_more(a, tf.fill([5], bad)), clipping)
            assert not np.isfinite(other.norms[-1])
            for x, y in zip(one.sums, other.sums, strict=True):
                np.testing.assert_allclose(x, y, rtol=0, atol=1e-6)


class Pulls(layers.Layer):
    """Takes differences between positions: what their gradients have in common cancels."""

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        factors = np.random.default_rng(0).normal(size=inputs.shape[1]).astype(np.float32)
        return tf.tensordot(inputs, factors - factors.mean(), [[1], [0]])


def check_cancelling() -> None:
    """Rounding errors of norms by positions do not let a gradient through that is longer than the clip norm."""
    model = tf.keras.Sequential([layers.Input((8, 30)), layers.Dense(20, use_bias=False), Pulls()])
    generator = np.random.default_rng(0)
    for offset in (0.0, 1e3, 1e5):
        for clip_norm in (0.1, 3.0):
            for _ in range(5):
                x = tf.constant(offset + generator.normal(size=(1, 8, 30)), tf.float32)
                a = Case(model, x, tf.constant([0]), tf.ones(1))
                found = clipped(a, clip_norm=clip_norm, losses_of=lambda outputs, _: tf.reduce_sum(outputs, axis=1))
                assert norm(found.sums) <= clip_norm * (1 + 1e-5)


def check_cancelling_tokens() -> None:
    """The same for a row of an embedding that is looked up several times."""
    model = tf.keras.Sequential([layers.Input((8,), dtype="int32"), layers.Embedding(2, 5), Pulls()])
    generator = np.random.default_rng(0)
    for _ in range(20):
        factors = tf.constant(1e4 * generator.normal(size=5), tf.float32)
        a = Case(model, tf.ones((1, 8), tf.int32), tf.constant([0]), tf.ones(1))
        found = clipped(
            a, clip_norm=1e-4, losses_of=lambda outputs, _, factors=factors: tf.reduce_sum(outputs * factors, axis=1)
        )
        assert norm(found.sums) <= 1e-4 * (1 + 1e-5)


def check_underflow() -> None:
    """Inputs whose squares are zero in float32, times gradients that are huge, and the other way round."""
    model = tf.keras.Sequential([layers.Input((400,)), layers.Dense(3, use_bias=False)])
    for feature, factor in ((1e-20, 3e18), (3e17, 1e-19)):
        a = Case(model, tf.fill([1, 400], feature), tf.constant([0]), tf.ones(1))
        found = clipped(
            a, clip_norm=0.1, losses_of=lambda outputs, _, factor=factor: tf.reduce_sum(outputs * factor, axis=1)
        )
        assert norm(found.sums) <= 0.1 * (1 + 1e-5)


EVERY_CHECK: tuple[Callable[[], None], ...] = (
    check_dense,
    check_example_weights,
    check_shared_layer,
    check_repeated_tokens,
    check_microbatches,
    check_convolution,
    check_recurrent,
    check_normalization,
    check_general_rule,
    check_sensitivity,
    check_not_finite,
    check_cancelling,
    check_cancelling_tokens,
    check_underflow,
)
