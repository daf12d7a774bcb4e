"""Measures workers in turns, and says what came out as rows."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from systems.protocol import WorkerError

SLOW = 2.0
SLOW_ROUNDS = 3
MOST_STEPS = 500
PATIENCE = 20.0

Row = dict[str, Any]


class Measurable(Protocol):
    """What `in_turns` needs of a worker."""

    def measure(self, steps: int, timeout: float) -> list[float]:
        """Returns the seconds of each step."""


@dataclass
class Timings:
    """What was measured of one worker.

    Attributes:
        worker: the worker.
        seconds: for each round the mean seconds of its steps.
        steps: how many steps a round has.
        rounds: how many rounds it takes part in.
        failure: why it was given up, if it was.
    """

    worker: Measurable
    seconds: list[float] = field(default_factory=list)
    steps: int = 1
    rounds: int = 0
    failure: str | None = None

    @property
    def slow(self) -> bool:
        """Whether a round is one long step."""
        return self.steps == 1 and self.rounds == SLOW_ROUNDS


def in_turns(
    workers: Sequence[Measurable],
    *,
    rounds: int,
    seconds: float,
    timeout: float,
    after_turn: Callable[[], object] = lambda: None,
) -> list[Timings]:
    """Measures workers side by side: in each round each has its turn, one at a time, beginning with another each round.

    A turn is as many steps as take about `seconds`, after one that is not counted and brings the caches back. A worker
    whose step takes more than two seconds has one step a turn, no uncounted one, and at most three rounds.

    Args:
        workers: what to measure, warmed up.
        rounds: how many rounds.
        seconds: how long a turn should take.
        timeout: the most seconds that a step may take.
        after_turn: called after each turn.

    Returns:
        One for each worker, in their order.
    """
    timings = [Timings(worker, rounds=rounds) for worker in workers]
    for each in timings:
        _try(each, lambda each=each: _plan(each, rounds, seconds, timeout))
    for number in range(rounds):
        first = number % len(timings) if timings else 0
        for each in timings[first:] + timings[:first]:
            if each.failure is None and number < each.rounds:
                _try(each, lambda each=each: _turn(each, timeout))
            after_turn()
    return timings


def _try(timings: Timings, action: Callable[[], object]) -> None:
    try:
        action()
    except WorkerError as error:
        timings.failure = str(error)


def _plan(timings: Timings, rounds: int, seconds: float, timeout: float) -> None:
    pilot = timings.worker.measure(1, timeout)[0]
    if pilot <= SLOW:
        pilot = min(timings.worker.measure(3, 3 * timeout))
    timings.steps = max(1, min(MOST_STEPS, round(seconds / max(pilot, 1e-9))))
    timings.rounds = rounds if pilot <= SLOW else min(rounds, SLOW_ROUNDS)


def _turn(timings: Timings, timeout: float) -> None:
    uncounted = 0 if timings.slow else 1
    taken = timings.worker.measure(timings.steps + uncounted, timeout + PATIENCE * timings.steps)
    timings.seconds.append(statistics.fmean(taken[uncounted:]))


def summary(seconds: Sequence[float]) -> Row:
    """Returns median and spread over rounds in milliseconds: quartiles, lowest and highest."""
    milliseconds = sorted(1_000 * each for each in seconds)
    low, high = (
        statistics.quantiles(milliseconds, n=4, method="inclusive")[::2] if len(milliseconds) > 1 else milliseconds * 2
    )
    return {
        "median_ms": statistics.median(milliseconds),
        "spread": [low, high],
        "range": [milliseconds[0], milliseconds[-1]],
        "rounds": len(milliseconds),
    }


def with_ratios(rows: Iterable[Row], own_plain: Mapping[str, str | None]) -> list[Row]:
    """Adds to the rows of one workload which variant is its system's best, and its ratios to other systems' best.

    Args:
        rows: with `system`, `bound_ms`, and `median_ms` or, where the system failed, `failure`.
        own_plain: for each system the one that does the same without privacy in the same framework, if there is one.

    Returns:
        New rows, with `best`, `ratio_to_plain`, `ratio_to_dpfl` and `ratio_to_own_plain`, which are this row's median
        divided by that system's best, and `ratio_to_bound`; None where either is missing.
    """
    rows = list(rows)
    best: dict[str, float] = {}
    for row in rows:
        if "median_ms" in row:
            best[row["system"]] = min(row["median_ms"], best.get(row["system"], float("inf")))

    def ratio(row: Row, system: str | None) -> float | None:
        return row["median_ms"] / best[system] if "median_ms" in row and system in best else None

    return [
        row
        | {
            "best": row.get("median_ms") == best.get(row["system"], float("nan")),
            "ratio_to_plain": ratio(row, "plain"),
            "ratio_to_dpfl": ratio(row, "dpfl"),
            "ratio_to_own_plain": ratio(row, own_plain.get(row["system"])),
            "ratio_to_bound": row["median_ms"] / row["bound_ms"] if "median_ms" in row else None,
        }
        for row in rows
    ]
