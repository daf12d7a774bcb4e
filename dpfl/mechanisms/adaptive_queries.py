"""The query of adaptive clipping."""

from __future__ import annotations

import collections
from typing import Any

import dp_accounting
import tensorflow as tf

from dpfl.limits import LARGEST_CLIP_NORM, SMALLEST_CLIP_NORM
from dpfl.mechanisms.queries import ClippingSumQuery
from dpfl.noise import normal_like, round_seed
from dpfl.randomness import Purpose, stateless_seed


class AdaptiveClippingSumQuery(ClippingSumQuery):
    """A sum of clipped records plus Gaussian noise, and a noisy count that moves the clip norm.

    See `dpfl.AdaptiveClipping`.

    Args:
        clip_norm: L2 norm to which records are clipped in the first round.
        noise_multiplier: standard deviation of the noise on each coordinate of the sum, divided by the clip norm.
        count_stddev: standard deviation of the noise on the count, in clients.
        quantile: the fraction of updates that should not exceed the clip norm.
        learning_rate: of the logarithm of the clip norm.
        expected_cohort: what the count is divided by.
        seed: the run's seed.
    """

    GlobalState = collections.namedtuple(
        "GlobalState",
        [
            "clip_norm",
            "noise_multiplier",
            "count_stddev",
            "quantile",
            "learning_rate",
            "expected_cohort",
            "seed",
            "count_seed",
            "round",
        ],
    )
    SampleState = collections.namedtuple("SampleState", ["total", "count"])

    def __init__(
        self,
        clip_norm: float,
        noise_multiplier: float,
        count_stddev: float,
        quantile: float,
        learning_rate: float,
        expected_cohort: float,
        seed: int,
    ) -> None:
        self._numbers = (clip_norm, noise_multiplier, count_stddev, quantile, learning_rate, expected_cohort)
        self._seed = seed

    def initial_global_state(self) -> GlobalState:
        """The arguments (float32 scalars), the sum's and the count's seed (int32, 2), round 0 (int32 scalar).

        The clip norm of every round may be released: it is computed from noisy counts.
        """
        return self.GlobalState._make(
            [
                *(tf.constant(number, tf.float32) for number in self._numbers),
                tf.constant(stateless_seed(self._seed, Purpose.NOISE), tf.int32),
                tf.constant(stateless_seed(self._seed, Purpose.CLIPPED_COUNT_NOISE), tf.int32),
                tf.constant(0, tf.int32),
            ]
        )

    def initial_sample_state(self, template: Any = None) -> SampleState:
        """A sum of zero in the template's structure, and a count of zero."""
        return self.SampleState(super().initial_sample_state(template), tf.constant(0.0))

    def exact_sum(self, sample_state: SampleState) -> Any:
        """See `SumQuery.exact_sum`."""
        return sample_state.total

    def sent(self, params: tf.Tensor, clipped: Any, norms: tf.Tensor) -> SampleState:
        """The clipped record, and whether it was within the clip norm: 1/2 if so, -1/2 if not.

        Where the norm is not finite both are zero, as if the client had not come. One client changes the
        count by at most 1/2.

        Args:
            params: the clip norm.
            clipped: one clipped record, or the sum of several. Private, and so is the count.
            norms: its norm before clipping, or theirs.
        """
        within = tf.where(norms <= params, 0.5, -0.5)
        counts = tf.where(tf.math.is_finite(norms), within, tf.zeros_like(norms))
        return self.SampleState(clipped, tf.reduce_sum(counts))

    def get_noised_result(
        self, sample_state: SampleState, global_state: GlobalState
    ) -> tuple[Any, GlobalState, dp_accounting.DpEvent]:
        """Adds the round's noise to the sum and to the count, and moves the clip norm.

        Args:
            sample_state: the sum of preprocessed records. Private.
            global_state: the state of this round.

        Returns:
            The noisy sum; the next round's state, whose clip norm may be released with it; the event of one
            unsampled sum and count (the plan accounts for sampling and composition).
        """
        state = global_state
        noise = normal_like(sample_state.total, round_seed(state.seed, state.round))
        stddev = state.noise_multiplier * state.clip_norm
        noisy = tf.nest.map_structure(lambda part, draw: part + stddev * draw, sample_state.total, noise)

        count_noise = normal_like(sample_state.count, round_seed(state.count_seed, state.round))
        count = sample_state.count + state.count_stddev * count_noise
        # As in tensorflow_privacy's QuantileEstimatorQuery.
        fraction = tf.clip_by_value(count / state.expected_cohort + 0.5, 0.0, 1.0)
        factor = tf.exp(-state.learning_rate * (fraction - state.quantile))
        # Beyond, squares leave the range of float32 and norms would be wrong.
        clip_norm = tf.clip_by_value(state.clip_norm * factor, SMALLEST_CLIP_NORM, LARGEST_CLIP_NORM)
        event = dp_accounting.ComposedDpEvent(
            [
                dp_accounting.GaussianDpEvent(state.noise_multiplier),
                dp_accounting.GaussianDpEvent(2 * state.count_stddev),
            ]
        )
        return noisy, state._replace(clip_norm=clip_norm, round=state.round + 1), event
