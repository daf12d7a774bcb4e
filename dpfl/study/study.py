"""A study: a grid of experiments, each run with the same seeds."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock

from dpfl.errors import InputError
from dpfl.progress import progress_bar
from dpfl.randomness import check_seed
from dpfl.simulation.checkpoints import Checkpoints
from dpfl.simulation.experiment import Experiment
from dpfl.study.store import Store
from dpfl.study.workers import Planned, run_tasks, tasks_of

if TYPE_CHECKING:
    import pandas as pd

Axes = Mapping[Any, Sequence[Any]]


def grid(base: Experiment, axes: Axes) -> list[Experiment]:
    """Returns the experiments of a grid, the last axis varying fastest.

    Args:
        base: what the experiments share.
        axes: values by setting; a dot reaches into a group ("privacy.epsilon"), and a tuple of
            settings takes tuples of values, which change together.

    Raises:
        InputError: a setting does not exist or a value is wrong.
    """
    for name, axis in axes.items():
        if isinstance(axis, str) or not isinstance(axis, Sequence) or not axis:
            raise InputError(f"the axis {name} must be a list of values, at least one, but it was {axis!r}.")
        if isinstance(name, tuple) and any(not isinstance(v, tuple) or len(v) != len(name) for v in axis):
            raise InputError(f"the axis {name} must be a list of tuples with {len(name)} values each.")
    names = [name if isinstance(name, tuple) else (name,) for name in axes]
    values = [[value if isinstance(name, tuple) else (value,) for value in axis] for name, axis in axes.items()]
    experiments = []
    for point in itertools.product(*values):
        settings = {
            name: value
            for group, together in zip(names, point, strict=True)
            for name, value in zip(group, together, strict=True)
        }
        experiments.append(base.replace(**settings))
    return experiments


class Study:
    """Experiments x seeds, whose ended runs are kept in a folder and never done again.

    Args:
        experiments: one experiment or several.
        axes: a grid over each of them, as `grid` takes it.
        seeds: a number of seeds (0, 1, ...) or the seeds themselves. All experiments use the same
            ones, so that configurations can be compared pair by pair.

    Attributes:
        experiments: all experiments of the study, those that are the same only once.
        seeds: the seeds.
    """

    def __init__(
        self,
        experiments: Experiment | Sequence[Experiment],
        axes: Axes | None = None,
        seeds: int | Sequence[int] = 3,
    ) -> None:
        bases = [experiments] if isinstance(experiments, Experiment) else list(experiments)
        listed = seeds if isinstance(seeds, Iterable) else range(check_seed(seeds))
        self.seeds = tuple(dict.fromkeys(check_seed(seed) for seed in listed))
        if not self.seeds:
            raise InputError(f"a study needs at least one seed, but they were {seeds!r}.")
        everything = [experiment for base in bases for experiment in grid(base, axes or {})]
        by_id = {experiment.run_id(self.seeds[0]): experiment for experiment in everything}
        self.experiments = list(by_id.values())
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
        progress: bool = True,
        checkpoint_every: int | None = None,
    ) -> Study:
        """Does the runs that the folder does not hold yet, then collects the tables.

        Args:
            folder: of the store: `records/`, `runs.csv` and `history.csv`.
            workers: number of processes; None takes one for each core.
            progress: whether to show a progress bar.
            checkpoint_every: rounds from one checkpoint of a run to the next, so that a study that was killed goes on
                inside its runs, which then train one at a time and never side by side. They are in `checkpoints/` until
                a run's record is kept, as secret as the seeds: see `Experiment.run`. None keeps nothing of a run that
                has not ended.

        Returns:
            The study itself, for `frame` and `history`.

        Raises:
            InputError: a privacy target cannot be met (nothing is run then), another process is running
                a study in this folder, records vanished from it meanwhile, or a checkpoint is another plan's.
        """
        workers = (os.cpu_count() or 1) if workers is None else workers
        if workers < 1:
            raise InputError(f"a study needs at least 1 worker process, but it was told {workers}.")
        store = Store(Path(folder))
        within = store.folder / "checkpoints"
        checkpoints = None if checkpoint_every is None else Checkpoints(within, checkpoint_every)
        try:
            with store.lock():
                self._run(store, workers, progress, checkpoints)
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
        return len(self._missing(Store(Path(folder))))

    def frame(self) -> pd.DataFrame:
        """The records, one row a run."""
        return self._stored().frame(self.run_ids)

    def history(self) -> pd.DataFrame:
        """One row for every round of every run."""
        return self._stored().history(self.run_ids)

    def _stored(self) -> Store:
        if self._store is None:
            raise InputError("the study has no results yet: call run(folder) first.")
        return self._store

    def _missing(self, store: Store) -> list[tuple[int, int]]:
        """The runs that the store does not hold, by the experiment's index and the seed."""
        return [
            (index, seed)
            for index, experiment in enumerate(self.experiments)
            for seed in self.seeds
            if not store.has(experiment.run_id(seed))
        ]

    def _run(self, store: Store, workers: int, progress: bool, checkpoints: Checkpoints | None) -> None:
        runs = self._missing(store)
        if runs:
            planned = self._plan(sorted({index for index, _ in runs}), progress)
            tasks = tasks_of(planned, runs, workers, together=checkpoints is None)
            rounds = sum(planned[index].plan.rounds for index, _ in runs)
            unit = f"rounds in {len(runs)} runs"
            with progress_bar("training", rounds, unit, shown=progress) as advance:
                run_tasks(planned, tasks, store.folder, workers, advance, checkpoints)
            if lost := len(self._missing(store)):
                raise InputError(
                    f"{lost} finished runs are gone from {store.folder} again: leave the folder alone while a study "
                    "runs, and start it anew to repeat them."
                )
        store.collect(self.run_ids)

    def _plan(self, indices: Sequence[int], progress: bool) -> dict[int, Planned]:
        """Calibrates all mechanisms and clients, so that what cannot be met is refused before anything is trained."""
        planned = {}
        with progress_bar("calibrating", len(indices), "configurations", shown=progress) as advance:
            for index in indices:
                experiment = self.experiments[index]
                plan = experiment.plan()
                planned[index] = Planned(experiment, plan, experiment.client_plan(plan.rounds))
                advance(1)
        return planned
