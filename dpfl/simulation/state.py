"""What the in-graph engine's graphs take and give: a run's state, its numbers, and what a round measures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
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
        norm_counts: how many of the updates' norms lie in each bin of `norm_bins`, (..., bins).
        clipped_fraction: fraction of the cohort whose update was clipped.
        non_finite_updates: clients whose update was NaN or infinite, and counted as zero.
        clip_norm: the norm to which updates were clipped.
        example_clipped_fraction: mean over clients and local steps of the fraction of a minibatch's examples whose
            gradient was longer than their clip norm; only of clients that train by DP-SGD.
        signal_to_noise: L2 norm of the sum of what clients send, divided by that of the noise that the server adds to
            it; NaN where it adds none, and where clients send no clipped updates but integers or noisy ones.
    """

    update_norm: tf.Tensor
    norm_counts: tf.Tensor
    clipped_fraction: tf.Tensor
    non_finite_updates: tf.Tensor
    clip_norm: tf.Tensor
    example_clipped_fraction: tf.Tensor
    signal_to_noise: tf.Tensor


# Norms are counted in bins whose edges grow by the same factor, so that counts of parts of a cohort can be summed.
_BINS_PER_OCTAVE = 8
_LOWEST_OCTAVE, _HIGHEST_OCTAVE = -30, 20
NORM_BINS = _BINS_PER_OCTAVE * (_HIGHEST_OCTAVE - _LOWEST_OCTAVE)
NORM_QUANTILES = {"update_norm_p10": 0.1, "update_norm_p50": 0.5, "update_norm_p90": 0.9}
"""The quantiles of the updates' norms that are measured, by their columns."""


def norm_counts(norms: tf.Tensor, finite: tf.Tensor) -> tf.Tensor:
    """How many norms lie in each bin, in graph; norms beyond the bins, 1e-9 to 1e6, count in the outermost ones.

    Args:
        norms: of the clients, (clients,) or (clients, configurations).
        finite: which of them count.

    Returns:
        Counts as float32, (bins,) or (configurations, bins).
    """
    bins = tf.math.log(tf.where(finite, norms, 1.0)) * (_BINS_PER_OCTAVE / np.log(2.0))
    bins = tf.clip_by_value(bins - _LOWEST_OCTAVE * _BINS_PER_OCTAVE, 0.0, NORM_BINS - 1.0)
    others = tf.shape(norms)[1:]
    configurations = tf.reduce_prod(others)
    places = tf.reshape(tf.cast(bins, tf.int32), [-1, configurations]) + NORM_BINS * tf.range(configurations)
    counted = tf.reshape(tf.cast(finite, tf.float32), tf.shape(places))
    counts = tf.math.unsorted_segment_sum(counted, places, NORM_BINS * configurations)
    return tf.ensure_shape(tf.reshape(counts, tf.concat([others, [NORM_BINS]], 0)), [*norms.shape[1:], NORM_BINS])


def norm_quantile(counts: np.ndarray, level: float) -> np.ndarray:
    """The norm that a fraction of the updates does not exceed; NaN where there are none.

    Inside a bin, whose edges are 9 % apart, norms count as evenly spread on a logarithmic scale.

    Args:
        counts: what `norm_counts` gave, (..., bins).
        level: the fraction.
    """
    below = np.cumsum(np.asarray(counts, np.float64), axis=-1)
    wanted = level * below[..., -1:]
    place = np.argmax((below >= wanted) & (counts > 0), axis=-1)[..., None]
    inside = np.take_along_axis(np.asarray(counts, np.float64), place, -1)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = (wanted - np.take_along_axis(below, place, -1) + inside) / inside
    norms = 2.0 ** (_LOWEST_OCTAVE + (place + share) / _BINS_PER_OCTAVE)
    return np.where(below[..., -1:] > 0, norms, np.nan)[..., 0]


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
