"""Which clients take part in a round, and what their sampling does for privacy.

A sampler says how a release that each client could take part in becomes the privacy event of all rounds, and
under which neighbouring relations that analysis holds.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

import dp_accounting
import numpy as np
import pydantic
from scipy import stats
from typing_extensions import override

from dpfl.config import Config
from dpfl.errors import InputError
from dpfl.privacy.events import BallsInBinsDpEvent, RevealedPoissonSampledDpEvent
from dpfl.privacy.relations import Relation
from dpfl.randomness import Purpose, generator

# Of a round in which a Poisson sample exceeds the cap that is chosen for it: far below any delta.
_CAP_EXCEEDED = 1e-12
SECRET_COHORTS = "Who took part in which round stays secret."
_FIXED_GROUPS = (
    "Which group a client belongs to was fixed beforehand, without a look at the data, and stays the same whoever else "
    "is in the data."
)


class BaseSampler(Config):
    """What all samplers have in common.

    Attributes:
        name: the kind of sampling.
        relations: the neighbouring relations under which the analysis holds.
        assumptions: sentences that must be true for the analysis to hold.
    """

    name: str
    assumptions: ClassVar[tuple[str, ...]] = (SECRET_COHORTS,)
    relations: ClassVar[tuple[Relation, ...]] = ("add_or_remove_one", "replace_one", "replace_special")

    def check(self, population: int) -> None:
        """Refuses a cohort that the population cannot fill."""

    def check_relation(self, relation: Relation) -> None:
        """Refuses a neighbouring relation under which this sampling has no known analysis."""
        if relation not in self.relations:
            raise InputError(
                f"the sampler {self.name} has no known analysis under the relation {relation}: choose the relation "
                f"{' or '.join(self.relations)}, or another sampler."
            )

    def expected_cohort(self, population: int) -> float:
        """The expected number of clients in a round, by which sums are divided."""
        raise NotImplementedError

    def smallest_cohort(self, population: int) -> int:
        """The number of clients that every round is sure to have."""
        return 0

    def period(self, population: int) -> int | None:
        """The number of rounds after which a client may take part again; None where nothing separates them.

        With a period b, each client has one phase, and takes part only in rounds that are congruent
        to it modulo b.
        """
        return None

    def most_participations(self, population: int, rounds: int) -> int:
        """The largest number of rounds that any client can ever take part in, however the draws fall.

        Args:
            population: the number of clients.
            rounds: the number of rounds.
        """
        return math.ceil(rounds / (self.period(population) or 1))

    def clients(self, seed: int, round_number: int, population: int) -> np.ndarray:
        """Draws the clients of a round.

        Args:
            seed: the run's seed.
            round_number: the round, from 0.
            population: the number of clients in the data.

        Returns:
            Ascending client indices, int32. Unless a mechanism says otherwise the membership is
            private: the guarantee relies on nobody learning who took part.
        """
        raise NotImplementedError

    def event(self, release: dp_accounting.DpEvent, population: int, rounds: int) -> dp_accounting.DpEvent:
        """The privacy event of all rounds, where nobody learns who took part.

        Args:
            release: what one round releases of a client that takes part in it.
            population: the number of clients.
            rounds: the number of rounds.
        """
        raise NotImplementedError

    def revealed_event(self, release: dp_accounting.DpEvent, population: int, rounds: int) -> dp_accounting.DpEvent:
        """The privacy event of all rounds, where everybody learns who took part.

        Args:
            release: what one round releases of a client that takes part in it.
            population: the number of clients.
            rounds: the number of rounds.
        """
        raise NotImplementedError

    def in_words(self, population: int) -> str:
        """The sampling as a clause of the guarantee's statement."""
        raise NotImplementedError


class _CohortSampler(BaseSampler):
    """Samplers that are told the expected number of clients in a round."""

    cohort: int = pydantic.Field(gt=0)

    @override
    def check(self, population: int) -> None:
        if self.cohort > population:
            raise InputError(
                f"the expected cohort of {self.cohort} exceeds the {population} clients of the data; "
                f"choose a cohort of at most {population}."
            )

    @override
    def expected_cohort(self, population: int) -> float:
        return float(self.cohort)


