"""From privacy events to epsilon.

A mechanism describes what it releases as a `dp_accounting.DpEvent`; an accountant turns the event
into epsilon at a given delta. The privacy-loss-distribution accountant (Koskela et al. 2020,
1906.03049; Doroshenko et al. 2022, 2207.04380) is the default: tight, and pessimistic only by its
discretisation of 1e-4. Renyi-DP (Mironov 2017, 1702.07476) gives larger values.
"""

from __future__ import annotations

import importlib.metadata
from typing import get_args

import dp_accounting
from absl import logging
from dp_accounting.rdp import RdpAccountant

from dpfl.errors import InputError
from dpfl.privacy.memory import remembered
from dpfl.privacy.pld import FasterPLDAccountant
from dpfl.privacy.relations import Accountant, Relation

# dp-accounting's own default: a reader who composes the same event there gets the same epsilon.
PLD_INTERVAL = 1e-4
LARGEST_EPSILON = 100.0


def accountant_name(accountant: Accountant) -> str:
    """The accountant with the library's version, as a record states it."""
    return f"{accountant.upper()} (dp-accounting {importlib.metadata.version('dp-accounting')})"


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
    """Refuses unknown relations and accountants, and pairs of them that have no correct analysis."""
    for name, value, known in (
        ("relation", relation, get_args(Relation)),
        ("accountant", accountant, get_args(Accountant)),
    ):
        if value not in known:
            raise InputError(f"there is no {name} {value!r}: choose {', '.join(known)}.")
    if accountant == "rdp" and relation == "replace_one":
        # dp-accounting 0.6 returns the add-or-remove value here, half the true sensitivity
        # (google/differential-privacy issue 378).
        raise InputError(
            "the RDP accountant has no correct analysis of the relation replace_one; "
            "use the PLD accountant, or the relation add_or_remove_one."
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
            `SelfComposedDpEvent(PoissonSampledDpEvent(q, GaussianDpEvent(z)), rounds)`.
        delta: the probability mass outside the epsilon bound, in (0, 1).
        relation: the neighbouring relation.
        accountant: "pld" or "rdp".
        pld_interval: discretisation of the privacy loss; any value gives an upper bound, and a
            smaller one a tighter bound for more time.

    Returns:
        Epsilon, an upper bound; infinity where nothing is guaranteed.

    Raises:
        InputError: delta is outside (0, 1), or the accountant has no analysis of this event under
            this relation.
    """
    check_delta(delta)
    check_analysis(relation, accountant)
    return _composed_epsilon(event, delta, relation, accountant, pld_interval)


@remembered
def _composed_epsilon(
    event: dp_accounting.DpEvent,
    delta: float,
    relation: Relation,
    accountant: Accountant,
    pld_interval: float,
) -> float:
    neighbours = dp_accounting.NeighboringRelation[relation.upper()]
    composed = (
        FasterPLDAccountant(neighbours, pld_interval)
        if accountant == "pld"
        else RdpAccountant(neighboring_relation=neighbours)
    )
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # Orders for which RDP's series does not converge are left out.
    try:
        composed.compose(event)
    except dp_accounting.UnsupportedEventError:
        raise InputError(
            f"the {accountant.upper()} accountant has no analysis of {type(event).__name__} under the "
            f"relation {relation}; choose another accountant or relation."
        ) from None
    except MemoryError:
        raise InputError(
            f"the {accountant.upper()} accountant needs more memory for this than there is; "
            "take fewer steps or more noise, or the RDP accountant."
        ) from None
    finally:
        logging.set_verbosity(verbosity)
    return float(composed.get_epsilon(delta))
