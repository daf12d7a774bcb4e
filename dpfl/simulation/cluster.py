"""A Ray cluster on which the clients of each round are trained."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pydantic

from dpfl.config import Config
from dpfl.errors import InputError

if TYPE_CHECKING:
    from dpfl.simulation.ray_rounds import Actors


class RayCluster(Config):
    """Ray actors over which a run's cohorts are split: `experiment.run(cluster=dpfl.RayCluster(actors=8))`.

    A process that is connected to a cluster already (`ray.init`) uses that one and stays connected.

    Attributes:
        address: of the cluster, as `ray.init` takes it: "auto" for the one that this machine belongs to, or
            "host:port". None takes what the environment variable RAY_ADDRESS says; where there is none, a cluster on
            this machine alone begins with the run and ends with it.
        actors: processes that train clients; None for as many as the cluster has room for. A round's cohort is always
            split for this many, so that the same number gives the same result bit for bit.
        threads: of each actor, for which it occupies as many of the cluster's CPUs.
    """

    address: str | None = None
    actors: int | None = pydantic.Field(default=None, gt=0)
    threads: int = pydantic.Field(default=1, gt=0)

    @contextlib.contextmanager
    def started(self) -> Iterator[Actors]:
        """Connects to the cluster and starts the actors, for as long as the block runs.

        Raises:
            InputError: Ray is not installed, the cluster cannot be reached, or it has no room for the actors.
        """
        with self.connected() as ray:
            from dpfl.simulation.ray_rounds import Actors

            with Actors(ray, self._count(ray), self.threads) as actors:
                yield actors

    @contextlib.contextmanager
    def connected(self) -> Iterator[Any]:
        """Connects to the cluster for as long as the block runs, unless this process is connected already.

        Yields:
            The module `ray`.

        Raises:
            InputError: Ray is not installed, or the cluster cannot be reached.
        """
        ray = _ray()
        was_connected = ray.is_initialized()
        try:
            if not was_connected:
                self._connect(ray)
            yield ray
        finally:
            if not was_connected:
                ray.shutdown()

    def _connect(self, ray: Any) -> None:
        quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
        address = self.address or os.environ.get("RAY_ADDRESS")
        try:
            if address in (None, "", "local"):
                cpus = None if self.actors is None else self.actors * self.threads
                ray.init("local", num_cpus=cpus, include_dashboard=False, **quiet)
            else:
                ray.init(address, **quiet)
        except Exception as error:  # Ray raises a bare one where its processes do not start in time.
            reason = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
            if address in (None, "", "local"):
                raise InputError(
                    f"Ray could not start on this machine ({reason}): try again when it is less busy, or start Ray "
                    'yourself by "ray start --head" and give the address "auto".'
                ) from error
            raise InputError(
                f'the Ray cluster at {address!r} cannot be used ({reason}): start one there by "ray start --head", or '
                "leave the address out to use this machine alone."
            ) from error

    def _count(self, ray: Any) -> int:
        """How many actors there shall be."""
        cpus = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
        room = sum(number // self.threads for number in cpus)
        if room < (self.actors or 1):
            raise InputError(
                f"the Ray cluster has {sum(cpus)} CPUs on {len(cpus)} machines, and so room for {room} actors of "
                f"{self.threads} threads each, but {self.actors or 'at least 1'} were asked for: ask for less, or "
                "start more machines with CPUs (ray start --num-cpus)."
            )
        return self.actors or room


def _ray() -> Any:
    """Imports Ray.

    Raises:
        InputError: it is not installed.
    """
    # Ray reads it at its import. By default it would send the working directory of who uses `uv run` to all machines
    # and make new environments there; processes are to have the environment in which the cluster was started.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # A cluster of our own reports to nobody.
    try:
        import ray
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise InputError(
            "a cluster needs Ray, which is not installed: install it with \"pip install 'ray>=2.30'\", or in dpfl's "
            'own folder with "uv sync --extra ray".'
        ) from None
    return ray
