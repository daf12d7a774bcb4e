"""Every random draw is a pure function of (seed, purpose, round, client).

Runs with the same seed share their cohorts, their initial weights and the directions of their
noise, whatever else differs between them (common random numbers): comparisons over paired seeds
are sharper for it. The generators are NumPy's Philox and TensorFlow's stateless ones. They are made
for simulation; a deployment draws its noise from a cryptographic source.
"""

from __future__ import annotations

import enum
import operator
from typing import Any

import numpy as np

from dpfl.errors import InputError


class Purpose(enum.IntEnum):
    """What a random draw is for; purposes never share a stream."""

    INITIAL_WEIGHTS = 1
    SAMPLING = 2
    SHUFFLING = 3
    NOISE = 4
    MODEL = 5
    HOLDING_OUT = 6
    PARTITION = 7
    SYNTHESIS = 8
    GROUPING = 9
    CAPPING = 10
    CLIENT_NOISE = 11
    CLIPPED_COUNT_NOISE = 12
    ROTATION = 13
    EXAMPLE_SAMPLING = 14
    EXAMPLE_NOISE = 15
    CHOOSING_CLIENTS = 16
    SUBSPACE = 17
    ROUNDING = 18


def check_seed(seed: Any) -> int:
    """Returns the seed as an integer; refuses what is none, or not from 0 to 2 ** 64 - 1."""
    try:
        value = operator.index(seed)
    except TypeError:
        raise InputError(f"a seed must be a whole number, but it was {seed!r}.") from None
    if not 0 <= value < 2**64:
        raise InputError(f"a seed must be a whole number of at least 0 and below 2 ** 64, but it was {seed}.")
    return value


def _sequence(seed: int, purpose: Purpose, *path: int) -> np.random.SeedSequence:
    check_seed(seed)
    return np.random.SeedSequence(entropy=seed, spawn_key=(int(purpose), *path))


def generator(seed: int, purpose: Purpose, *path: int) -> np.random.Generator:
    """Returns the NumPy generator for a purpose.

    Args:
        seed: the run's seed, a non-negative integer.
        purpose: what is drawn.
        *path: the round, or whatever else the draw depends on.
    """
    return np.random.Generator(np.random.Philox(_sequence(seed, purpose, *path)))


def stateless_seed(seed: int, purpose: Purpose) -> np.ndarray:
    """Returns the seed of TensorFlow's stateless operations for a purpose: two int32 values."""
    return _sequence(seed, purpose).generate_state(2).astype(np.uint32).view(np.int32)
