"""The price of tuning: what it costs to release the best of several private runs.

Papernot & Steinke 2022 (2110.03620): where the number of runs is itself drawn at random, and only the best run is
released, the price is a fraction of what it costs to release them all. Liu & Talwar (2018, 1811.07971) have
the idea.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Literal

import dp_accounting
import numpy as np

from dpfl.errors import InputError
from dpfl.privacy.accounting import check_analysis, check_delta, epsilon
from dpfl.privacy.rdp import ORDERS, epsilon_of_divergences, renyi_divergences, repeated_and_selected
from dpfl.privacy.relations import Accountant, Relation

Distribution = Literal["geometric", "logarithmic", "poisson"]

# The shape of the truncated negative binomial distribution that each name stands for; infinity is dp-accounting's
# way to say Poisson.
_SHAPES: dict[str, float] = {"logarithmic": 0.0, "geometric": 1.0, "poisson": math.inf}


def best_of(
    event: dp_accounting.DpEvent | Sequence[dp_accounting.DpEvent],
    delta: float,
    *,
    trials: float,
    distribution: Distribution | float = "geometric",
    relation: Relation = "add_or_remove_one",
) -> float:
    """Returns the epsilon of releasing the best of a random number of trials, and nothing of the others.

    What exactly has to be done for it to hold: draw the number of trials from the distribution, without telling
    it; for each trial draw a configuration at random from the grid, with replacement and independently;
    run it, at the cost of `event`, with noise of its own; release the configuration and the model of the trial
    that scores best. The score must come from what the run itself pays for or from public data. It does NOT hold
    for the best of k configurations that are each tried once: for that see `all_of`. The bounds are theorem 2
    (truncated negative binomial) and theorem 6 (Poisson) of 2110.03620.

    Args:
        event: what one trial costs; where configurations differ in it, the events of all of them.
        delta: in (0, 1).
        trials: the mean number of trials, at least 1.
        distribution: of the number of trials. "geometric"; "logarithmic", which costs less and varies more;
            "poisson", which varies least, and where no trial at all is run, and nothing released, with
            probability exp(-trials); or a positive number: the shape of a truncated negative binomial
            distribution (1 is geometric, and larger shapes vary less and cost more).
        relation: the neighbouring relation.

    Returns:
        Epsilon by Renyi divergences, an upper bound.

    Raises:
        InputError: a value is out of range, or there is no Renyi analysis of the event under the relation.
    """
    check_delta(delta)
    check_analysis(relation, "rdp")
    if not _is_number(trials) or not 1 <= trials < math.inf:
        raise InputError(f"the mean number of trials must be at least 1 and finite, but it was {_shown(trials)}.")
    configurations = list(event) if isinstance(event, Sequence) else [event]
    if not configurations:
        raise InputError("there is no trial to account for: give the event of at least one configuration.")
    for trial in configurations:
        _check_event(trial)
    orders = np.array(ORDERS)
    try:
        curves = [renyi_divergences(trial, orders, relation) for trial in configurations]
    except dp_accounting.UnsupportedEventError:
        kinds = ", ".join(sorted({_kind(trial) for trial in configurations}))
        raise InputError(
            f"the price of tuning {kinds} is not known under the relation {relation}, since the RDP "
            "accountant has no analysis of it; choose another relation or mechanism."
        ) from None
    # A trial with a random configuration diverges no more than the dearest one does at each order.
    best = repeated_and_selected(np.max(curves, axis=0), orders, trials, _shape(distribution))
    return epsilon_of_divergences(best, delta)


def all_of(
    event: dp_accounting.DpEvent,
    delta: float,
    *,
    trials: int,
    relation: Relation = "add_or_remove_one",
    accountant: Accountant = "pld",
) -> float:
    """Returns the epsilon of releasing all trials, which covers any choice among them.

    This is plain composition: it holds whichever configurations are tried, and whatever is told of them.

    Args:
        event: what one trial costs, the same for every configuration (or the dearest of them).
        delta: in (0, 1).
        trials: how many trials are run, at least 1.
        relation: the neighbouring relation.
        accountant: "pld" or "rdp".

    Raises:
        InputError: a value is out of range, or the accountant has no analysis of the event.
    """
    _check_event(event)
    if not _is_number(trials) or not trials >= 1 or trials % 1 != 0:
        raise InputError(f"at least 1 trial must be run, and a whole number of them, but it was {_shown(trials)}.")
    repeated = dp_accounting.SelfComposedDpEvent(event, int(trials))
    return epsilon(repeated, delta, relation=relation, accountant=accountant)


def _shape(distribution: Distribution | float) -> float:
    if isinstance(distribution, str):
        if distribution not in _SHAPES:
            raise InputError(
                f"there is no distribution {distribution!r} of the number of trials: choose "
                f"{', '.join(_SHAPES)}, or a positive number."
            )
        return _SHAPES[distribution]
    if not _is_number(distribution) or not 0 < distribution < math.inf:
        raise InputError(
            "the shape of a negative binomial distribution must be positive and finite, "
            f"but it was {_shown(distribution)}."
        )
    return float(distribution)


def _check_event(event: object) -> None:
    if not isinstance(event, dp_accounting.DpEvent):
        raise InputError(
            "a trial costs a privacy event, such as plan.event() or guarantee.privacy_event(), but it was of type "
            f"{type(event).__name__}."
        )


def _kind(event: dp_accounting.DpEvent) -> str:
    """What an event repeats, if it repeats something."""
    while isinstance(event, dp_accounting.SelfComposedDpEvent):
        event = event.event
    return type(event).__name__


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real)


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, numbers.Real) else repr(value)
