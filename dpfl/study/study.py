"""A study: a grid of experiments, each run with the same seeds."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock

import dpfl
from dpfl.errors import InputError
from dpfl.progress import Board, progress_bar
from dpfl.randomness import check_seed
from dpfl.simulation.checkpoints import Checkpoints
from dpfl.simulation.experiment import Experiment
from dpfl.study.axes import Axes, ceilings, grid
from dpfl.study.running import run_names, run_tasks
from dpfl.study.store import Store
from dpfl.study.workers import Outcome, Planned, process_pool, ray_pool, tasks_of

if TYPE_CHECKING:
    import pandas as pd


class Study:
    """Experiments x seeds, whose ended runs are kept in a folder and never done again.

    Args:
        experiments: one experiment or several.
        axes: a grid over each of them, as `grid` takes it.
        seeds: a number of seeds (0, 1, ...) or the seeds themselves. All experiments use the same
            ones, so that configurations can be compared pair by pair.
        ceiling: whether plain federated averaging, without clip and noise, runs beside each of them.

    Attributes:
        experiments: all experiments of the study, those that are the same only once.
        seeds: the seeds.
    """

    def __init__(
        self,
        experiments: Experiment | Sequence[Experiment],
        axes: Axes | None = None,
        seeds: int | Sequence[int] = 3,
        ceiling: bool = False,
    ) -> None:
        bases = [experiments] if isinstance(experiments, Experiment) else list(experiments)
        listed = seeds if isinstance(seeds, Iterable) else range(check_seed(seeds))
        self.seeds = tuple(dict.fromkeys(check_seed(seed) for seed in listed))
        if not self.seeds:
            raise InputError(f"a study needs at least one seed, but they were {seeds!r}.")
        everything = [experiment for base in bases for experiment in grid(base, axes or {})]
        if ceiling:
            everything += ceilings(everything)
        self.experiments = list({experiment.configuration: experiment for experiment in everything}.values())
        self._store: Store | None = None

    @property
    def run_ids(self) -> list[str]:
        """The identities of all runs, seeds varying fastest."""
        return [experiment.run_id(seed) for experiment in self.experiments for seed in self.seeds]

    def run(
        self,
        folder: str | Path,
        *,
        workers: int | None = None,
        ray: str | None = None,
        progress: bool = True,
        checkpoint_every: int | None = None,
    ) -> Study:
        """Does the runs that the folder does not hold yet, then collects the tables.

        A run whose worker dies (or in which anything else is raised) is tried once more; if that fails too it is
        recorded with the status "failed" and its reason, the rest goes on, and the next call of this method tries it
        again. A run whose model is not finite at the end has the status "diverged", which is a result.

        Args:
            folder: of the store: see `Store`.
            workers: number of processes on this machine; None takes one for each core. Not with `ray`.
            ray: address of a Ray cluster that does the runs, one on each CPU: "auto" for the one that this machine
                belongs to, "host:port", or "local" for one that begins and ends with the study. Results come back to
                this process, which alone writes to the folder. None for processes on this machine.
            progress: whether to show progress.
            checkpoint_every: rounds from one checkpoint of a run to the next, so that a study that was killed goes on
                inside its runs, which then train one at a time and never side by side. They are in `checkpoints/` until
                a run's record is kept, as secret as the seeds: see `Experiment.run`. None keeps nothing of a run that
                has not ended. Not with `ray`.

        Returns:
            The study itself, for `frame` and `history`.

        Raises:
            InputError: a privacy target cannot be met (nothing is run then), another process is running
                a study in this folder, records vanished from it meanwhile, the disk is full, the cluster cannot be
                reached, or a checkpoint is another plan's.
        """
        if ray is not None and (workers is not None or checkpoint_every is not None):
            raise InputError(
                "on a Ray cluster there is a worker for each of its CPUs, and runs are not kept half-done: leave "
                "workers and checkpoint_every out, or leave ray out."
            )
        workers = (os.cpu_count() or 1) if workers is None else workers
        if workers < 1:
            raise InputError(f"a study needs at least 1 worker process, but it was told {workers}.")
        store = Store(folder)
        within = store.folder / "checkpoints"
        checkpoints = None if checkpoint_every is None else Checkpoints(within, checkpoint_every)
        try:
            with store.lock():
                self._run(store, workers, ray, progress, checkpoints)
                if within.is_dir():  # Of runs whose record was kept just before a kill, or by a study without any.
                    Checkpoints(within).clear(self.run_ids)
        except filelock.Timeout:
            raise InputError(
                f"another process is running a study in {folder}: wait for it, or choose another folder."
            ) from None
        self._store = store
        return self

    def pending(self, folder: str | Path) -> int:
        """The number of runs that the folder does not hold yet."""
        return len(self._missing(Store(folder)))

    def frame(self) -> pd.DataFrame:
        """The records, one row a run."""
        return self._stored().frame(self.run_ids)

    def history(self) -> pd.DataFrame:
        """One row for every round of every run."""
        return self._stored().history(self.run_ids)

    def client_epsilons(self) -> pd.DataFrame:
        """What the examples of each client were charged: see `Store.client_epsilons`."""
        return self._stored().client_epsilons(self.run_ids)

    def _stored(self) -> Store:
        if self._store is None:
            raise InputError("the study has no results yet: call run(folder) first.")
        return self._store

    def _missing(self, store: Store) -> list[tuple[int, int]]:
        """The runs that the store does not hold, by the experiment's index and the seed."""
        ended = store.ended()
        return [
            (index, seed)
            for index, experiment in enumerate(self.experiments)
            for seed in self.seeds
            if experiment.run_id(seed) not in ended
        ]

    def _run(
        self, store: Store, workers: int, ray: str | None, progress: bool, checkpoints: Checkpoints | None
    ) -> None:
        runs = self._missing(store)
        if runs:
            planned = self._plan(sorted({index for index, _ in runs}), progress)
            store.describe(self._description())
            failed: set[str] = set()

            def keep(outcome: Outcome) -> None:
                store.write(*outcome)
                run_id = outcome.record["run_id"]
                if outcome.record["status"] == "failed":
                    failed.add(run_id)
                elif checkpoints is not None:
                    checkpoints.remove(run_id)

            rounds = sum(planned[index].plan.rounds for index, _ in runs)
            most = 2 * len(runs)  # Each run may be done once more by itself.
            with (
                ray_pool(planned, most, ray)
                if ray is not None
                else process_pool(planned, most, min(workers, len(runs)), checkpoints)
            ) as pool:
                tasks = tasks_of(planned, runs, pool.workers, together=checkpoints is None)
                with Board("training", rounds, "rounds", shown=progress) as board:
                    run_tasks(pool, planned, tasks, keep, board)
            lost = [run for run in self._missing(store) if self.experiments[run[0]].run_id(run[1]) not in failed]
            if lost:
                raise InputError(
                    f"{len(lost)} finished runs are gone from {store.folder} again: leave the folder alone while a "
                    "study runs, and start it anew to repeat them."
                )
        store.describe(self._description())
        store.collect()

    def _description(self) -> dict[str, Any]:
        """What the study asks for, as plain values."""
        return {
            "run_ids": self.run_ids,
            "seeds": list(self.seeds),
            "experiments": [experiment.settings() for experiment in self.experiments],
            "dpfl_version": dpfl.__version__,
        }

    def _plan(self, indices: Sequence[int], progress: bool) -> dict[int, Planned]:
        """Calibrates all mechanisms and clients, so that what cannot be met is refused before anything is trained."""
        planned = {}
        with progress_bar("calibrating", len(indices), "configurations", shown=progress) as advance:
            for index in indices:
                experiment = self.experiments[index]
                try:
                    plan = experiment.plan()
                    planned[index] = Planned(experiment, plan, experiment.client_plan(plan.rounds))
                except InputError as error:
                    name = run_names(self.experiments)[index]
                    raise InputError(f"with {name}, {error}" if name else str(error)) from None
                advance(1)
        return planned
