"""Local noise: every client's update is clipped and noised before anybody sees it.

Statistical checks have fixed seeds; drawn at random, each would fail with the probability that stands beside it,
mostly 1e-6.
"""

import math
from typing import Any

import dp_accounting
import numpy as np
import pytest
import tensorflow as tf
from guarantee_checks import FALSE_ALARM, ROUNDING, flat, release, wicked_records
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dpfl.errors import InputError
from dpfl.mechanisms import Gaussian, LocalGaussian, LocalLaplace, Plan
from dpfl.privacy import Privacy
from dpfl.privacy.events import with_noise
from dpfl.sampling import BallsInBins, CappedPoisson, Cyclic, CyclicPoisson, Everyone, FixedSize, Poisson

SETTINGS = settings(max_examples=40, deadline=None, derandomize=True, database=None)
CLIP, COHORT = 0.7, 5
BOTH = pytest.mark.parametrize("mechanism", [LocalGaussian, LocalLaplace])
NORM_ORDER = {LocalGaussian: 2, LocalLaplace: 1}
DISTRIBUTION = {LocalGaussian: stats.norm, LocalLaplace: stats.laplace}
SAMPLERS = [
    Poisson(cohort=20),
    CappedPoisson(cohort=20),
    FixedSize(cohort=20),
    Everyone(),
    Cyclic(cohort=20),
    CyclicPoisson(cohort=20, groups=2),
    BallsInBins(cohort=20),
]
ANYTHING = st.one_of(
    st.floats(-3, 3, width=32),
    st.floats(width=32, allow_nan=True, allow_infinity=True),
    st.sampled_from([0.0, -0.0, 1e-45, 1e-30, 1e15, -1e18, 1e30, -3e38, math.nan, math.inf, -math.inf]),
)


def plan_of(mechanism: type, noise: float = 0.0, clip_norm: float = CLIP, sampler: Any = None) -> Plan:
    """One round; without noise unless told otherwise."""
    configured = mechanism(clip_norm=clip_norm, noise_multiplier=noise or None)
    target = Privacy(epsilon=None, delta=1e-3, relation="replace_one")
    return configured.plan(target, sampler or FixedSize(cohort=COHORT), 100, 1)


def at_round(state: Any, number: int) -> Any:
    """The state of a later round."""
    return state._replace(numerator_state=state.numerator_state._replace(round=tf.constant(number)))


def sent(query: Any, records: list[Any], number: int = 0, first_client: int = 0) -> np.ndarray:
    """What clients 0, 1, ... send in a round, all tensors as one float64 vector each."""
    params = query.derive_sample_params(at_round(query.initial_global_state(), number))
    rows = []
    for client, record in enumerate(records, first_client):
        record = tf.nest.map_structure(lambda part: tf.constant(part, tf.float32), record)
        rows.append(flat(query.preprocess_record(query.client_params(params, tf.constant(client)), record)))
    return np.stack(rows)


