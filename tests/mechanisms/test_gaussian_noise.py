"""The noise: normal, of the right size, fresh where it must be and repeatable where it must be."""

import numpy as np
import pytest
import tensorflow as tf
from guarantee_checks import (
    changed,
    check_noise_distribution,
    check_noise_independence,
    check_noise_repeats,
    noise,
    release,
)
from scipy import stats

import dpfl.noise
from dpfl.mechanisms import Gaussian, NoMechanism
from dpfl.privacy import Privacy
from dpfl.randomness import Purpose, stateless_seed
from dpfl.sampling import Poisson

SHAPES = [(40,), (5, 8)]


class TestDistribution:
    @pytest.mark.parametrize(
        ("clip", "multiplier", "cohort"), [(0.7, 1.33, 20), (1e-3, 0.5, 1), (250.0, 8.0, 1000), (1.0, 1e-3, 3)]
    )
    def test_is_normal_with_deviation_z_clip_over_cohort(self, plan, clip, multiplier, cohort):
        check_noise_distribution(changed(plan, clip_norm=clip, noise_multiplier=multiplier, cohort=cohort))

    def test_has_the_normals_tails(self, plan):
        # Of 400,000 normal draws 25.3 lie beyond 4 deviations; outside [5, 55] with probability 1e-6.
        draws = np.concatenate([tensors[0] for tensors in noise(plan, 2, 4, [(100_000,)])])
        scale = plan.noise_multiplier * plan.clip_norm / plan.expected_cohort
        assert 5 <= np.sum(np.abs(draws) > 4 * scale) <= 55
        # The excess kurtosis of n normal draws has variance 24 / n; beyond 5 of its deviations 6e-7.
        assert abs(stats.kurtosis(draws)) <= 5 * np.sqrt(24 / len(draws))

    def test_without_a_target_there_is_none(self):
        made = Gaussian(clip_norm=1).plan(Privacy(epsilon=None), Poisson(cohort=2), 4, 3)
        nothing = NoMechanism().plan(Privacy(epsilon=None), Poisson(cohort=2), 4, 3)
        for plan in (made, nothing):
            for released in noise(plan, 0, 2, SHAPES):
                assert not any(tensor.any() for tensor in released)


class TestIndependence:
    def test_of_tensors_rounds_and_seeds(self, plan):
        check_noise_independence(plan)

    def test_tensors_of_one_shape_differ_in_every_coordinate(self, plan):
        first, second = noise(plan, 0, 1, [(1000,), (1000,)])[0]
        assert np.all(first != second)

    def test_no_value_comes_twice_in_many_rounds(self, plan):
        # 60 rounds of 20 coordinates: two of 1,200 float32 normals agree by chance with probability below 0.2,
        # two successive ones by 1e-4; whole tensors never do.
        rounds = np.stack([np.concatenate(tensors) for tensors in noise(plan, 3, 60, [(10,), (10,)])])
        tensors = rounds.reshape(120, 10)
        assert len(np.unique(tensors, axis=0)) == 120

    def test_seeds_differ(self, plan):
        released = [tuple(noise(plan, seed, 1, [(5,)])[0][0]) for seed in (0, 1, 2, 2**31, 2**32, 2**32 + 1, 2**64 - 1)]
        assert len(set(released)) == len(released)

    def test_the_rarest_draws_are_beyond_nine_standard_deviations(self, monkeypatch):
        # What limits the noise is the smallest uniform. tf.random.stateless_normal ends at 5.68, and 1e-8 of all draws
        # lie further out: too few to wait for. The smallest uniform, one of 2^-32, and the median.
        draws = self.drawn(monkeypatch, [0, 1, 2**31], [0, 0, 0])
        np.testing.assert_allclose(draws[:3], [9.4925, 6.6604, 1.1774], atol=1e-3)

    def test_the_centre_has_neither_holes_nor_heaps(self, monkeypatch):
        # The uniforms next to 1, of which float32 keeps 24 bits: 4,096 values of the 32 higher bits, each with 64
        # values of the lower ones, hit each of 15 bins of the squared radius, one step of float32 wide, as often.
        high, low = np.meshgrid(np.arange(2**32 - 4096, 2**32), (np.arange(64) + 0.5) * 2**26)
        draws = self.drawn(monkeypatch, high.reshape(-1), low.reshape(-1))
        counts, _ = np.histogram(draws[: high.size].astype(np.float64) ** 2 / 2, np.arange(16) * 2.0**-24)
        np.testing.assert_allclose(counts, 256 * 64, rtol=0.02)

    @staticmethod
    def drawn(monkeypatch, high, low):
        """What the generator makes of the higher and lower bits of the radius; the angle is zero."""

        def chosen(shape, seed, minval, maxval, dtype):
            bits = np.ones((3, int(shape[1])), np.uint32)
            bits[0, : len(high)], bits[1, : len(high)], bits[2] = high, low, 0
            return tf.constant(bits, dtype)

        monkeypatch.setattr(tf.random, "stateless_uniform", chosen)
        return dpfl.noise._normal(tf.constant(2 * len(high)), tf.constant([1, 2]), tf.constant(1.0)).numpy()

    def test_seeds_differ_beyond_32_bits(self, plan):
        # With `stateless_fold_in`, whose seeds have 32 bits, these two share the noise of all rounds.
        first, second = (
            np.stack([tensors[0] for tensors in noise(plan, seed, 3, [(5,)])]) for seed in (148918, 159761)
        )
        assert not np.any(first == second)

    def test_far_rounds_differ(self, plan):
        query = plan.query(0)
        start = query.initial_global_state()
        released = []
        for number in (0, 1, 2, 1000, 2**16, 2**31 - 2):
            numerator = start.numerator_state._replace(round=tf.constant(number))
            result, _ = release(query, [], [tf.zeros(5)], start._replace(numerator_state=numerator))
            released.append(tuple(result[0]))
        assert len(set(released)) == len(released)


