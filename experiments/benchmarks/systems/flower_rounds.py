"""A round of federated averaging in Flower's simulation: `FedAvg` in Flower's wrapper for central differential privacy.

Flower simulates by Ray: actors run the `ClientApp` (here PyTorch, trained as its tutorials do) of one client at a time
and get and return messages with all weights. Both of its wrappers with a fixed clip norm are there as variants:
`server-clip` clips on the server, one update after the other, and `client-clip` in the actors, by Flower's own
`fixedclipping_mod`. Both add noise of standard deviation noise multiplier x clip norm / number of clients to the mean.
There are as many actors as threads, with one thread each: one actor with two threads took five times as long for the
MLP with 100 clients. Evaluation is off, and so is logging below warnings.

The `ServerApp` runs a strategy of one round whenever it gets an order. Flower's simulation looks for new messages, and
the server for new replies, every 0.1 seconds: no round is faster. `run_simulation` is said to be deprecated in favour
of the command `flwr run`, which calls the same code in a process of its own and could not be asked for single rounds.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"  # or actors take the environment of the `uv run` around the benchmark
os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"  # a warning otherwise
# When one of its workers crashes, Ray kills its process group, which could be that of this process and run.py.
os.environ["RAY_process_group_cleanup_enabled"] = "0"  # noqa: SIM112

import flwr
import numpy as np
import ray
import torch
from checks import check_round
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import fixedclipping_mod
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
    Strategy,
)
from flwr.simulation import run_simulation
from protocol import Work, serve
from torch_rounds_models import build, gradient, loss, tensors, trained, weights_of
from workloads import CLIP_NORM, LEARNING_RATE, NOISE_MULTIPLIER, WORKLOADS, FederatedWorkload

logging.getLogger("flwr").setLevel(logging.WARNING)
WRAPPERS = {
    "server-clip": DifferentialPrivacyServerSideFixedClipping,
    "client-clip": DifferentialPrivacyClientSideFixedClipping,
}
TAG = "DPFL_BENCHMARK_FLOWER"
CLEAN_UP = """
import os, pathlib, shutil, signal, sys, time
name, folder, parent = sys.argv[1:]
while os.getppid() == int(parent):
    time.sleep(1)
for process in pathlib.Path("/proc").glob("[0-9]*"):
    try:
        if f"{name}={folder}".encode() in (process / "environ").read_bytes().split(bytes(1)):
            os.kill(int(process.name), signal.SIGKILL)
    except OSError:
        pass
shutil.rmtree(folder, ignore_errors=True)
"""
SIMULATIONS = contextlib.ExitStack()


def arrays_of(model: torch.nn.Module) -> ArrayRecord:
    """The trained weights as Flower sends them. An LSTM's second bias, which is no weight, would get noise."""
    return ArrayRecord({name: each.detach() for name, each in model.named_parameters() if each.requires_grad})


@functools.cache
def _model(workload: str) -> torch.nn.Module:
    """The model of this actor, which has one thread."""
    torch.set_num_threads(1)
    return build(workload)


