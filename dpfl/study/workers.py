"""What the worker processes of a study do, and the pools of them: on this machine, and on a Ray cluster."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from dpfl.clients.example_privacy import ClientPlan
from dpfl.mechanisms import Plan
from dpfl.models.pickling import make_lazy_modules_picklable
from dpfl.simulation.checkpoints import Checkpoints
from dpfl.simulation.cluster import RayCluster
from dpfl.simulation.experiment import Experiment
from dpfl.simulation.together import graph_key, together_key

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


class Outcome(NamedTuple):
    """What is kept of a run that has ended: the arguments of `Store.write`."""

    record: dict[str, Any]
    history: list[dict[str, Any]]
    guarantees: dict[str, dict[str, Any] | None]
    client_epsilons: list[float] | None


class Pool(Protocol):
    """Worker processes, each with one thread and a warm graph.

    Attributes:
        workers: how many there are.
    """

    workers: int

    def submit(self, slot: int, task: Task) -> concurrent.futures.Future[list[Outcome]]:
        """Has a task done by the next worker that is free.

        Args:
            slot: the task's number, under which `rounds` counts.
            task: what to do.
        """

    def rounds(self) -> np.ndarray:
        """The rounds that were begun and done by slot; -1 while a task waits, or where it cannot be seen."""

    def reason(self, error: BaseException) -> str:
        """Why a task came to nothing, in words."""


def tasks_of(
    planned: Mapping[int, Planned], runs: Sequence[tuple[int, int]], workers: int, together: bool
) -> list[Task]:
    """Puts runs into tasks, those with the most work first, and such as share compiled graphs one after the other.

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
    graphs: dict[Any, int] = {}
    graph_of = {
        index: graphs.setdefault(graph_key(planned[index].experiment, planned[index].plan), len(graphs))
        for index in dict(runs)
    }

    def place(task: Task) -> tuple[int, int]:
        return -sum(planned[index].plan.rounds for index in task.experiments), graph_of[task.experiments[0]]

    return sorted(tasks, key=place)


@contextlib.contextmanager
def process_pool(
    planned: Mapping[int, Planned], tasks: int, workers: int, checkpoints: Checkpoints | None
) -> Iterator[Pool]:
    """Worker processes on this machine, which end with the block, and with this process however it goes.

    Args:
        planned: the tasks' experiments by index; sent to each worker once.
        tasks: the largest number of tasks that will be submitted.
        workers: number of processes.
        checkpoints: where to keep runs until they have ended; None for nowhere.
    """
    import pebble
    from loky.backend import get_context

    make_lazy_modules_picklable()
    with tempfile.TemporaryDirectory(prefix="dpfl-") as scratch:
        counters = Path(scratch) / "rounds"
        rounds = np.memmap(counters, np.int64, "w+", shape=tasks)
        rounds[:] = -1
        processes = pebble.ProcessPool(
            max_workers=workers,
            initializer=_start_worker,
            initargs=(planned, checkpoints, counters, os.getpid()),
            # Of loky: starts clean processes that do not import the user's script again, and takes lambdas along.
            context=get_context("loky"),
        )
        try:
            yield _Processes(processes, rounds, workers)
            processes.close()
        finally:
            processes.stop()
            processes.join()


class _Processes:
    """See `process_pool`."""

    def __init__(self, processes: Any, rounds: np.ndarray, workers: int) -> None:
        self._processes, self._rounds, self.workers = processes, rounds, workers

    def submit(self, slot: int, task: Task) -> concurrent.futures.Future[list[Outcome]]:
        return self._processes.schedule(_do_counted, args=(slot, task))

    def rounds(self) -> np.ndarray:
        return np.array(self._rounds)

    def reason(self, error: BaseException) -> str:
        import pebble

        if not isinstance(error, pebble.ProcessExpired):
            return _in_words(error)
        code = error.exitcode
        if code == -signal.SIGKILL:
            return "the worker process was killed (signal 9), as the system does when memory runs out"
        return f"the worker process died ({f'signal {-code}' if code and code < 0 else f'exit code {code}'})"