class TestRepetition:
    def test_seed_and_round_decide(self, plan):
        check_noise_repeats(plan)

    def test_neither_epsilon_nor_clip_nor_cohort_change_its_direction(self, plan):
        reference = noise(plan, 4, 2, SHAPES)
        for changes in (
            {"noise_multiplier": 5.0},
            {"clip_norm": 0.01},
            {"cohort": 3},
            {"population": 1000, "rounds": 500},
        ):
            other = changed(plan, **changes)
            scales = [p.noise_multiplier * p.clip_norm / p.expected_cohort for p in (plan, other)]
            ratio = scales[1] / scales[0]
            for before, after in zip(reference, noise(other, 4, 2, SHAPES), strict=True):
                for first, second in zip(before, after, strict=True):
                    np.testing.assert_allclose(second, first * ratio, rtol=1e-5)

    def test_is_the_same_in_a_graph(self, plan):
        query = plan.query(9)
        template = [tf.zeros(shape) for shape in SHAPES]

        @tf.function
        def two_rounds() -> tuple[list[tf.Tensor], list[tf.Tensor]]:
            state = query.initial_global_state()
            first, state, _ = query.get_noised_result(query.initial_sample_state(template), state)
            second, _, _ = query.get_noised_result(query.initial_sample_state(template), state)
            return first, second

        in_graph = [[part.numpy().ravel() for part in released] for released in two_rounds()]
        for eager, compiled in zip(noise(plan, 9, 2, SHAPES), in_graph, strict=True):
            for first, second in zip(eager, compiled, strict=True):
                np.testing.assert_array_equal(np.float32(first), second)


class TestState:
    def test_counts_rounds_and_keeps_all_else(self, plan):
        query = plan.query(7)
        state = first = query.initial_global_state()
        for number in range(4):
            assert state.numerator_state.round.numpy() == number
            assert state.denominator.numpy() == plan.expected_cohort
            for name in ("clip_norm", "stddev", "seed"):
                before, after = (getattr(s.numerator_state, name).numpy() for s in (first, state))
                np.testing.assert_array_equal(before, after)
            _, state = release(query, [], [tf.zeros(3)], state)

    def test_holds_the_plans_numbers(self, plan):
        state = plan.query(7).initial_global_state().numerator_state
        assert state.clip_norm.numpy() == np.float32(plan.clip_norm)
        assert state.stddev.numpy() == np.float32(plan.noise_multiplier * plan.clip_norm)
        np.testing.assert_array_equal(state.seed.numpy(), stateless_seed(7, Purpose.NOISE))
        assert {tensor.dtype for tensor in state} == {tf.float32, tf.int32}

    def test_two_queries_of_a_plan_are_interchangeable(self, plan):
        # The engine compiles one query and is given the states of others.
        first, second = plan.query(1), changed(plan, clip_norm=3.0, cohort=5).query(2)
        record, template = [np.full(4, 9, np.float32)], [tf.zeros(4)]
        own, _ = release(second, [record], template)
        through_the_other, _ = release(first, [record], template, second.initial_global_state())
        np.testing.assert_array_equal(own[0], through_the_other[0])

    def test_the_event_is_the_noise_of_one_sum(self, plan):
        query = plan.query(0)
        total = query.initial_sample_state([tf.zeros(2)])
        _, _, event = query.get_noised_result(total, query.initial_global_state())
        assert float(event.noise_multiplier) == pytest.approx(plan.noise_multiplier, rel=1e-6)