@functools.cache
def _examples(folder: str, client: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A client's examples, read once by each actor."""
    return tensors(*(np.load(Path(folder, name), mmap_mode="r")[client] for name in ("x.npy", "y.npy")))


def train(message: Message, context: Context) -> Message:
    """Trains one client: what the `ClientApp` does."""
    asked: Any = message.content["config"]
    work = WORKLOADS[asked["workload"]]
    model = _model(asked["workload"])
    model.load_state_dict(message.content["arrays"].to_torch_state_dict(), strict=False)
    optimizer = torch.optim.SGD(trained(model), LEARNING_RATE)
    x, y = _examples(asked["folder"], asked.get("client", int(context.node_config["partition-id"])))
    for own_x, own_y in zip(x.split(work.facts["batch"]), y.split(work.facts["batch"]), strict=True):
        optimizer.zero_grad()
        loss(model, own_x, own_y).backward()
        optimizer.step()
    metrics = MetricRecord({"num-examples": len(y)})
    return Message(RecordDict({"arrays": arrays_of(model), "metrics": metrics}), reply_to=message)


class FirstClients(FedAvg):
    """Federated averaging with so few clients that it can be checked: the nodes drawn stand for the first clients."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Gives each message the number of a client, which `train` takes for that of its node."""
        messages = list(super().configure_train(server_round, arrays, config, grid))
        for client, message in enumerate(messages):
            message.content = RecordDict({"arrays": arrays, "config": ConfigRecord({**config, "client": client})})
        return messages


@dataclass(frozen=True)
class Order:
    """One round: the strategy that does it, the weights that it starts from and what the clients are told."""

    strategy: Strategy
    arrays: ArrayRecord
    config: dict[str, Any]


class Simulation:
    """A running simulation of Flower.

    Args:
        workload: the workload's name.
        variant: as in the catalogue.
        threads: processors that Ray may use: one for each actor.
        folder: an existing folder for the clients' data and for Ray's files.
    """

    def __init__(self, workload: str, variant: str, threads: int, folder: Path) -> None:
        self._workload, self._wrapper, self._folder = workload, WRAPPERS[variant], folder
        self._nodes = WORKLOADS[workload].facts["clients"]
        self._orders: queue.Queue[Order | None] = queue.Queue()
        self._answers: queue.Queue[ArrayRecord | BaseException] = queue.Queue()
        backend = {
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": threads, "num_gpus": 0, "_temp_dir": str(folder / "ray")},
        }
        self._thread = threading.Thread(target=self._run, args=(backend,), daemon=True)
        self._thread.start()

    def _run(self, backend: dict[str, Any]) -> None:
        client = ClientApp()
        mods = [fixedclipping_mod] if self._wrapper is DifferentialPrivacyClientSideFixedClipping else []
        client.train(mods=mods)(train)
        server = ServerApp()

        @server.main()
        def main(grid: Grid, _: Context) -> None:
            while (order := self._orders.get()) is not None:
                config = ConfigRecord(dict(order.config))
                result = order.strategy.start(grid, order.arrays, num_rounds=1, train_config=config)
                self._answers.put(result.arrays if result.arrays else RuntimeError("a client failed: see the log"))

        try:
            run_simulation(server, client, self._nodes, backend_config=backend)
            self._answers.put(RuntimeError("the simulation has ended"))
        except BaseException as error:
            self._answers.put(error)

    def rounds(
        self, noise_multiplier: float, clip_norm: float, x: np.ndarray, y: np.ndarray
    ) -> Callable[[ArrayRecord], ArrayRecord]:
        """Returns a function that does one round with all of some clients, without evaluation.

        Args:
            noise_multiplier: of Flower's wrapper.
            clip_norm: of Flower's wrapper.
            x: the clients' inputs, (clients, examples, *example); no more clients than the workload has.
            y: their labels, (clients, examples).

        Returns:
            From the weights before the round to the weights after it. It raises a RuntimeError if a client or the
            simulation failed.
        """
        clients = len(x)
        folder = tempfile.mkdtemp(dir=self._folder)
        for name, array in (("x.npy", x), ("y.npy", y)):
            np.save(Path(folder, name), array)
        # Without the minimum the first round takes as many clients as happen to be registered when it begins.
        averaging = (FedAvg if clients == self._nodes else FirstClients)(
            fraction_train=clients / self._nodes,
            fraction_evaluate=0.0,
            min_train_nodes=clients,
            min_available_nodes=self._nodes,
        )
        strategy = self._wrapper(averaging, noise_multiplier, clip_norm, clients)

        def one_round(arrays: ArrayRecord) -> ArrayRecord:
            self._orders.put(Order(strategy, arrays, {"workload": self._workload, "folder": folder}))
            answer = self._answers.get()
            if isinstance(answer, BaseException):
                raise answer
            return answer

        return one_round

    def close(self) -> None:
        """Ends the simulation and its Ray cluster."""
        self._orders.put(None)
        self._thread.join()


def _scratch_folder() -> Path:
    """Returns a new folder for data and Ray's files, which a process of its own removes when this one has ended.

    It also ends those of Ray's processes that still show the environment variable they inherited. Ray's two agents have
    written their titles over it: if this process is killed, as run.py does, they live on for up to half a minute.
    """
    os.setpgrp()  # what Ray does to its process group is not to meet run.py
    folder = tempfile.mkdtemp(prefix="dpfl-")
    command = [sys.executable, "-c", CLEAN_UP, TAG, folder, str(os.getpid())]
    subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    os.environ[TAG] = folder
    return Path(folder)


def prepare(workload: str, variant: str, threads: int) -> Work:
    """Rounds with all clients in a running simulation, in which first those of the check are done."""
    work = WORKLOADS[workload]
    assert isinstance(work, FederatedWorkload)
    simulation = Simulation(workload, variant, threads, _scratch_folder())
    SIMULATIONS.callback(simulation.close)
    model = build(workload)
    arrays = first = arrays_of(build(workload))

    def checked(noise_multiplier: float, clip_norm: float, x: np.ndarray, y: np.ndarray) -> list[np.ndarray]:
        after = simulation.rounds(noise_multiplier, clip_norm, x, y)(first)
        model.load_state_dict(after.to_torch_state_dict(), strict=False)
        return weights_of(model)

    check_round(checked, functools.partial(gradient, workload), work)
    x, y = work.client_examples()
    one_round = simulation.rounds(NOISE_MULTIPLIER, CLIP_NORM, x, y)

    def step() -> None:
        nonlocal arrays
        arrays = one_round(arrays)

    facts = {
        "version": flwr.__version__,
        "parameters": work.parameters,
        "clients": len(x),
        "torch": torch.__version__,
        "ray": ray.__version__,
    }
    return Work(step, facts)


if __name__ == "__main__":
    # Ray's actors import this module by its name; what is defined in `__main__` they would get with each message.
    import flower_rounds

    with flower_rounds.SIMULATIONS:
        serve(flower_rounds.prepare)
