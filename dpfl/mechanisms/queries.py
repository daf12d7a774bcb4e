"""The TensorFlow Privacy queries of dpfl's mechanisms.

A query is Python structure; everything that differs between two configurations (clip, noise, seed,
round) is a tensor in its global state, so one traced graph serves them all.
"""

from __future__ import annotations

import collections
from typing import Any

import dp_accounting
import tensorflow as tf
from tensorflow_privacy import NormalizedQuery
from tensorflow_privacy.privacy.dp_query.dp_query import SumAggregationDPQuery

from dpfl.noise import normal_like, round_seed
from dpfl.randomness import Purpose, stateless_seed


def global_norm(record: Any) -> tf.Tensor:
    """L2 norm of all tensors of a structure together, a float32 scalar.

    Written as a sum of squares because `tf.linalg.global_norm` has no `tf.vectorized_map` form.
    """
    return tf.sqrt(tf.add_n([tf.reduce_sum(tf.square(part)) for part in tf.nest.flatten(record)]))


def clip_scale(norm: tf.Tensor, clip_norm: tf.Tensor) -> tf.Tensor:
    """By what records are multiplied to be clipped; zero where a norm is not finite in float32.

    So one diverged client does not make the sum NaN, and the sensitivity holds for every record.

    Args:
        norm: the records' norms, float32 of any shape.
        clip_norm: the largest norm that they may keep, which broadcasts; infinity clips nothing.
    """
    scale = tf.where(norm > clip_norm, clip_norm / norm, 1.0)
    return tf.where(tf.math.is_finite(norm), scale, 0.0)


def clip_to_norm(record: Any, norm: tf.Tensor, clip_norm: tf.Tensor) -> Any:
    """Scales a record down to a norm, or to zero where its norm is not finite in float32.

    Args:
        record: a structure of float tensors. Private, before and after clipping.
        norm: its norm, a scalar.
        clip_norm: the largest norm that it may keep; infinity clips nothing.
    """
    scale = clip_scale(norm, clip_norm)
    # Zero times NaN is zero here, and cheaper than choosing between two tensors.
    return tf.nest.map_structure(lambda part: tf.math.multiply_no_nan(part, scale), record)


class SumQuery(SumAggregationDPQuery):
    """A sum of clipped records plus noise that is a function of (seed, round).

    `tensorflow_privacy`'s own queries draw stateful noise, which neither a second engine nor a
    resumed run can repeat; these keep the seed and the round in their global state.
    """

    @property
    def only_clips(self) -> bool:
        """Whether clients' records do no more than enter the sum, each scaled by `clip_scale` of its norm.

        A cohort's records can then be clipped and summed in one matrix product; see `ClippingSumQuery.sent`.
        """
        return False

    def client_params(self, params: Any, client: tf.Tensor) -> Any:
        """The sample params as one client uses them.

        Args:
            params: from `derive_sample_params`.
            client: the client's index, int32 scalar; queries that draw random numbers on the client fold it in.
        """
        return params

    def clip_norm(self, params: Any) -> tf.Tensor:
        """The norm to which records are clipped under these params, a float32 scalar."""
        raise NotImplementedError

    def exact_sum(self, sample_state: Any) -> Any:
        """The sum before the server's noise, in the structure of a record, or None where nobody knows it. Private."""
        return None


class ClippingSumQuery(SumQuery):
    """A sum of records clipped in L2 norm; the sample params are the clip norm, a field of the global state."""

    @property
    def only_clips(self) -> bool:
        """See `SumQuery`."""
        return True

    def derive_sample_params(self, global_state: Any) -> tf.Tensor:
        """The clip norm."""
        return global_state.clip_norm

    def clip_norm(self, params: tf.Tensor) -> tf.Tensor:
        """The clip norm."""
        return params

    def exact_sum(self, sample_state: Any) -> Any:
        """See `SumQuery.exact_sum`."""
        return sample_state

    def preprocess_record(self, params: tf.Tensor, record: Any) -> Any:
        """Scales a record down to the clip norm, or to zero where its norm is not finite.

        Args:
            params: the clip norm.
            record: a structure of float tensors. Private, before and after clipping.
        """
        norm = global_norm(record)
        return self.sent(params, clip_to_norm(record, norm, params), norm)

    def sent(self, params: tf.Tensor, clipped: Any, norms: tf.Tensor) -> Any:
        """What clients send: their clipped records and whatever else the query asks for. Private.

        Args:
            params: the clip norm.
            clipped: one clipped record, or the sum of several.
            norms: its norm before clipping, or theirs.
        """
        return clipped


