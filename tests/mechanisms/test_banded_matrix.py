"""Banded matrix factorisation: the sensitivity of all rounds together, and noise that is C^-1 z."""

import math
from typing import Any

import dp_accounting
import numpy as np
import pytest
import tensorflow as tf
from guarantee_checks import check_denominator, check_wicked_neighbours, check_wicked_records, without_noise
from hypothesis import given, settings
from hypothesis import strategies as st
from query_checks import check_covariance, check_resumes, check_runs_in_graph, check_seeds, noise_of, planned, run

from dpfl.errors import InputError
from dpfl.mechanisms import Gaussian
from dpfl.mechanisms.banded_matrix import BandedMatrix
from dpfl.mechanisms.strategies import as_matrix, banded_strategy
from dpfl.noise import normal_like, round_seed
from dpfl.randomness import Purpose, stateless_seed
from dpfl.sampling import BallsInBins, Cyclic, CyclicPoisson, Everyone, FixedSize, Poisson

SETTINGS = settings(max_examples=40, deadline=None, derandomize=True)


def plan_of(rounds: int = 7, bands: int = 3, noise: float = 1.5, momentum: float = 0.0, sampler: Any = None) -> Any:
    mechanism = BandedMatrix(clip_norm=0.7, bands=bands, momentum=momentum)
    return planned(mechanism, sampler or Cyclic(cohort=20), 60, rounds, noise)


def strategy(rounds: int, bands: int) -> np.ndarray:
    return as_matrix(banded_strategy(rounds, bands))


def stated_sensitivity(bands: int, period: int, rounds: int) -> float:
    """What the event of a cyclic sampler says, in clip norms."""
    event = BandedMatrix(clip_norm=1, bands=bands).event(1.0, Cyclic(cohort=1), period, rounds, None)
    if isinstance(event, dp_accounting.SelfComposedDpEvent):
        assert event.event == dp_accounting.GaussianDpEvent(1.0)
        return math.sqrt(event.count)
    return 1 / event.noise_multiplier


def true_sensitivity(matrix: np.ndarray, period: int) -> float:
    """The largest over phases of sqrt(sum of |C^T C| over pairs of the client's rounds)."""
    gram = np.abs(matrix.T @ matrix)
    return max(math.sqrt(gram[phase::period, phase::period].sum()) for phase in range(min(period, len(matrix))))


class TestSensitivity:
    @SETTINGS
    @given(st.integers(1, 30), st.integers(1, 12), st.integers(1, 12), st.integers(0, 15))
    def test_is_at_least_the_true_one_whatever_the_rest_of_the_run(self, rounds, bands, period, more):
        matrix = strategy(rounds + more, bands)[:rounds, :rounds]
        assert true_sensitivity(matrix, period) <= stated_sensitivity(bands, period, rounds) * (1 + 1e-9)

    @pytest.mark.parametrize(("bands", "period"), [(1, 1), (3, 3), (4, 5), (8, 8)])
    def test_is_exact_where_columns_do_not_overlap(self, bands, period):
        assert true_sensitivity(strategy(24, bands), period) == pytest.approx(stated_sensitivity(bands, period, 24))

    def test_by_hand_where_they_do(self):
        # 8 bands, a client every third round: of its 10 rounds, every third is alone: 4 + 3 + 3.
        assert stated_sensitivity(8, 3, 30) == pytest.approx(2 + 2 * math.sqrt(3))

    @settings(SETTINGS, max_examples=25)
    @given(st.integers(2, 12), st.integers(1, 6), st.integers(1, 6), st.data())
    def test_bounds_what_one_client_does(self, rounds, bands, period, data):
        value = st.floats(width=32) | st.floats(-10, 10, width=32)
        updates = st.lists(st.lists(value, min_size=2, max_size=2), min_size=rounds, max_size=rounds)
        theirs, others = np.array(data.draw(updates), np.float32), np.array(data.draw(updates), np.float32)
        phase = data.draw(st.integers(0, period - 1))
        taken = [t for t in range(phase, rounds, period) if data.draw(st.booleans())]
        plan = without_noise(plan_of(rounds, bands))
        without = [[[others[t]]] for t in range(rounds)]
        with_client = [[[others[t]], [theirs[t]]] if t in taken else [[others[t]]] for t in range(rounds)]
        query, template = plan.query(0, [tf.zeros(2)]), [tf.zeros(2)]
        moved = run(query, with_client, template)[0] - run(query, without, template)[0]
        moved = strategy(rounds, bands) @ moved * plan.expected_cohort / 0.7
        assert np.linalg.norm(moved) <= stated_sensitivity(bands, period, rounds) * (1 + 1e-5)

    def test_is_reached(self):
        plan = without_noise(plan_of(9, 3))
        updates = [[[np.float32([3, 4])]] if t % 3 == 0 else [] for t in range(9)]
        moved = run(plan.query(0, [tf.zeros(2)]), updates, [tf.zeros(2)])[0] * plan.expected_cohort / 0.7
        assert np.linalg.norm(strategy(9, 3) @ moved) == pytest.approx(stated_sensitivity(3, 3, 9), rel=1e-5)

    def test_of_wicked_updates(self):
        check_wicked_records(plan_of())
        check_wicked_neighbours(plan_of())

    def test_denominator_is_the_expected_cohort(self):
        check_denominator(plan_of())