class Poisson(_CohortSampler):
    """Every client takes part in a round independently, with the same probability.

    The number of clients in a round varies, may be zero, and is private: sums are divided by the
    expected cohort. This is the sampling that amplification by Poisson subsampling assumes.

    Attributes:
        cohort: the expected number of clients in a round.
    """

    name: Literal["poisson"] = "poisson"

    def rate(self, population: int) -> float:
        """The probability with which a client takes part in a round.

        Raises:
            InputError: the expected cohort is larger than the population.
        """
        self.check(population)
        return self.cohort / population

    @override
    def clients(self, seed: int, round_number: int, population: int) -> np.ndarray:
        return _poisson_sample(seed, round_number, population, self.rate(population))

    @override
    def event(self, release: dp_accounting.DpEvent, population: int, rounds: int) -> dp_accounting.DpEvent:
        return _repeated(_poisson_sampled(release, self.rate(population)), rounds)

    @override
    def revealed_event(self, release: dp_accounting.DpEvent, population: int, rounds: int) -> dp_accounting.DpEvent:
        return _repeated(_revealed(release, self.rate(population)), rounds)

    @override
    def in_words(self, population: int) -> str:
        return (
            f"on a Poisson sample of the {population} clients at rate {self.rate(population):g} "
            f"(expected cohort {self.cohort})"
        )


class CappedPoisson(Poisson):
    """Poisson sampling with a largest cohort; where more are drawn, a random part of them takes part.

    The cap costs privacy (Ganesh 2025, 2508.15089), next to nothing where it is hardly ever reached.

    Attributes:
        cohort: the expected number of clients in a round, before the cap.
        cap: the largest number of clients in a round; None takes the smallest that a round exceeds
            with a probability below 1e-12, which costs nothing that can be seen.
    """

    name: Literal["capped_poisson"] = "capped_poisson"  # type: ignore[assignment]
    cap: int | None = pydantic.Field(default=None, gt=0)

    def largest_cohort(self, population: int) -> int:
        """The cap, chosen where none was given."""
        if self.cap is not None:
            return min(self.cap, population)
        return min(int(stats.binom.isf(_CAP_EXCEEDED, population, self.rate(population))), population)

    @override
    def clients(self, seed: int, round_number: int, population: int) -> np.ndarray:
        drawn = super().clients(seed, round_number, population)
        cap = self.largest_cohort(population)
        if len(drawn) <= cap:
            return drawn
        kept = generator(seed, Purpose.CAPPING, round_number).choice(drawn, size=cap, replace=False)
        return np.sort(kept)

    @override
    def event(self, release: dp_accounting.DpEvent, population: int, rounds: int) -> dp_accounting.DpEvent:
        cap = self.largest_cohort(population)
        if cap == population:
            return super().event(release, population, rounds)
        if not isinstance(release, dp_accounting.GaussianDpEvent):
            raise InputError(
                f"the sampler {self.name} has a known analysis for Gaussian noise alone: choose the sampler poisson."
            )
        one = dp_accounting.TruncatedSubsampledGaussianDpEvent(
            population, self.rate(population), cap, release.noise_multiplier
        )
        return _repeated(one, rounds)

    @override
    def in_words(self, population: int) -> str:
        return f"{super().in_words(population)}, of which at most {self.largest_cohort(population)} take part"


class FixedSize(_CohortSampler):
    """Every round has the same number of different clients, each set of them with the same probability.

    Only replacing a client has a known analysis: it is dearer than Poisson sampling, since in the worst case a
    client's presence in the cohort turns the whole sum around.

    Attributes:
        cohort: the number of clients in a round.
    """

    name: Literal["fixed_size"] = "fixed_size"
    relations: ClassVar[tuple[Relation, ...]] = ("replace_one",)

    @override
    def smallest_cohort(self, population: int) -> int:
        return self.cohort

    @override
    def clients(self, seed: int, round_number: int, population: int) -> np.ndarray:
        self.check(population)
        drawn = generator(seed, Purpose.SAMPLING, round_number).choice(population, size=self.cohort, replace=False)
        return np.sort(drawn).astype(np.int32)

    @override
    def event(self, release: dp_accounting.DpEvent, population: int, rounds: int) -> dp_accounting.DpEvent:
        self.check(population)
        if self.cohort == population:
            return _repeated(release, rounds)
        return _repeated(dp_accounting.SampledWithoutReplacementDpEvent(population, self.cohort, release), rounds)

    @override
    def revealed_event(self, release: dp_accounting.DpEvent, population: int, rounds: int) -> dp_accounting.DpEvent:
        self.check(population)
        return _repeated(_revealed(release, self.cohort / population), rounds)

    @override
    def in_words(self, population: int) -> str:
        return f"on {self.cohort} of the {population} clients, drawn without replacement"


