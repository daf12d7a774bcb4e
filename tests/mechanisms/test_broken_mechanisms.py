"""Mechanisms that are broken on purpose: the checks of the guarantee must catch each of them.

A check that has never failed shows nothing. Every class below breaks the guarantee in a way that has
happened in somebody's code (DESIGN.md, "Ways the guarantee is lost").
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import dp_accounting
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_privacy
from guarantee_checks import (
    EVERY_CHECK,
    changed,
    check_accounting,
    check_balls_in_bins,
    check_capped,
    check_client_noise,
    check_clients_differ,
    check_count_is_charged,
    check_count_sensitivity,
    check_cyclic,
    check_cyclic_poisson,
    check_denominator,
    check_fixed_size,
    check_noise_distribution,
    check_noise_hides_a_client,
    check_noise_independence,
    check_noise_repeats,
    check_poisson,
    check_recorded_event,
    check_rounds_are_charged,
    check_wicked_neighbours,
    check_wicked_records,
)
from tensorflow_privacy.privacy.dp_query.dp_query import SumAggregationDPQuery

from dpfl.mechanisms import Gaussian, Plan
from dpfl.mechanisms.adaptive_clipping import AdaptiveClipping
from dpfl.mechanisms.adaptive_queries import AdaptiveClippingSumQuery
from dpfl.mechanisms.banded_matrix import BandedMatrix
from dpfl.mechanisms.base import BaseMechanism
from dpfl.mechanisms.correlated_queries import BandedSumQuery, TreeSumQuery
from dpfl.mechanisms.distributed import DistributedDiscreteGaussian, DistributedMechanism, DistributedSkellam
from dpfl.mechanisms.distributed_queries import DistributedSumQuery
from dpfl.mechanisms.local import LocalGaussian
from dpfl.mechanisms.local_queries import LocalGaussianSumQuery
from dpfl.mechanisms.queries import GaussianSumQuery, MeanQuery
from dpfl.mechanisms.tree_aggregation import TreeAggregation
from dpfl.noise import normal_like, round_seed
from dpfl.privacy import Privacy, epsilon, poisson_gaussian
from dpfl.privacy.events import as_dict
from dpfl.randomness import Purpose, generator
from dpfl.sampling import (
    BallsInBins,
    BaseSampler,
    CappedPoisson,
    Cyclic,
    CyclicPoisson,
    Everyone,
    FixedSize,
    Poisson,
)


def with_query(make: Callable[[Plan, int], Any]) -> type[Plan]:
    """A kind of plan whose queries come from `make`."""

    class BrokenPlan(Plan):
        def query(self, seed: int, template: Any = None) -> Any:
            return make(self, seed)

    return BrokenPlan


def stddev(plan: Plan) -> float:
    """Of the noise on each coordinate of the sum."""
    return plan.noise_multiplier * plan.clip_norm


def with_sum_query(kind: type[GaussianSumQuery]) -> type[Plan]:
    """A kind of plan whose sum query is of another kind; the denominator stays right."""
    return with_query(lambda plan, seed: MeanQuery(kind(plan.clip_norm, stddev(plan), seed), plan.expected_cohort))


def broken(kind: type[Plan], plan: Plan) -> Plan:
    return kind(**{field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)})


class DividesByTheActualCohort(SumAggregationDPQuery):
    def __init__(self, plan: Plan, seed: int) -> None:
        self._sum = GaussianSumQuery(plan.clip_norm, stddev(plan), seed)

    def initial_global_state(self) -> Any:
        return self._sum.initial_global_state()

    def initial_sample_state(self, template: Any) -> Any:
        return self._sum.initial_sample_state(template), tf.constant(0.0)

    def derive_sample_params(self, state: Any) -> Any:
        return self._sum.derive_sample_params(state)

    def preprocess_record(self, params: Any, record: Any) -> Any:
        return self._sum.preprocess_record(params, record), tf.constant(1.0)

    def get_noised_result(self, sample: Any, state: Any) -> Any:
        noisy, state, event = self._sum.get_noised_result(sample[0], state)
        return tf.nest.map_structure(lambda part: part / tf.maximum(sample[1], 1.0), noisy), state, event


class ClipsAfterSumming(GaussianSumQuery):
    def preprocess_record(self, params: Any, record: Any) -> Any:
        finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(part)) for part in tf.nest.flatten(record)])
        return tf.nest.map_structure(lambda part: tf.where(finite, part, 0.0), record)

    def get_noised_result(self, sample: Any, state: Any) -> Any:
        return super().get_noised_result(super().preprocess_record(state.clip_norm, sample), state)


class ForgetsNonFiniteUpdates(GaussianSumQuery):
    def preprocess_record(self, params: Any, record: Any) -> Any:
        clipped, _ = tf.clip_by_global_norm(tf.nest.flatten(record), params)
        return tf.nest.pack_sequence_as(record, clipped)


class ReplacesNonFiniteValues(GaussianSumQuery):
    """Zeroes what is not finite in an update after it was clipped: the rest of an infinite update stays."""

    def preprocess_record(self, params: Any, record: Any) -> Any:
        def finite(part: tf.Tensor) -> tf.Tensor:
            return tf.where(tf.math.is_finite(part), part, tf.zeros_like(part))

        norm = tf.linalg.global_norm(tf.nest.flatten(tf.nest.map_structure(finite, record)))
        scale = tf.where(tf.math.is_finite(norm) & (norm > params), params / norm, 1.0)
        return tf.nest.map_structure(lambda part: finite(part * scale), record)


class ClipsEachTensor(GaussianSumQuery):
    def preprocess_record(self, params: Any, record: Any) -> Any:
        return tf.nest.map_structure(lambda part: super(ClipsEachTensor, self).preprocess_record(params, part), record)


class NormalisesEveryUpdate(GaussianSumQuery):
    """Also stretches short updates to the clip, and divides a zero update by its norm."""

    def preprocess_record(self, params: Any, record: Any) -> Any:
        norm = tf.linalg.global_norm(tf.nest.flatten(record))
        return tf.nest.map_structure(lambda part: part * params / norm, record)


class RepeatsItsNoise(GaussianSumQuery):
    def get_noised_result(self, sample: Any, state: Any) -> Any:
        result, _, event = super().get_noised_result(sample, state)
        return result, state, event


class SharesNoiseBetweenTensors(GaussianSumQuery):
    def get_noised_result(self, sample: Any, state: Any) -> Any:
        parts = [super(SharesNoiseBetweenTensors, self).get_noised_result(p, state) for p in tf.nest.flatten(sample)]
        return tf.nest.pack_sequence_as(sample, [part[0] for part in parts]), *parts[0][1:]


class SparesNoiseForEmptyCohorts(GaussianSumQuery):
    def get_noised_result(self, sample: Any, state: Any) -> Any:
        noisy, state, event = super().get_noised_result(sample, state)
        nobody = tf.reduce_all([tf.reduce_all(part == 0) for part in tf.nest.flatten(sample)])
        return tf.nest.map_structure(lambda s, n: tf.where(nobody, s, n), sample, noisy), state, event


class UniformNoise(GaussianSumQuery):
    """The right mean and variance, and no tails."""

    def get_noised_result(self, sample: Any, state: Any) -> Any:
        reach = state.stddev * math.sqrt(3)
        seeds = tf.random.experimental.stateless_split(
            round_seed(state.seed, state.round), len(tf.nest.flatten(sample))
        )
        noisy = [
            part + tf.random.stateless_uniform(tf.shape(part), seed, -reach, reach)
            for part, seed in zip(tf.nest.flatten(sample), seeds, strict=True)
        ]
        return tf.nest.pack_sequence_as(sample, noisy), state._replace(round=state.round + 1), None


def with_scaled_noise(factor: Callable[[Plan], float]) -> type[Plan]:
    def make(plan: Plan, seed: int) -> Any:
        return MeanQuery(GaussianSumQuery(plan.clip_norm, stddev(plan) * factor(plan), seed), plan.expected_cohort)

    return with_query(make)


def with_denominator(denominator: Callable[[Plan], float]) -> type[Plan]:
    return with_query(
        lambda plan, seed: MeanQuery(GaussianSumQuery(plan.clip_norm, stddev(plan), seed), denominator(plan))
    )


def stateful(plan: Plan, seed: int) -> Any:
    total = tensorflow_privacy.GaussianSumQuery(plan.clip_norm, stddev(plan))
    return tensorflow_privacy.NormalizedQuery(total, plan.expected_cohort)


# What is broken: the kind of plan, the check that catches it, and what the check complains about.
BROKEN_QUERIES = {
    "divides by the actual cohort": (
        with_query(DividesByTheActualCohort),
        check_denominator,
        "1 clients are divided by another number",
    ),
    "divides by the population": (
        with_denominator(lambda plan: float(plan.population)),
        check_denominator,
        "1 clients are divided by another number",
    ),
    "moves the mean by dividing by the actual cohort": (
        with_query(DividesByTheActualCohort),
        check_wicked_neighbours,
        r"moved the mean by (20|19\.99)",
    ),
    "clips after summing": (
        with_sum_query(ClipsAfterSumming),
        check_wicked_neighbours,
        r"moved the mean by (2\.0|1\.99)",
    ),
    "forgets non-finite updates": (with_sum_query(ForgetsNonFiniteUpdates), check_wicked_records, "made the sum"),
    "replaces non-finite values": (
        with_sum_query(ReplacesNonFiniteValues),
        check_wicked_records,
        r"contributed 3.*e\+30, clip 0\.7",
    ),
    "clips each tensor": (with_sum_query(ClipsEachTensor), check_wicked_records, "contributed 1.21.*, clip 0.7"),
    "normalises every update": (with_sum_query(NormalisesEveryUpdate), check_wicked_records, "made the sum"),
    "noise off by sqrt(2)": (
        with_scaled_noise(lambda plan: 1 / math.sqrt(2)),
        check_noise_distribution,
        r"the variance is 0\.(49|50)",
    ),
    "noise off by one per cent": (
        with_scaled_noise(lambda plan: 0.99),
        check_noise_distribution,
        r"the variance is 0\.9[78]",
    ),
    "noise scaled by z, not z * clip": (
        with_scaled_noise(lambda plan: 1 / plan.clip_norm),
        check_noise_distribution,
        r"the variance is 2\.0",
    ),
    "uniform noise": (with_sum_query(UniformNoise), check_noise_distribution, "the variance is|not normal"),
    "spares the noise for empty cohorts": (
        with_sum_query(SparesNoiseForEmptyCohorts),
        check_noise_distribution,
        r"the variance is 0\.0",
    ),
    "repeats its noise every round": (
        with_sum_query(RepeatsItsNoise),
        check_noise_independence,
        r"round 0.* and .*round [12].* has correlation 1\.0",
    ),
    "shares noise between tensors": (
        with_sum_query(SharesNoiseBetweenTensors),
        check_noise_independence,
        r"tensor 0.* and .*tensor [12].* has correlation 1\.0",
    ),
    "same noise for every seed": (
        with_query(lambda plan, seed: Plan.query(plan, 0)),
        check_noise_independence,
        r"seed 0.* and .*seed 1.* has correlation 1\.0",
    ),
    "stateful noise": (with_query(stateful), check_noise_repeats, "differs between two queries"),
}


@pytest.mark.parametrize(("kind", "check", "complaint"), BROKEN_QUERIES.values(), ids=BROKEN_QUERIES)
def test_a_broken_query_is_caught(plan, kind, check, complaint):
    with pytest.raises(AssertionError, match=complaint):
        check(broken(kind, plan))


class OfAFixedSize(Poisson):
    """A cohort of the same size every round, without replacement: epsilon 8.81 where Poisson has 1.71."""

    def clients(self, seed: int, round_number: int, population: int) -> np.ndarray:
        draws = generator(seed, Purpose.SAMPLING, round_number)
        return np.sort(draws.choice(population, self.cohort, replace=False)).astype(np.int32)


class WithReplacement(Poisson):
    """A client that is drawn twice contributes twice the clip."""

    def clients(self, seed: int, round_number: int, population: int) -> np.ndarray:
        draws = generator(seed, Purpose.SAMPLING, round_number)
        return np.sort(draws.choice(population, draws.poisson(self.cohort))).astype(np.int32)


class Shuffled(Poisson):
    """Passes over the clients: each takes part once in a pass, in a round of it by chance.

    Each round taken alone is a Poisson sample; that a client is spared after its turn gives it away.
    """

    def clients(self, seed: int, round_number: int, population: int) -> np.ndarray:
        rounds = population // self.cohort
        turns = generator(seed, Purpose.SAMPLING, round_number // rounds).integers(0, rounds, population)
        return np.flatnonzero(turns == round_number % rounds).astype(np.int32)


class SameEveryRound(Poisson):
    def clients(self, seed: int, round_number: int, population: int) -> np.ndarray:
        return super().clients(seed, 0, population)


class InPairs(Poisson):
    """Clients come two by two."""

    def clients(self, seed: int, round_number: int, population: int) -> np.ndarray:
        came = generator(seed, Purpose.SAMPLING, round_number).random(population // 2) < self.cohort / population
        return np.flatnonzero(np.repeat(came, 2)).astype(np.int32)


class SomeOftener(Poisson):
    """Clients with much data come oftener, on average at the right rate."""

    def clients(self, seed: int, round_number: int, population: int) -> np.ndarray:
        rates = self.cohort / population * np.linspace(0.8, 1.2, population)
        return np.flatnonzero(generator(seed, Purpose.SAMPLING, round_number).random(population) < rates).astype(
            np.int32
        )


class Capped(Poisson):
    """Drops who is too many: the cap must be accounted for, and is not."""

    def clients(self, seed: int, round_number: int, population: int) -> np.ndarray:
        return super().clients(seed, round_number, population)[: self.cohort]


@pytest.mark.parametrize(
    ("kind", "complaint"),
    [
        (OfAFixedSize, r"the variance of cohort sizes is 0\.000"),
        (WithReplacement, "clients are not ascending and unique"),
        (Shuffled, "depends on the round before"),
        (SameEveryRound, "took part 0 times|took part 3000 times"),
        (InPairs, r"the variance of cohort sizes is 2\.0|two clients take part with correlation 1"),
        (SomeOftener, "took part 7[0-9]{2} times of 3000"),
        (Capped, r"client \d+ took part|the variance of cohort sizes"),
    ],
    ids=lambda value: getattr(value, "__name__", "caught"),
)
def test_a_broken_sampler_is_caught(kind, complaint):
    with pytest.raises(AssertionError, match=complaint):
        check_poisson(kind(cohort=20), 60)


def accounted(plan: Plan, noise: float, rate: float, rounds: int, relation: str = "add_or_remove_one") -> Plan:
    """The plan with the guarantee of other numbers than its own."""
    event = poisson_gaussian(noise, rate, rounds)
    spent = epsilon(event, plan.guarantee.delta, relation=relation)
    return changed(plan, guarantee=dataclasses.replace(plan.guarantee, epsilon=spent, event=as_dict(event)))


BROKEN_ACCOUNTS = {
    "charges one round less": lambda plan: accounted(plan, plan.noise_multiplier, 1 / 3, plan.rounds - 1),
    "forgets one client of the population": lambda plan: accounted(plan, plan.noise_multiplier, 20 / 61, plan.rounds),
    "amplifies at the wrong rate": lambda plan: accounted(plan, plan.noise_multiplier, 1 / 60, plan.rounds),
    "states replace-one, charges add-or-remove": lambda plan: changed(
        plan, guarantee=dataclasses.replace(plan.guarantee, relation="replace_one")
    ),
    "less noise than it charges": lambda plan: changed(plan, noise_multiplier=plan.noise_multiplier / 1.01),
}


@pytest.mark.parametrize("breaks", BROKEN_ACCOUNTS.values(), ids=BROKEN_ACCOUNTS)
def test_a_broken_account_is_caught(plan, breaks):
    with pytest.raises(AssertionError, match="states epsilon"):
        check_accounting(breaks(plan))
    with pytest.raises(AssertionError, match=r"states epsilon|the guarantee is for"):
        check_recorded_event(breaks(plan))


# Accounted as the Poisson samples that they are not.
@pytest.mark.parametrize(
    "sampler",
    [FixedSize(cohort=20), CappedPoisson(cohort=20, cap=22), BallsInBins(cohort=20), Cyclic(cohort=20), Everyone()],
    ids=lambda sampler: sampler.name,
)
def test_a_sampler_that_is_not_the_accounted_one_is_caught(plan, sampler):
    with pytest.raises(AssertionError, match="the guarantee is for"):
        check_recorded_event(changed(plan, sampler=sampler))


class IgnoresItsCap(CappedPoisson):
    def clients(self, seed: int, round_number: int, population: int) -> np.ndarray:
        return Poisson.clients(self, seed, round_number, population)


class KeepsTheFirst(CappedPoisson):
    """Drops who is too many, and always the same: some clients come oftener than others."""

    def clients(self, seed: int, round_number: int, population: int) -> np.ndarray:
        return Poisson.clients(self, seed, round_number, population)[: self.largest_cohort(population)]


class DropsOneTooMany(CappedPoisson):
    def clients(self, seed: int, round_number: int, population: int) -> np.ndarray:
        drawn = super().clients(seed, round_number, population)
        return drawn[:-1] if len(drawn) == self.largest_cohort(population) else drawn


class SomeTwice(FixedSize):
    def clients(self, seed: int, round_number: int, population: int) -> np.ndarray:
        draws = generator(seed, Purpose.SAMPLING, round_number)
        return np.sort(draws.choice(population, self.cohort)).astype(np.int32)


class ABlock(FixedSize):
    """Clients that follow one another: each comes as often as it should, but always with its neighbours."""

    def clients(self, seed: int, round_number: int, population: int) -> np.ndarray:
        first = generator(seed, Purpose.SAMPLING, round_number).integers(population)
        return np.sort((first + np.arange(self.cohort)) % population).astype(np.int32)


class GroupsAnew(Cyclic):
    """New groups in every period: a client's last and first round may follow one another."""

    def clients(self, seed: int, round_number: int, population: int) -> np.ndarray:
        return super().clients(seed + round_number // self.period(population), round_number, population)


class FromEverybody(CyclicPoisson):
    """A Poisson sample of all clients, instead of the group whose turn it is."""

    def clients(self, seed: int, round_number: int, population: int) -> np.ndarray:
        return Poisson(cohort=self.cohort).clients(seed, round_number, population)


class ThrownOnce(BallsInBins):
    """The same bins in every epoch, as a shuffle that is drawn once."""

    def clients(self, seed: int, round_number: int, population: int) -> np.ndarray:
        return super().clients(seed, round_number % self.bins(population), population)


class ThrownAgain(BallsInBins):
    """Bins that are drawn anew in each round are no bins: a client may come twice in an epoch, or never."""

    def clients(self, seed: int, round_number: int, population: int) -> np.ndarray:
        thrown = generator(seed, Purpose.SAMPLING, round_number).integers(self.bins(population), size=population)
        return np.flatnonzero(thrown == round_number % self.bins(population)).astype(np.int32)


@pytest.mark.parametrize(
    ("sampler", "check", "complaint"),
    [
        (IgnoresItsCap(cohort=20, cap=22), check_capped, r"a round has [23]\d clients, though at most 22 may come"),
        (KeepsTheFirst(cohort=20, cap=20), check_capped, r"client \d+ took part"),
        (DropsOneTooMany(cohort=20, cap=22), check_capped, "rounds of 3000 have 2[12] clients"),
        (SomeTwice(cohort=20), check_fixed_size, "clients are not ascending and unique"),
        (ABlock(cohort=20), check_fixed_size, r"pair \d+ took part"),
        (GroupsAnew(cohort=20), check_cyclic, "the groups change"),
        (FromEverybody(cohort=5, groups=4), check_cyclic_poisson, "took part in the turns of [234] groups"),
        (ThrownOnce(cohort=20), check_balls_in_bins, r"client and bin \d+ took part"),
        (ThrownAgain(cohort=20), check_balls_in_bins, "somebody took part 0 times in an epoch, somebody [23] times"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseSampler) else "",
)
def test_another_broken_sampler_is_caught(sampler, check, complaint):
    with pytest.raises(AssertionError, match=complaint):
        check(sampler, 60)


def plan_of(mechanism: BaseMechanism, sampler: BaseSampler, **settings: Any) -> Plan:
    """A plan for 60 clients with noise that is given: accountants have no say in it."""
    relation = "replace_special" if isinstance(mechanism, DistributedMechanism | LocalGaussian) else "add_or_remove_one"
    target = Privacy(epsilon=None, delta=1e-3, relation=relation, accountant="rdp")
    values = {"noise": 1.5, "rounds": 8, "dimension": 4096, **settings}
    noisy = mechanism.replace(noise_multiplier=values["noise"])
    return noisy.plan(target, sampler, 60, values["rounds"], dimension=values["dimension"])


def with_kind_of_query(mechanism: type[BaseMechanism], query: type[Any]) -> type[BaseMechanism]:
    """The mechanism, but for the kind of its query."""

    class Broken(mechanism):
        def sum_query(self, plan: Plan, seed: int, template: Any) -> Any:
            made = super().sum_query(plan, seed, template)
            made.__class__ = query
            return made

    return Broken


class LessNoise(GaussianSumQuery):
    def initial_global_state(self) -> Any:
        state = super().initial_global_state()
        return state._replace(stddev=state.stddev / math.sqrt(2))


class LeavesOutTheCount(AdaptiveClipping):
    """All noise for the updates, as if the count came for nothing: DESIGN.md has 1.71 where 1.80 is true."""

    def sum_noise(self, noise: float, expected_cohort: float) -> float:
        return noise


class HalvesTheCountsNoise(AdaptiveClipping):
    """Takes the count's sensitivity for 1/4."""

    def sum_query(self, plan: Plan, seed: int, template: Any) -> Any:
        query = super().sum_query(plan, seed, template)
        clip, noise, count_stddev, *rest = query._numbers
        query._numbers = (clip, noise, count_stddev / 2, *rest)
        return query


class CountsFromZero(AdaptiveClippingSumQuery):
    """Bits of 0 and 1 instead of -1/2 and 1/2: who is removed moves the count by 1."""

    def preprocess_record(self, params: Any, record: Any) -> Any:
        sample = super().preprocess_record(params, record)
        return sample._replace(count=sample.count + 0.5)


class SharesNoiseWithTheCount(AdaptiveClippingSumQuery):
    """The count's noise is that of the first coordinate: their difference has none."""

    def get_noised_result(self, sample: Any, state: Any) -> Any:
        noisy, _, event = super().get_noised_result(sample, state)
        draw = (noisy[0][0] - sample.total[0][0]) / (state.noise_multiplier * state.clip_norm)
        # Without noise of its own the count is what is put in.
        counted = sample._replace(count=sample.count + state.count_stddev * draw)
        _, after, _ = super().get_noised_result(counted, state._replace(count_stddev=tf.constant(0.0)))
        return noisy, after._replace(count_stddev=state.count_stddev), event


class RestartsWithTheSameNoise(TreeSumQuery):
    def get_noised_result(self, sample: Any, state: Any) -> Any:
        in_tree = state._replace(round=state.round % state.restart_every)
        noisy, after, event = super().get_noised_result(sample, in_tree)
        return noisy, after._replace(round=state.round + 1), event


class DrawsNodesAnew(TreeSumQuery):
    """Each prefix sum has the noise of as many nodes as it should, but of none that another has."""

    def get_noised_result(self, sample: Any, state: Any) -> Any:
        def of_prefix(rounds: tf.Tensor) -> Any:
            nodes = tf.cast(tf.raw_ops.PopulationCount(x=rounds), tf.float32)
            return normal_like(sample, round_seed(state.seed, rounds)), state.stddev * tf.sqrt(nodes)

        (new, scale), (old, old_scale) = of_prefix(state.round + 1), of_prefix(state.round)
        noisy = tf.nest.map_structure(lambda s, n, o: s + scale * n - old_scale * o, sample, new, old)
        return noisy, state._replace(round=state.round + 1), None


class TakesNodesBack(TreeSumQuery):
    """Noise of rounds that adds up to that of the newest node alone, without the others that a prefix sum needs."""

    def get_noised_result(self, sample: Any, state: Any) -> Any:
        def node(number: tf.Tensor) -> Any:
            return normal_like(sample, round_seed(state.seed, number))

        kept = tf.cast(state.round > 0, tf.float32)
        noisy = tf.nest.map_structure(
            lambda s, n, o: s + state.stddev * (n - kept * o), sample, node(state.round + 1), node(state.round)
        )
        return noisy, state._replace(round=state.round + 1), None


class CountsTheDeepestTree(TreeAggregation):
    """Charges restarts by the depth of one tree, not by their sum."""

    def sensitivity(self, rounds: int, period: int) -> float:
        return super().sensitivity(min(rounds, self.restart_every or rounds), period)


class CountsOneEpoch(TreeAggregation):
    """Charges a client for one round of each tree, whatever the period."""

    def sensitivity(self, rounds: int, period: int) -> float:
        return super().sensitivity(rounds, rounds)


class OfUnitRows(BandedMatrix):
    """The factor on the wrong side: rows of norm 1, so that columns exceed it."""

    def sum_query(self, plan: Plan, seed: int, template: Any) -> Any:
        query = super().sum_query(plan, seed, template)
        query._rows = query._rows / np.linalg.norm(query._rows, axis=1, keepdims=True)
        return query


class MultipliesByTheFactor(BandedSumQuery):
    """Noise C z instead of C^-1 z."""

    def get_noised_result(self, sample: Any, state: Any) -> Any:
        row = tf.gather(state.rows, state.round)
        noise = [
            state.stddev * row[k] * normal_like(sample, round_seed(state.seed, state.round - k))[0]
            for k in range(state.rows.shape[1])
        ]
        return [sample[0] + tf.add_n(noise)], state._replace(round=state.round + 1), None


class ForgetsThatColumnsOverlap(BandedMatrix):
    def _overlaps(self, sampler: BaseSampler, population: int) -> int:
        return 1


class AmplifiesAtTheOverallRate(CyclicPoisson):
    """At cohort / population, though only a group is sampled from."""

    def event(self, release: dp_accounting.DpEvent, population: int, rounds: int) -> dp_accounting.DpEvent:
        sampled = dp_accounting.PoissonSampledDpEvent(self.cohort / population, release)
        return dp_accounting.SelfComposedDpEvent(sampled, math.ceil(rounds / self.groups))


class ChargesWholePeriods(Cyclic):
    """Forgets the period that has begun."""

    def event(self, release: dp_accounting.DpEvent, population: int, rounds: int) -> dp_accounting.DpEvent:
        return dp_accounting.SelfComposedDpEvent(release, rounds // self.period(population))


class SharesForTheExpectedCohort(DistributedSkellam):
    """Smaller groups then lack noise."""

    def sum_query(self, plan: Plan, seed: int, template: Any) -> Any:
        query = super().sum_query(plan, seed, template)
        clip, steps, bound, share, bits = query._numbers
        fewer = math.sqrt(plan.sampler.smallest_cohort(plan.population) / plan.expected_cohort)
        query._numbers = (clip, steps, bound, share * fewer, bits)
        return query


def sharing_noise(query: type[Any]) -> type[Any]:
    """The kind of query whose clients all draw what client 0 draws."""

    class SharesNoiseBetweenClients(query):
        def client_params(self, params: Any, client: tf.Tensor) -> Any:
            return super().client_params(params, tf.zeros_like(client))

    return SharesNoiseBetweenClients


class NoisesTheSum(LocalGaussian):
    """Each client adds a share of the noise, though its update is seen alone."""

    def sum_query(self, plan: Plan, seed: int, template: Any) -> Any:
        query = super().sum_query(plan, seed, template)
        query._scale /= math.sqrt(plan.expected_cohort)
        return query


def check_noise_of_the_smallest_cohort(plan: Plan) -> None:
    check_client_noise(plan, plan.sampler.smallest_cohort(plan.population), plan.noise_multiplier)


def check_noise_of_one_client(plan: Plan) -> None:
    check_client_noise(plan, 1, plan.noise_multiplier)


GAUSSIAN = Gaussian(clip_norm=0.7)
ADAPTIVE = {"clip_norm": 0.7}
TREE = {"clip_norm": 0.7, "variance_reduction": "none"}
RESTARTED = {**TREE, "restart_every": 4}
BANDED = {"clip_norm": 0.7, "bands": 4}
# A plan that is broken, the check that catches it, what it complains about, and the same plan as it should be.
BROKEN_MECHANISMS = {
    "noise off by sqrt(2)": (
        lambda: plan_of(with_kind_of_query(Gaussian, LessNoise)(clip_norm=0.7), Everyone()),
        check_noise_hides_a_client,
        r"is seen at 1\.4[12]",
        lambda: plan_of(GAUSSIAN, Everyone()),
    ),
    "leaves out the count query": (
        lambda: plan_of(LeavesOutTheCount(**ADAPTIVE), Poisson(cohort=20), noise=1.2),
        check_count_is_charged,
        r"a noise multiplier of 1\.0\d+ together, but 1\.2",
        lambda: plan_of(AdaptiveClipping(**ADAPTIVE), Poisson(cohort=20), noise=1.2),
    ),
    "takes the count's sensitivity for 1/4": (
        lambda: plan_of(HalvesTheCountsNoise(**ADAPTIVE), Poisson(cohort=20), noise=1.2),
        check_count_is_charged,
        r"a noise multiplier of 0\.\d+ together, but 1\.2",
        lambda: plan_of(AdaptiveClipping(**ADAPTIVE), Poisson(cohort=20), noise=1.2),
    ),
    "counts from zero": (
        lambda: plan_of(
            with_kind_of_query(AdaptiveClipping, CountsFromZero)(**ADAPTIVE), Poisson(cohort=20), noise=1.2
        ),
        check_count_sensitivity,
        r"moved the count by 1\.0",
        lambda: plan_of(AdaptiveClipping(**ADAPTIVE), Poisson(cohort=20), noise=1.2),
    ),
    "shares noise between sum and count": (
        lambda: plan_of(
            with_kind_of_query(AdaptiveClipping, SharesNoiseWithTheCount)(**ADAPTIVE), Poisson(cohort=20), noise=1.2
        ),
        check_count_is_charged,
        r"the count's noise has correlation 1\.0",
        lambda: plan_of(AdaptiveClipping(**ADAPTIVE), Poisson(cohort=20), noise=1.2),
    ),
    "restarts with the same noise": (
        lambda: plan_of(with_kind_of_query(TreeAggregation, RestartsWithTheSameNoise)(**RESTARTED), Everyone()),
        check_noise_hides_a_client,
        r"is seen at \d{3,}",
        lambda: plan_of(TreeAggregation(**RESTARTED), Everyone()),
    ),
    "draws the nodes anew in each round": (
        lambda: plan_of(with_kind_of_query(TreeAggregation, DrawsNodesAnew)(**TREE), Cyclic(cohort=7)),
        check_noise_hides_a_client,
        r"is seen at 1\.[1-9]",
        lambda: plan_of(TreeAggregation(**TREE), Cyclic(cohort=7)),
    ),
    "has one node's noise on each prefix sum": (
        lambda: plan_of(with_kind_of_query(TreeAggregation, TakesNodesBack)(**TREE), Everyone()),
        check_noise_hides_a_client,
        r"is seen at [1-9]",
        lambda: plan_of(TreeAggregation(**TREE), Everyone()),
    ),
    "charges restarts by the depth of one tree": (
        lambda: plan_of(CountsTheDeepestTree(**RESTARTED), Everyone()),
        check_noise_hides_a_client,
        r"is seen at 1\.4[12]",
        lambda: plan_of(TreeAggregation(**RESTARTED), Everyone()),
    ),
    "charges several epochs of a tree as one": (
        lambda: plan_of(CountsOneEpoch(**TREE), Cyclic(cohort=30)),
        check_noise_hides_a_client,
        r"is seen at [1-9]\.",
        lambda: plan_of(TreeAggregation(**TREE), Cyclic(cohort=30)),
    ),
    "normalises the rows of the banded matrix": (
        lambda: plan_of(OfUnitRows(**BANDED), Cyclic(cohort=15)),
        check_noise_hides_a_client,
        r"is seen at 1\.[1-9]",
        lambda: plan_of(BandedMatrix(**BANDED), Cyclic(cohort=15)),
    ),
    "multiplies noise by the banded matrix": (
        lambda: plan_of(with_kind_of_query(BandedMatrix, MultipliesByTheFactor)(**BANDED), Cyclic(cohort=15)),
        check_noise_hides_a_client,
        r"is seen at 1\.\d",
        lambda: plan_of(BandedMatrix(**BANDED), Cyclic(cohort=15)),
    ),
    "forgets that columns overlap": (
        lambda: plan_of(ForgetsThatColumnsOverlap(**BANDED), Everyone()),
        check_noise_hides_a_client,
        r"is seen at 1\.\d",
        lambda: plan_of(BandedMatrix(**BANDED), Everyone()),
    ),
    "amplifies at the overall rate": (
        lambda: plan_of(BandedMatrix(**BANDED), AmplifiesAtTheOverallRate(cohort=5, groups=4)),
        check_rounds_are_charged,
        r"clients take part 0\.6\d+ times on average, but 0\.167 times are charged",
        lambda: plan_of(BandedMatrix(**BANDED), CyclicPoisson(cohort=5, groups=4)),
    ),
    "forgets the period that has begun": (
        lambda: plan_of(GAUSSIAN, ChargesWholePeriods(cohort=20)),
        check_rounds_are_charged,
        "a client takes part 3 times, but 2 are charged",
        lambda: plan_of(GAUSSIAN, Cyclic(cohort=20)),
    ),
    "shares the noise for the expected cohort": (
        lambda: plan_of(SharesForTheExpectedCohort(clip_norm=0.7), Cyclic(cohort=7)),
        check_noise_of_the_smallest_cohort,
        r"6 clients noise their sum by 1\.4\d+ clips instead of 1\.5",
        lambda: plan_of(DistributedSkellam(clip_norm=0.7), Cyclic(cohort=7)),
    ),
    "local clients share noise": (
        lambda: plan_of(
            with_kind_of_query(LocalGaussian, sharing_noise(LocalGaussianSumQuery))(clip_norm=0.7), Everyone()
        ),
        check_clients_differ,
        r"the noise of two clients has correlation 1\.0",
        lambda: plan_of(LocalGaussian(clip_norm=0.7), Everyone()),
    ),
    "distributed clients share noise": (
        lambda: plan_of(
            with_kind_of_query(DistributedDiscreteGaussian, sharing_noise(DistributedSumQuery))(clip_norm=0.7),
            Everyone(),
            dimension=40_000,
        ),
        check_clients_differ,
        r"the noise of two clients has correlation 1\.0",
        lambda: plan_of(DistributedDiscreteGaussian(clip_norm=0.7), Everyone(), dimension=40_000),
    ),
    "local clients add shares of noise": (
        lambda: plan_of(NoisesTheSum(clip_norm=0.7), Everyone()),
        check_noise_of_one_client,
        r"1 clients noise their sum by 0\.[12]\d+ clips instead of 1\.5",
        lambda: plan_of(LocalGaussian(clip_norm=0.7), Everyone()),
    ),
}


@pytest.mark.parametrize(
    ("make", "check", "complaint", "make_true"), BROKEN_MECHANISMS.values(), ids=BROKEN_MECHANISMS.keys()
)
def test_a_broken_mechanism_is_caught_and_the_true_one_passes(make, check, complaint, make_true):
    with pytest.raises(AssertionError, match=complaint):
        check(make())
    check(make_true())


@pytest.mark.parametrize("check", EVERY_CHECK, ids=lambda check: check.__name__)
def test_the_true_mechanism_passes(plan, check):
    check(plan)


def test_the_true_sampler_passes(plan):
    check_poisson(plan.sampler, plan.population)
