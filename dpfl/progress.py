"""Progress bars."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


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
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn(f"{{task.completed:g}} of {{task.total:g}} {unit}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as bar:
        identity = bar.add_task(task, total=total)
        yield lambda more: bar.update(identity, advance=more)
