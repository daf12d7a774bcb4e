"""Plain federated averaging: the ceiling that private runs are compared with."""

from __future__ import annotations

import math
from typing import Literal

from dpfl.config import Config
from dpfl.errors import InputError
from dpfl.mechanisms.plan import Plan
from dpfl.privacy import Guarantee, Privacy
from dpfl.sampling import Poisson


class NoMechanism(Config):
    """Neither clips nor adds noise; the sum is divided by the expected cohort all the same."""

    name: Literal["none"] = "none"

    def check(self, target: Privacy, sampler: Poisson, population: int) -> None:
        """Refuses an epsilon, which this mechanism cannot keep, and a cohort beyond the population."""
        sampler.rate(population)
        if target.epsilon is not None:
            raise InputError(
                f"the mechanism none cannot keep epsilon {target.epsilon:g}: choose the mechanism gaussian, "
                "or epsilon none."
            )

    def plan(self, target: Privacy, sampler: Poisson, population: int, rounds: int) -> Plan:
        """Returns the plan of a run without any guarantee.

        Raises:
            InputError: the target asks for an epsilon, or the cohort exceeds the population.
        """
        self.check(target, sampler, population)
        guarantee = Guarantee(
            unit=target.unit,
            relation=target.relation,
            epsilon=math.inf,
            delta=target.delta,
            mechanism="plain averaging of unclipped updates without noise",
            sampler=sampler.in_words(population),
            steps=rounds,
            accountant="none",
            released="the models after all rounds",
        )
        return Plan(self.name, sampler, population, rounds, math.inf, 0.0, guarantee)
