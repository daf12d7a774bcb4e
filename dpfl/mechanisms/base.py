"""What all mechanisms have in common: from a target to a plan."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import numbers
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import dp_accounting
import pydantic

from dpfl.compression import Compression
from dpfl.config import Config
from dpfl.errors import InputError
from dpfl.limits import LARGEST_CLIP_NORM, LARGEST_NOISE, LEAST_NOISE, SMALLEST_CLIP_NORM
from dpfl.mechanisms.deployment import Deployment
from dpfl.mechanisms.plan import Plan
from dpfl.privacy import Guarantee, Privacy, accounting, calibration
from dpfl.privacy.events import as_dict
from dpfl.privacy.relations import Accountant, Relation
from dpfl.privacy.target import check_weak_delta
from dpfl.sampling import BaseSampler

if TYPE_CHECKING:
    from dpfl.mechanisms.queries import MeanQuery, SumQuery

_LEAST_NOISE_FOR_PLD = 0.1  # with less, the privacy loss may take more values than memory holds
_MOST_ROUNDS = 1_000_000_000
_UNCOMPRESSED = Compression()

_EVERYWHERE = (
    "The number of clients counts as public, and the split into training and held-out examples as fixed.",
    "It does not cover figures measured along the way (accuracies, losses, update norms), nor the choice of "
    "hyperparameters by looking at them.",
    "The noise is a pseudo-random function, in float32, of the run's seed: whoever knows the seed can take it off, and "
    "runs with the same seed share it, so a model that is released needs a seed of its own that stays secret.",
)
_TRUSTED_SERVER = (
    "The guarantee assumes a trusted server: it sees the single updates and who sent them, and tells nobody."
)


class BaseMechanism(Config):
    """Clips each client's update, adds noise, and divides the sum by the expected cohort.

    Attributes:
        name: the kind of mechanism.
        clip_norm: the largest norm of a client's update (all tensors together), between 1e-9 and 1e9:
            beyond, squares leave the range of float32 and norms would be wrong.
        noise_multiplier: a fixed noise; None calibrates it to the target. With a fixed noise the
            target's epsilon is a budget: training ends before the round that would exceed it.
        released: what the guarantee covers, in words.
        needs_dimension: whether accounting depends on the number of coordinates of an update.
        weighting: clients count alike: weights by data would break the sensitivity (see `dpfl.NoMechanism`).
        clients_noise_alone: whether what a client sends protects it by itself, so that it may be quantised after.
    """

    name: str
    clip_norm: float
    noise_multiplier: float | None = None
    released: ClassVar[str] = "the models after all rounds"
    needs_dimension: ClassVar[bool] = False
    weighting: ClassVar[Literal["equal"]] = "equal"
    clients_noise_alone: ClassVar[bool] = False

    @property
    def works_side_by_side(self) -> bool:
        """Whether runs under several settings of this mechanism can share one graph; see `together_key`."""
        return False

    @pydantic.model_validator(mode="after")
    def _check_numbers(self) -> BaseMechanism:
        if not SMALLEST_CLIP_NORM <= self.clip_norm <= LARGEST_CLIP_NORM:
            raise InputError(
                f"the clip norm must be a positive number between {SMALLEST_CLIP_NORM:g} and {LARGEST_CLIP_NORM:g}, "
                f"but it was {self.clip_norm:g}; to train without clipping use the mechanism none."
            )
        noise = self.noise_multiplier
        if noise is not None and not LEAST_NOISE <= noise <= LARGEST_NOISE:
            raise InputError(
                f"the noise multiplier must be at least {LEAST_NOISE:g} and at most {LARGEST_NOISE:g}, "
                f"but it was {noise:g}; "
                "None calibrates it to epsilon."
            )
        return self

    # What each mechanism says for itself.

    def event(
        self, noise: float, sampler: BaseSampler, population: int, rounds: int, dimension: int | None
    ) -> dp_accounting.DpEvent:
        """The privacy event of a number of rounds; all its noise is proportional to `noise`.

        Args:
            noise: the noise multiplier.
            sampler: draws the cohorts.
            population: the number of clients.
            rounds: the number of rounds, at least 1.
            dimension: the number of coordinates of an update, where `needs_dimension`.
        """
        raise NotImplementedError

    def sum_query(self, plan: Plan, seed: int, template: Any) -> SumQuery:
        """The query that sums clipped updates and adds the plan's noise; see `Plan.query`."""
        raise NotImplementedError

    def in_words(self, noise: float) -> str:
        """The mechanism as a clause of the guarantee's statement."""
        raise NotImplementedError

    def structure(self, plan: Plan) -> tuple[Any, ...]:
        """What a compiled graph of the query depends on, beside the mechanism's name."""
        return ()

    def assumptions(self, sampler: BaseSampler) -> tuple[str, ...]:
        """Sentences that must be true for the guarantee to hold."""
        return (_TRUSTED_SERVER, *sampler.assumptions)

    def noise_for_cohort(self, noise: float, share: float) -> float:
        """The noise multiplier with which a smaller cohort has as much noise on its mean.

        Args:
            noise: the noise multiplier of the larger cohort.
            share: the smaller expected cohort divided by the larger one.
        """
        return noise * share

    def check_noise(self, noise: float, sampler: BaseSampler, population: int, dimension: int | None) -> None:
        """Refuses a noise multiplier that the mechanism's parts cannot share, or its numbers not hold."""

    def check_sampler(self, sampler: BaseSampler, population: int, relation: Relation) -> None:
        """Refuses samplers under which the mechanism has no known analysis."""
        sampler.check_relation(relation)

    def check_compression(self, compression: Compression) -> None:
        """Refuses a compression of updates that the mechanism cannot use."""

    def update_bytes(self, parameters: int) -> int:
        """Bytes that a client sends in a round, where updates are not quantised.

        Args:
            parameters: the number of coordinates of an update.
        """
        return 4 * parameters  # float32

    # What is the same for all.

    def mean_query(self, plan: Plan, seed: int, template: Any) -> MeanQuery:
        """The query of the mean: the noisy sum divided by the expected cohort; see `Plan.query`."""
        from dpfl.mechanisms.queries import MeanQuery

        return MeanQuery(self.sum_query(plan, seed, template), plan.expected_cohort)

    def check(
        self, target: Privacy, sampler: BaseSampler, population: int, deployment: Deployment | None = None
    ) -> None:
        """Refuses settings that no noise can reconcile.

        Raises:
            InputError: a target that is not user-level, a cohort beyond the population, a weak delta, a sampler or
                relation that the mechanism has no analysis for, or a deployment smaller than the simulation.
        """
        if population < 1:
            raise InputError(f"at least 1 client is needed, but there were {population}.")
        if target.unit != "user":
            raise InputError(
                f"the mechanism {self.name} protects clients, not examples: give it a target of unit user, or an "
                "experiment whose clients train with an example_clip."
            )
        sampler.check(population)
        if deployment is not None:
            larger = deployment.sampler(sampler)
            self.check(target, larger, deployment.clients)
            if larger.expected_cohort(deployment.clients) < sampler.expected_cohort(population):
                raise InputError(
                    "the deployment's expected cohort must be at least the simulated one, "
                    f"{sampler.expected_cohort(population):g}, but it was "
                    f"{larger.expected_cohort(deployment.clients):g}."
                )
        if target.epsilon is None and self.noise_multiplier is None:
            return
        self.check_sampler(sampler, population, target.relation)
        check_weak_delta(target.delta, population, target.allow_weak_delta)

    def plan(
        self,
        target: Privacy,
        sampler: BaseSampler,
        population: int,
        rounds: int,
        *,
        dimension: int | None = None,
        deployment: Deployment | None = None,
        compression: Compression = _UNCOMPRESSED,
    ) -> Plan:
        """Calibrates the noise for a target.

        Args:
            target: the guarantee asked for; with epsilon None (and no fixed noise) updates are clipped
                but not noised.
            sampler: draws the cohorts.
            population: the number of clients.
            rounds: the number of rounds, each of which releases one noisy sum.
            dimension: the number of coordinates of an update, where `needs_dimension`.
            deployment: calibrates for this larger population, and puts as much noise on the mean of
                the simulated cohort as the deployment's would have.
            compression: of the updates; the dimension is then that of what is left of them.

        Raises:
            InputError: the target cannot be met, or the mechanism cannot use the compression.
        """
        self.check(target, sampler, population, deployment)
        self.check_compression(compression)
        check_rounds(rounds)
        if self.needs_dimension and (dimension is None or dimension < 1):
            raise InputError(
                f"the mechanism {self.name} accounts for the number of weights: tell the plan the dimension, at least "
                "1 (--dimension, dimension=)."
            )
        if deployment is None:
            plan = self._planned(target, sampler, population, rounds, dimension)
            return dataclasses.replace(plan, compression=compression)
        larger = deployment.sampler(sampler)
        deployed = self._planned(target, larger, deployment.clients, rounds, dimension)
        share = sampler.expected_cohort(population) / deployed.expected_cohort
        noise = self.noise_for_cohort(deployed.noise_multiplier, share)
        accountant = target.accountant
        if 0 < noise < _LEAST_NOISE_FOR_PLD:
            accountant = _rdp_if_known(self.event(noise, sampler, population, deployed.rounds, dimension), target)
        analysed = target.replace(accountant=accountant)
        simulated = self._with_noise(noise, analysed, sampler, population, deployed.rounds, dimension)
        extrapolated = dataclasses.replace(
            deployed.guarantee,
            assumptions=(
                f"This is an extrapolation: it speaks of {deployment.clients:,} clients, while {population:,} were "
                "simulated, for whom another guarantee holds.",
                *deployed.guarantee.assumptions,
            ),
        )
        return dataclasses.replace(simulated, target=target, extrapolated=extrapolated, compression=compression)

    def _planned(
        self, target: Privacy, sampler: BaseSampler, population: int, rounds: int, dimension: int | None
    ) -> Plan:
        """Calibrates the noise to epsilon, or the rounds to a fixed noise."""
        noise = self.noise_multiplier
        analysis: dict[str, Any] = {"relation": target.relation, "accountant": target.accountant}

        def event_of(count: int, noise: float) -> dp_accounting.DpEvent:
            return self.event(noise, sampler, population, count, dimension)

        if noise is None and target.epsilon is not None:
            noise = calibration.noise_for(event_of(rounds, 1.0), target.epsilon, target.delta, **analysis)
        elif noise is not None and target.epsilon is not None:
            rounds = calibration.largest_count(
                functools.partial(event_of, noise=noise), target.epsilon, target.delta, largest=rounds, **analysis
            )
        plan = self._with_noise(noise or 0.0, target, sampler, population, rounds, dimension)
        if target.epsilon is not None and plan.guarantee.epsilon > target.epsilon:
            raise InputError(
                f"epsilon {target.epsilon:g} cannot be accounted for at delta {target.delta:g}: choose a larger delta."
            )
        return plan

    def _with_noise(
        self,
        noise: float,
        target: Privacy,
        sampler: BaseSampler,
        population: int,
        rounds: int,
        dimension: int | None,
    ) -> Plan:
        """What a noise guarantees, if any."""
        event: dp_accounting.DpEvent = dp_accounting.NonPrivateDpEvent()
        if noise:
            self.check_noise(noise, sampler, population, dimension)
            event = self.event(noise, sampler, population, rounds, dimension)
        guarantee = guarantee_of(
            event,
            target,
            mechanism=self.in_words(noise),
            sampler=sampler.in_words(population),
            steps=rounds,
            released=self.released,
            assumptions=(*self.assumptions(sampler), *_EVERYWHERE) if noise else (),
        )
        return Plan(self, target, sampler, population, rounds, dimension, noise, guarantee)