class TestSensitivity:
    @BOTH
    @SETTINGS
    @given(
        st.lists(st.lists(ANYTHING, min_size=6, max_size=6), min_size=3, max_size=3), st.sampled_from([1e-6, 0.7, 1e4])
    )
    def test_of_any_updates(self, mechanism, updates, clip):
        order = NORM_ORDER[mechanism]
        query = plan_of(mechanism, clip_norm=clip).query(0)
        records = [[np.reshape(update[:4], (2, 2)), np.array(update[4:])] for update in updates]
        vectors = sent(query, records)
        for update, vector in zip(updates, vectors, strict=True):
            assert np.all(np.isfinite(vector))
            assert np.linalg.norm(vector, order) <= clip * (1 + ROUNDING)
            values = np.float32(update)
            with np.errstate(over="ignore", invalid="ignore"):
                norm = float(np.sum(np.abs(values)) if order == 1 else np.sqrt(np.sum(np.square(values))))
            if not math.isfinite(norm):
                assert not vector.any(), f"{update} is not finite but contributed {vector}"
            elif norm <= clip * (1 - ROUNDING):
                assert np.allclose(vector, values, rtol=1e-6, atol=1e-36)
        # Neighbouring cohorts: one update replaced by another, or by nothing.
        total = vectors[:2].sum(axis=0)
        assert np.linalg.norm(total - vectors[1:].sum(axis=0), order) <= 2 * clip * (1 + ROUNDING)
        assert np.linalg.norm(total - vectors[0], order) <= clip * (1 + ROUNDING)

    @BOTH
    def test_is_reached(self, mechanism):
        vectors = sent(plan_of(mechanism).query(0), [[np.float32([30, -40])], [np.float32([-30, 40])]])
        order = NORM_ORDER[mechanism]
        assert np.linalg.norm(vectors[0], order) == pytest.approx(CLIP, rel=1e-5)
        assert np.linalg.norm(vectors[0] - vectors[1], order) == pytest.approx(2 * CLIP, rel=1e-5)

    @BOTH
    def test_what_is_not_finite_sends_noise_alone(self, mechanism):
        template, records = wicked_records(CLIP)
        query = plan_of(mechanism, noise=2.0).query(4)
        (silent,) = sent(query, [tf.nest.map_structure(np.zeros_like, template)])
        for record in records[-4:]:
            assert np.array_equal(sent(query, [record])[0], silent)
        assert np.all(silent != 0)


