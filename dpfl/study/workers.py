"""Runs in worker processes, each with one thread and a warm graph."""

from __future__ import annotations

import copyreg
import importlib
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import loky
import numpy as np

from dpfl.clients.example_privacy import ClientPlan
from dpfl.mechanisms import Plan
from dpfl.simulation.checkpoints import Checkpoints
from dpfl.simulation.experiment import Experiment
from dpfl.study.store import Store

_SECONDS_BETWEEN_LOOKS = 0.5


class Planned(NamedTuple):
    """An experiment with its plans of the server and of the clients."""

    experiment: Experiment
    plan: Plan
    client_plan: ClientPlan | None


class Task(NamedTuple):
    """A run to do: the index of its experiment, and its seed."""

    experiment: int
    seed: int


def run_tasks(
    planned: Mapping[int, Planned],
    tasks: Sequence[Task],
    folder: Path,
    workers: int,
    advance: Callable[[int], None],
    checkpoints: Checkpoints | None,
) -> None:
    """Does all the runs and keeps each in the store as soon as it has ended.

    The numbers do not depend on how many workers there are: a run happens in one process, on one
    thread.

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
    _make_lazy_modules_picklable()
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


def _make_lazy_modules_picklable() -> None:
    """Lets a user's function that mentions `keras`, which TensorFlow loads lazily, travel to the workers."""
    if "tensorflow" in sys.modules:
        from tensorflow.python.util.lazy_loader import LazyLoader

        copyreg.pickle(LazyLoader, lambda module: (importlib.import_module, (module.__name__,)))


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
    """Does one run, counts its rounds in its slot, and keeps what it leaves behind."""
    from dpfl.simulation.run import run

    experiment, plan, client_plan = _worker.planned[task.experiment]

    def advance(rounds: int) -> None:
        _worker.rounds[slot] += rounds

    result = run(experiment, plan, client_plan, task.seed, advance, _worker.checkpoints)
    _worker.store.write(result.record, result.history, result.guarantees())
    if _worker.checkpoints is not None:
        _worker.checkpoints.remove(result.record["run_id"])
