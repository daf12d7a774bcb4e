"""Whatever the compression and whoever sends what: a client moves the sum by at most the clip norm.

Every mechanism with every compression that it does not refuse is held to one check, `check_sensitivity`, and queries
that are broken on purpose have to fail it.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from guarantee_checks import FALSE_ALARM, ROUNDING, changed, flat, wicked_records
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dpfl.compression import Compression
from dpfl.config import kinds
from dpfl.errors import InputError
from dpfl.mechanisms import (
    AdaptiveClipping,
    BandedMatrix,
    DistributedDiscreteGaussian,
    DistributedSkellam,
    Gaussian,
    LocalGaussian,
    LocalLaplace,
    Mechanism,
    NoMechanism,
    Plan,
    TreeAggregation,
)
from dpfl.mechanisms.compressed_queries import CompressedMeanQuery
from dpfl.privacy import Privacy
from dpfl.sampling import Cyclic, Poisson

CLIP, COHORT, POPULATION, ROUNDS = 0.7, 5, 20, 10
TEMPLATE, _WICKED = wicked_records(CLIP)
_NUMBERS = np.random.default_rng(0)
# Zeros, records within and beyond the clip, huge ones, ones that are not finite; and two that lie on no level.
RECORDS = [_WICKED[index] for index in (7, 10, 0, 4, 5, 6, 12, 14, 17)] + [
    tf.nest.map_structure(lambda part: np.float32(_NUMBERS.normal(size=part.shape)), TEMPLATE) for _ in range(2)
]
FINITE = [record for record in RECORDS if np.isfinite(flat(record)).all()]
DIMENSION = 11
CENTRAL: dict[str, Any] = {
    "gaussian": Gaussian(clip_norm=CLIP),
    "gaussian per layer": Gaussian(clip_norm=CLIP, clipping="per_layer"),
    "gaussian per layer by size": Gaussian(clip_norm=CLIP, clipping="per_layer_by_size"),
    "adaptive clipping": AdaptiveClipping(clip_norm=CLIP, count_noise=5.0),
    "tree": TreeAggregation(clip_norm=CLIP),
    "banded": BandedMatrix(clip_norm=CLIP, bands=2),
    "discrete gaussian": DistributedDiscreteGaussian(clip_norm=CLIP),
    "skellam": DistributedSkellam(clip_norm=CLIP),
}
LOCAL: dict[str, Any] = {"local gaussian": LocalGaussian(clip_norm=CLIP), "local laplace": LocalLaplace(clip_norm=CLIP)}
MECHANISMS = {**CENTRAL, **LOCAL}
QUANTISED = [
    {"bits": bits, "rotation": rotation} for bits, rotation in [(b, r) for b in (1, 2, 4, 8) for r in (False, True)]
]
SELECTED: list[dict[str, Any]] = [
    {"random_k": 3},
    {"random_k": 0.6},
    {"rank": 1},
    {"sparsity": 0.5, "pruning_begins": 0.1, "pruning_ends": 0.3},
]
SETTINGS = [Compression(**one) for one in (*QUANTISED, *SELECTED)] + [
    Compression(**selection, bits=bits, rotation=rotation)
    for selection, bits, rotation in zip(SELECTED, (1, 4, 2, 1), (True, False, True, False), strict=True)
]


def taken(mechanism: Any, compression: Compression) -> bool:
    try:
        mechanism.check_compression(compression)
    except InputError:
        return False
    return True


COMBINATIONS = [(name, c) for name, mechanism in MECHANISMS.items() for c in SETTINGS if taken(mechanism, c)]
of_central = [(name, c) for name, c in COMBINATIONS if name in CENTRAL]


def in_words(value: Any) -> str:
    return value.in_words() if isinstance(value, Compression) else str(value)


@functools.cache
def planned(name: str, compression: Compression, noise: float = 0.0) -> Plan:
    """A plan with a given noise; its guarantee is not looked at."""
    cyclic = name in ("tree", "banded", "discrete gaussian", "skellam")
    target = Privacy(epsilon=None, delta=1e-3, relation="replace_special" if cyclic else "add_or_remove_one")
    sampler = Cyclic(cohort=COHORT) if cyclic else Poisson(cohort=COHORT)
    size = sum(math.prod(shape) for shape in compression.record_shapes([(2, 3), (4,), ()]))
    plan = MECHANISMS[name].plan(target, sampler, POPULATION, ROUNDS, dimension=size, compression=compression)
    return changed(plan, noise_multiplier=noise)


def prepared(query: CompressedMeanQuery, template: Any, *, rounds_done: int = 5) -> tuple[Any, Any]:
    """The state of a later round, in which a model of some weights is pruned, and its params."""
    state = query.initial_global_state()._replace(round=tf.constant(rounds_done))
    numbers = np.random.default_rng(1)
    weights = [tf.constant(numbers.normal(size=part.shape), tf.float32) for part in tf.nest.flatten(template)]
    state = query.after_release(state, weights)
    return state, query.derive_sample_params(state)


def as_tensors(record: Any) -> Any:
    return tf.nest.map_structure(lambda part: tf.constant(part, tf.float32), record)


def check_sensitivity(plan: Plan, query: Any, records: Sequence[Any], template: Any = TEMPLATE) -> float:
    """Each client adds at most the clip norm to the sum, and moves the noiseless mean by at most clip / cohort.

    Clients keep their seeds, and so their roundings, whoever else comes. Within 1e-5 for float32; a distributed
    mechanism rounds to integers, whose norm has a bound of its own, above the clip norm and in its accounting. The mean
    is looked at for the first two records.

    Returns:
        The largest part of the clip norm that anybody added.
    """
    state, params = prepared(query, template)
    clip_norm = plan.clip_norm
    distributed = hasattr(state.inner.numerator_state, "squared_bound")
    if distributed:
        numbers = state.inner.numerator_state
        clip_norm *= math.sqrt(float(numbers.squared_bound)) / float(numbers.steps)
        assert clip_norm < 1.2 * plan.clip_norm
    sent = [
        query.preprocess_record(query.client_params(params, tf.constant(client)), as_tensors(record))
        for client, record in enumerate(records)
    ]

    def mean(of: Sequence[Any]) -> np.ndarray:
        total = query.initial_sample_state(template)
        for one in of:
            total = query.accumulate_preprocessed_record(total, one)
        return flat(query.get_noised_result(total, state)[0])

    largest = 0.0
    for one, record in zip(sent, records, strict=True):
        if distributed:
            squares = np.sum(np.square(flat(one)))
            assert squares <= float(numbers.squared_bound)
            largest = max(largest, math.sqrt(squares) / float(numbers.steps))
        else:
            summed = flat(getattr(one, "total", one))
            assert np.isfinite(summed).all(), f"{record} comes to {summed}"
            assert np.linalg.norm(summed) <= clip_norm * (1 + ROUNDING), (
                f"{record} adds {np.linalg.norm(summed) / clip_norm:.4f} clip norms to the sum"
            )
            largest = max(largest, np.linalg.norm(summed) / clip_norm)
    everyone, nobody, bound = mean(sent), mean([]), clip_norm / plan.expected_cohort * (1 + ROUNDING)
    assert not nobody.any()
    for index, record in enumerate(records[:2]):
        alone, others = mean([sent[index]]), mean([*sent[:index], *sent[index + 1 :]])
        for moved in (alone, everyone - others):
            assert np.linalg.norm(moved) <= bound, (
                f"{record} moves the mean by {np.linalg.norm(moved) / bound:.4f} times what is stated"
            )
    return largest


class TestSensitivity:
    def test_all_mechanisms_but_the_one_without_a_guarantee_are_here(self):
        known = set(kinds(Mechanism).values())
        assert {type(mechanism) for mechanism in MECHANISMS.values()} == known - {NoMechanism}
        assert len(COMBINATIONS) > 100

    @pytest.mark.parametrize(("name", "compression"), of_central, ids=in_words)
    def test_of_records_that_somebody_could_send_to_break_it(self, name, compression):
        plan = planned(name, compression)
        largest = check_sensitivity(plan, plan.query(3, TEMPLATE), RECORDS)
        # The clip is reached, or else one far below the clip norm would pass as well.
        assert largest > (0.5 if "per layer" in name else 0.95)

    @settings(max_examples=40, deadline=None, derandomize=True, database=None)
    @given(st.data(), st.sampled_from(of_central), st.integers(0, 2**32))
    def test_of_any_records(self, data, combination, seed):
        values = st.one_of(
            st.floats(-3, 3, width=32),
            st.floats(width=32, allow_nan=True, allow_infinity=True),
            st.sampled_from([0.0, -0.0, 1e-30, 1e15, -1e18, 1e30, -3e38, math.nan, math.inf]),
        )
        drawn = [data.draw(st.lists(values, min_size=DIMENSION, max_size=DIMENSION)) for _ in range(2)]
        records = [
            {
                "kernel": np.float32(one[:6]).reshape(2, 3),
                "more": [np.float32(one[6:10]), np.float32(one[10])],
            }
            for one in drawn
        ]
        plan = planned(*combination)
        check_sensitivity(plan, plan.query(seed, TEMPLATE), records)

    @pytest.mark.parametrize("compression", [c for c in SETTINGS if c.bits is not None], ids=in_words)
    def test_what_is_summed_is_the_clipped_record_of_the_bytes_that_are_sent(self, compression):
        plan = planned("gaussian", compression)
        query = plan.query(3, TEMPLATE)
        _, params = prepared(query, TEMPLATE)
        for client, record in enumerate(RECORDS):
            of_client = query.client_params(params, tf.constant(client))
            message = query.message(of_client, as_tensors(record))
            length = query.subspaces.sent_count(params.subspace)
            assert message.shape == (query.codec.message_bytes(int(length)),)
            decoded = query.codec.decode(message, length, params.signs_seed)
            read = query.subspaces.received(params.subspace, decoded)
            norm = np.linalg.norm(flat(read))
            summed, reported = query.sent_and_norm(of_client, as_tensors(record))
            if not np.isfinite(float(reported)):
                assert not flat(summed).any()
                continue
            np.testing.assert_allclose(reported, norm, rtol=1e-5, atol=1e-20)
            np.testing.assert_allclose(flat(summed), flat(read) * min(1, CLIP / max(norm, 1e-30)), rtol=1e-4)

    def test_clients_round_differently_and_one_client_the_same_again(self):
        query = planned("gaussian", Compression(bits=2)).query(3, TEMPLATE)
        state, params = prepared(query, TEMPLATE)
        record = as_tensors({"kernel": np.linspace(-1, 1, 6).reshape(2, 3), "more": [np.linspace(-1, 1, 4), 0.3]})
        sent = [query.message(query.client_params(params, tf.constant(c)), record).numpy().tobytes() for c in range(9)]
        assert len(set(sent)) > 5
        again = query.message(query.client_params(params, tf.constant(4)), record).numpy().tobytes()
        assert again == sent[4]
        later = query.derive_sample_params(state._replace(round=tf.constant(6)))
        rounds = [query.message(query.client_params(p, tf.constant(4)), record).numpy() for p in (params, later)]
        assert not np.array_equal(*rounds)


class TestLocalMechanisms:
    @pytest.mark.parametrize("name", LOCAL)
    @pytest.mark.parametrize("compression", [Compression(**one) for one in SELECTED], ids=in_words)
    def test_clip_the_record_before_they_noise_it(self, name, compression):
        query = planned(name, compression).query(3, TEMPLATE)
        _, params = prepared(query, TEMPLATE)
        order = 1 if name == "local laplace" else 2
        longest = 0.0
        for client, record in enumerate(RECORDS):
            sent = query.preprocess_record(query.client_params(params, tf.constant(client)), as_tensors(record))
            assert np.isfinite(flat(sent)).all()
            longest = max(longest, np.linalg.norm(flat(sent), order))
        assert longest <= CLIP * (1 + ROUNDING)
        assert longest >= CLIP * (1 - ROUNDING)

    @pytest.mark.parametrize("name", LOCAL)
    @pytest.mark.parametrize("compression", [SETTINGS[0], SETTINGS[5], *SETTINGS[-4:]], ids=in_words)
    def test_send_a_function_of_the_noised_record_alone(self, name, compression):
        """Post-processing: the message is the codec's, of the record that a query without bits would send."""
        query = planned(name, compression, noise=1.5).query(3, TEMPLATE)
        _, params = prepared(query, TEMPLATE)
        for client, record in enumerate(map(as_tensors, RECORDS[-4:])):
            params_of_client = query.client_params(params, tf.constant(client))
            own = params_of_client.of_client
            coordinates = query.subspaces.records(own.subspace, tf.nest.flatten(record))
            vector = query.subspaces.sent(own.subspace, query._inner.preprocess_record(own.inner, coordinates))
            expected = query.codec.encode(vector, own.signs_seed, own.seed)
            np.testing.assert_array_equal(query.message(params_of_client, record), expected)
            read = query.codec.decode(expected, tf.size(vector), own.signs_seed)
            sent, _ = query.sent_and_norm(params_of_client, record)
            np.testing.assert_array_equal(flat(sent), flat(query.subspaces.received(own.subspace, read)))


