"""Generators that never share their draws, whatever other code does with the same seed."""

from __future__ import annotations

import zlib

import numpy as np

from dpfl.errors import InputError

Seed = int | np.random.Generator


def generator(seed: Seed, purpose: str) -> np.random.Generator:
    """Returns the generator of (seed, purpose), or the given generator itself.

    With `np.random.default_rng(seed)` instead, dealing examples that somebody shuffled with the same seed would
    undo the shuffle.

    Raises:
        InputError: The seed is negative.
    """
    if isinstance(seed, np.random.Generator):
        return seed
    if seed < 0:
        raise InputError(f"the seed is {seed}, but an integer of at least 0 is needed.")
    return np.random.default_rng([seed, zlib.crc32(purpose.encode())])