class Everyone(BaseSampler):
    """All clients take part in every round."""

    name: Literal["everyone"] = "everyone"
    assumptions: ClassVar[tuple[str, ...]] = ()

    @override
    def expected_cohort(self, population: int) -> float:
        return float(population)

    @override
    def smallest_cohort(self, population: int) -> int:
        return population

    @override
    def period(self, population: int) -> int:
        return 1

    @override
    def clients(self, seed: int, round_number: int, population: int) -> np.ndarray:
        return np.arange(population, dtype=np.int32)

    @override
    def event(self, release: dp_accounting.DpEvent, population: int, rounds: int) -> dp_accounting.DpEvent:
        return _repeated(release, rounds)

    @override
    def revealed_event(self, release: dp_accounting.DpEvent, population: int, rounds: int) -> dp_accounting.DpEvent:
        return _repeated(release, rounds)

    @override
    def in_words(self, population: int) -> str:
        return f"on all {population} clients"


class Cyclic(_CohortSampler):
    """Clients form groups of one size that take part one after the other, over and over.

    Two rounds of the same client lie exactly population / cohort rounds apart (the minimum separation of the
    DP-FTRL literature). Nothing is random about it, so nothing is amplified and nobody needs to be
    kept secret; which group a client belongs to counts as public and does not depend on the data.

    Attributes:
        cohort: the largest number of clients in a round; there are as few groups as that allows, of sizes that
            differ by at most one.
    """

    name: Literal["cyclic"] = "cyclic"
    assumptions: ClassVar[tuple[str, ...]] = (_FIXED_GROUPS,)

    @override
    def expected_cohort(self, population: int) -> float:
        return population / self.period(population)

    @override
    def smallest_cohort(self, population: int) -> int:
        return population // self.period(population)

    @override
    def period(self, population: int) -> int:
        self.check(population)
        return math.ceil(population / self.cohort)

    @override
    def clients(self, seed: int, round_number: int, population: int) -> np.ndarray:
        return _group(seed, round_number, population, self.period(population))

    @override
    def event(self, release: dp_accounting.DpEvent, population: int, rounds: int) -> dp_accounting.DpEvent:
        return _repeated(release, math.ceil(rounds / self.period(population)))

    @override
    def revealed_event(self, release: dp_accounting.DpEvent, population: int, rounds: int) -> dp_accounting.DpEvent:
        return self.event(release, population, rounds)

    @override
    def in_words(self, population: int) -> str:
        period = self.period(population)
        return f"on one of {period} fixed groups of the {population} clients in turn"


class CyclicPoisson(_CohortSampler):
    """Clients form groups that take turns; of the group whose turn it is, a Poisson sample takes part.

    With it, factorisations whose bands do not exceed the number of groups keep the amplification by
    sampling (Choquette-Choo et al. 2023, 2306.08153, section 4): each client pays for rounds / groups
    Poisson samples at the rate cohort * groups / population.

    Attributes:
        cohort: the expected number of clients in a round.
        groups: the number of groups, and of rounds after which a client may take part again.
    """

    name: Literal["cyclic_poisson"] = "cyclic_poisson"
    assumptions: ClassVar[tuple[str, ...]] = (*_CohortSampler.assumptions, _FIXED_GROUPS)
    groups: int = pydantic.Field(gt=0)

    @override
    def check(self, population: int) -> None:
        super().check(population)
        if self.cohort * self.groups > population:
            raise InputError(
                f"{self.groups} groups of {population} clients have fewer members than the expected cohort of "
                f"{self.cohort}: choose at most {population // self.cohort} groups."
            )

    def rate(self, population: int) -> float:
        """The probability with which a client takes part in a round of its group."""
        self.check(population)
        return self.cohort * self.groups / population

    @override
    def period(self, population: int) -> int:
        return self.groups

    @override
    def clients(self, seed: int, round_number: int, population: int) -> np.ndarray:
        group = _group(seed, round_number, population, self.groups)
        drawn = _poisson_sample(seed, round_number, population, self.rate(population))
        return np.intersect1d(group, drawn, assume_unique=True)

    @override
    def event(self, release: dp_accounting.DpEvent, population: int, rounds: int) -> dp_accounting.DpEvent:
        turns = math.ceil(rounds / self.groups)
        return _repeated(_poisson_sampled(release, self.rate(population)), turns)

    @override
    def revealed_event(self, release: dp_accounting.DpEvent, population: int, rounds: int) -> dp_accounting.DpEvent:
        return _repeated(_revealed(release, self.rate(population)), math.ceil(rounds / self.groups))

    @override
    def in_words(self, population: int) -> str:
        return (
            f"on a Poisson sample at rate {self.rate(population):g} of one of {self.groups} fixed groups of the "
            f"{population} clients in turn (expected cohort {self.cohort})"
        )


