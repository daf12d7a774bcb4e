"""Distributed noise: integers within the stated norms, decoded without bias, with noise exactly as planned.

Statistical checks have fixed seeds; drawn at random, each would fail with the probability that stands beside it,
mostly 1e-6.
"""

import math
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from guarantee_checks import FALSE_ALARM, flat
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg, stats

from dpfl.errors import InputError
from dpfl.mechanisms import Deployment, DistributedDiscreteGaussian, DistributedSkellam, Gaussian, Plan
from dpfl.mechanisms.distributed import squared_norm_bound
from dpfl.mechanisms.distributed_queries import (
    Layout,
    centred,
    conditionally_rounded,
    discrete_gaussian_cdf,
    hadamard_transform,
    integer_noise,
    random_signs,
    skellam_cdf,
)
from dpfl.noise import round_seed
from dpfl.privacy import Privacy
from dpfl.privacy.events import DiscreteGaussianSumDpEvent, SkellamDpEvent, with_noise
from dpfl.sampling import BallsInBins, Cyclic, Everyone, FixedSize, Poisson

SETTINGS = settings(max_examples=40, deadline=None, derandomize=True, database=None)
CLIP, CLIENTS = 0.7, 8
BOTH = pytest.mark.parametrize("mechanism", [DistributedDiscreteGaussian, DistributedSkellam])
CDFS = {"discrete_gaussian": discrete_gaussian_cdf, "skellam": skellam_cdf}
ANYTHING = st.one_of(
    st.floats(-3, 3, width=32),
    st.floats(width=32, allow_nan=True, allow_infinity=True),
    st.sampled_from([0.0, -0.0, 1e-45, 1e-30, 1e15, -1e18, 1e30, -3e38, math.nan, math.inf, -math.inf]),
)


def plan_of(mechanism: type, template: Any, noise: float = 0.0, clients: int = CLIENTS, **fields: Any) -> Plan:
    """One round with everyone; without noise unless told otherwise."""
    configured = mechanism(clip_norm=fields.pop("clip_norm", CLIP), noise_multiplier=noise or None, **fields)
    target = Privacy(epsilon=None, delta=1e-5, relation="replace_special")
    dimension = sum(int(np.prod(part.shape)) for part in tf.nest.flatten(template))
    return configured.plan(target, Everyone(), clients, 1, dimension=dimension)


def sent(query: Any, records: list[Any], state: Any = None, first_client: int = 0) -> np.ndarray:
    """What clients 0, 1, ... send, one int32 vector each."""
    params = query.derive_sample_params(query.initial_global_state() if state is None else state)
    rows = []
    for client, record in enumerate(records, first_client):
        record = tf.nest.map_structure(lambda part: tf.constant(part, tf.float32), record)
        rows.append(query.preprocess_record(query.client_params(params, tf.constant(client)), record).numpy())
    return np.stack(rows)


def decoded(query: Any, vectors: np.ndarray, state: Any = None) -> np.ndarray:
    """The mean that the server makes of what it was sent."""
    state = query.initial_global_state() if state is None else state
    total = query.initial_sample_state(None)
    for vector in vectors:
        total = query.accumulate_preprocessed_record(total, tf.constant(vector, tf.int32))
    return flat(query.get_noised_result(total, state)[0])


def at_round(state: Any, number: int) -> Any:
    """The state of a later round."""
    return state._replace(numerator_state=state.numerator_state._replace(round=tf.constant(number)))


def clipped(record: Any, clip: float = CLIP) -> np.ndarray:
    vector = flat(record)
    return vector * min(1.0, clip / max(float(np.linalg.norm(vector)), 1e-300))


class TestRotation:
    @pytest.mark.parametrize("length", [1, 2, 8, 32, 64, 1024])
    def test_is_the_orthonormal_hadamard_matrix(self, length):
        vector = np.random.default_rng(length).normal(size=length).astype(np.float32)
        expected = linalg.hadamard(length) @ vector.astype(np.float64) / math.sqrt(length)
        assert np.allclose(hadamard_transform(tf.constant(vector)), expected, atol=2e-6)

    @pytest.mark.parametrize("length", [1, 4, 2**10, 2**13, 2**17])
    def test_keeps_norms_and_is_its_own_inverse(self, length):
        vector = tf.random.stateless_normal([length], [length, 0])
        rotated = hadamard_transform(vector)
        assert np.allclose(hadamard_transform(rotated), vector, atol=1e-5)
        assert np.linalg.norm(rotated) == pytest.approx(np.linalg.norm(vector), rel=1e-5)

    def test_signs_are_fair_and_new_in_each_round(self):
        template = [tf.zeros(2**14)]
        query = plan_of(DistributedSkellam, template).query(0, template)
        state = query.initial_global_state()
        signs = []
        for _ in range(4):
            signs.append(query.derive_sample_params(state).signs.numpy())
            state = query.get_noised_result(query.initial_sample_state(None), state)[1]
        signs = np.stack(signs)
        assert set(np.unique(signs)) == {-1.0, 1.0}
        # Means and products of pairs: 10 sums of 2 ** 14 fair signs; 1e-6 together.
        bound = stats.norm.isf(FALSE_ALARM / 2 / 10) * math.sqrt(2**14)
        assert np.abs(signs.sum(axis=1)).max() <= bound
        assert np.abs(np.triu(signs @ signs.T, k=1)).max() <= bound
        assert np.array_equal(signs[0], random_signs(2**14, tf.constant(_rotation_seed(query))).numpy())

    def test_spreads_a_single_weight_over_all_coordinates(self):
        template = [tf.zeros(1000)]
        query = plan_of(DistributedSkellam, template, steps=2**15).query(0, template)
        one_hot = np.zeros(1000, np.float32)
        one_hot[17] = CLIP
        sizes = np.abs(sent(query, [[one_hot]])[0])
        assert np.all((sizes == 2**10) | (np.abs(sizes - 2**10) == 1))


