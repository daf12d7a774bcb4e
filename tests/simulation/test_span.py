"""The first kernel in the span of a client's examples: what clipping relies on, and that it is the same kernel."""

from collections.abc import Callable

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tensorflow as tf

from dpfl.clients import ClientTraining
from dpfl.models.functional import FunctionalModel
from dpfl.simulation import span as span_module
from dpfl.simulation.clients import SideBySide
from dpfl.simulation.span import Cohort, Span

FEATURES, UNITS, CLIP = 40, 3, 0.7


def _cohort(x: np.ndarray) -> Cohort:
    """The span of one client with these examples, (examples, features)."""
    starts, sizes = tf.constant([0]), tf.constant([len(x)])
    span = Span(tf.constant(x), starts, sizes, len(x), UNITS)
    return span.cohort(tf.constant([0]), tf.zeros([1, FEATURES, UNITS]))


def _clipped(cohort: Cohort, coefficients: np.ndarray) -> np.ndarray:
    """What a client with these coefficients adds to the sum, in float64."""
    coefficients = tf.constant(coefficients[None], tf.float32)
    norm = tf.sqrt(cohort.squared_norms(coefficients))
    scale = tf.where(norm > CLIP, CLIP / norm, 1.0)
    return cohort.sum_of_scaled(coefficients, scale).numpy().astype(np.float64)


@hypothesis.given(
    seed=st.integers(0, 2**32 - 1),
    examples=st.integers(1, 12),
    size=st.floats(-3, 12),
    alike=st.floats(0, 1),
    apart=st.sampled_from([1.0, 1e-3, 1e-6, 0.0]),
)
@hypothesis.settings(max_examples=150, deadline=None)
def test_no_client_adds_more_than_the_clip_norm(
    seed: int, examples: int, size: float, alike: float, apart: float
) -> None:
    rng = np.random.default_rng(seed)
    x = alike * rng.uniform(size=FEATURES) + apart * rng.normal(size=(examples, FEATURES))
    coefficients = rng.normal(size=(examples, UNITS))
    coefficients -= alike * coefficients.mean(axis=0)  # Cancels where the examples are alike.
    added = _clipped(_cohort(x.astype(np.float32)), 10.0**size * coefficients)
    assert np.linalg.norm(added) <= CLIP * (1 + 1e-4)


def _cancelling() -> tuple[Cohort, np.ndarray]:
    """Large coefficients that cancel: no kernel update but for a large rounding error."""
    rng = np.random.default_rng(5)
    x = np.repeat(rng.uniform(size=(1, FEATURES)), 12, axis=0)
    coefficients = 1e9 * rng.normal(size=(6, UNITS))
    return _cohort(x.astype(np.float32)), rng.permutation(np.concatenate([coefficients, -coefficients]))


def test_the_margin_for_rounding_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    cohort, coefficients = _cancelling()
    assert np.linalg.norm(_clipped(cohort, coefficients)) <= CLIP * (1 + 1e-4)
    monkeypatch.setattr(span_module, "_ROUNDING", 0.0)
    assert np.linalg.norm(_clipped(cohort, coefficients)) > 1.01 * CLIP


def test_ordinary_updates_have_their_norm() -> None:
    rng = np.random.default_rng(1)
    x = rng.uniform(size=(9, FEATURES)).astype(np.float32)
    coefficients = rng.normal(size=(1, 9, UNITS)).astype(np.float32)
    norms = np.sqrt(_cohort(x).squared_norms(tf.constant(coefficients)).numpy())
    np.testing.assert_allclose(norms, [[np.linalg.norm(x.T @ coefficients[0])]], rtol=2e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_adds_nothing(value: float) -> None:
    rng = np.random.default_rng(2)
    cohort = _cohort(rng.uniform(size=(4, FEATURES)).astype(np.float32))
    coefficients = np.full((1, 4, UNITS), value, np.float32)
    assert not np.isfinite(cohort.squared_norms(tf.constant(coefficients)).numpy()).any()
    added = cohort.sum_of_scaled(tf.constant(coefficients), tf.zeros([1, 1]))
    np.testing.assert_array_equal(added, np.zeros((1, FEATURES, UNITS)))


@pytest.mark.parametrize("optimizer", ["sgd", "momentum"])
def test_gram_matrices_made_in_every_round_give_the_same(
    optimizer: str, setup: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = ClientTraining(learning_rate=0.1, batch_size=3, epochs=2, optimizer=optimizer, proximal_strength=0.1)
    cohorts = [np.array([0, 3, 4, 17, 29]), np.array([5])]
    kept, _ = setup("mlp", local=local).run(cohorts)
    monkeypatch.setattr(span_module, "_LARGEST_KEPT", 0)
    made, _ = setup("mlp", local=local).run(cohorts)
    for one, other in zip(kept.weights, made.weights, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


def test_adam_and_clipping_by_tensor_do_not_stay_in_the_span(setup: Callable) -> None:
    def spans(**options: object) -> bool:
        way = setup("mlp", **options).engine._training
        return isinstance(way, SideBySide) and way._span is not None

    assert spans()
    assert not spans(local=ClientTraining(batch_size=3, epochs=1, optimizer="adam"))
    assert not spans(clip_norm=None, mechanism=_by_tensor())


def _by_tensor() -> object:
    from dpfl import Gaussian

    return Gaussian(clip_norm=1.0, clipping="per_layer")


def _dense(**options: object) -> tf.keras.layers.Layer:
    return tf.keras.layers.Dense(4, **options)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (lambda: [tf.keras.layers.Flatten(), _dense(), _dense()], 0),
        (lambda: [tf.keras.layers.Flatten(), _dense(use_bias=False), _dense()], 0),
        (lambda: [tf.keras.layers.Flatten(), _dense(kernel_regularizer="l2"), _dense()], None),
        (lambda: [tf.keras.layers.Flatten(), _dense(trainable=False), _dense()], None),
        (lambda: [tf.keras.layers.Conv2D(2, 3), tf.keras.layers.Flatten(), _dense()], None),
        (lambda: [tf.keras.layers.Flatten(), tf.keras.layers.ReLU(), _dense()], None),
        (lambda: [_dense(), tf.keras.layers.Flatten(), _dense()], None),  # Dense along the last axis of an image.
    ],
)
def test_the_first_kernel_is_one_that_sees_the_examples_themselves(layers: Callable, expected: int | None) -> None:
    model = FunctionalModel(lambda: tf.keras.Sequential([tf.keras.layers.Input((5, 5, 1)), *layers()]), (5, 5, 1), 4)
    assert model.first_kernel == expected
