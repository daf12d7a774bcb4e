"""A round of dpfl's in-graph engine, with all clients as its cohort."""

from __future__ import annotations

import functools

import numpy as np
from checks import check_round
from keras_models import gradient_of, new_model, use_threads
from protocol import Work, serve
from workloads import CLIP_NORM, LEARNING_RATE, NOISE_MULTIPLIER, SEED, WORKLOADS

import dpfl
from dpfl.simulation.rounds import Rounds
from dpfl.simulation.run import _start


def federated(name: str, x: np.ndarray, y: np.ndarray) -> dpfl.data.FederatedData:
    """Returns the clients' examples, (clients, examples, *example), as a dataset; its test set, unused, is one of them.

    Args:
        name: what the dataset is called.
        x: inputs.
        y: labels, (clients, examples).
    """
    clients, examples = y.shape
    classes = WORKLOADS[name].classes
    x, y = x.reshape(clients * examples, *x.shape[2:]), y.ravel()
    return dpfl.data.FederatedData(
        name=name,
        x=x,
        y=y,
        offsets=np.arange(clients + 1) * examples,
        x_validation=x[:0],
        y_validation=y[:0],
        x_test=x[:1],
        y_test=y[:1],
        num_classes=classes,
        client_ids=tuple(map(str, range(clients))),
        class_names=tuple(map(str, range(classes))),
    )


def rounds_of(
    workload: str,
    data: dpfl.data.FederatedData,
    noise_multiplier: float = NOISE_MULTIPLIER,
    clip_norm: float = CLIP_NORM,
) -> Rounds:
    """Returns a run before its first round, from the workload's first weights, as `dpfl.Experiment.run` starts one.

    An experiment without a target for epsilon needs no calibration; its runs go on for as many rounds as one likes.
    """
    work = WORKLOADS[workload]
    experiment = dpfl.Experiment(
        data=data,
        model=new_model(workload),
        local=dpfl.ClientTraining(learning_rate=LEARNING_RATE, batch_size=work.batch, epochs=1),
        mechanism=dpfl.Gaussian(clip_norm=clip_norm, noise_multiplier=noise_multiplier or None),
        privacy=dpfl.Privacy(epsilon=None),
        sampler=dpfl.Everyone(),
        rounds=1,
    )
    _, rounds = _start(experiment, experiment.plan(), experiment.client_plan(), SEED, actors=None)
    return rounds


def after_one_round(
    workload: str, noise_multiplier: float, clip_norm: float, x: np.ndarray, y: np.ndarray
) -> list[np.ndarray]:
    """What `check_round` calls `one_round`."""
    rounds = rounds_of(workload, federated(workload, x, y), noise_multiplier, clip_norm)
    rounds.run([np.arange(len(x))])
    return rounds.weights()


def prepare(workload: str, variant: str, threads: int) -> Work:
    """Rounds of one run, checked against federated averaging in NumPy."""
    use_threads(threads, within_operation=1)  # The engine's two lanes are for this: see README.md, Scaling out.
    work = WORKLOADS[workload]
    check_round(functools.partial(after_one_round, workload), gradient_of(workload), work)
    rounds, everybody = rounds_of(workload, federated(workload, *work.client_examples())), np.arange(work.clients)
    facts = {"version": dpfl.__version__, "parameters": work.parameters, "clients": work.clients}
    return Work(lambda: rounds.run([everybody]), facts)


if __name__ == "__main__":
    serve(prepare)