def _rotation_seed(query: Any) -> np.ndarray:
    state = query.initial_global_state().numerator_state
    return round_seed(state.rotation_seed, state.round).numpy()


class TestRounding:
    @SETTINGS
    @given(
        st.lists(st.floats(-300, 300, width=32), min_size=1, max_size=64),
        st.sampled_from([0.0, 0.3, math.exp(-0.5), 0.99]),
        st.integers(0, 2**31 - 1),
    )
    def test_keeps_the_bound_whatever_the_seed(self, values, beta, seed):
        vector = np.float32(values)
        bound = squared_norm_bound(max(float(np.linalg.norm(vector.astype(np.float64))), 1), len(values), beta)
        rounded = conditionally_rounded(tf.constant(vector), tf.constant(bound, tf.float64), tf.constant([seed, 7]))
        rounded = rounded.numpy().astype(np.int64)
        assert np.sum(rounded**2) <= bound
        assert np.all((rounded == np.floor(vector)) | (rounded == np.ceil(vector)) | (rounded == np.floor(vector) + 1))

    def test_is_unbiased(self):
        values = np.float32([0, 1, -1, 0.5, -0.5, 0.1, -0.1, 7.25, -1000.75, 1e-3, 0.999])
        draws = conditionally_rounded(
            tf.constant(np.repeat(values, 100_000)), tf.constant(math.inf, tf.float64), tf.constant([1, 2])
        ).numpy()
        means = draws.reshape(len(values), -1).mean(axis=1)
        fractions = values - np.floor(values)
        errors = np.sqrt(fractions * (1 - fractions) / 100_000)
        # 1e-6 for all together, by the normal approximation of at least 100 successes.
        assert np.all(np.abs(means - values) <= stats.norm.isf(FALSE_ALARM / 2 / len(values)) * errors + 1e-7)

    def test_tries_again_until_the_bound_holds(self):
        # Of 16 halves, so many are rounded up as the sum of squares says; 5 or fewer happens in 11 % of tries.
        half, sums = tf.fill([16], 0.5), []
        for seed in range(30):
            rounded = conditionally_rounded(half, tf.constant(5.0, tf.float64), tf.constant([seed, 0])).numpy()
            assert set(np.unique(rounded)) <= {0, 1}
            sums.append(rounded.sum())
        assert max(sums) <= 5
        # Under the condition sums have mean 4.5 and standard deviation 0.7: 6 standard errors, 1e-9.
        assert np.mean(sums) == pytest.approx(4.5, abs=0.8)

    def test_goes_towards_zero_where_no_try_can_succeed(self):
        rounded = conditionally_rounded(
            tf.constant([3.5, -3.5, 0.5, -0.5]), tf.constant(18.0, tf.float64), tf.constant([1, 0])
        )
        short = conditionally_rounded(tf.fill([400], -0.5), tf.constant(0.0, tf.float64), tf.constant([1, 0]))
        assert np.sum(np.square(rounded)) <= 18
        assert np.array_equal(short, np.zeros(400))

    @pytest.mark.parametrize(("steps", "dimension"), [(4, 256), (40, 256), (400, 256), (16, 16)])
    @pytest.mark.parametrize("beta", [0.1, math.exp(-0.5), 0.9])
    def test_one_try_keeps_the_papers_bound_often_enough(self, steps, dimension, beta):
        # At the clip, with fractions as close to one half as that allows: the longest that rounded vectors get.
        vector = np.full(dimension, steps / math.sqrt(dimension))
        vector[::2] *= -1
        generator = np.random.default_rng(3)
        rounded = np.floor(vector) + (generator.random((4000, dimension)) < vector - np.floor(vector))
        kept = np.sum(np.sum(rounded**2, axis=1) <= squared_norm_bound(steps, dimension, beta))
        # Theorem 1: with probability at least 1 - beta; 1e-6.
        assert kept >= stats.binom.ppf(FALSE_ALARM, 4000, 1 - beta)

    def test_bound_of_the_paper(self):
        # By hand: c = 100, d = 64, beta = exp(-1/2): 10,000 + 16 + 1 * (100 + 4).
        assert squared_norm_bound(100, 64, math.exp(-0.5)) == 10_120
        assert squared_norm_bound(100, 64, 0) == 108**2
        # With tiny steps the rounding itself is the longer bound: 1 + 2.5e5 + (1 + 500) > 1 + ... (1 + 1000)^2.
        assert squared_norm_bound(1, 10**6, math.exp(-0.5)) == 1 + 250_000 + 501
        assert squared_norm_bound(1, 1, math.exp(-0.5)) == 2  # 1 + 1/4 + 3/2, rounded down