class TestNoise:
    @BOTH
    def test_of_one_client_has_the_distribution(self, mechanism):
        query = plan_of(mechanism, noise=1.3).query(3)
        (draws,) = sent(query, [[np.zeros(200_000), np.zeros((100, 200)), np.zeros(())]])
        scaled = draws / (1.3 * CLIP)
        distribution = DISTRIBUTION[mechanism]
        assert stats.kstest(scaled, distribution.cdf).pvalue >= FALSE_ALARM
        variance, kurtosis = distribution.var(), float(distribution.stats(moments="k"))
        bound = stats.norm.isf(FALSE_ALARM / 2)  # 1e-6 each, by the central limit theorem
        assert abs(scaled.mean()) <= bound * math.sqrt(variance / len(scaled))
        spread = np.mean(scaled**2) / variance
        assert abs(spread - 1) <= bound * math.sqrt((kurtosis + 2) / len(scaled))
        # The tails: with 220,001 draws the largest lies beyond these bounds with probability below 1e-6.
        low, high = (
            distribution.isf((1 - FALSE_ALARM ** (1 / len(scaled))) / 2),
            distribution.isf(FALSE_ALARM / 2 / len(scaled)),
        )
        assert low <= np.abs(scaled).max() <= high

    @BOTH
    def test_is_added_to_the_clipped_update(self, mechanism):
        update = [np.float32([3, -4, 0.5])]
        silent, noisy = (sent(plan_of(mechanism, noise=noise).query(3), [update])[0] for noise in (0, 2.0))
        (alone,) = sent(plan_of(mechanism, noise=2.0).query(3), [[np.zeros(3)]])
        assert np.allclose(noisy, silent + alone, atol=1e-5)

    @BOTH
    def test_of_the_mean_is_that_of_all_clients(self, mechanism):
        template = [tf.zeros(50_000)]
        plan = plan_of(mechanism, noise=1.3)
        query = plan.query(3)
        total = query.initial_sample_state(template)
        for row in sent(query, [[np.zeros(50_000)]] * COHORT):
            total = query.accumulate_preprocessed_record(total, [tf.constant(row, tf.float32)])
        mean = flat(query.get_noised_result(total, query.initial_global_state())[0])
        scaled = mean * COHORT / (1.3 * CLIP)
        variance, kurtosis = DISTRIBUTION[mechanism].var(), float(DISTRIBUTION[mechanism].stats(moments="k"))
        spread = np.mean(scaled**2) / (COHORT * variance)
        # 1e-6 by the central limit theorem.
        assert abs(spread - 1) <= stats.norm.isf(FALSE_ALARM / 2) * math.sqrt((kurtosis / COHORT + 2) / len(scaled))

    @BOTH
    def test_nobody_adds_none_to_an_empty_cohort(self, mechanism):
        result, state = release(plan_of(mechanism, noise=2.0).query(0), [], [tf.zeros(10), tf.zeros((2, 3))])
        assert not flat(result).any()
        assert int(state.numerator_state.round) == 1

    @BOTH
    def test_clients_rounds_tensors_and_seeds_have_noise_of_their_own(self, mechanism):
        size = 20_000
        update = [np.zeros(size), np.zeros((2, size // 2))]
        rows = [
            row
            for seed in (0, 1)
            for number in (0, 1)
            for row in sent(plan_of(mechanism, noise=1.0).query(seed), [update] * 3, number)
        ]
        streams = np.concatenate([np.split(row, 2) for row in rows])
        pairs = len(streams) * (len(streams) - 1) / 2
        # 1e-6 for all pairs together, and for all streams' neighbouring coordinates together.
        worst = np.abs(np.triu(np.corrcoef(streams), k=1)).max()
        assert worst <= stats.norm.isf(FALSE_ALARM / 2 / pairs) / math.sqrt(size)
        serial = [np.corrcoef(stream[:-1], stream[1:])[0, 1] for stream in streams]
        assert np.abs(serial).max() <= stats.norm.isf(FALSE_ALARM / 2 / len(streams)) / math.sqrt(size)

    @BOTH
    def test_repeats_with_seed_round_and_client(self, mechanism):
        update, plan = [np.linspace(-1, 1, 50)], plan_of(mechanism, noise=1.0)
        first, second = (sent(plan.query(5), [update] * 3, number=2) for _ in range(2))
        assert np.array_equal(first, second)
        assert np.array_equal(first[2:], sent(plan.query(5), [update], number=2, first_client=2))

    @BOTH
    def test_is_fresh_where_nobody_says_which_client_it_is(self, mechanism):
        size = 2**14
        query = plan_of(mechanism, noise=1.0).query(3)
        params = query.derive_sample_params(query.initial_global_state())
        streams = []
        for _ in range(2):
            tf.random.set_seed(1)  # must not make clients alike
            traced = tf.function(lambda: query.preprocess_record(params, [tf.zeros(size)]))
            streams += [flat(traced()), flat(traced())]
        bound = stats.norm.isf(FALSE_ALARM / 2 / 6) / math.sqrt(size)
        assert np.abs(np.triu(np.corrcoef(streams), k=1)).max() <= bound  # 1e-6
        expected = CLIP * DISTRIBUTION[mechanism].std()
        assert np.std(streams) == pytest.approx(expected, rel=0.03)  # 6 standard errors for Laplace: below 1e-8


class TestEngines:
    @BOTH
    def test_loops_and_vectorized_maps_agree_with_single_clients(self, mechanism):
        query = plan_of(mechanism, noise=1.0).query(3)
        generator = np.random.default_rng(1)
        updates = [tf.constant(generator.normal(size=(COHORT, *shape)), tf.float32) for shape in ((40, 20), (7,))]
        clients = tf.constant([30, 1, 4, 15, 9])
        state = at_round(query.initial_global_state(), 1)

        def one(params: Any, index: Any) -> Any:
            return query.preprocess_record(
                query.client_params(params, clients[index]), [part[index] for part in updates]
            )

        @tf.function
        def loop(state: Any) -> Any:
            params = query.derive_sample_params(state)

            def body(index: tf.Tensor, total: Any) -> tuple[tf.Tensor, Any]:
                return index + 1, query.accumulate_preprocessed_record(total, one(params, index))

            start = (tf.constant(0), query.initial_sample_state([tf.zeros((40, 20)), tf.zeros(7)]))
            return query.get_noised_result(tf.while_loop(lambda index, _: index < COHORT, body, start)[1], state)[:2]

        @tf.function
        def vectorized(state: Any) -> Any:
            params = query.derive_sample_params(state)
            return tf.vectorized_map(
                lambda both: query.preprocess_record(query.client_params(params, both[1]), both[0]), (updates, clients)
            )

        params = query.derive_sample_params(state)
        alone = np.stack([flat(one(params, index)) for index in range(COHORT)])
        side_by_side = np.concatenate([part.numpy().reshape(COHORT, -1) for part in vectorized(state)], axis=1)
        assert np.allclose(alone, side_by_side, rtol=1e-5, atol=1e-6)
        mean, after = loop(state)
        assert np.allclose(flat(mean), alone.mean(axis=0), rtol=1e-5, atol=1e-6)
        assert int(after.numerator_state.round) == 2


class TestEvents:
    @pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: sampler.name)
    @BOTH
    def test_are_those_of_revealed_cohorts(self, mechanism, sampler):
        inner = {LocalGaussian: dp_accounting.GaussianDpEvent, LocalLaplace: dp_accounting.LaplaceDpEvent}[mechanism]
        event = mechanism(clip_norm=3).event(2.0, sampler, 100, 10, None)
        assert event == sampler.revealed_event(inner(2.0), 100, 10)
        assert event == with_noise(mechanism(clip_norm=3).event(1.0, sampler, 100, 10, None), 2.0)

    @pytest.mark.parametrize("relation", ["replace_one", "replace_special"])
    @pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: sampler.name)
    @BOTH
    def test_every_sampler_meets_a_target(self, mechanism, sampler, relation):
        plan = mechanism(clip_norm=1).plan(Privacy(epsilon=4, delta=1e-5, relation=relation), sampler, 100, 10)
        assert 3.9 <= plan.guarantee.epsilon <= 4

    def test_sampling_amplifies_nothing(self):
        # One round in which one of ten takes part: at a delta below the rate a client that does is hardly better off.
        target = Privacy(epsilon=1, delta=1e-9, relation="replace_special")
        everyone, sampled = (
            LocalGaussian(clip_norm=1).plan(target, sampler, 100, 1).noise_multiplier
            for sampler in (Everyone(), Poisson(cohort=10))
        )
        central = Gaussian(clip_norm=1).plan(target, Poisson(cohort=10), 100, 1).noise_multiplier
        assert 0.9 * everyone <= sampled <= everyone
        assert central < 0.5 * sampled

    @BOTH
    def test_statement_says_what_is_added_and_who_is_trusted(self, mechanism):
        target = Privacy(epsilon=4, delta=1e-5, relation="replace_one")
        plan = mechanism(clip_norm=0.5, noise_multiplier=2).plan(target, Poisson(cohort=10), 100, 1)
        statement = plan.guarantee.statement()
        words = {
            LocalGaussian: "clipped to L2 norm 0.5, with Gaussian noise of standard deviation 1 ",
            LocalLaplace: "clipped to L1 norm 0.5, with Laplace noise of scale 1 ",
        }[mechanism]
        assert f"each client's update, {words}" in statement
        assert "needs no trusted server" in statement
        assert "assumes a server that is trusted" not in statement

    @pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: sampler.name)
    @BOTH
    def test_assumes_what_the_sampler_assumes_but_secret_cohorts(self, mechanism, sampler):
        assumed = mechanism(clip_norm=1).assumptions(sampler)
        assert not any("stays secret" in sentence for sentence in assumed)
        assert any("group a client belongs to was fixed beforehand" in sentence for sentence in assumed) == isinstance(
            sampler, Cyclic | CyclicPoisson
        )

    @BOTH
    def test_refuses_to_hide_that_a_client_exists(self, mechanism):
        with pytest.raises(InputError) as refused:
            mechanism(clip_norm=1).plan(Privacy(epsilon=4, delta=1e-5), Everyone(), 100, 10)
        assert str(refused.value).endswith("choose the relation replace_one or replace_special.")
        assert ". " not in str(refused.value)

    @BOTH
    @pytest.mark.parametrize("fields", [{"clip_norm": 0}, {"clip_norm": math.nan}, {"noise_multiplier": 0}])
    def test_refuses_bad_settings(self, mechanism, fields):
        with pytest.raises(InputError):
            mechanism(**{"clip_norm": 1, **fields})
