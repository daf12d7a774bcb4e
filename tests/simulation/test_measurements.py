"""What a round measures: quantiles of norms, signal to noise and bytes, against what clients that train alone give."""

import math

import numpy as np
import pytest
import tensorflow as tf

import dpfl
from dpfl.simulation.run import _ENGINES, _graph_engine, _server_step, _start, run_together
from dpfl.simulation.state import NORM_QUANTILES, norm_counts, norm_quantile


@pytest.fixture(scope="module")
def base() -> dpfl.Experiment:
    return dpfl.Experiment(
        data=dpfl.data.digits(clients=60),
        local=dpfl.ClientTraining(learning_rate=0.3, batch_size=5, steps=2),
        mechanism=dpfl.Gaussian(clip_norm=0.5),
        privacy=dpfl.Privacy(epsilon=8, delta=1e-2),
        sampler=dpfl.Poisson(cohort=40),
        rounds=1,
    )


def sums_of_each_client(experiment: dpfl.Experiment) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """Weights before the first round, and the updates of its clients, each trained as a cohort of one without clip."""
    plain = experiment.replace(mechanism=dpfl.NoMechanism(), **{"privacy.epsilon": None})
    plan = plain.plan()
    cohort = plan.sampler.clients(0, 0, plan.population)
    updates = []
    for client in cohort:
        model, engine = _graph_engine(plain, plan)
        server = _server_step(plain, plan, model)
        state = engine.initial_state(plan, server, 0)
        before = [np.array(weight) for weight in state.weights]
        settings = engine.settings(plain.local, server, 0, None)
        after, _ = engine.run_rounds(state, [np.array([client], np.int32)], settings)
        # The mean divides by the expected cohort.
        updates.append(
            np.concatenate(
                [
                    plan.expected_cohort * (np.array(new) - old).ravel()
                    for new, old in zip(after.weights, before, strict=True)
                ]
            )
        )
    return updates, before, cohort


@pytest.mark.parametrize("model", ["softmax", "mlp", "cnn"])
def test_quantiles_and_signal_are_those_of_the_clients(base: dpfl.Experiment, model: str) -> None:
    experiment = base.replace(model=model)
    updates, _, cohort = sums_of_each_client(experiment)
    norms = np.array([np.linalg.norm(update) for update in updates])
    result = experiment.run(0, progress=False)
    (row,) = result.history
    assert row["cohort"] == len(cohort)
    for name, level in NORM_QUANTILES.items():
        low, high = np.quantile(norms, level, method="lower"), np.quantile(norms, level, method="higher")
        assert low / 1.1 < row[name] < high * 1.1
    np.testing.assert_allclose(row["update_norm"], norms.mean(), rtol=1e-3)
    clipped = sum(update * min(1, 0.5 / norm) for update, norm in zip(updates, norms, strict=True))
    # The noise of one round is one draw: its norm is about its standard deviation times the root of the dimension.
    expected = experiment.plan().noise_multiplier * 0.5 * math.sqrt(len(clipped))
    spread = 6 / math.sqrt(2 * len(clipped))  # six standard deviations, of a seed that is fixed
    assert row["signal_to_noise"] == pytest.approx(np.linalg.norm(clipped) / expected, rel=spread + 1e-3)
    assert result.record["signal_to_noise"] == row["signal_to_noise"]
    assert row["bytes_up"] == row["bytes_down"] == 4 * len(clipped) * len(cohort) == result.record["bytes_up"]
    assert result.record["final_clip_norm"] == 0.5


def test_what_is_measured_does_not_depend_on_what_trains_beside_it(base: dpfl.Experiment) -> None:
    experiments = [base.replace(rounds=3, **{"mechanism.clip_norm": clip}) for clip in (0.1, 0.5)]
    together = run_together([(one, one.plan()) for one in experiments], 0, lambda rounds: None)
    for experiment, result in zip(experiments, together, strict=True):
        alone = experiment.run(0, progress=False)
        assert [row.keys() for row in alone.history] == [row.keys() for row in result.history]
        for one, other in zip(alone.history, result.history, strict=True):
            for name in (*NORM_QUANTILES, "signal_to_noise", "bytes_up"):
                assert one[name] == pytest.approx(other[name], rel=1e-3)


