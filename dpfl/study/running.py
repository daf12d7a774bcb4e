"""Tasks on a pool of workers: each run is kept as it ends, and one that is lost twice is recorded as failed."""

from __future__ import annotations

import collections
import concurrent.futures
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dpfl.errors import InputError
from dpfl.progress import Board
from dpfl.simulation.experiment import Experiment
from dpfl.study.workers import Outcome, Planned, Pool, Task

_SECONDS_BETWEEN_LOOKS = 0.5


def run_tasks(
    pool: Pool,
    planned: Mapping[int, Planned],
    tasks: Sequence[Task],
    keep: Callable[[Outcome], None],
    board: Board,
) -> None:
    """Does all the runs.

    A run happens in one process, on one thread. Its numbers do not depend on how many workers there are, nor on what
    trains beside it but for the rounding of float32. Where a task comes to nothing (its worker died, or something in it
    was raised), each of its runs gets one more try by itself; a run that fails again is recorded so.

    Args:
        pool: whose workers do the tasks; it has room for every run to be a task once more.
        planned: the tasks' experiments by index.
        tasks: what to run.
        keep: called in this process with each run that has ended.
        board: where progress is shown.

    Raises:
        InputError: a run was refused, or there is no room to keep it. What was kept before stays.
    """
    from dpfl.simulation.run import failed_record

    names = run_names([each.experiment for each in planned.values()])
    label = dict(zip(planned, names, strict=True))
    slots: dict[concurrent.futures.Future[list[Outcome]], int] = {}
    given: list[tuple[Task, bool]] = []
    counts: collections.Counter[str] = collections.Counter()
    done = 0

    def submit(task: Task, again: bool) -> None:
        slots[pool.submit(len(given), task)] = len(given)
        given.append((task, again))

    def total(task: Task) -> int:
        return sum(planned[index].plan.rounds for index in task.experiments)

    for task in tasks:
        submit(task, again=False)
    runs = sum(len(task.experiments) for task in tasks)
    while slots:
        ended, _ = concurrent.futures.wait(slots, _SECONDS_BETWEEN_LOOKS, concurrent.futures.FIRST_COMPLETED)
        for future in ended:
            task, again = given[slots.pop(future)]
            try:
                outcomes = future.result()
            except InputError:
                raise
            except Exception as error:
                if not again:
                    for index in task.experiments:
                        submit(Task((index,), task.seed), again=True)
                    continue
                record = failed_record(*planned[task.experiments[0]], task.seed, pool.reason(error))
                outcomes = [Outcome(record, [], {"guarantee": None}, None)]
            for outcome in outcomes:
                keep(outcome)
                counts[outcome.record["status"]] += 1
            done += total(task)
        rounds = pool.rounds()
        running = {
            _name(given[slot][0], label): (int(rounds[slot]), total(given[slot][0]))
            for slot in slots.values()
            if rounds[slot] >= 0
        }
        at_work = sum(completed for completed, _ in running.values())
        waiting = runs - counts.total()
        board.show(done + at_work, {**counts, "to do": waiting}, running)


def run_names(experiments: Sequence[Experiment]) -> list[str]:
    """Names for experiments by the settings in which they differ, such as "epsilon 1, clip_norm 0.5"."""
    flat = [_flat(experiment.settings()) for experiment in experiments]
    paths = [path for path in dict.fromkeys(path for one in flat for path in one) if _differs(flat, path)]
    paths = [path for path in paths if not path.startswith("data.") or path == "data.name"]
    return [", ".join(f"{_word(path)} {_text(one[path])}" for path in paths if path in one) for one in flat]


def _word(path: str) -> str:
    """A setting in words: of "mechanism.name" the group, of others the last part."""
    group, _, name = path.rpartition(".")
    return (group if name == "name" else name).replace("_", " ")


def _text(value: Any) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their paths."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def _differs(flat: Sequence[Mapping[str, Any]], path: str) -> bool:
    return len({str(one[path]) for one in flat if path in one}) > 1


def _name(task: Task, label: Mapping[int, str]) -> str:
    """What a task is called on the board."""
    what = label[task.experiments[0]] if len(task.experiments) == 1 else f"{len(task.experiments)} runs side by side"
    return ", ".join(filter(None, (what, f"seed {task.seed}")))
