"""From privacy events to epsilon.

A mechanism describes what it releases as a `dp_accounting.DpEvent`; an accountant turns the event
into epsilon at a given delta. Privacy loss distributions (Koskela et al. 2020, 1906.03049; Doroshenko et al. 2022,
2207.04380) are the default: tight, and pessimistic only by their discretisation of 1e-4. Renyi-DP (Mironov 2017,
1702.07476) gives larger values, and answers where no privacy loss distribution is known.
"""

from __future__ import annotations

import importlib.metadata
from typing import get_args

import dp_accounting
import numpy as np

from dpfl.errors import InputError
from dpfl.privacy.pld import has_pld, pld_epsilon
from dpfl.privacy.rdp import rdp_epsilon, renyi_divergences
from dpfl.privacy.relations import Accountant, Relation

# dp-accounting's own default: a reader who composes the same event there gets the same epsilon.
PLD_INTERVAL = 1e-4
LARGEST_EPSILON = 100.0
_ANY_ORDERS = np.array([2.0, 32.0])


def accountant_name(accountant: Accountant) -> str:
    """The accountant with the versions of what computes it, as a record states it."""
    libraries = {"pld": ("dpfl",), "rdp": ("dpfl", "dp-accounting")}[accountant]
    return f"{accountant.upper()} ({', '.join(f'{name} {importlib.metadata.version(name)}' for name in libraries)})"


def check_delta(delta: float) -> None:
    """Refuses a delta outside (0, 1)."""
    if not 0 < delta < 1:
        raise InputError(f"delta must lie between 0 and 1, both excluded, but it was {delta:g}.")


def check_epsilon(target: float) -> None:
    """Refuses a target epsilon outside (0, 100]."""
    if not 0 < target <= LARGEST_EPSILON:
        raise InputError(
            f"epsilon must be a positive number up to {LARGEST_EPSILON:g}, beyond which nobody is protected, "
            f"but it was {target:g}."
        )


def check_analysis(relation: str, accountant: str) -> None:
    """Refuses unknown relations and accountants."""
    for name, value, known in (
        ("relation", relation, get_args(Relation)),
        ("accountant", accountant, get_args(Accountant)),
    ):
        if value not in known:
            raise InputError(f"there is no {name} {value!r}: choose {', '.join(known)}.")


def accountant_for(event: dp_accounting.DpEvent, relation: Relation, accountant: Accountant) -> Accountant:
    """Returns the accountant that answers for an event: PLD leaves to RDP what it has no analysis of.

    Args:
        event: what is released.
        relation: the neighbouring relation.
        accountant: the accountant asked for.

    Raises:
        InputError: there is no such relation or accountant, or none has an analysis of the event under the relation.
    """
    check_analysis(relation, accountant)
    if accountant == "pld" and has_pld(event, relation):
        return "pld"
    if _has_rdp(event, relation):
        return "rdp"
    raise _refusal(event, relation, accountant)


def _has_rdp(event: dp_accounting.DpEvent, relation: Relation) -> bool:
    try:
        renyi_divergences(event, _ANY_ORDERS, relation)
    except dp_accounting.UnsupportedEventError:
        return False
    return True


def _refusal(event: dp_accounting.DpEvent, relation: Relation, accountant: Accountant) -> InputError:
    while isinstance(event, dp_accounting.SelfComposedDpEvent):
        event = event.event
    who = "no accountant has an" if accountant == "pld" else "the RDP accountant has no"
    return InputError(
        f"{who} analysis of {type(event).__name__} under the relation {relation}; "
        "choose another relation, sampler or accountant."
    )


def epsilon(
    event: dp_accounting.DpEvent,
    delta: float,
    *,
    relation: Relation = "add_or_remove_one",
    accountant: Accountant = "pld",
    pld_interval: float = PLD_INTERVAL,
) -> float:
    """Returns the epsilon that an event costs at a delta.

    Args:
        event: what was, or will be, released; for example
            `SelfComposedDpEvent(PoissonSampledDpEvent(q, GaussianDpEvent(z)), rounds)`. Noise multipliers are
            relative to what one unit contributes; where a unit is replaced, the sensitivity is twice that.
        delta: the probability mass outside the epsilon bound, in (0, 1).
        relation: the neighbouring relation.
        accountant: "pld", which is RDP for events without a known privacy loss distribution, or "rdp".
        pld_interval: discretisation of the privacy loss; any value gives an upper bound, and a
            smaller one a tighter bound for more time.

    Returns:
        Epsilon, an upper bound; infinity where nothing is guaranteed.

    Raises:
        InputError: delta is outside (0, 1), there is no analysis of this event under this relation, or it needs more
            memory than there is.
    """
    check_delta(delta)
    check_analysis(relation, accountant)
    try:
        if accountant == "pld" and has_pld(event, relation):
            return pld_epsilon(event, delta, relation, pld_interval)
        return rdp_epsilon(event, delta, relation)
    except dp_accounting.UnsupportedEventError:
        raise _refusal(event, relation, accountant) from None
    except MemoryError:
        raise InputError(
            "the PLD accountant needs more memory for this than there is; "
            "take fewer steps or more noise, or the RDP accountant."
        ) from None


def epsilon_by_accountant(
    event: dp_accounting.DpEvent, delta: float, *, relation: Relation = "add_or_remove_one"
) -> dict[str, float]:
    """Returns the epsilons that an event costs at a delta by "pld" and by "rdp", where they have an answer.

    Args:
        event: what was, or will be, released.
        delta: the probability mass outside the epsilon bound, in (0, 1).
        relation: the neighbouring relation.

    Raises:
        InputError: delta is outside (0, 1), or no accountant has an analysis of this event under this relation.
    """
    accountants = {accountant_for(event, relation, "pld")}
    if _has_rdp(event, relation):
        accountants.add("rdp")
    answers: dict[str, float] = {}
    for accountant in sorted(accountants):
        try:
            answers[accountant] = epsilon(event, delta, relation=relation, accountant=accountant)
        except InputError:  # PLD needs more memory than there is.
            if accountants == {accountant}:
                raise
    return answers
