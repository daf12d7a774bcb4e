"""What the in-graph engine's graphs take and give: a run's state, its numbers, and what a round measures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from dpfl.clients.dp_sgd import ClientNumbers, ClientSeeds
from dpfl.clients.optimizers import OptimizerNumbers


class State(NamedTuple):
    """Everything that a round changes.

    Attributes:
        weights: the model's trainable weights; released after each round.
        server: the server optimizer's moments.
        query: the mechanism's state, with the seed and the round of its noise.
        round: rounds done, int32.
    """

    weights: tuple[tf.Tensor, ...]
    server: tuple[Any, ...]
    query: Any
    round: tf.Tensor


class PrivateSettings(NamedTuple):
    """What clients that train by DP-SGD need: numbers, and the run's seeds of sampling, noise and random layers."""

    numbers: ClientNumbers
    seeds: ClientSeeds


class Settings(NamedTuple):
    """What differs between configurations that share a compiled graph; all are scalars or seeds.

    Clients that train by DP-SGD look at `private` alone; where there are none it is empty.
    """

    steps: tf.Tensor
    epochs: tf.Tensor
    optimizer: OptimizerNumbers
    server: tuple[tf.Tensor, ...]
    shuffling_seed: tf.Tensor
    model_seed: tf.Tensor
    private: PrivateSettings | tuple[()]


class Measurements(NamedTuple):
    """What a simulation sees of a round and nobody may release: not covered by any guarantee.

    Attributes:
        update_norm: mean L2 norm of the updates before clipping.
        clipped_fraction: fraction of the cohort whose update was clipped.
        non_finite_updates: clients whose update was NaN or infinite, and counted as zero.
        clip_norm: the norm to which updates were clipped.
        example_clipped_fraction: mean over clients and local steps of the fraction of a minibatch's examples whose
            gradient was longer than their clip norm; only of clients that train by DP-SGD.
    """

    update_norm: tf.Tensor
    clipped_fraction: tf.Tensor
    non_finite_updates: tf.Tensor
    clip_norm: tf.Tensor
    example_clipped_fraction: tf.Tensor


# Configurations that train side by side have their numbers and weights along a first axis. Whole numbers (seeds, rounds
# and steps) are the same for all of them and have no such axis: noise is then drawn once, and scaled for each.


def _is_shared(tensor: tf.Tensor) -> bool:
    return tensor.dtype.is_integer


def stacked(structures: Sequence[Any]) -> Any:
    """States or settings of several configurations as one, in which they are side by side."""
    return tf.nest.map_structure(lambda *parts: parts[0] if _is_shared(parts[0]) else tf.stack(parts), *structures)


def expanded(structure: Any) -> Any:
    """One configuration as if it were side by side with others."""
    return tf.nest.map_structure(lambda part: part if _is_shared(part) else part[None], structure)


def unstacked(structure: Any, index: int = 0) -> Any:
    """One of the configurations that are side by side."""
    return tf.nest.map_structure(lambda part: part if _is_shared(part) else part[index], structure)


def for_each(function: Callable[..., Any], *structures: Any) -> Any:
    """Applies a function of one configuration to all that are side by side, in graph.

    What depends on whole numbers alone, such as standard normal noise, is computed once.
    """
    leaves = tf.nest.flatten(structures)

    def one(own: list[tf.Tensor]) -> Any:
        following = iter(own)
        mixed = [leaf if _is_shared(leaf) else next(following) for leaf in leaves]
        return function(*tf.nest.pack_sequence_as(structures, mixed))

    results = tf.vectorized_map(one, [leaf for leaf in leaves if not _is_shared(leaf)])
    return tf.nest.map_structure(lambda part: part[0] if _is_shared(part) else part, results)