class BallsInBins(_CohortSampler):
    """In each epoch every client falls into one of the epoch's rounds at random, like a ball into a bin.

    Each client takes part once an epoch of round(population / cohort) rounds (Chua et al. 2024,
    2412.16802): a shuffle that has an analysis. The balls are thrown anew in every epoch.

    Attributes:
        cohort: the number of clients in a round to aim at.
    """

    name: Literal["balls_in_bins"] = "balls_in_bins"
    relations: ClassVar[tuple[Relation, ...]] = ("add_or_remove_one", "replace_special")

    @override
    def expected_cohort(self, population: int) -> float:
        return population / self.bins(population)

    def bins(self, population: int) -> int:
        """The number of rounds in an epoch."""
        self.check(population)
        return max(1, round(population / self.cohort))

    @override
    def most_participations(self, population: int, rounds: int) -> int:
        return math.ceil(rounds / self.bins(population))

    @override
    def clients(self, seed: int, round_number: int, population: int) -> np.ndarray:
        epoch, turn = divmod(round_number, self.bins(population))
        thrown = generator(seed, Purpose.SAMPLING, epoch).integers(self.bins(population), size=population)
        return np.flatnonzero(thrown == turn).astype(np.int32)

    @override
    def event(self, release: dp_accounting.DpEvent, population: int, rounds: int) -> dp_accounting.DpEvent:
        bins = self.bins(population)
        epochs, more = divmod(rounds, bins)
        if bins == 1:
            return _repeated(release, rounds)
        return _composed(
            _repeated(BallsInBinsDpEvent(bins, bins, release), epochs),
            _repeated(BallsInBinsDpEvent(bins, more, release), 1 if more else 0),
        )

    @override
    def revealed_event(self, release: dp_accounting.DpEvent, population: int, rounds: int) -> dp_accounting.DpEvent:
        bins = self.bins(population)
        epochs, more = divmod(rounds, bins)
        return _composed(_repeated(release, epochs), _repeated(_revealed(release, more / bins), 1 if more else 0))

    @override
    def in_words(self, population: int) -> str:
        return (
            f"on one of {self.bins(population)} bins in turn, into which the {population} clients are thrown at "
            "random, anew in every epoch"
        )


Sampler = Annotated[
    Poisson | CappedPoisson | FixedSize | Everyone | Cyclic | CyclicPoisson | BallsInBins,
    pydantic.Field(discriminator="name"),
]


def _poisson_sample(seed: int, round_number: int, population: int, rate: float) -> np.ndarray:
    draws = generator(seed, Purpose.SAMPLING, round_number).random(population)
    return np.flatnonzero(draws < rate).astype(np.int32)


def _group(seed: int, round_number: int, population: int, groups: int) -> np.ndarray:
    """The clients whose turn it is; the groups are drawn once a run and differ by at most one client."""
    order = generator(seed, Purpose.GROUPING).permutation(population)
    return np.sort(order[round_number % groups :: groups]).astype(np.int32)


def _repeated(event: dp_accounting.DpEvent, count: int) -> dp_accounting.DpEvent:
    if count == 0:
        return dp_accounting.NoOpDpEvent()
    return dp_accounting.SelfComposedDpEvent(event, count)


def _composed(first: dp_accounting.DpEvent, second: dp_accounting.DpEvent) -> dp_accounting.DpEvent:
    parts = [part for part in (first, second) if not isinstance(part, dp_accounting.NoOpDpEvent)]
    return parts[0] if len(parts) == 1 else dp_accounting.ComposedDpEvent(tuple(parts))


def _poisson_sampled(release: dp_accounting.DpEvent, rate: float) -> dp_accounting.DpEvent:
    return dp_accounting.PoissonSampledDpEvent(rate, release) if rate < 1 else release


def _revealed(release: dp_accounting.DpEvent, rate: float) -> dp_accounting.DpEvent:
    return RevealedPoissonSampledDpEvent(rate, release) if rate < 1 else release