def test_parts_of_a_cohort_add_up(base: dpfl.Experiment) -> None:
    plan = base.plan()
    _, rounds = _start(base, plan, None, 0)
    model, engine = _graph_engine(base, plan)
    server = _server_step(base, plan, model)
    state, settings = engine.initial_state(plan, server, 0), engine.settings(base.local, server, 0, None)
    cohort = plan.sampler.clients(0, 0, plan.population)
    whole = rounds.run([cohort])
    sums = [engine.partial_sum(state, part, settings) for part in (cohort[:7], cohort[7:], cohort[:0])]
    _, parts = engine.finish(state, sums, len(cohort), settings)
    assert whole.keys() == parts.keys()
    for name in (*NORM_QUANTILES, "signal_to_noise"):
        np.testing.assert_allclose(whole[name], parts[name], rtol=1e-4)


def test_where_there_is_nothing_to_measure(base: dpfl.Experiment) -> None:
    plan = base.plan()
    _, rounds = _start(base, plan, None, 0)
    measured = rounds.run([np.zeros(0, np.int32)])
    assert all(np.isnan(measured[name][0]) for name in NORM_QUANTILES)
    assert measured["signal_to_noise"][0] == 0
    free = base.replace(**{"privacy.epsilon": None}).run(0, progress=False)
    assert math.isnan(free.history[0]["signal_to_noise"])
    assert free.record["signal_to_noise"] is None
    for mechanism in (dpfl.NoMechanism(), dpfl.NoMechanism(weighting="examples")):
        plain = base.replace(mechanism=mechanism, **{"privacy.epsilon": None}).run(0, progress=False)
        assert math.isnan(plain.history[0]["signal_to_noise"])
        assert plain.record["final_clip_norm"] is None
    local = base.replace(mechanism=dpfl.LocalGaussian(clip_norm=0.5), **{"privacy.relation": "replace_one"})
    assert math.isnan(local.run(0, progress=False).history[0]["signal_to_noise"])


def test_adaptive_clipping_says_where_it_came_to(base: dpfl.Experiment) -> None:
    mechanism = dpfl.AdaptiveClipping(clip_norm=0.5, quantile=0.7, count_noise=1.0)
    result = base.replace(mechanism=mechanism, rounds=5).run(0, progress=False)
    assert result.record["clip_quantile"] == 0.7
    assert result.record["final_clip_norm"] == result.history[-1]["clip_norm"] != 0.5
    assert result.record["signal_to_noise"] > 0


def test_integers_of_the_distributed_mechanisms_are_counted_by_their_bits(base: dpfl.Experiment) -> None:
    mechanism = dpfl.DistributedSkellam(clip_norm=0.5, bits=18)
    experiment = base.replace(
        mechanism=mechanism, sampler=dpfl.FixedSize(cohort=40), **{"privacy.relation": "replace_one"}
    )
    (row,) = experiment.run(0, progress=False).history
    assert row["bytes_up"] == 40 * 1024 * 18 // 8  # 650 weights, filled up to 1,024
    assert row["bytes_down"] == 40 * 650 * 4
    assert math.isnan(row["signal_to_noise"])


@pytest.mark.parametrize("level", [0.1, 0.5, 0.9])
def test_quantiles_from_counts_are_within_five_percent(level: float) -> None:
    norms = np.random.default_rng(3).lognormal(-1, 2, size=(4_001, 2)).astype(np.float32)
    counts = norm_counts(tf.constant(norms), tf.constant(np.isfinite(norms))).numpy()
    np.testing.assert_allclose(norm_quantile(counts, level), np.quantile(norms, level, axis=0), rtol=0.05)
    halves = [norm_counts(tf.constant(part), tf.fill(part.shape, True)).numpy() for part in np.split(norms[1:], 2)]
    np.testing.assert_allclose(norm_quantile(sum(halves), level), np.quantile(norms[1:], level, axis=0), rtol=0.05)


def test_norms_beyond_the_bins_and_such_that_are_not_finite() -> None:
    norms = tf.constant([0.0, 1e-20, 1e20, float("nan"), float("inf"), 1.0])
    counts = norm_counts(norms, tf.math.is_finite(norms)).numpy()
    assert counts.sum() == 4
    assert counts[0] == 2
    assert counts[-1] == 1
    assert np.isnan(norm_quantile(np.zeros(400), 0.5))


def test_plans_that_share_a_graph_divide_by_their_own_cohort(base: dpfl.Experiment) -> None:
    """Whoever was traced first: the ratio is that of the run by itself."""
    larger = base.replace(sampler=dpfl.Poisson(cohort=20))
    _ENGINES.clear()
    alone = larger.run(0, progress=False).history
    _ENGINES.clear()
    base.run(0, progress=False)
    after = larger.run(0, progress=False).history
    assert [row["signal_to_noise"] for row in after] == pytest.approx([row["signal_to_noise"] for row in alone])