@st.composite
def cohorts(draw: st.DrawFn) -> tuple[list[tuple[int, ...]], list[list[np.ndarray]]]:
    shapes = draw(st.lists(st.sampled_from([(), (1,), (5,), (2, 3), (1, 2, 2)]), min_size=1, max_size=3))

    def part(shape: tuple[int, ...]) -> np.ndarray:
        size = math.prod(shape)
        return np.array(draw(st.lists(ANYTHING, min_size=size, max_size=size)), np.float32).reshape(shape)

    return shapes, [[part(shape) for shape in shapes] for _ in range(3)]


class TestSensitivity:
    @BOTH
    @SETTINGS
    @given(
        drawn=cohorts(),
        clip=st.sampled_from([1e-6, 0.01, 0.7, 3.5, 1e4]),
        steps=st.sampled_from([None, 1, 3.7, 100, 2**16]),
        beta=st.sampled_from([0.0, math.exp(-0.5), 0.95]),
        seed=st.integers(0, 2**40),
    )
    def test_of_any_updates(self, mechanism, drawn, clip, steps, beta, seed):
        shapes, updates = drawn
        template = [tf.TensorSpec(shape) for shape in shapes]
        plan = plan_of(mechanism, template, clip_norm=clip, steps=steps, beta=beta, bits=32)
        vectors = sent(plan.query(seed, template), updates).astype(np.int64)
        release = plan.mechanism.event(1.0, plan.sampler, plan.population, 1, plan.dimension).event
        squared = np.sum(vectors**2, axis=1)
        assert np.all(squared <= release.l2_sensitivity**2 * (1 + 1e-12))
        if mechanism is DistributedSkellam:
            assert np.all(np.sum(np.abs(vectors), axis=1) <= release.l1_sensitivity)
        for update, vector in zip(updates, vectors, strict=True):
            with np.errstate(over="ignore", invalid="ignore"):
                norm = np.sqrt(np.sum(np.square(np.float32(flat(update)))))
            if not np.isfinite(norm):
                assert not vector.any(), f"{update} is not finite but sent {vector}"
        # Neighbouring cohorts: one update replaced by nothing, or by another.
        total = vectors[:2].sum(axis=0)
        assert np.sum((total - vectors[0]) ** 2) <= release.l2_sensitivity**2 * (1 + 1e-12)
        assert np.linalg.norm(total - vectors[1:].sum(axis=0)) <= 2 * release.l2_sensitivity * (1 + 1e-12)

    def test_is_nearly_reached(self):
        # An update at the clip is hardly shorter in steps than the bound says: a looser clip would be seen.
        template = [tf.zeros(5000)]
        plan = plan_of(DistributedSkellam, template)
        record = [100 * np.random.default_rng(0).normal(size=5000).astype(np.float32)]
        vector = sent(plan.query(0, template), [record])[0].astype(np.float64)
        bound = plan.mechanism.squared_sensitivity(plan.sampler, plan.population, 5000)
        assert 0.99 <= np.linalg.norm(vector) / math.sqrt(bound) <= 1

    @BOTH
    def test_what_is_not_finite_sends_noise_alone(self, mechanism):
        template = [tf.zeros(50), tf.zeros((3, 3))]
        query = plan_of(mechanism, template, noise=2.0).query(4, template)
        broken = [np.full(50, 1.0), np.full((3, 3), np.nan)]
        zero = [np.zeros(50), np.zeros((3, 3))]
        vectors = sent(query, [broken])[0], sent(query, [zero])[0]
        assert np.array_equal(*vectors)
        assert vectors[0].any()


