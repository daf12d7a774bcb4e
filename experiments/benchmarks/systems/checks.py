"""Whether a step is DP-SGD's and a round federated averaging's: workers run this before they are measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from workloads import LEARNING_RATE, FederatedWorkload

HUGE, MUCH, SMALL = 1e6, 1e3, 0.1
CHECKED_CLIENTS = 4

Weights = list[np.ndarray]
Round = Callable[[float, float, np.ndarray, np.ndarray], Weights]
Gradient = Callable[[Weights, np.ndarray, np.ndarray], Weights]


def check_parameters(found: int, expected: int) -> None:
    """Raises a ValueError unless the model has as many trainable weights as the workload says."""
    if found != expected:
        raise ValueError(f"the model has {found:,} trainable weights instead of {expected:,}")


def check_step(
    private: Callable[[float, float, bool], np.ndarray], plain: Callable[[bool], np.ndarray], batch: int
) -> None:
    """Compares one private step with what DP-SGD says it is.

    Args:
        private: takes a noise multiplier, a clip norm, and whether all examples are alike; returns the change of all
            weights, as one vector, that one step from the model's first weights makes.
        plain: the same for the non-private step.
        batch: the number of examples.

    Raises:
        ValueError: unless the step without noise and with a huge clip norm is the plain step; the step without noise
            and with a small clip norm, all examples alike, is the plain step scaled down to that norm (both to 1e-3);
            and the step with much noise is as wide as the noise says (to 10 %, 20 standard errors for 26,010 weights).
    """
    difference = _difference(private(0.0, HUGE, False), plain(False))
    if not difference < 1e-3:
        raise ValueError(f"without noise and clipping the step differs from the plain step by {difference:.1e} of it")
    one = plain(True)
    if np.linalg.norm(one) < LEARNING_RATE * SMALL:
        raise ValueError("the gradient is too small to be clipped, so that clipping cannot be checked")
    difference = _difference(private(0.0, SMALL, True), one * (LEARNING_RATE * SMALL / np.linalg.norm(one)))
    if not difference < 1e-3:
        raise ValueError(f"without noise the clipped step differs from what it should be by {difference:.1e} of it")
    spread = np.std(private(HUGE, SMALL, False)) / (LEARNING_RATE * SMALL * HUGE / batch)
    if not 0.9 < spread < 1.1:
        raise ValueError(f"the noise of the step is {spread:.3g} times as wide as it should be")


def _difference(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def check_round(one_round: Round, gradient: Gradient, workload: FederatedWorkload) -> None:
    """Compares one private round with federated averaging done in NumPy, on four clients.

    All examples of a client are alike, so that their order does not matter.

    Args:
        one_round: takes a noise multiplier, a clip norm, inputs (clients, examples, *example) and labels (clients,
            examples); returns the weights, in Keras' layout and order, after one round of the system under test from
            the workload's first weights, in which all these clients take part.
        gradient: takes weights, and the inputs and labels of one minibatch; returns the gradients of the mean loss, in
            Keras' layout and order, as the system's framework computes them.
        workload: the one under test.

    Raises:
        ValueError: unless the round without noise is the reference's, both with a clip norm that clips half of the
            clients and with one that clips none (to 1e-3 of the change), and the round with much noise is as wide as
            the noise multiplier says (to 10 %, or 20 % where there are fewer than 10,000 weights).
    """
    x, y = workload.client_examples(CHECKED_CLIENTS, alike=True)
    first = workload.first_weights()
    updates = [_update(gradient, workload, x[client], y[client]) for client in range(CHECKED_CLIENTS)]
    norms = [float(np.linalg.norm(update)) for update in updates]
    middle = float(np.median(norms))
    if not min(norms) < middle < max(norms):
        raise ValueError("the clients' updates have the same norm, so that clipping cannot be checked")

    def change(noise_multiplier: float, clip_norm: float) -> np.ndarray:
        after = one_round(noise_multiplier, clip_norm, x, y)
        shapes = [tuple(np.shape(weight)) for weight in after]
        if shapes != list(workload.shapes):
            raise ValueError(f"the weights have the shapes {shapes} instead of {list(workload.shapes)}")
        return _vector(after) - _vector(first)

    for clip_norm, what in ((middle, "round without noise"), (HUGE, "round without noise and clipping")):
        clipped = [update * min(1.0, clip_norm / norm) for update, norm in zip(updates, norms, strict=True)]
        difference = _difference(change(0.0, clip_norm), sum(clipped) / CHECKED_CLIENTS)
        if not difference < 1e-3:
            raise ValueError(f"the {what} differs from federated averaging by {difference:.1e} of its change")
    spread = np.std(change(MUCH, middle)) / (MUCH * middle / CHECKED_CLIENTS)
    tolerance = 0.1 if workload.parameters >= 10_000 else 0.2
    if not 1 - tolerance < spread < 1 + tolerance:
        raise ValueError(f"the noise of the round is {spread:.3g} times as wide as it should be")


def _update(gradient: Gradient, workload: FederatedWorkload, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """What a client's local steps change, as one vector of float64."""
    first = workload.first_weights()
    weights = first
    for step in range(workload.local_steps):
        rows = slice(step * workload.batch, (step + 1) * workload.batch)
        gradients = gradient(weights, x[rows], y[rows])
        weights = [
            weight - np.float32(LEARNING_RATE) * np.asarray(each)
            for weight, each in zip(weights, gradients, strict=True)
        ]
    return _vector(weights) - _vector(first)


def _vector(weights: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.asarray(weight, np.float64).ravel() for weight in weights])
