"""Mechanisms that are broken on purpose: the checks of the guarantee must catch each of them.

A check that has never failed shows nothing. Every class below breaks the guarantee in a way that has
happened in somebody's code (DESIGN.md, "Ways the guarantee is lost").
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from guarantee_checks import (
    EVERY_CHECK,
    check_accounting,
    check_denominator,
    check_noise_distribution,
    check_noise_independence,
    check_noise_repeats,
    check_poisson,
    check_wicked_neighbours,
    check_wicked_records,
)
from tensorflow_privacy import GaussianSumQuery, NormalizedQuery
from tensorflow_privacy.privacy.dp_query.dp_query import SumAggregationDPQuery

from dpfl.mechanisms import Plan
from dpfl.mechanisms.queries import StatelessGaussianSumQuery
from dpfl.privacy import epsilon, poisson_gaussian
from dpfl.randomness import Purpose, generator
from dpfl.sampling import Poisson


def with_query(make: Callable[[Plan, int], Any]) -> type[Plan]:
    """A kind of plan whose queries come from `make`."""

    class BrokenPlan(Plan):
        def query(self, seed: int) -> Any:
            return make(self, seed)

    return BrokenPlan


def with_sum_query(kind: type[StatelessGaussianSumQuery]) -> type[Plan]:
    """A kind of plan whose sum query is of another kind; the denominator stays right."""
    return with_query(
        lambda plan, seed: NormalizedQuery(kind(plan.clip_norm, plan.noise_stddev, seed), float(plan.sampler.cohort))
    )


def broken(kind: type[Plan], plan: Plan) -> Plan:
    return kind(**{field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)})


class DividesByTheActualCohort(SumAggregationDPQuery):
    def __init__(self, plan: Plan, seed: int) -> None:
        self._sum = StatelessGaussianSumQuery(plan.clip_norm, plan.noise_stddev, seed)

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


class ClipsAfterSumming(StatelessGaussianSumQuery):
    def preprocess_record(self, params: Any, record: Any) -> Any:
        finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(part)) for part in tf.nest.flatten(record)])
        return tf.nest.map_structure(lambda part: tf.where(finite, part, 0.0), record)

    def get_noised_result(self, sample: Any, state: Any) -> Any:
        return super().get_noised_result(super().preprocess_record(state.clip_norm, sample), state)


class ForgetsNonFiniteUpdates(StatelessGaussianSumQuery):
    def preprocess_record(self, params: Any, record: Any) -> Any:
        clipped, _ = tf.clip_by_global_norm(tf.nest.flatten(record), params)
        return tf.nest.pack_sequence_as(record, clipped)


class ReplacesNonFiniteValues(StatelessGaussianSumQuery):
    """Zeroes what is not finite in an update after it was clipped: the rest of an infinite update stays."""

    def preprocess_record(self, params: Any, record: Any) -> Any:
        def finite(part: tf.Tensor) -> tf.Tensor:
            return tf.where(tf.math.is_finite(part), part, tf.zeros_like(part))

        norm = tf.linalg.global_norm(tf.nest.flatten(tf.nest.map_structure(finite, record)))
        scale = tf.where(tf.math.is_finite(norm) & (norm > params), params / norm, 1.0)
        return tf.nest.map_structure(lambda part: finite(part * scale), record)


class ClipsEachTensor(StatelessGaussianSumQuery):
    def preprocess_record(self, params: Any, record: Any) -> Any:
        return tf.nest.map_structure(lambda part: super(ClipsEachTensor, self).preprocess_record(params, part), record)


class NormalisesEveryUpdate(StatelessGaussianSumQuery):
    """Also stretches short updates to the clip, and divides a zero update by its norm."""

    def preprocess_record(self, params: Any, record: Any) -> Any:
        norm = tf.linalg.global_norm(tf.nest.flatten(record))
        return tf.nest.map_structure(lambda part: part * params / norm, record)


class RepeatsItsNoise(StatelessGaussianSumQuery):
    def get_noised_result(self, sample: Any, state: Any) -> Any:
        result, _, event = super().get_noised_result(sample, state)
        return result, state, event


class SharesNoiseBetweenTensors(StatelessGaussianSumQuery):
    def get_noised_result(self, sample: Any, state: Any) -> Any:
        parts = [super(SharesNoiseBetweenTensors, self).get_noised_result(p, state) for p in tf.nest.flatten(sample)]
        return tf.nest.pack_sequence_as(sample, [part[0] for part in parts]), *parts[0][1:]


class SparesNoiseForEmptyCohorts(StatelessGaussianSumQuery):
    def get_noised_result(self, sample: Any, state: Any) -> Any:
        noisy, state, event = super().get_noised_result(sample, state)
        nobody = tf.reduce_all([tf.reduce_all(part == 0) for part in tf.nest.flatten(sample)])
        return tf.nest.map_structure(lambda s, n: tf.where(nobody, s, n), sample, noisy), state, event


class UniformNoise(StatelessGaussianSumQuery):
    """The right mean and variance, and no tails."""

    def get_noised_result(self, sample: Any, state: Any) -> Any:
        reach = state.stddev * math.sqrt(3)
        seeds = tf.random.experimental.stateless_split(
            tf.random.experimental.stateless_fold_in(state.seed, state.round), len(tf.nest.flatten(sample))
        )
        noisy = [
            part + tf.random.stateless_uniform(tf.shape(part), seed, -reach, reach)
            for part, seed in zip(tf.nest.flatten(sample), seeds, strict=True)
        ]
        return tf.nest.pack_sequence_as(sample, noisy), state._replace(round=state.round + 1), None


def with_scaled_noise(factor: Callable[[Plan], float]) -> type[Plan]:
    def make(plan: Plan, seed: int) -> Any:
        total = StatelessGaussianSumQuery(plan.clip_norm, plan.noise_stddev * factor(plan), seed)
        return NormalizedQuery(total, float(plan.sampler.cohort))

    return with_query(make)


def with_denominator(denominator: Callable[[Plan], float]) -> type[Plan]:
    def make(plan: Plan, seed: int) -> Any:
        return NormalizedQuery(StatelessGaussianSumQuery(plan.clip_norm, plan.noise_stddev, seed), denominator(plan))

    return with_query(make)


def stateful(plan: Plan, seed: int) -> Any:
    return NormalizedQuery(GaussianSumQuery(plan.clip_norm, plan.noise_stddev), float(plan.sampler.cohort))


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


class FixedSize(Poisson):
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
        (FixedSize, r"the variance of cohort sizes is 0\.000"),
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
    spent = epsilon(poisson_gaussian(noise, rate, rounds), plan.guarantee.delta, relation=relation)
    return dataclasses.replace(plan, guarantee=dataclasses.replace(plan.guarantee, epsilon=spent))


BROKEN_ACCOUNTS = {
    "charges one round less": lambda plan: accounted(plan, plan.noise_multiplier, plan.sampling_rate, plan.rounds - 1),
    "forgets one client of the population": lambda plan: accounted(plan, plan.noise_multiplier, 20 / 61, plan.rounds),
    "amplifies at the wrong rate": lambda plan: accounted(plan, plan.noise_multiplier, 1 / 60, plan.rounds),
    "states replace-one, charges add-or-remove": lambda plan: dataclasses.replace(
        plan, guarantee=dataclasses.replace(plan.guarantee, relation="replace_one")
    ),
    "less noise than it charges": lambda plan: dataclasses.replace(plan, noise_multiplier=plan.noise_multiplier / 1.01),
}


@pytest.mark.parametrize("breaks", BROKEN_ACCOUNTS.values(), ids=BROKEN_ACCOUNTS)
def test_a_broken_account_is_caught(plan, breaks):
    with pytest.raises(AssertionError, match="states epsilon"):
        check_accounting(breaks(plan))


@pytest.mark.parametrize("check", EVERY_CHECK, ids=lambda check: check.__name__)
def test_the_true_mechanism_passes(plan, check):
    check(plan)


def test_the_true_sampler_passes(plan):
    check_poisson(plan.sampler, plan.population)
