"""Progress bars."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextlib.contextmanager
def rounds_bar(
    rounds: int, *, shown: bool = True, done: str = "{task.completed:g} of {task.total:g} rounds"
) -> Iterator[Callable[[int], None]]:
    """Shows a progress bar with the time left on standard error while the block runs.

    Args:
        rounds: how many rounds make the whole.
        shown: False keeps quiet.
        done: what stands behind the bar.

    Yields:
        A function that takes the number of rounds done since its last call.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn(done),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as bar:
        task = bar.add_task("training", total=rounds)
        yield lambda more: bar.update(task, advance=more)
