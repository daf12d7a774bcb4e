"""The guarantee that a user asks for."""

from __future__ import annotations

import pydantic

from dpfl.config import Config
from dpfl.errors import InputError
from dpfl.privacy.accounting import check_analysis, check_delta, check_epsilon
from dpfl.privacy.relations import Accountant, Relation, Unit


class Privacy(Config):
    """A privacy target: what the noise of the mechanism, or of the clients, is calibrated to.

    Attributes:
        unit: what one neighbour differs in. "user": all the data of one client, which the mechanism's noise
            protects. "example": one training example, which the noise in each client's local steps protects.
        epsilon: the bound on the privacy loss, above 0 and up to 100; None trains without noise.
        delta: the probability mass outside the bound; below 1 / clients, since a mechanism that
            publishes one client at random already satisfies delta = 1 / clients. For unit "example" below 1 /
            training examples of all clients together, for the same reason.
        relation: the neighbouring relation: "add_or_remove_one", "replace_one" or "replace_special".
        accountant: "pld" (tight) or "rdp".
        allow_weak_delta: accepts a delta of 1 / clients (1 / examples) and more.
    """

    unit: Unit = "user"
    epsilon: float | None
    delta: float = 1e-5
    relation: Relation = "add_or_remove_one"
    accountant: Accountant = "pld"
    allow_weak_delta: bool = False

    @pydantic.model_validator(mode="after")
    def _check(self) -> Privacy:
        if self.epsilon is not None:
            check_epsilon(self.epsilon)
        check_delta(self.delta)
        check_analysis(self.relation, self.accountant)
        return self


def check_weak_delta(delta: float, population: int, allowed: bool, units: str = "clients") -> None:
    """Refuses a delta of 1 / population and more, unless it is allowed.

    Args:
        delta: of the target.
        population: how many units there are that a guarantee protects.
        allowed: whether it is allowed.
        units: what they are, in words.
    """
    if delta >= 1 / population and not allowed:
        raise InputError(
            f"delta {delta:g} is no privacy for {population} {units}: choose a delta below 1 / {units} = "
            f"{1 / population:.2g}, or allow it knowingly (--allow-weak-delta, allow_weak_delta=True)."
        )
