"""The TensorFlow Privacy queries of dpfl's mechanisms.

A query is Python structure; everything that differs between two configurations (clip, noise, seed,
round) is a tensor in its global state, so one traced graph serves them all.
"""

from __future__ import annotations

import collections
from typing import Any

import dp_accounting
import tensorflow as tf
from tensorflow_privacy.privacy.dp_query.dp_query import SumAggregationDPQuery

from dpfl.randomness import Purpose, stateless_seed


def global_norm(record: Any) -> tf.Tensor:
    """L2 norm of all tensors of a structure together, a float32 scalar.

    Written as a sum of squares because `tf.linalg.global_norm` has no `tf.vectorized_map` form.
    """
    return tf.sqrt(tf.add_n([tf.reduce_sum(tf.square(part)) for part in tf.nest.flatten(record)]))


class StatelessGaussianSumQuery(SumAggregationDPQuery):
    """Sum of clipped records plus Gaussian noise that is a function of (seed, round).

    `tensorflow_privacy.GaussianSumQuery` draws stateful noise, which neither a second engine nor a
    resumed run can repeat; this one keeps the seed and the round in its global state.

    A record whose L2 norm is not finite in float32 contributes zero, so that one diverged client
    does not make the sum NaN and the sensitivity holds for every possible record.

    Args:
        clip_norm: L2 norm to which each record is clipped; infinity clips nothing.
        stddev: standard deviation of the noise on each coordinate of the sum.
        seed: the run's seed.
    """

    GlobalState = collections.namedtuple("GlobalState", ["clip_norm", "stddev", "seed", "round"])

    def __init__(self, clip_norm: float, stddev: float, seed: int) -> None:
        self._clip_norm = clip_norm
        self._stddev = stddev
        self._seed = seed

    def initial_global_state(self) -> GlobalState:
        """Clip norm and noise (float32 scalars), seed (int32, 2), round 0 (int32 scalar)."""
        return self.GlobalState(
            tf.constant(self._clip_norm, tf.float32),
            tf.constant(self._stddev, tf.float32),
            tf.constant(stateless_seed(self._seed, Purpose.NOISE), tf.int32),
            tf.constant(0, tf.int32),
        )

    def derive_sample_params(self, global_state: GlobalState) -> tf.Tensor:
        """The clip norm."""
        return global_state.clip_norm

    def preprocess_record(self, params: tf.Tensor, record: Any) -> Any:
        """Scales a record down to the clip norm, or to zero where its norm is not finite.

        Args:
            params: the clip norm.
            record: a structure of float tensors. Private, before and after clipping.
        """
        norm = global_norm(record)
        scale = tf.where(norm > params, params / norm, 1.0)
        scale = tf.where(tf.math.is_finite(norm), scale, 0.0)
        # Zero times NaN is zero here, and cheaper than choosing between two tensors.
        return tf.nest.map_structure(lambda part: tf.math.multiply_no_nan(part, scale), record)

    def get_noised_result(
        self, sample_state: Any, global_state: GlobalState
    ) -> tuple[Any, GlobalState, dp_accounting.DpEvent]:
        """Adds the round's noise.

        Args:
            sample_state: the sum of preprocessed records. Private.
            global_state: the state of this round.

        Returns:
            The noisy sum, which may be released under the plan's guarantee; the next round's state;
            the event of one unsampled sum (the plan accounts for sampling and composition).
        """
        parts = tf.nest.flatten(sample_state)
        seeds = tf.random.experimental.stateless_split(
            tf.random.experimental.stateless_fold_in(global_state.seed, global_state.round), len(parts)
        )
        noisy = [
            part + global_state.stddev * tf.random.stateless_normal(tf.shape(part), seeds[index])
            for index, part in enumerate(parts)
        ]
        event = dp_accounting.GaussianDpEvent(global_state.stddev / global_state.clip_norm)
        next_state = global_state._replace(round=global_state.round + 1)
        return tf.nest.pack_sequence_as(sample_state, noisy), next_state, event
