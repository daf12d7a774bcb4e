"""Runs in worker processes, each with one thread and a warm graph."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import loky

from dpfl.mechanisms import Plan
from dpfl.simulation.experiment import Experiment
from dpfl.study.store import Store


class Planned(NamedTuple):
    """An experiment with its plan."""

    experiment: Experiment
    plan: Plan


class Task(NamedTuple):
    """A run to do: the index of its experiment, and its seed."""

    experiment: int
    seed: int


def run_tasks(
    planned: Mapping[int, Planned],
    tasks: Sequence[Task],
    folder: Path,
    workers: int,
    on_end: Callable[[Task], None],
) -> None:
    """Does all the runs and keeps each in the store as soon as it has ended.

    The numbers do not depend on how many workers there are: a run happens in one process, on one
    thread.

    Args:
        planned: the tasks' experiments by index; sent to each worker once.
        tasks: what to run.
        folder: of the store.
        workers: number of processes.
        on_end: called in this process after each run.

    Raises:
        Exception: the first error of a run; runs that have ended are kept.
    """
    executor = loky.ProcessPoolExecutor(
        max_workers=min(workers, len(tasks)),
        initializer=_start_worker,
        initargs=(planned, folder, os.getpid()),
    )
    try:
        futures = {executor.submit(_run_task, task): task for task in tasks}
        for future in loky.as_completed(futures):
            future.result()
            on_end(futures[future])
    finally:
        executor.shutdown(wait=True, kill_workers=True)


class _Worker(NamedTuple):
    """What a worker process knows."""

    planned: Mapping[int, Planned]
    store: Store


_worker: _Worker


def _start_worker(planned: Mapping[int, Planned], folder: Path, parent: int) -> None:
    global _worker
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    _worker = _Worker(planned, Store(folder))


def _die_with(parent: int) -> None:
    """Ends this process soon after its parent is gone, however the parent went."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def _run_task(task: Task) -> None:
    from dpfl.simulation.run import run

    experiment, plan = _worker.planned[task.experiment]
    result = run(experiment, plan, task.seed)
    _worker.store.write(result.record, result.history, result.guarantee.as_dict())