class TestWithoutAGuarantee:
    @pytest.mark.parametrize("weighting", ["equal", "examples"])
    @pytest.mark.parametrize("compression", [SETTINGS[0], SETTINGS[5], *SETTINGS[-4:]], ids=in_words)
    def test_what_diverged_counts_as_nothing_all_the_same(self, weighting, compression):
        mechanism = NoMechanism(weighting=weighting)
        plan = mechanism.plan(Privacy(epsilon=None), Poisson(cohort=5), 20, ROUNDS, compression=compression)
        query = plan.query(3, TEMPLATE)
        state, params = prepared(query, TEMPLATE)
        total = query.initial_sample_state(TEMPLATE)
        bad = tf.nest.map_structure(lambda part: tf.fill(part.shape, math.nan), TEMPLATE)
        for client, record in enumerate([RECORDS[4], bad]):
            own = query.client_params(params, tf.constant(client), tf.constant(7))
            total = query.accumulate_preprocessed_record(total, query.preprocess_record(own, as_tensors(record)))
        mean = flat(query.get_noised_result(total, state)[0])
        assert np.isfinite(mean).all()


class ClipsBeforeQuantising(CompressedMeanQuery):
    """The record is clipped, then written and read: of 1 bit it may be read with several times the clip norm."""

    def sent_and_norm(self, params: Any, record: Any) -> tuple[Any, tf.Tensor]:
        own = self._own(params)
        coordinates = self.subspaces.records(own.subspace, tf.nest.flatten(record))
        clipped, norm = self._inner.sent_and_norm(own.inner, coordinates)
        return self._through_codec(own, clipped), norm