def refuse_changing_subspaces(mechanism: str, compression: Compression) -> None:
    """Refuses subspaces that are new in each round, for mechanisms whose noise cancels over the rounds.

    Args:
        mechanism: its name.
        compression: of updates.

    Raises:
        InputError: there are such subspaces.
    """
    name = "random_k" if compression.random_k is not None else "rank"
    if getattr(compression, name) is not None:
        raise InputError(
            f"the noise of the mechanism {mechanism} cancels over the rounds, coordinate by coordinate, while {name} "
            "takes others in each round: choose the mechanism gaussian, or leave it out."
        )


def check_rounds(rounds: int) -> None:
    """Refuses a plan of no rounds, of a part of one, and of more than anybody will see."""
    if not isinstance(rounds, numbers.Integral) or not 1 <= rounds <= _MOST_ROUNDS:
        raise InputError(f"a whole number of rounds from 1 to {_MOST_ROUNDS:,} must be planned, but it was {rounds}.")


def _rdp_if_known(event: dp_accounting.DpEvent, target: Privacy) -> Accountant:
    """RDP, or the target's accountant for events that RDP has no answer for."""
    with contextlib.suppress(InputError):
        return accounting.accountant_for(event, target.relation, "rdp")
    return target.accountant


def independent_rounds(noise: float, sampler: BaseSampler, population: int, rounds: int) -> dp_accounting.DpEvent:
    """The event of rounds that each add Gaussian noise of their own."""
    return sampler.event(dp_accounting.GaussianDpEvent(noise), population, rounds)


def guarantee_of(
    event: dp_accounting.DpEvent,
    target: Privacy,
    *,
    mechanism: str,
    sampler: str,
    steps: int,
    released: str = "the models after all rounds",
    assumptions: tuple[str, ...] = (),
) -> Guarantee:
    """The guarantee that an event gives at a target's delta, relation and accountant, with its description."""
    epsilon, accounted_by = math.inf, "none"
    accountant: Accountant | Literal["none"] = "none"
    if not isinstance(event, dp_accounting.NonPrivateDpEvent):
        accountant = accounting.accountant_for(event, target.relation, target.accountant)
        accounted_by = accounting.accountant_name(accountant)
        epsilon = accounting.epsilon(event, target.delta, relation=target.relation, accountant=accountant)
    return Guarantee(
        unit=target.unit,
        relation=target.relation,
        epsilon=epsilon,
        delta=target.delta,
        mechanism=mechanism,
        sampler=sampler,
        steps=steps,
        accountant=accountant,
        accounted_by=accounted_by,
        released=released,
        assumptions=assumptions,
        event=as_dict(event),
    )
