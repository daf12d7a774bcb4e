"""What every engine offers: the rounds of one run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np


class Rounds(Protocol):
    """The rounds of one run on one engine, with the state that they change."""

    def run(self, cohorts: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """Runs the next rounds, one for each cohort.

        Args:
            cohorts: client indices of each round; an empty cohort releases noise alone.

        Returns:
            Measurements by name, arrays of one value a round, which nothing protects.
        """

    def evaluate(self, split: str) -> tuple[float, float]:
        """Accuracy (a fraction) and mean cross-entropy (nats) on "validation" or "test"; NaN where it is empty."""

    def weights(self) -> list[np.ndarray]:
        """The model's trainable weights after the rounds so far."""

    def state(self) -> list[np.ndarray]:
        """Everything that the next rounds depend on: model, server optimizer, mechanism, seeds and round.

        Whoever has it can take the noise off what is released: as secret as the seed.
        """

    def restore(self, state: Sequence[np.ndarray]) -> None:
        """Goes on from what `state` gave, bit for bit."""


def arrays_of(structure: Any) -> list[np.ndarray]:
    """The leaves of a nested structure of tensors as arrays, in the order of `tf.nest`."""
    import tensorflow as tf

    return [np.asarray(leaf) for leaf in tf.nest.flatten(structure)]


def structure_of(arrays: Sequence[np.ndarray], like: Any) -> Any:
    """The inverse of `arrays_of`: tensors in the structure of `like`, and of its types."""
    import tensorflow as tf

    leaves = [
        tf.constant(array, tf.convert_to_tensor(old).dtype)
        for array, old in zip(arrays, tf.nest.flatten(like), strict=True)
    ]
    return tf.nest.pack_sequence_as(like, leaves)