class ScalesAfterTheClip(CompressedMeanQuery):
    """Random coordinates times d / k, an unbiased estimate of the whole update; but after the clip."""

    def sent_and_norm(self, params: Any, record: Any) -> tuple[Any, tf.Tensor]:
        sent, norm = super().sent_and_norm(params, record)
        scale = DIMENSION / sum(math.prod(shape) for shape in self.subspaces.record_shapes)
        return tf.nest.map_structure(lambda part: part * scale, sent), norm


class DividesByTheActualCohort(CompressedMeanQuery):
    def initial_sample_state(self, template: Any = None) -> Any:
        return super().initial_sample_state(template), tf.constant(0.0)

    def preprocess_record(self, params: Any, record: Any) -> Any:
        return super().preprocess_record(params, record), tf.constant(1.0)

    def get_noised_result(self, sample_state: Any, global_state: Any) -> Any:
        mean, state, event = super().get_noised_result(sample_state[0], global_state)
        share = COHORT / tf.maximum(sample_state[1], 1.0)
        return tf.nest.map_structure(lambda part: part * share, mean), state, event


class ClipsTheUpdateAndNotTheRecord(CompressedMeanQuery):
    """The update is clipped before it becomes a record, and what was decoded never."""

    def sent_and_norm(self, params: Any, record: Any) -> tuple[Any, tf.Tensor]:
        own = self._own(params)
        whole = tf.nest.flatten(record)
        norm = tf.linalg.global_norm(whole)
        clipped = [tf.math.multiply_no_nan(part, tf.minimum(1.0, CLIP / norm)) for part in whole]
        return self._through_codec(own, self.subspaces.records(own.subspace, clipped)), norm