class TestAccounting:
    @pytest.mark.parametrize("groups", [4, 5])
    def test_is_amplified_where_groups_take_turns(self, groups):
        # 2306.08153, theorem 4; jax-privacy's amplified_bandmf_event: ceil(iterations / bands) DP-SGD steps at the
        # rate within a group.
        event = BandedMatrix(clip_norm=1, bands=4).event(1.3, CyclicPoisson(cohort=10, groups=groups), 1000, 101, None)
        release = dp_accounting.PoissonSampledDpEvent(10 * groups / 1000, dp_accounting.GaussianDpEvent(1.3))
        assert event == dp_accounting.SelfComposedDpEvent(release, math.ceil(101 / groups))

    def test_is_not_amplified_where_columns_overlap(self):
        event = BandedMatrix(clip_norm=1, bands=6).event(1.3, CyclicPoisson(cohort=10, groups=5), 1000, 100, None)
        assert event == dp_accounting.GaussianDpEvent(pytest.approx(1.3 / (2 * math.sqrt(10))))

    @pytest.mark.parametrize(
        "sampler",
        [
            Poisson(cohort=10),
            FixedSize(cohort=10),
            BallsInBins(cohort=10),
            Everyone(),
            Cyclic(cohort=10),
            CyclicPoisson(cohort=10, groups=3),
        ],
    )
    def test_one_band_is_dp_sgd(self, sampler):
        arguments = (1.3, sampler, 100, 17, None)
        assert BandedMatrix(clip_norm=1, bands=1).event(*arguments) == Gaussian(clip_norm=1).event(*arguments)

    @pytest.mark.parametrize("sampler", [Poisson(cohort=10), FixedSize(cohort=10), BallsInBins(cohort=10)])
    def test_refuses_samplers_that_separate_nothing(self, sampler):
        with pytest.raises(InputError, match=r"2 bands needs a sampler .* cyclic_poisson with at least 2 groups"):
            BandedMatrix(clip_norm=1, bands=2).check_sampler(sampler, 100, sampler.relations[0])

    @pytest.mark.parametrize(("bands", "period"), [(1, 4), (4, 4), (9, 4), (5, 1)])
    def test_never_falls_from_round_to_round(self, bands, period):
        spent = [stated_sensitivity(bands, period, rounds) for rounds in range(1, 60)]
        assert np.all(np.diff(spent) >= 0)

    @pytest.mark.parametrize("wrong", [{"bands": 0}, {"bands": 2, "momentum": 1.0}, {"bands": 2, "momentum": -0.1}])
    def test_fields_out_of_range(self, wrong):
        with pytest.raises(InputError, match=list(wrong)[-1]):
            BandedMatrix(clip_norm=1, **wrong)