@contextlib.contextmanager
def ray_pool(planned: Mapping[int, Planned], tasks: int, address: str) -> Iterator[Pool]:
    """Workers on the machines of a Ray cluster, one for each CPU.

    Args:
        planned: the tasks' experiments by index; sent to each machine once.
        tasks: the largest number of tasks that will be submitted.
        address: of the cluster, as `RayCluster` takes it; "local" for one on this machine that ends with the block.

    Raises:
        InputError: Ray is not installed, or the cluster cannot be reached.
    """
    make_lazy_modules_picklable()
    with RayCluster(address=address).connected() as ray:
        # One CPU each. What is lost is repeated by the study, which counts.
        remote = ray.remote(num_cpus=1, max_retries=0)(_do_on_ray)
        pool = _RayTasks(ray, remote, ray.put(dict(planned)), tasks)
        try:
            yield pool
        finally:
            pool.cancel()


class _RayTasks:
    """See `ray_pool`."""

    def __init__(self, ray: Any, remote: Any, planned: Any, tasks: int) -> None:
        self._ray, self._remote, self._planned, self._tasks = ray, remote, planned, tasks
        self._references: list[Any] = []
        self.workers = max(1, int(ray.cluster_resources().get("CPU", 1)))

    def submit(self, slot: int, task: Task) -> concurrent.futures.Future[list[Outcome]]:
        reference = self._remote.remote([self._planned], task)
        self._references.append(reference)
        return reference.future()

    def rounds(self) -> np.ndarray:
        return np.full(self._tasks, -1)

    def reason(self, error: BaseException) -> str:
        cause = getattr(error, "cause", None) or error
        return _in_words(cause)

    def cancel(self) -> None:
        """Ends what has not ended yet."""
        for reference in self._references:
            with contextlib.suppress(Exception):
                self._ray.cancel(reference, force=True)


def _in_words(error: BaseException) -> str:
    """An exception as one line that is not too long for a table."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300].rstrip(": ")


class _Worker(NamedTuple):
    """What a worker process knows."""

    planned: Mapping[int, Planned]
    checkpoints: Checkpoints | None
    rounds: np.ndarray


_worker: _Worker


def _start_worker(planned: Mapping[int, Planned], checkpoints: Checkpoints | None, counters: Path, parent: int) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's to handle.
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    try:
        rounds = np.memmap(counters, np.int64, "r+")
    except FileNotFoundError:  # The driver was interrupted while this process started.
        os._exit(1)
    _use_one_thread()
    _worker = _Worker(planned, checkpoints, rounds)


def _use_one_thread() -> None:
    """For TensorFlow in a process in which it has not computed yet."""
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)


def _die_with(parent: int) -> None:
    """Ends this process soon after its parent is gone, however the parent went."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def _do_counted(slot: int, task: Task) -> list[Outcome]:
    """Does a task's runs in a process of this machine, and counts their rounds in its slot."""
    _worker.rounds[slot] = 0

    def advance(rounds: int) -> None:
        _worker.rounds[slot] += rounds

    return _do(_worker.planned, task, advance, _worker.checkpoints)


_on_ray: tuple[Any, Mapping[int, Planned]] | None = None
"""The experiments that a Ray worker knows, so that its next task finds them and its graphs."""


def _do_on_ray(boxed: list[Any], task: Task) -> list[Outcome]:
    """Does a task's runs in a process of a Ray cluster."""
    import ray

    global _on_ray
    if _on_ray is None:
        _use_one_thread()
    if _on_ray is None or _on_ray[0] != boxed[0]:
        _on_ray = boxed[0], ray.get(boxed[0])
    return _do(_on_ray[1], task, lambda rounds: None, None)


def _do(
    planned: Mapping[int, Planned], task: Task, advance: Callable[[int], None], checkpoints: Checkpoints | None
) -> list[Outcome]:
    """Does a task's runs.

    Args:
        planned: the experiments by index.
        task: what to do.
        advance: called with a number of rounds whenever so many more are done.
        checkpoints: where to keep runs until they have ended; None for nowhere.
    """
    from dpfl.simulation.run import run, run_together

    chosen = [planned[index] for index in task.experiments]
    if len(chosen) == 1:
        results = [run(*chosen[0], task.seed, advance, checkpoints)]
    else:
        results = run_together([(experiment, plan) for experiment, plan, _ in chosen], task.seed, advance)
    outcomes = []
    for result in results:
        epsilons = None if result.client_epsilons is None else [float(e) for e in result.client_epsilons.epsilons]
        outcomes.append(Outcome(result.record, result.history, result.guarantees(), epsilons))
    return outcomes