class TestDecoding:
    @SETTINGS
    @given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=20), st.integers(2, 32))
    def test_representatives_modulo_a_power_of_two(self, values, bits):
        half = 2 ** (bits - 1)
        expected = [(value + half) % 2**bits - half for value in values]
        assert centred(tf.constant(values, tf.int32), tf.constant(bits)).numpy().tolist() == expected

    @SETTINGS
    @given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=20), st.integers(2, 32))
    def test_sums_wrap_and_it_does_not_matter_who_reduces(self, values, bits):
        half = 2 ** (bits - 1)
        with np.errstate(over="ignore"):
            total = np.sum(np.array(values, np.int32), dtype=np.int32)
        by_clients = sum(value % 2**bits for value in values) % 2**bits
        expected = (by_clients + half) % 2**bits - half
        assert int(centred(tf.constant(total, tf.int32), tf.constant(bits))) == expected

    def test_large_sums_wrap_around(self):
        template = [tf.zeros(1)]
        plan = plan_of(DistributedSkellam, template, bits=10, steps=10, clients=2)
        query = plan.query(0, template)
        step = CLIP / 10 / 2
        assert decoded(query, np.full((1, 1), 511)) * self._sign(query) == pytest.approx(511 * step, rel=1e-6)
        assert decoded(query, np.full((1, 1), 512)) * self._sign(query) == pytest.approx(-512 * step, rel=1e-6)
        assert decoded(query, np.full((4, 1), 300)) * self._sign(query) == pytest.approx((1200 - 1024) * step, rel=1e-6)

    @staticmethod
    def _sign(query: Any) -> float:
        return float(query.derive_sample_params(query.initial_global_state()).signs[0])

    @BOTH
    @pytest.mark.parametrize("bits", [20, 32])
    def test_error_is_that_of_rounding(self, mechanism, bits):
        template = {"kernel": tf.zeros((30, 20)), "more": [tf.zeros(4), tf.zeros(())]}
        generator = np.random.default_rng(5)
        records = [
            {"kernel": size * generator.normal(size=(30, 20)), "more": [generator.normal(size=4), generator.normal()]}
            for size in (0, 1e-3, 0.01, 0.1, 1, 3, 100, 1e4)
        ]
        plan = plan_of(mechanism, template, bits=bits)
        query = plan.query(9, template)
        found = decoded(query, sent(query, records))
        error = found - np.mean([clipped(record) for record in records], axis=0)
        steps = plan.mechanism.steps_per_clip(plan.sampler, plan.population, plan.dimension)
        step = CLIP / steps / CLIENTS  # of the mean
        # Rounding moves each coordinate of each client by less than a step, and rotations keep the norm.
        assert np.linalg.norm(error) <= step * CLIENTS * math.sqrt(1024) * (1 + 1e-3)
        # In truth by a variance of at most 1/4 of a step; 1e-6 by the chi-square tail of 1024 coordinates.
        assert np.sum(error**2) <= step**2 * CLIENTS / 4 * stats.chi2.isf(FALSE_ALARM, 1024)

    def test_is_unbiased(self):
        template = [tf.zeros(20)]
        plan = plan_of(DistributedSkellam, template, steps=8, beta=0, clients=1)
        query = plan.query(1, template)
        record = [np.linspace(-0.3, 0.2, 20).astype(np.float32)]
        rounds = 400
        assert np.linalg.norm(record[0]) > CLIP  # so that it is clipped, too

        @tf.function
        def one_round(state: Any) -> tuple[Any, Any]:
            params = query.client_params(query.derive_sample_params(state), tf.constant(0))
            return query.get_noised_result(query.preprocess_record(params, record), state)[:2]

        state, means = query.initial_global_state(), []
        for _ in range(rounds):
            mean, state = one_round(state)
            means.append(flat(mean))
        errors = np.stack(means) - clipped(record)
        # The standard error is at most half a step / sqrt(rounds); 1e-6 for all coordinates (sub-Gaussian).
        bound = math.sqrt(2 * math.log(2 * 20 / FALSE_ALARM)) / 2 * (CLIP / 8) / math.sqrt(rounds)
        assert np.abs(errors.mean(axis=0)).max() <= bound
        assert errors.std() > 0.1 * CLIP / 8  # rounding there was

    def test_restores_the_structure(self):
        template = {"kernel": tf.TensorSpec((2, 3)), "more": (np.zeros(4), tf.zeros(()))}
        record = {"kernel": np.full((2, 3), 0.1), "more": (np.arange(4) / 100, np.float32(-0.2))}
        query = plan_of(DistributedSkellam, template, steps=2**16, clients=1).query(0, template)
        total = tf.constant(sent(query, [record])[0])
        result = query.get_noised_result(total, query.initial_global_state())[0]
        tf.nest.assert_same_structure(result, record)
        for found, part in zip(tf.nest.flatten(result), tf.nest.flatten(record), strict=True):
            assert found.dtype == tf.float32
            assert np.allclose(found, part, atol=1e-4)

    @SETTINGS
    @given(st.lists(st.sampled_from([(), (1,), (7,), (2, 3), (0, 2)]), min_size=1, max_size=4))
    def test_layout_pads_to_a_power_of_two(self, shapes):
        layout = Layout([tf.TensorSpec(shape) for shape in shapes])
        size = sum(math.prod(shape) for shape in shapes)
        assert (layout.dimension, layout.padded) == (size, max(1, 2 ** math.ceil(math.log2(max(size, 1)))))
        record = [np.random.default_rng(0).normal(size=shape).astype(np.float32) for shape in shapes]
        vector = layout.to_vector([tf.constant(part) for part in record])
        assert vector.shape == (layout.padded,)
        assert all(np.array_equal(a, b) for a, b in zip(layout.from_vector(vector), record, strict=True))


