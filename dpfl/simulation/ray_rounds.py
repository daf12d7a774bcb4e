"""The rounds of one run over many processes on many machines, as Ray actors.

What clients send is summed, and sums can be taken in parts: each actor trains some clients of the cohort and returns
the sum of their clipped updates; the driver adds these sums and then, once, the noise. Actors may be lost at any time:
what one of them was at is done by another.
"""

from __future__ import annotations

import collections
import heapq
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dpfl.clients import ClientTraining
from dpfl.clients.example_privacy import ClientPlan
from dpfl.clients.schedule import examples_seen
from dpfl.data import FederatedData
from dpfl.mechanisms import Plan
from dpfl.models.functional import FunctionalModel
from dpfl.models.pickling import make_lazy_modules_picklable
from dpfl.simulation.engine import Engine, GraphRounds
from dpfl.simulation.rounds import structure_of
from dpfl.simulation.server import ServerStep
from dpfl.simulation.state import Settings, State

_PATIENCE = 300.0  # seconds until the first of the actors has to be there
_LOSSES_PER_ACTOR = 3  # without a part done in between, until the fault is taken to be the work's own


class Work(NamedTuple):
    """All that an actor needs to train any client of a run; private, as the data in it is."""

    data: FederatedData
    model: FunctionalModel
    local: ClientTraining
    server: ServerStep
    plan: Plan
    client_plan: ClientPlan | None
    seed: int


class _Actor:
    """What a process of the cluster does."""

    def __init__(self, threads: int) -> None:
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(threads)

    def prepare(self, work: Work) -> None:
        """Makes the engine. The arrays in `work` are those of Ray's store, which all actors of a machine share."""
        query = work.plan.query(0, work.model.initial_weights(0))
        self._engine = Engine(work.data, work.model, work.local, work.server, query)
        self._settings = self._engine.settings(work.local, work.server, work.seed, work.client_plan)
        self._like = self._engine.initial_state(work.plan, work.server, work.seed)

    def sum(self, state: list[np.ndarray], clients: np.ndarray) -> list[np.ndarray]:
        """See `Engine.partial_sum`."""
        return self._engine.partial_sum(structure_of(state, self._like), clients, self._settings)


class _Going(NamedTuple):
    """What an actor is at: a part of the round, or None while it prepares itself."""

    actor: Any
    part: int | None