class TestNoise:
    @pytest.mark.parametrize(("rounds", "bands", "momentum"), [(12, 1, 0.0), (12, 4, 0.0), (12, 12, 0.9), (5, 20, 0.0)])
    def test_is_the_inverse_strategy_times_the_rounds_draws(self, rounds, bands, momentum):
        plan = plan_of(rounds, bands, momentum=momentum)
        template = [tf.zeros(50)]
        scale = plan.noise_multiplier * 0.7 / plan.expected_cohort
        noise = noise_of(plan.query(8, template), rounds, 50) / scale
        seed = tf.constant(stateless_seed(8, Purpose.NOISE))
        draws = [normal_like(template, round_seed(seed, tf.constant(t)))[0].numpy() for t in range(rounds)]
        matrix = as_matrix(banded_strategy(rounds, bands, momentum))
        np.testing.assert_allclose(matrix @ noise, draws, atol=1e-5)

    @pytest.mark.parametrize(("rounds", "bands"), [(12, 1), (12, 4), (10, 10)])
    def test_covariance_of_increments_and_prefix_sums(self, rounds, bands):
        size, plan = 20_000, plan_of(rounds, bands)
        scale = plan.noise_multiplier * 0.7 / plan.expected_cohort
        noise = noise_of(plan.query(3, [tf.zeros(size)]), rounds, size) / scale
        inverse = np.linalg.inv(strategy(rounds, bands))
        check_covariance(noise, inverse @ inverse.T)
        errors = np.cumsum(inverse, axis=0)
        check_covariance(np.cumsum(noise, axis=0), errors @ errors.T)

    def test_of_one_band_is_the_gaussian_mechanisms_to_the_bit(self):
        template = [tf.zeros(30), tf.zeros((2, 2))]
        updates = [[[np.full(30, t, np.float32), np.ones((2, 2), np.float32)]] for t in range(5)]
        arguments = (Cyclic(cohort=20), 60, 5)
        mine, _ = run(plan_of(5, 1).query(4, template), updates, template)
        theirs, _ = run(planned(Gaussian(clip_norm=0.7), *arguments).query(4), updates, template)
        np.testing.assert_array_equal(mine, theirs)

    def test_is_a_function_of_the_seed(self):
        plan = plan_of(4, 1)
        check_seeds(plan)
        correlated = plan_of(4, 3)
        first, again = (noise_of(correlated.query(1, [tf.zeros(9)]), 4, 9) for _ in range(2))
        np.testing.assert_array_equal(first, again)

    def test_stays_bounded_in_float32_over_a_long_run(self):
        # The recursion neither blows up nor drifts: over 500 rounds it stays with float64's.
        plan = plan_of(500, 16)
        scale = plan.noise_multiplier * 0.7 / plan.expected_cohort
        noise = noise_of(plan.query(8, [tf.zeros(3)]), 500, 3) / scale
        seed = tf.constant(stateless_seed(8, Purpose.NOISE))
        draws = [normal_like([tf.zeros(3)], round_seed(seed, tf.constant(t)))[0].numpy() for t in range(500)]
        np.testing.assert_allclose(noise, np.linalg.solve(strategy(500, 16), np.array(draws)), atol=1e-4)


class TestState:
    @pytest.mark.parametrize("bands", [1, 4])
    def test_runs_in_graph(self, bands):
        check_runs_in_graph(plan_of(7, bands), clients=3)

    @pytest.mark.parametrize("bands", [1, 4])
    def test_resumes(self, bands):
        check_resumes(plan_of(7, bands))

    def test_keeps_one_round_less_than_bands(self):
        plan = plan_of(20, 5)
        state = plan.query(0, [tf.TensorSpec([2, 3])]).initial_global_state().numerator_state
        assert [past.shape.as_list() for past in state.past] == [[4, 2, 3]]
        assert plan.structure == ("banded_matrix", 20, 5)

    def test_needs_a_template(self):
        with pytest.raises(InputError, match="banded_matrix keeps past noise"):
            plan_of().query(0)

    def test_one_graph_serves_any_momentum(self):
        query, other = (plan_of(6, 3, momentum=momentum).query(1, [tf.zeros(3)]) for momentum in (0.0, 0.9))
        expected, _ = run(other, [[]] * 6, [tf.zeros(3)])
        found, _ = run(query, [[]] * 6, [tf.zeros(3)], other.initial_global_state())
        np.testing.assert_array_equal(found, expected)

    def test_more_rounds_than_planned_are_refused(self):
        with pytest.raises(tf.errors.InvalidArgumentError):
            noise_of(plan_of(6, 3).query(1, [tf.zeros(3)]), 7, 3)
