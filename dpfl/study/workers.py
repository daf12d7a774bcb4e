"""Runs in worker processes, each with one thread and a warm graph."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import loky
import numpy as np

from dpfl.clients.example_privacy import ClientPlan
from dpfl.mechanisms import Plan
from dpfl.models.pickling import make_lazy_modules_picklable
from dpfl.simulation.checkpoints import Checkpoints
from dpfl.simulation.experiment import Experiment
from dpfl.simulation.together import together_key
from dpfl.study.store import Store

_SECONDS_BETWEEN_LOOKS = 0.5
_MOST_TOGETHER = 64  # so that a kill costs little


class Planned(NamedTuple):
    """An experiment with its plans of the server and of the clients."""

    experiment: Experiment
    plan: Plan
    client_plan: ClientPlan | None


class Task(NamedTuple):
    """Runs to do in one process: the indices of their experiments, which train side by side, and their seed."""

    experiments: tuple[int, ...]
    seed: int


def tasks_of(
    planned: Mapping[int, Planned], runs: Sequence[tuple[int, int]], workers: int, together: bool
) -> list[Task]:
    """Puts runs into tasks, those with the most work first.

    Args:
        planned: the experiments by index.
        runs: an experiment's index and a seed each.
        workers: number of processes, none of which should go without work.
        together: whether runs may train side by side.
    """
    groups: dict[Any, list[int]] = {}
    for index, seed in runs:
        experiment, plan, _ = planned[index]
        key = together_key(experiment, plan) if together else None
        groups.setdefault((seed, index if key is None else key), []).append(index)
    most = min(_MOST_TOGETHER, -(-len(runs) // workers))
    tasks = [
        Task(tuple(indices[first : first + most]), seed)
        for (seed, _), indices in groups.items()
        for first in range(0, len(indices), most)
    ]
    return sorted(tasks, key=lambda task: -sum(planned[index].plan.rounds for index in task.experiments))


def run_tasks(
    planned: Mapping[int, Planned],
    tasks: Sequence[Task],
    folder: Path,
    workers: int,
    advance: Callable[[int], None],
    checkpoints: Checkpoints | None,
) -> None:
    """Does all the runs and keeps each in the store as soon as it has ended.

    A run happens in one process, on one thread. Its numbers do not depend on how many workers there are, nor on what
    trains beside it but for the rounding of float32.

    Args:
        planned: the tasks' experiments by index; sent to each worker once.
        tasks: what to run.
        folder: of the store.
        workers: number of processes.
        advance: called in this process with a number of rounds whenever so many more are done.
        checkpoints: where to keep runs until they have ended; None for nowhere.

    Raises:
        Exception: the first error of a run; runs that have ended are kept.
    """
    make_lazy_modules_picklable()
    scratch = tempfile.TemporaryDirectory(prefix="dpfl-")
    counters = Path(scratch.name) / "rounds"
    rounds = np.memmap(counters, np.int64, "w+", shape=len(tasks))
    executor = loky.ProcessPoolExecutor(
        max_workers=min(workers, len(tasks)),
        initializer=_start_worker,
        initargs=(planned, Store(folder), checkpoints, counters, os.getpid()),
    )
    try:
        pending = {executor.submit(_run_task, slot, task) for slot, task in enumerate(tasks)}
        shown = 0
        while pending:
            ended, pending = loky.wait(pending, timeout=_SECONDS_BETWEEN_LOOKS, return_when=loky.FIRST_COMPLETED)
            for future in ended:
                future.result()
            done = int(rounds.sum())
            advance(done - shown)
            shown = done
    finally:
        executor.shutdown(wait=True, kill_workers=True)
        scratch.cleanup()


class _Worker(NamedTuple):
    """What a worker process knows."""

    planned: Mapping[int, Planned]
    store: Store
    checkpoints: Checkpoints | None
    rounds: np.ndarray


_worker: _Worker


def _start_worker(
    planned: Mapping[int, Planned], store: Store, checkpoints: Checkpoints | None, counters: Path, parent: int
) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's to handle.
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    try:
        rounds = np.memmap(counters, np.int64, "r+")
    except FileNotFoundError:  # The driver was interrupted while this process started.
        os._exit(1)
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    _worker = _Worker(planned, store, checkpoints, rounds)


def _die_with(parent: int) -> None:
    """Ends this process soon after its parent is gone, however the parent went."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def _run_task(slot: int, task: Task) -> None:
    """Does a task's runs, counts their rounds in its slot, and keeps what they leave behind."""
    from dpfl.simulation.run import run, run_together

    def advance(rounds: int) -> None:
        _worker.rounds[slot] += rounds

    planned = [_worker.planned[index] for index in task.experiments]
    if len(planned) == 1:
        results = [run(*planned[0], task.seed, advance, _worker.checkpoints)]
    else:
        results = run_together([(experiment, plan) for experiment, plan, _ in planned], task.seed, advance)
    for result in results:
        _worker.store.write(result.record, result.history, result.guarantees())
        if _worker.checkpoints is not None:
            _worker.checkpoints.remove(result.record["run_id"])