def exact_probabilities(name: str, stddev: float, shares: int) -> tuple[np.ndarray, np.ndarray]:
    """The integers and their probabilities in the sum of shares."""
    reach = math.ceil(12 * stddev * math.sqrt(shares)) + 30
    integers = np.arange(-reach, reach + 1)
    if name == "skellam":
        return integers, stats.skellam.pmf(integers, shares * stddev**2 / 2, shares * stddev**2 / 2)
    one = np.exp(-(integers**2) / (2 * stddev**2))
    one /= one.sum()
    total = one
    for _ in range(shares - 1):
        total = np.convolve(total, one, mode="same")
    return integers, total


def chi_square_pvalue(draws: np.ndarray, integers: np.ndarray, probabilities: np.ndarray) -> float:
    """Of the hypothesis that draws have these probabilities, integers joined where fewer than 20 are expected."""
    expected = probabilities * len(draws)
    kept = expected >= 20
    counts = np.bincount(draws - integers[0], minlength=len(integers))
    observed = np.append(counts[kept], counts[~kept].sum())
    wanted = np.append(expected[kept], len(draws) - expected[kept].sum())
    if wanted[-1] < 20:
        observed, wanted = np.append(observed[:-2], observed[-2:].sum()), np.append(wanted[:-2], wanted[-2:].sum())
    return float(stats.chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue)