class Actors:
    """Actors that train parts of a cohort, each replaced when it is lost; as a context, ended with its block.

    Ray could restart actors by itself, but would wait where a machine is gone and no other has room: here the actors
    that are left do the work, and a new one joins them when it has found a place.

    Args:
        ray: the module, connected to a cluster.
        count: how many actors.
        threads: of each.
    """

    def __init__(self, ray: Any, count: int, threads: int) -> None:
        self._ray, self.count, self._threads = ray, count, threads
        self._lost_errors = (
            ray.exceptions.RayActorError,
            ray.exceptions.ObjectLostError,  # the sum itself, with the machine that had it
            ray.exceptions.NodeDiedError,
            ray.exceptions.OutOfMemoryError,
            ray.exceptions.WorkerCrashedError,
        )
        # Machine after machine gets one, as long as there is room.
        self._remote = ray.remote(_Actor).options(num_cpus=threads, max_restarts=0, scheduling_strategy="SPREAD")
        self._all = [self._remote.remote(threads) for _ in range(count)]
        self._idle: collections.deque[Any] = collections.deque()
        self._going: dict[Any, _Going] = {}
        self._losses = 0
        self._work: Any = None

    def __enter__(self) -> Actors:
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self._all:
            self._ray.kill(actor)

    def prepare(self, work: Work) -> None:
        """Gives the actors other work, in place of all that they had before."""
        make_lazy_modules_picklable()
        self._work = self._ray.put(work)
        self._idle.clear()
        self._going = {actor.prepare.remote(self._work): _Going(actor, None) for actor in self._all}
        self._losses = 0

    def sums(self, state: list[np.ndarray], parts: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
        """The sums of a round's parts, in the order of the parts whoever did them and whenever.

        Args:
            state: before the round, as `Rounds.state` gives it.
            parts: client indices of each.

        Raises:
            Exception: what training raised in an actor.
            RuntimeError: actors are lost again and again, or find no place in the cluster.
        """
        shared = self._ray.put(state)
        todo, done = collections.deque(range(len(parts))), dict[int, list[np.ndarray]]()
        while len(done) < len(parts):
            while todo and self._idle:
                actor, part = self._idle.popleft(), todo.popleft()
                self._going[actor.sum.remote(shared, parts[part])] = _Going(actor, part)
            for reference in self._ended():
                actor, given = self._going.pop(reference)
                try:
                    result = self._ray.get(reference)
                except self._lost_errors as error:
                    if given is not None:
                        todo.appendleft(given)
                    self._replace(actor, error)
                    continue
                except self._ray.exceptions.RayTaskError as error:
                    # As it would be in one process; where it happened is in the error behind it.
                    raise (error.cause if isinstance(error.cause, Exception) else error) from error
                self._idle.append(actor)
                if given is not None:
                    done[given] = result
                    self._losses = 0
        return [done[part] for part in range(len(parts))]

    def _ended(self) -> list[Any]:
        """What has ended, waiting until something has."""
        works = any(going.part is not None for going in self._going.values())
        ended, _ = self._ray.wait(list(self._going), timeout=None if works else _PATIENCE)
        if not ended:
            raise RuntimeError(
                f"none of the {self.count} actors was ready within {_PATIENCE:g} seconds: others may use all CPUs of "
                "the Ray cluster, which 'ray status' shows."
            )
        return ended

    def _replace(self, actor: Any, error: Exception) -> None:
        self._losses += 1
        if self._losses > _LOSSES_PER_ACTOR * self.count:
            raise RuntimeError(
                f"{self._losses} actors were lost one after the other without a part of the round done: something in "
                "the training may end its process, such as memory that does not suffice."
            ) from error
        self._ray.kill(actor)  # It may live on, unreachable.
        self._all.remove(actor)
        new = self._remote.remote(self._threads)
        self._all.append(new)
        self._going[new.prepare.remote(self._work)] = _Going(new, None)


class RayRounds(GraphRounds):
    """The rounds of one run over Ray actors: see `Rounds`.

    A cohort is split into as many parts as there are actors, of about the same number of examples. The same number of
    actors gives the same result bit for bit, on machines that compute alike, whether or not actors were lost;
    another number, or one process, the same up to the order in which float32 numbers are summed.

    Args:
        actors: that train the clients, with nothing else to do as long as these rounds go on.
        engine: of this process, which adds noise and evaluates.
        state: before the first round.
        settings: the configuration's numbers.
        work: the same run for the actors.
    """

    def __init__(self, actors: Actors, engine: Engine, state: State, settings: Settings, work: Work) -> None:
        super().__init__(engine, state, settings)
        self._actors = actors
        self._costs = np.asarray(
            examples_seen(
                work.data.client_sizes.astype(np.int32),
                steps=settings.steps,
                epochs=settings.epochs,
                batch_size=work.local.batch_size,
                sampling=work.local.example_sampling if work.local.is_private else "shuffled",
            )
        )
        actors.prepare(work)

    def run(self, cohorts: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """See `Rounds.run`."""
        measured = [self._round(cohort) for cohort in cohorts]
        return {name: np.concatenate([one[name] for one in measured]) for name in measured[0]}

    def _round(self, cohort: np.ndarray) -> dict[str, np.ndarray]:
        parts = balanced_parts(cohort, self._costs[cohort], self._actors.count)
        if parts:
            sums = self._actors.sums(self.state(), parts)
        else:  # Nobody takes part, and the noise is released all the same.
            sums = [self._engine.partial_sum(self._state, cohort, self._settings)]
        self._state, measured = self._engine.finish(self._state, sums, len(cohort), self._settings)
        return measured


def balanced_parts(clients: np.ndarray, costs: np.ndarray, parts: int) -> list[np.ndarray]:
    """Splits clients into parts of about the same cost: the dearest first, each to the part that has least.

    Args:
        clients: their indices.
        costs: of each of them.
        parts: how many, at most; a part without a client is left out.

    Returns:
        The client indices of each part, ascending, so that rows of the data are read in order.
    """
    loads = [(0, part) for part in range(parts)]
    part_of = np.empty(len(clients), np.int64)
    for index in np.argsort(-costs, kind="stable"):
        load, part = loads[0]
        part_of[index] = part
        heapq.heapreplace(loads, (load + int(costs[index]), part))
    return [np.sort(clients[part_of == part]) for part in range(parts) if (part_of == part).any()]
