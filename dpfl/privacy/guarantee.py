"""The guarantee that a run keeps, in numbers and in words."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from dpfl.privacy.relations import RELATION_IN_WORDS, UNIT_IN_WORDS, Relation, Unit
from dpfl.privacy.rounding import rounded_up


@dataclasses.dataclass(frozen=True)
class Guarantee:
    """A differential-privacy guarantee with everything that a reviewer needs to check it.

    Attributes:
        unit: the privacy unit: "user" or "example".
        relation: the neighbouring relation.
        epsilon: what the accountant returned for what is released; infinity without noise.
        delta: the probability mass outside the bound.
        mechanism: the mechanism in words, with its noise multiplier.
        sampler: the sampling in words, with its rate.
        steps: how many noisy sums are released.
        accountant: the accountant with its version.
        released: what the guarantee covers, in words.
        assumptions: sentences that must hold for the guarantee to hold, or that limit it.
    """

    unit: Unit
    relation: Relation
    epsilon: float
    delta: float
    mechanism: str
    sampler: str
    steps: int
    accountant: str
    released: str
    assumptions: tuple[str, ...] = ()

    def statement(self) -> str:
        """The guarantee as a paragraph for a paper."""
        steps = "step" if self.unit == "example" else "round"
        how = f"{self.mechanism} in each of {self.steps} {steps}{'s' if self.steps != 1 else ''}, {self.sampler}"
        if math.isinf(self.epsilon):
            return " ".join((f"No differential privacy is guaranteed: {how}.", *self.assumptions))
        return " ".join(
            (
                f"({rounded_up(self.epsilon, 4):g}, {rounded_up(self.delta, 4):g})-differential privacy at "
                f"{self.unit} level: "
                f"the distribution of {self.released} changes by at most this epsilon and delta when "
                f"{UNIT_IN_WORDS[self.unit]} {RELATION_IN_WORDS[self.relation]} in the training data (relation "
                f"{self.relation}).",
                f"It comes from {how}; epsilon by the accountant {self.accountant}.",
                *self.assumptions,
            )
        )

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values for JSON; an infinite epsilon becomes None."""
        values = dataclasses.asdict(self)
        values["assumptions"] = list(self.assumptions)
        values["epsilon"] = None if math.isinf(self.epsilon) else self.epsilon
        return values