def broken(kind: type[CompressedMeanQuery], plan: Plan) -> CompressedMeanQuery:
    records = [tf.TensorSpec(shape) for shape in plan.compression.record_shapes([(2, 3), (4,), ()])]
    inner = plan.mechanism.mean_query(plan, 3, records)
    return kind(inner, plan.compression, TEMPLATE, plan.rounds, 3, after_noise=False)


class TestBrokenQueries:
    """The very same check catches each of them."""

    @pytest.mark.parametrize("kind", [ClipsBeforeQuantising, ClipsTheUpdateAndNotTheRecord])
    @pytest.mark.parametrize("name", ["gaussian", "tree"])
    @pytest.mark.parametrize("settings", QUANTISED, ids=str)
    def test_clipping_before_quantisation(self, kind, name, settings):
        plan = planned(name, Compression(**settings))
        with pytest.raises(AssertionError, match="clip norms to the sum"):
            check_sensitivity(plan, broken(kind, plan), FINITE)

    @pytest.mark.parametrize("settings", SELECTED[:3], ids=str)
    def test_scaling_after_the_clip(self, settings):
        plan = planned("gaussian", Compression(**settings))
        with pytest.raises(AssertionError, match="clip norms to the sum"):
            check_sensitivity(plan, broken(ScalesAfterTheClip, plan), FINITE)

    @pytest.mark.parametrize("settings", [QUANTISED[0], QUANTISED[5], *SELECTED], ids=str)
    def test_dividing_by_the_actual_cohort(self, settings):
        plan = planned("gaussian", Compression(**settings))
        query = broken(DividesByTheActualCohort, plan)
        with pytest.raises(AssertionError, match="times what is stated"):
            check_sensitivity(plan, Summed(query), FINITE)


