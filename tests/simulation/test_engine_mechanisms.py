"""Every mechanism in the in-graph engine: against its query called by hand, client by client."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from dpfl.mechanisms import (
    AdaptiveClipping,
    BandedMatrix,
    DistributedDiscreteGaussian,
    DistributedSkellam,
    Gaussian,
    LocalGaussian,
    LocalLaplace,
    TreeAggregation,
)
from dpfl.sampling import Cyclic, CyclicPoisson, Everyone, Poisson
from dpfl.simulation.clients import OneByOne, SideBySide
from dpfl.simulation.state import Settings, State

COHORTS = [np.array(members, np.int32) for members in ([0, 3, 4, 17, 29], [], [5], [1, 2, 6], [7, 8, 9, 10])]
MECHANISMS: list[tuple[Any, dict[str, Any]]] = [
    (Gaussian(clip_norm=0.3, clipping="per_layer"), {}),
    (Gaussian(clip_norm=0.3, clipping="per_layer_by_size"), {}),
    (AdaptiveClipping(clip_norm=0.1, count_noise=0.5), {}),
    (TreeAggregation(clip_norm=0.3), {"sampler": Cyclic(cohort=6)}),
    (TreeAggregation(clip_norm=0.3, restart_every=2, variance_reduction="none"), {"sampler": Everyone()}),
    (BandedMatrix(clip_norm=0.3, bands=3), {"sampler": CyclicPoisson(cohort=5, groups=4)}),
    (DistributedDiscreteGaussian(clip_norm=0.3), {"sampler": Cyclic(cohort=6), "relation": "replace_special"}),
    (DistributedSkellam(clip_norm=0.3), {"sampler": Everyone(), "relation": "replace_one"}),
    (LocalGaussian(clip_norm=0.3), {"sampler": Poisson(cohort=5), "relation": "replace_special"}),
    (LocalLaplace(clip_norm=5.0), {"sampler": Poisson(cohort=5), "relation": "replace_one"}),
]
ALL = pytest.mark.parametrize(
    ("mechanism", "options"), MECHANISMS, ids=[f"{kind.name}-{index}" for index, (kind, _) in enumerate(MECHANISMS)]
)


def _by_hand(configured: Any) -> State:
    """The rounds as DESIGN has them, one client after the other."""
    way, state = configured.engine._training, configured.state
    alone = OneByOne(way._examples, way._model, way._local, way._query)
    query = configured.plan.query(configured.seed, list(state.weights))

    @tf.function(autograph=False)
    def sent(state: State, client: tf.Tensor, settings: Settings) -> Any:
        params = query.derive_sample_params(state.query)
        update = alone._train(state, params, client, settings)
        return query.preprocess_record(query.client_params(params, client), update)

    for cohort in COHORTS:
        total = query.initial_sample_state(list(state.weights))
        for client in cohort:
            record = sent(state, tf.constant(client), configured.settings)
            total = query.accumulate_preprocessed_record(total, record)
        mean, query_state, _ = query.get_noised_result(total, state.query)
        weights = tuple(weight + part for weight, part in zip(state.weights, mean, strict=True))
        state = state._replace(weights=weights, query=query_state, round=state.round + 1)
    return state


def _tolerance(mechanism: Any) -> float:
    """Float32 sums; where float32 moves a number across an integer, one of at least 256 steps per clip norm."""
    return max(2e-5, mechanism.clip_norm / 256) if hasattr(mechanism, "steps") else 2e-5


@ALL
def test_rounds_side_by_side(mechanism: Any, options: dict, setup: Callable) -> None:
    configured = setup(mechanism=mechanism, epsilon=20.0, seed=4, **options)
    assert isinstance(configured.engine._training, SideBySide)
    at_once, _ = configured.run(COHORTS)
    by_hand = _by_hand(configured)
    for one, other in zip(at_once.weights, by_hand.weights, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=_tolerance(mechanism))

    # Rounds in several calls are the same to the bit: a run can be resumed.
    state = configured.state
    for cohort in COHORTS:
        state, _ = configured.run([cohort], state)
    for one, other in zip(tf.nest.flatten(at_once), tf.nest.flatten(state), strict=True):
        np.testing.assert_array_equal(one, other)

    # Another seed has other noise (and other minibatches).
    configured.seed = 5
    others, _ = configured.run([COHORTS[0]], configured.state._replace(weights=by_hand.weights))
    configured.seed = 4
    again, _ = configured.run([COHORTS[0]], configured.state._replace(weights=by_hand.weights))
    assert np.std(others.weights[0] - again.weights[0]) > 1e-4


@pytest.mark.slow
@ALL
def test_rounds_one_by_one(mechanism: Any, options: dict, setup: Callable) -> None:
    configured = setup("cnn", mechanism=mechanism, epsilon=20.0, seed=4, **options)
    assert isinstance(configured.engine._training, OneByOne)
    state, _ = configured.run(COHORTS)
    for one, other in zip(state.weights, _by_hand(configured).weights, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=_tolerance(mechanism))


def test_the_adaptive_clip_norm_of_each_round_is_measured(setup: Callable) -> None:
    configured = setup(mechanism=AdaptiveClipping(clip_norm=1e-3, clip_learning_rate=0.5, count_noise=0.5))
    _, measured = configured.run(COHORTS)
    assert measured["clip_norm"][0] == pytest.approx(1e-3)
    # Every update is longer than the clip norm: without noise it grows with each cohort of at least half the expected.
    assert measured["clip_norm"][1] > 1e-3
    assert measured["clipped_fraction"][0] == 1