class MeanQuery(NormalizedQuery):
    """A noisy sum divided by the expected cohort.

    Args:
        numerator: the query of the sum.
        denominator: the expected cohort, never the actual one.
    """

    def __init__(self, numerator: SumQuery, denominator: float) -> None:
        super().__init__(numerator, denominator)
        self._sum = numerator

    @property
    def only_clips(self) -> bool:
        """See `SumQuery.only_clips`."""
        return self._sum.only_clips

    def sent(self, params: tf.Tensor, clipped: Any, norms: tf.Tensor) -> Any:
        """See `ClippingSumQuery.sent`; only of queries that only clip."""
        return self._sum.sent(params, clipped, norms)

    def sent_and_norm(self, params: Any, record: Any) -> tuple[Any, tf.Tensor]:
        """What `preprocess_record` gives, and the L2 norm of what it clips, a float32 scalar. Private, both.

        Args:
            params: from `client_params`.
            record: an update, a structure of float32 tensors.
        """
        return self.preprocess_record(params, record), global_norm(record)

    def onto(self, params: Any, gradients: list[tf.Tensor]) -> list[tf.Tensor]:
        """A client's gradients projected onto the coordinates that it sends: all of them.

        Args:
            params: from `derive_sample_params`.
            gradients: tensors of the weights' shapes, which may have further axes in front. Private.
        """
        return gradients

    def after_release(self, global_state: Any, weights: Any) -> Any:
        """The state of the next round, which may follow the released model; here it does not.

        Args:
            global_state: from `get_noised_result`.
            weights: of the model that is released.
        """
        return global_state

    def record_norm(self, global_state: Any, update: Any) -> tf.Tensor:
        """The L2 norm of what a client sends before it is quantised and clipped, a float32 scalar. Private.

        Args:
            global_state: of the round.
            update: a structure of float32 tensors. Private.
        """
        return global_norm(update)

    def rounds_done(self, global_state: Any) -> tf.Tensor:
        """How many sums were released, an int32 scalar."""
        return global_state.numerator_state.round

    def exact_result(self, sample_state: Any, global_state: Any) -> Any:
        """What `get_noised_result` gives but for the noise, or None where nobody knows it. Private."""
        exact = self._sum.exact_sum(sample_state)
        # Of the state: plans with other cohorts share this graph.
        denominator = tf.cast(global_state.denominator, tf.float32)
        return None if exact is None else tf.nest.map_structure(lambda part: part / denominator, exact)

    def client_params(self, params: Any, client: tf.Tensor, examples: tf.Tensor | None = None) -> Any:
        """See `SumQuery.client_params`.

        How many examples the client processed is not passed on: weights by data would break the sensitivity.
        """
        return self._sum.client_params(params, client)

    def clip_norm(self, params: Any) -> tf.Tensor:
        """See `SumQuery.clip_norm`."""
        return self._sum.clip_norm(params)


class GaussianSumQuery(ClippingSumQuery):
    """Sum of records clipped in L2 norm plus independent Gaussian noise in every round.

    Args:
        clip_norm: L2 norm to which each record is clipped; infinity clips nothing.
        stddev: standard deviation of the noise on each coordinate of the sum.
        seed: the run's seed.
        clipping: "flat", "per_layer" or "per_layer_by_size", as `dpfl.Gaussian` has it.
    """

    GlobalState = collections.namedtuple("GlobalState", ["clip_norm", "stddev", "seed", "round"])

    def __init__(self, clip_norm: float, stddev: float, seed: int, clipping: str = "flat") -> None:
        self._clip_norm = clip_norm
        self._stddev = stddev
        self._seed = seed
        self._clipping = clipping

    def initial_global_state(self) -> GlobalState:
        """Clip norm and noise (float32 scalars), seed (int32, 2), round 0 (int32 scalar)."""
        return self.GlobalState(
            tf.constant(self._clip_norm, tf.float32),
            tf.constant(self._stddev, tf.float32),
            tf.constant(stateless_seed(self._seed, Purpose.NOISE), tf.int32),
            tf.constant(0, tf.int32),
        )

    @property
    def only_clips(self) -> bool:
        """Whether all tensors are clipped together."""
        return self._clipping == "flat"

    def preprocess_record(self, params: tf.Tensor, record: Any) -> Any:
        """Scales a record down to the clip norm, or to zero where its norm is not finite.

        Args:
            params: the clip norm.
            record: a structure of float tensors. Private, before and after clipping.
        """
        if self.only_clips:
            return super().preprocess_record(params, record)
        norm = global_norm(record)
        parts = tf.nest.flatten(record)
        sizes = [tf.cast(tf.size(part), tf.float32) if "size" in self._clipping else tf.constant(1.0) for part in parts]
        share = params / tf.sqrt(tf.add_n(sizes))
        # A record that is not finite somewhere counts nowhere.
        norms = [tf.where(tf.math.is_finite(norm), global_norm(part), norm) for part in parts]
        clipped = [
            clip_to_norm(part, norm, share * tf.sqrt(size))
            for part, norm, size in zip(parts, norms, sizes, strict=True)
        ]
        return tf.nest.pack_sequence_as(record, clipped)

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
        noise = normal_like(sample_state, round_seed(global_state.seed, global_state.round))
        noisy = tf.nest.map_structure(lambda part, draw: part + global_state.stddev * draw, sample_state, noise)
        event = dp_accounting.GaussianDpEvent(global_state.stddev / global_state.clip_norm)
        return noisy, global_state._replace(round=global_state.round + 1), event