class Summed:
    """Shows the check the record in the sum of a query that counts as well."""

    def __init__(self, query: Any) -> None:
        self._query = query

    def __getattr__(self, name: str) -> Any:
        return getattr(self._query, name)

    def preprocess_record(self, params: Any, record: Any) -> Any:
        return _Counted(*self._query.preprocess_record(params, record))

    def accumulate_preprocessed_record(self, total: Any, one: Any) -> Any:
        return self._query.accumulate_preprocessed_record(total, (one.total, one.count))


class _Counted:
    def __init__(self, total: Any, count: Any) -> None:
        self.total, self.count = total, count


LARGE = [tf.zeros((300, 200)), tf.zeros(200), tf.zeros((40, 30))]


class TestNoise:
    @pytest.mark.parametrize("name", ["gaussian", "adaptive clipping", "tree"])
    @pytest.mark.parametrize(
        "settings",
        [
            {"random_k": 0.3},
            {"random_k": 9000, "bits": 1},
            {"rank": 20, "bits": 4, "rotation": True},
            {"sparsity": 0.75, "pruning_begins": 0.1, "pruning_ends": 0.2, "bits": 2},
        ],
        ids=str,
    )
    def test_lies_in_the_subspace_and_has_the_plans_spread_there(self, name, settings):
        """Three statistics of normal draws, each of which fails with probability 1e-6."""
        if not taken(MECHANISMS[name], Compression(**settings)):
            pytest.skip("refused")
        plan = planned(name, Compression(**settings), 1.5)
        query = plan.query(5, LARGE)
        state, params = prepared(query, LARGE)
        update = query.get_noised_result(query.initial_sample_state(LARGE), state)[0]
        assert [part.shape for part in update] == [part.shape for part in LARGE]
        subspace, whole = params.subspace, np.linalg.norm(flat(update))
        outside = flat(update) - flat(query.onto(params, update))
        assert np.linalg.norm(outside) <= 1e-5 * whole

        draws = flat([query.subspaces.sent(subspace, query.subspaces.records(subspace, update))])
        count, size = len(draws), sum(math.prod(part.shape) for part in LARGE)
        assert count < 0.35 * size
        assert whole == pytest.approx(np.linalg.norm(draws), rel=1e-5)
        numerator = state.inner.numerator_state
        scale = plan.noise_multiplier * plan.clip_norm / plan.expected_cohort
        if name == "adaptive clipping":  # a little more, as the count is paid for as well
            scale = float(numerator.noise_multiplier) * plan.clip_norm / plan.expected_cohort
        if name == "tree":  # the first node of the first round, whose noise is the whole tree's
            scale = float(numerator.stddev) / plan.expected_cohort
        assert abs(draws.mean()) * math.sqrt(count) / scale <= stats.norm.isf(FALSE_ALARM / 2)
        low, high = stats.chi2.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], count)
        assert low <= np.sum(np.square(draws / scale)) <= high
        assert stats.kstest(draws / scale, "norm").pvalue >= FALSE_ALARM

    def test_of_fewer_coordinates_is_shorter(self):
        """What compression buys: the same noise on each coordinate, and fewer coordinates."""
        norms = []
        for compression in (Compression(), Compression(random_k=0.25)):
            query = planned("gaussian", compression, 1.5).query(5, LARGE)
            state = query.initial_global_state()
            norms.append(np.linalg.norm(flat(query.get_noised_result(query.initial_sample_state(LARGE), state)[0])))
        assert norms[1] == pytest.approx(norms[0] / 2, rel=0.02)

    def test_does_not_depend_on_bits(self):
        template = [tf.zeros(1000)]
        released = []
        for compression in (Compression(random_k=300), Compression(random_k=300, bits=1, rotation=True)):
            query = planned("gaussian", compression, 1.5).query(5, template)
            state = query.initial_global_state()
            released.append(flat(query.get_noised_result(query.initial_sample_state(template), state)[0]))
        np.testing.assert_array_equal(*released)


