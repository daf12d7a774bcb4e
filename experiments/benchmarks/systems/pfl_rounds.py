"""A round of pfl-research's own simulation with PyTorch: federated averaging with its central Gaussian mechanism.

A variant is a number of threads, or of processes of one thread each, which share the clients of a round as its guide to
fast simulations says.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import numpy as np
import torch
from checks import check_round
from protocol import Work, serve
from torch import nn
from torch_rounds_models import build, gradient, loss, tensors, trained, weights_of
from workloads import CLIP_NORM, LEARNING_RATE, NOISE_MULTIPLIER, SEED, WORKLOADS

ADDRESSES, RANK = "PFL_WORKER_ADDRESSES", "PFL_WORKER_RANK"
MANY = 2**31


def simulation(
    workload: str, noise_multiplier: float, clip_norm: float, x: np.ndarray, y: np.ndarray
) -> tuple[nn.Module, Callable[[], object]]:
    """Returns the model and a function that does one round with it, by `FederatedAveraging.run`.

    Args:
        workload: its name.
        noise_multiplier: the noise's standard deviation over the clip norm.
        clip_norm: the L2 norm of the largest update.
        x: inputs, (clients, examples, *example).
        y: labels, (clients, examples).
    """
    # Here, not above: pfl joins the other processes when it is imported.
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.pytorch import PyTorchTensorDataset
    from pfl.data.sampling import MinimizeReuseUserSampler
    from pfl.hyperparam import NNTrainHyperParams
    from pfl.metrics import Weighted
    from pfl.model.pytorch import PyTorchModel
    from pfl.privacy import CentrallyAppliedPrivacyMechanism, GaussianMechanism

    # All processes draw the same seeds for their noise.
    np.random.seed(SEED)  # noqa: NPY002
    torch.manual_seed(SEED)
    clients = len(x)
    model = build(workload)
    model.loss = functools.partial(loss, model)
    # Evaluated before the first round only, which is not measured.
    model.metrics = lambda x, y: {"loss": Weighted(float(loss(model, x, y).detach()), 1)}
    federated_model = PyTorchModel(
        model, local_optimizer_create=torch.optim.SGD, central_optimizer=torch.optim.SGD(trained(model), lr=1.0)
    )
    # Made once, so that each keeps its minibatches.
    datasets = [PyTorchTensorDataset(tensors(x[client], y[client])) for client in range(clients)]
    dataset = FederatedDataset(datasets.__getitem__, MinimizeReuseUserSampler(range(clients)))
    mechanism = CentrallyAppliedPrivacyMechanism(GaussianMechanism(clip_norm, noise_multiplier))
    backend = SimulatedBackend(training_data=dataset, val_data=dataset, postprocessors=[mechanism])
    train_params = NNTrainHyperParams(
        local_num_epochs=1, local_learning_rate=LEARNING_RATE, local_batch_size=WORKLOADS[workload].batch
    )
    algorithm = FederatedAveraging()
    rounds = 0

    def step() -> None:
        nonlocal rounds
        rounds += 1
        # `run` goes on where it stopped.
        algorithm.run(
            NNAlgorithmParams(
                central_num_iterations=rounds,
                evaluation_frequency=MANY,
                train_cohort_size=clients,
                val_cohort_size=None,
            ),
            backend,
            federated_model,
            train_params,
            send_metrics_to_platform=False,
        )

    return model, step


def prepare(workload: str, variant: str, threads: int) -> Work:
    """A round of all clients, checked against federated averaging.

    Raises:
        ValueError: if the variant needs more processors than there are threads.
    """
    number, kind = variant.split("-", 1)
    if int(number) > threads:
        raise ValueError(f"{variant} need {number} processors")
    # pfl asks for the device at each minibatch; this is the quickest answer.
    os.environ["PFL_PYTORCH_DEVICE"] = "cpu"
    processes = int(number) if kind == "processes" else 1
    torch.set_num_threads(int(number) // processes)
    others = _start_others(processes) if processes > 1 and RANK not in os.environ else []

    def one_round(noise_multiplier: float, clip_norm: float, x: np.ndarray, y: np.ndarray) -> list[np.ndarray]:
        model, step = simulation(workload, noise_multiplier, clip_norm, x, y)
        step()
        return weights_of(model)

    check_round(one_round, functools.partial(gradient, workload), WORKLOADS[workload])
    _, step = simulation(workload, NOISE_MULTIPLIER, CLIP_NORM, *WORKLOADS[workload].client_examples())

    def step_of_all() -> None:
        for other in others:
            other.stdin.write('{"steps": 1}\n')
            other.stdin.flush()
        step()

    facts = {
        "version": importlib.metadata.version("pfl"),
        "parameters": WORKLOADS[workload].parameters,
        "torch": torch.__version__,
    }
    return Work(step_of_all, facts)


def _start_others(processes: int) -> list[subprocess.Popen]:
    """Starts the other processes and makes this one the first of them."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    os.environ[ADDRESSES] = ",".join([f"localhost:{port}"] * processes)
    others = [
        subprocess.Popen(
            [sys.executable, *sys.argv],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            env={**os.environ, RANK: str(rank)},
        )
        for rank in range(1, processes)
    ]
    os.environ[RANK] = "0"
    return others


def _end_with(parent: int) -> None:
    """Ends this process when its parent has ended: it could wait long for it."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    if RANK in os.environ:
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
        serve(prepare, warm_up=0)  # the first process asks for these steps too
    else:
        serve(prepare)
