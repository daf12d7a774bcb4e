"""The guarantee that a run keeps, in numbers and in words."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any, Literal

import dp_accounting
import pydantic

from dpfl.errors import InputError
from dpfl.privacy import accounting, events
from dpfl.privacy.relations import RELATION_IN_WORDS, UNIT_IN_WORDS, Accountant, Relation, Unit
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
        accountant: the accountant that answered: "pld" or "rdp"; "none" without noise.
        accounted_by: the accountant in words, with its version.
        released: what the guarantee covers, in words.
        assumptions: sentences that must hold for the guarantee to hold, or that limit it.
        event: the privacy event as plain values (`dpfl.privacy.events`), from which an accountant
            computes epsilon anew.
    """

    unit: Unit
    relation: Relation
    epsilon: float
    delta: float
    mechanism: str
    sampler: str
    steps: int
    accountant: Accountant | Literal["none"]
    accounted_by: str
    released: str
    assumptions: tuple[str, ...] = ()
    event: dict[str, Any] = dataclasses.field(default_factory=dict)

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
                f"{UNIT_IN_WORDS[self.unit]} {RELATION_IN_WORDS[self.relation].format(data='the training data')} "
                f"(relation {self.relation}).",
                f"It comes from {how}; epsilon by the accountant {self.accounted_by}.",
                *self.assumptions,
            )
        )

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values for JSON; an infinite epsilon becomes None."""
        values = dataclasses.asdict(self)
        values["assumptions"] = list(self.assumptions)
        values["epsilon"] = None if math.isinf(self.epsilon) else self.epsilon
        return values

    def to_json(self) -> str:
        """The guarantee as JSON, from which `from_json` makes it again."""
        return json.dumps(self.as_dict())

    @classmethod
    def from_json(cls, text: str) -> Guarantee:
        """Reads what `to_json` wrote.

        Raises:
            InputError: it is not the JSON of a guarantee.
        """
        try:
            return cls.from_dict(json.loads(text))
        except ValueError:
            raise InputError("this is not the JSON of a guarantee: give what Guarantee.to_json wrote.") from None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Guarantee:
        """Reads what `as_dict` gave.

        Raises:
            InputError: fields of a guarantee are missing, or others are there.
        """
        try:
            epsilon = math.inf if values["epsilon"] is None else values["epsilon"]
            made: Guarantee = _GUARANTEES.validate_python({**values, "epsilon": epsilon}, strict=False)
            if set(values) != set(made.as_dict()):
                raise ValueError
        except (TypeError, KeyError, ValueError):  # pydantic.ValidationError is a ValueError
            raise InputError("these are not the fields of a guarantee: give what Guarantee.as_dict gave.") from None
        accounting.check_delta(made.delta)
        if not made.epsilon >= 0:
            raise InputError(f"the epsilon of a guarantee must be a number of at least 0, but it was {made.epsilon}.")
        return made

    def privacy_event(self) -> dp_accounting.DpEvent:
        """What was released, as the accountants take it."""
        return events.from_dict(self.event)

    def recomputed_epsilon(self) -> float:
        """Epsilon from the recorded event, delta, relation and accountant alone: how a reader checks a record."""
        if self.accountant == "none":
            return math.inf
        return accounting.epsilon(self.privacy_event(), self.delta, relation=self.relation, accountant=self.accountant)

    def epsilon_by_accountant(self) -> dict[str, float]:
        """Epsilon by each accountant that has an analysis of what was released."""
        return accounting.epsilon_by_accountant(self.privacy_event(), self.delta, relation=self.relation)


_GUARANTEES = pydantic.TypeAdapter(Guarantee)