@pytest.mark.skipif(not hasattr(CompressedMeanQuery, "sums"), reason="records are preprocessed one by one alone")
@pytest.mark.parametrize("name", ["gaussian", "adaptive clipping", "tree", "banded"])
@pytest.mark.parametrize("compression", SETTINGS, ids=in_words)
def test_what_many_clients_send_together_is_what_each_sends(name, compression):
    if not taken(MECHANISMS[name], compression):
        pytest.skip("refused")
    query = planned(name, compression).query(3, TEMPLATE)
    _, params = prepared(query, TEMPLATE)
    assert query.clips_many
    clients = tf.constant([4, 0, *range(7, 7 + len(RECORDS) - 2)])
    stacked = [tf.stack(parts) for parts in zip(*[tf.nest.flatten(as_tensors(r)) for r in RECORDS], strict=True)]
    total, norms = query.sums(params, clients, stacked)
    expected, each = query.initial_sample_state(TEMPLATE), []
    for client, record in zip(clients, RECORDS, strict=True):
        sent, norm = query.sent_and_norm(query.client_params(params, client), as_tensors(record))
        expected = query.accumulate_preprocessed_record(expected, sent)
        each.append(float(norm))
    np.testing.assert_allclose(flat(total), flat(expected), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(norms, each, rtol=1e-5, atol=1e-20)
