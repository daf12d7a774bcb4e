"""Whether a system's step is DP-SGD's: each worker runs this before it is measured, where steps are quick."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from workloads import LEARNING_RATE

HUGE, SMALL = 1e6, 0.1


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
