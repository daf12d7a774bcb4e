"""Progress bars."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(bar_width=24),
    TextColumn("{task.completed:g} of {task.total:g} {task.fields[unit]}"),
    TimeElapsedColumn(),
    TextColumn("left"),
    TimeRemainingColumn(),
)
_MOST_LINES = 8


@contextlib.contextmanager
def progress_bar(task: str, total: int, unit: str, *, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """Shows a progress bar with the time left on standard error while the block runs.

    Args:
        task: what is going on, such as "training".
        total: how many units make the whole.
        unit: what is counted, such as "rounds".
        shown: False keeps quiet.

    Yields:
        A function that takes the number of units done since its last call.
    """
    with Progress(*_COLUMNS, console=Console(stderr=True), disable=not shown) as bar:
        identity = bar.add_task(task, total=total, unit=unit)
        yield lambda more: bar.update(identity, advance=more)


class Board:
    """Progress of many runs: one bar for all, what became of those that have ended, and a line for each at work.

    Use it as a context manager; it shows itself on standard error while the block runs.

    Args:
        task: what is going on, such as "training".
        total: how many units all runs have together.
        unit: what is counted, such as "rounds".
        shown: False keeps quiet.
    """

    def __init__(self, task: str, total: int, unit: str, *, shown: bool = True) -> None:
        status = TextColumn("{task.fields[status]}")
        self._bars = Progress(*_COLUMNS, status, console=Console(stderr=True), disable=not shown)
        self._all = self._bars.add_task(task, total=total, unit=unit, status="")
        self._lines: dict[str, TaskID] = {}
        self._unit = unit

    def __enter__(self) -> Board:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        for line in self._lines.values():
            self._bars.remove_task(line)
        self._bars.stop()

    def show(self, done: int, status: Mapping[str, int], running: Mapping[str, tuple[int, int]]) -> None:
        """Shows how things stand.

        Args:
            done: units of all runs that are done.
            status: how many runs are in each state.
            running: units done and total by the name of what is at work.
        """
        words = ", ".join(f"{count} {state}" for state, count in status.items() if count)
        self._bars.update(self._all, completed=done, status=words)
        for name in set(self._lines) - set(running):
            self._bars.remove_task(self._lines.pop(name))
        for name, (completed, total) in running.items():
            if name not in self._lines and len(self._lines) < _MOST_LINES:
                self._lines[name] = self._bars.add_task(f"  {name}", total=total, unit=self._unit, status="")
            if name in self._lines:
                self._bars.update(self._lines[name], completed=completed)
