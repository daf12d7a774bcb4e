"""Plain federated averaging: the ceiling that private runs are compared with."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import dp_accounting

from dpfl.config import Config
from dpfl.errors import InputError
from dpfl.mechanisms.base import check_rounds, guarantee_of
from dpfl.mechanisms.deployment import Deployment
from dpfl.mechanisms.plan import Plan
from dpfl.privacy import Privacy
from dpfl.sampling import BaseSampler

if TYPE_CHECKING:
    from dpfl.mechanisms.queries import SumQuery


class NoMechanism(Config):
    """Neither clips nor adds noise; the sum is divided by the expected cohort all the same."""

    name: Literal["none"] = "none"
    clip_norm: ClassVar[float] = math.inf
    needs_dimension: ClassVar[bool] = False

    def check(
        self, target: Privacy, sampler: BaseSampler, population: int, deployment: Deployment | None = None
    ) -> None:
        """Refuses an epsilon, which this mechanism cannot keep, and a cohort beyond the population."""
        sampler.check(population)
        if target.epsilon is not None:
            raise InputError(
                f"the mechanism none cannot keep epsilon {target.epsilon:g}: choose the mechanism gaussian, "
                "or epsilon none."
            )

    def event(self, *_: Any) -> dp_accounting.DpEvent:
        """Whatever was done, nothing is guaranteed."""
        return dp_accounting.NonPrivateDpEvent()

    def sum_query(self, plan: Plan, seed: int, template: Any) -> SumQuery:
        """The query that sums updates as they are."""
        from dpfl.mechanisms.queries import GaussianSumQuery

        return GaussianSumQuery(math.inf, 0.0, seed)

    def structure(self, plan: Plan) -> tuple[Any, ...]:
        """Nothing that a compiled graph depends on."""
        return ()

    def plan(
        self,
        target: Privacy,
        sampler: BaseSampler,
        population: int,
        rounds: int,
        *,
        dimension: int | None = None,
        deployment: Deployment | None = None,
    ) -> Plan:
        """Returns the plan of a run without any guarantee.

        Raises:
            InputError: the target asks for an epsilon, or the cohort exceeds the population.
        """
        self.check(target, sampler, population)
        check_rounds(rounds)
        guarantee = guarantee_of(
            self.event(),
            target,
            mechanism="plain averaging of unclipped updates without noise",
            sampler=sampler.in_words(population),
            steps=rounds,
        )
        return Plan(self, target, sampler, population, rounds, dimension, 0.0, guarantee)