class TestNoise:
    @pytest.mark.parametrize("stddev", [0.1, 0.5, 1.0, 3.3, 20.0, 400.0])
    def test_table_of_the_skellam_distribution(self, stddev):
        cdf = skellam_cdf(tf.constant(stddev, tf.float64)).numpy()
        reach = len(cdf) // 2
        assert np.allclose(
            cdf, stats.skellam.cdf(np.arange(-reach, reach + 1), stddev**2 / 2, stddev**2 / 2), atol=1e-10
        )
        assert cdf[-1] == 1
        assert np.all(np.diff(cdf) >= 0)

    @pytest.mark.parametrize("stddev", [0.1, 0.5, 1.0, 3.3, 20.0, 400.0])
    def test_table_of_the_discrete_gaussian(self, stddev):
        cdf = discrete_gaussian_cdf(tf.constant(stddev, tf.float64)).numpy()
        integers, probabilities = exact_probabilities("discrete_gaussian", stddev, 1)
        reach, middle = len(cdf) // 2, len(integers) // 2
        assert np.allclose(cdf, np.cumsum(probabilities)[middle - reach : middle + reach + 1], atol=1e-13)

    @pytest.mark.parametrize("name", CDFS)
    @pytest.mark.parametrize("stddev", [0.4, 2.0, 11.0])
    def test_draws_have_the_distribution(self, name, stddev):
        draws = integer_noise(CDFS[name](tf.constant(stddev, tf.float64)), 400_000, tf.constant([5, 6])).numpy()
        integers, probabilities = exact_probabilities(name, stddev, 1)
        assert chi_square_pvalue(draws, integers, probabilities) >= FALSE_ALARM
        variance = float(np.sum(probabilities * integers**2))
        fourth = float(np.sum(probabilities * integers**4.0))
        # 1e-6 each, by the central limit theorem.
        bound = stats.norm.isf(FALSE_ALARM / 2)
        assert abs(draws.mean()) <= bound * math.sqrt(variance / len(draws))
        assert abs(np.mean(np.square(draws, dtype=np.float64)) - variance) <= bound * math.sqrt(
            (fourth - variance**2) / len(draws)
        )

    @pytest.mark.parametrize("name", CDFS)
    def test_widest_and_narrowest_draws(self, name):
        seed = tf.constant([7, 8])
        assert not np.any(integer_noise(CDFS[name](tf.constant(0.0, tf.float64)), 1000, seed))
        wide = integer_noise(CDFS[name](tf.constant(2.0**17, tf.float64)), 200_000, seed).numpy()
        # So wide that neither distribution can be told from a normal one; 1e-6.
        assert stats.kstest(wide / 2.0**17, "norm").pvalue >= FALSE_ALARM
        assert len(np.unique(wide % 2)) == 2

    @BOTH
    @pytest.mark.parametrize("steps", [1, 4, 100])
    def test_of_the_sum_is_that_of_all_shares(self, mechanism, steps):
        # 5 clients with empty updates: the sum of their integers is the noise.
        noise, clients, template = 1.3, 5, [tf.zeros(2**16)]
        query = plan_of(mechanism, template, noise=noise, steps=steps, clients=clients).query(2, template)
        vectors = sent(query, [[np.zeros(2**16)]] * clients)
        share = noise * steps / math.sqrt(clients)
        name = mechanism.model_fields["name"].default
        for shares, draws in ((1, vectors[0]), (clients, vectors.sum(axis=0))):
            assert chi_square_pvalue(draws, *exact_probabilities(name, share, shares)) >= FALSE_ALARM

    @BOTH
    def test_of_the_mean_has_the_planned_deviation(self, mechanism):
        template = [tf.zeros(60_000), tf.zeros((50, 100))]
        query = plan_of(mechanism, template, noise=0.8).query(3, template)
        mean = decoded(query, sent(query, [[np.zeros(60_000), np.zeros((50, 100))]] * CLIENTS))
        scaled = mean / (0.8 * CLIP / CLIENTS)
        low, high = stats.chi2.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], len(mean))  # 1e-6
        assert low <= np.sum(scaled**2) <= high
        assert abs(scaled.mean()) * math.sqrt(len(mean)) <= stats.norm.isf(FALSE_ALARM / 2)  # 1e-6
        # Rotated back, it is the sum of thousands of integers: as good as normal; 1e-6.
        assert stats.kstest(scaled, "norm").pvalue >= FALSE_ALARM

    @BOTH
    def test_clients_rounds_and_coordinates_have_noise_of_their_own(self, mechanism):
        size, update = 2**15, [np.full(2**15, 1e-3)]
        template = [tf.zeros(size)]
        query = plan_of(mechanism, template, noise=1.0).query(3, template)
        state = query.initial_global_state()
        streams = np.concatenate([sent(query, [update] * 3, at_round(state, number)) for number in (0, 1)])
        # The equal updates are far smaller than the noise, and rotated anew in each round.
        silent = sent(plan_of(mechanism, template).query(3, template), [update])
        assert np.std(silent) < 0.05 * np.std(streams)
        streams = np.concatenate([streams, sent(plan_of(mechanism, template, noise=1.0).query(4, template), [update])])
        correlations = np.triu(np.corrcoef(streams), k=1)
        pairs = len(streams) * (len(streams) - 1) / 2
        assert np.abs(correlations).max() <= stats.norm.isf(FALSE_ALARM / 2 / pairs) / math.sqrt(size) + 0.05**2  # 1e-6
        serial = [np.corrcoef(stream[:-1], stream[1:])[0, 1] for stream in streams]
        assert (
            np.abs(serial).max() <= stats.norm.isf(FALSE_ALARM / 2 / len(streams)) / math.sqrt(size) + 0.05**2
        )  # 1e-6

    @BOTH
    def test_repeats_with_seed_round_and_client(self, mechanism):
        template, update = [tf.zeros(100)], [np.linspace(-1, 1, 100)]
        plan = plan_of(mechanism, template, noise=1.0)
        first, second = (sent(plan.query(5, template), [update] * 3) for _ in range(2))
        assert np.array_equal(first, second)
        assert np.array_equal(first[2:], sent(plan.query(5, template), [update], first_client=2))
        assert not np.array_equal(first, sent(plan.query(6, template), [update] * 3))

    @BOTH
    def test_rounding_and_noise_do_not_share_their_draws(self, mechanism):
        # Were they shared, coordinates that are rounded up would have more, or less, noise than others.
        template, size = [tf.zeros(2**16)], 2**16
        update = [np.full(size, CLIP / math.sqrt(size)) * np.random.default_rng(0).choice([-1, 1], size)]
        noisy = plan_of(mechanism, template, noise=1.0, steps=128.0)
        silent = plan_of(mechanism, template, steps=128.0)
        rounded = sent(silent.query(7, template), [update])[0]
        noise = sent(noisy.query(7, template), [update])[0] - rounded
        assert rounded.std() > 0.3
        assert abs(np.corrcoef(rounded, noise)[0, 1]) <= stats.norm.isf(FALSE_ALARM / 2) / math.sqrt(size)  # 1e-6

    @BOTH
    def test_is_fresh_where_nobody_says_which_client_it_is(self, mechanism):
        template = [tf.zeros(2**14)]
        query = plan_of(mechanism, template, noise=1.0).query(3, template)
        params = query.derive_sample_params(query.initial_global_state())
        streams = []
        for _ in range(2):
            tf.random.set_seed(1)  # must not make clients alike
            traced = tf.function(lambda: query.preprocess_record(params, [tf.zeros(2**14)]))
            streams += [traced().numpy(), traced().numpy()]
        streams = np.stack(streams)
        bound = stats.norm.isf(FALSE_ALARM / 2 / 6) / math.sqrt(2**14)
        assert np.abs(np.triu(np.corrcoef(streams), k=1)).max() <= bound  # 1e-6
        steps = 8 * math.sqrt(2**14)
        assert streams.std() == pytest.approx(steps / math.sqrt(CLIENTS), rel=0.02)


