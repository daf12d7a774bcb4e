"""What a run has really spent."""

from __future__ import annotations

import functools
from collections.abc import Callable

import dp_accounting

from dpfl.privacy.accounting import PLD_INTERVAL, epsilon
from dpfl.privacy.relations import Accountant, Relation

# A coarser grid gives larger bounds, and a run asks for one in every round.
_INTERVAL_PER_EPSILON, _COARSEST_INTERVAL = 1e-3, 1e-2


class Ledger:
    """The epsilon that a run has spent after each of its rounds.

    Args:
        event_of: the privacy event of the first so many rounds, at least one; it says what the
            rounds really do (`Plan.event`).
        delta: the probability mass outside the bound.
        relation: the neighbouring relation.
        accountant: "pld" or "rdp".
        budget: the epsilon that the run may not exceed; infinity for none.

    Attributes:
        rounds: the number of rounds done.
        budget: the epsilon that the run may not exceed.
    """

    def __init__(
        self,
        event_of: Callable[[int], dp_accounting.DpEvent],
        delta: float,
        *,
        relation: Relation = "add_or_remove_one",
        accountant: Accountant = "pld",
        budget: float,
    ) -> None:
        self._event_of = event_of
        self._spent = functools.partial(
            _spent, delta=delta, relation=relation, accountant=accountant, interval=_interval(budget)
        )
        self.budget = budget
        self.rounds = 0

    @property
    def epsilon(self) -> float:
        """An upper bound of what the rounds done so far cost; may be released, as it depends on no data."""
        return self.epsilon_after(self.rounds)

    def epsilon_after(self, rounds: int) -> float:
        """An upper bound of what the first so many rounds cost."""
        return self._spent(self._event_of(rounds)) if rounds else 0.0

    def affords(self, more: int = 1) -> bool:
        """Whether so many further rounds stay within the budget."""
        return self.epsilon_after(self.rounds + more) <= self.budget

    def advance(self, rounds: int = 1) -> None:
        """Notes that so many rounds were done; what is spent cannot be taken back, budget or not."""
        self.rounds += rounds


def _interval(budget: float) -> float:
    return min(max(budget * _INTERVAL_PER_EPSILON, PLD_INTERVAL), _COARSEST_INTERVAL)


@functools.lru_cache(maxsize=100_000)
def _spent(
    event: dp_accounting.DpEvent, delta: float, relation: Relation, accountant: Accountant, interval: float
) -> float:
    """Runs of a study share their events: each is accounted for once in a process."""
    return epsilon(event, delta, relation=relation, accountant=accountant, pld_interval=interval)