class TestEngines:
    @BOTH
    def test_loops_and_vectorized_maps_agree_with_single_clients(self, mechanism):
        template = [tf.zeros((40, 20)), tf.zeros(7)]
        query = plan_of(mechanism, template, noise=1.0).query(3, template)
        generator = np.random.default_rng(1)
        updates = [tf.constant(generator.normal(size=(CLIENTS, *part.shape)), tf.float32) for part in template]
        state = query.initial_global_state()
        clients = tf.constant([3, 1, 4, 15, 9, 2, 6, 5])

        def single() -> np.ndarray:
            params = query.derive_sample_params(state)
            return np.stack(
                [
                    query.preprocess_record(query.client_params(params, clients[i]), [part[i] for part in updates])
                    for i in range(CLIENTS)
                ]
            )

        @tf.function
        def loop(state: Any) -> tuple[tf.Tensor, Any, Any]:
            def one_round(number: tf.Tensor, state: Any, _: tf.Tensor, mean: Any) -> tuple[Any, ...]:
                params = query.derive_sample_params(state)

                def body(i: tf.Tensor, total: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
                    record = query.preprocess_record(
                        query.client_params(params, clients[i]), [part[i] for part in updates]
                    )
                    return i + 1, query.accumulate_preprocessed_record(total, record)

                start = (tf.constant(0), query.initial_sample_state(template))
                _, total = tf.while_loop(lambda i, _: i < CLIENTS, body, start, parallel_iterations=1)
                mean, state, _ = query.get_noised_result(total, state)
                return number + 1, state, total, mean

            start = (tf.constant(0), state, query.initial_sample_state(template), template)
            _, state, total, mean = tf.while_loop(lambda number, *_: number < 2, one_round, start)
            return total, state, mean

        @tf.function
        def vectorized() -> tf.Tensor:
            params = query.derive_sample_params(state)
            return tf.vectorized_map(
                lambda both: query.preprocess_record(query.client_params(params, both[1]), both[0]), (updates, clients)
            )

        alone = single()
        # Sums of floats in another order may carry a coordinate across the boundary of rounding.
        difference = np.abs(alone - vectorized().numpy())
        assert difference.max() <= 1
        assert np.mean(difference > 0) <= 1e-3
        total, after, mean = loop(state)
        assert int(after.numerator_state.round) == 2
        second = decoded(query, sent_as(query, updates, clients, at_round(state, 1)), at_round(state, 1))
        assert np.allclose(flat(mean), second, atol=CLIP * 1e-3)
        assert total.dtype == tf.int32

    @BOTH
    def test_vectorized_clients_that_nobody_names_differ(self, mechanism):
        template = [tf.zeros(200)]
        query = plan_of(mechanism, template, noise=1.0).query(3, template)
        params = query.derive_sample_params(query.initial_global_state())
        rows = tf.vectorized_map(lambda update: query.preprocess_record(params, [update]), tf.zeros((6, 200))).numpy()
        assert len(np.unique(rows, axis=0)) == 6


def sent_as(query: Any, updates: list[tf.Tensor], clients: tf.Tensor, state: Any) -> np.ndarray:
    params = query.derive_sample_params(state)
    rows = [
        query.preprocess_record(query.client_params(params, client), [part[i] for part in updates])
        for i, client in enumerate(clients)
    ]
    return np.stack([row.numpy() for row in rows])


class TestEvents:
    @BOTH
    def test_noise_scales_the_event(self, mechanism):
        one, more = (mechanism(clip_norm=1).event(noise, Everyone(), 100, 10, 1000) for noise in (1.0, 2.5))
        assert more == with_noise(one, 2.5)

    def test_states_integer_sensitivities(self):
        fields = {"clip_norm": 3.0, "steps": 100.0}
        event = DistributedSkellam(**fields).event(2.0, Everyone(), 25, 10, 50)
        assert event.count == 10
        assert event.event == SkellamDpEvent(200.0, math.sqrt(10_120), math.isqrt(64 * 10_120))
        event = DistributedDiscreteGaussian(**fields).event(2.0, Cyclic(cohort=10), 25, 10, 50)
        # 25 clients in 3 groups have at least 8 members; each takes part 4 times at most.
        assert event.count == 4
        assert event.event == DiscreteGaussianSumDpEvent(200.0, 8, 64, math.sqrt(10_120))

    def test_l1_sensitivity_of_few_steps_is_the_squared_norm(self):
        event = DistributedSkellam(clip_norm=1, steps=1, beta=0.9).event(1.0, Everyone(), 25, 1, 4096).event
        bound = squared_norm_bound(1, 4096, 0.9)
        assert event.l1_sensitivity == min(math.isqrt(4096 * bound), bound) == bound

    @BOTH
    @pytest.mark.parametrize("relation", ["replace_special", "replace_one"])
    def test_costs_hardly_more_than_gaussian_noise(self, mechanism, relation):
        target = Privacy(epsilon=2, delta=1e-5, relation=relation, accountant="rdp")
        arguments = (target, Everyone(), 200, 20)
        distributed = mechanism(clip_norm=1).plan(*arguments, dimension=5000)
        central = Gaussian(clip_norm=1).plan(*arguments)
        assert distributed.guarantee.epsilon <= 2
        assert 1 <= distributed.noise_multiplier / central.noise_multiplier <= 1.01

    @BOTH
    def test_fixed_noise_is_a_budget(self, mechanism):
        target = Privacy(epsilon=4, delta=1e-5, relation="replace_one")
        plan = mechanism(clip_norm=1, noise_multiplier=8).plan(target, FixedSize(cohort=40), 200, 1000, dimension=500)
        assert 1 <= plan.rounds < 1000
        assert plan.guarantee.epsilon <= 4

    @BOTH
    def test_stands_for_a_larger_population(self, mechanism):
        target = Privacy(epsilon=4, delta=1e-5, relation="replace_special")
        arguments = (target, Everyone(), 200, 10)
        plan = mechanism(clip_norm=1, bits=24).plan(*arguments, dimension=500, deployment=Deployment(clients=10_000))
        assert 3.9 <= plan.extrapolated.epsilon <= 4 < plan.guarantee.epsilon
        of_deployment = mechanism(clip_norm=1, bits=24).plan(target, Everyone(), 10_000, 10, dimension=500)
        assert plan.noise_multiplier == pytest.approx(of_deployment.noise_multiplier / 50, rel=1e-9)

    @BOTH
    def test_statement_names_modulus_noise_and_assumptions(self, mechanism):
        target = Privacy(epsilon=4, delta=1e-5, relation="replace_one")
        statement = mechanism(clip_norm=0.5).plan(target, Everyone(), 200, 10, dimension=500).guarantee.statement()
        for words in ("2^20", "L2 norm 0.5", "secure aggregation", "none drops out", mechanism.distribution):
            assert words in statement


class TestRefusals:
    @staticmethod
    def refusal(mechanism: Any, sampler: Any, relation: str = "replace_special", population: int = 100) -> str:
        with pytest.raises(InputError) as refused:
            mechanism.plan(Privacy(epsilon=4, delta=1e-5, relation=relation), sampler, population, 10, dimension=1000)
        message = str(refused.value)
        assert message.endswith(".")
        assert ". " not in message
        return message

    @BOTH
    @pytest.mark.parametrize("sampler", [Poisson(cohort=10), BallsInBins(cohort=10)])
    def test_rounds_without_a_sure_number_of_clients(self, mechanism, sampler):
        assert "everyone, cyclic or fixed_size" in self.refusal(mechanism(clip_norm=1), sampler)

    @BOTH
    def test_relations_under_which_noise_is_missing(self, mechanism):
        message = self.refusal(mechanism(clip_norm=1), Everyone(), "add_or_remove_one")
        assert "choose the relation replace_one or replace_special" in message
        message = self.refusal(mechanism(clip_norm=1), FixedSize(cohort=10), "add_or_remove_one")
        assert message.endswith("choose the relation replace_one.")
        assert "replace_one" in self.refusal(mechanism(clip_norm=1), FixedSize(cohort=10), "replace_special")

    @BOTH
    def test_sums_beyond_the_modulus(self, mechanism):
        message = self.refusal(mechanism(clip_norm=1, bits=10), Everyone())
        needed = int(message.split("at least ")[1].split(" bits")[0])
        self.refusal(mechanism(clip_norm=1, bits=needed - 1), Everyone())
        mechanism(clip_norm=1, bits=needed).plan(
            Privacy(epsilon=4, delta=1e-5, relation="replace_special"), Everyone(), 100, 10, dimension=1000
        )
        mechanism(clip_norm=1, bits=10, steps=1, noise_multiplier=20).plan(
            Privacy(epsilon=None, relation="replace_special"), Everyone(), 100, 10, dimension=1000
        )

    def test_shares_wider_than_their_table(self):
        wide = DistributedSkellam(clip_norm=1, bits=32, steps=2**16, noise_multiplier=20)
        assert "fewer steps" in self.refusal(wide, FixedSize(cohort=10), "replace_one")

    @pytest.mark.parametrize(
        "fields",
        [
            {"bits": 1},
            {"bits": 33},
            {"beta": 1.0},
            {"beta": -0.1},
            {"steps": 0.5},
            {"steps": 1e6},
            {"steps": math.nan},
            {"k_stddevs": 0},
            {"k_stddevs": math.inf},
            {"clip_norm": 0},
            {"noise_multiplier": -1},
        ],
    )
    def test_bad_settings(self, fields):
        with pytest.raises(InputError) as refused:
            DistributedSkellam(**{"clip_norm": 1, **fields})
        assert next(iter(fields)).split("_")[0] in str(refused.value)

    def test_dimension_and_template(self):
        template = [tf.zeros(10)]
        with pytest.raises(InputError, match="tell the plan the dimension"):
            DistributedSkellam(clip_norm=1).plan(
                Privacy(epsilon=4, delta=1e-5, relation="replace_one"), Everyone(), 100, 10
            )
        plan = plan_of(DistributedSkellam, template)
        with pytest.raises(InputError, match="give the query the template of an update"):
            plan.query(0)
        with pytest.raises(InputError, match="the template has 11 weights but the plan is for updates of 10"):
            plan.query(0, [tf.zeros(11)])
