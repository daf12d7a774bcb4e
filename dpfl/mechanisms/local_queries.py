"""Queries of local differential privacy: each client clips and noises its own update."""

from __future__ import annotations

import collections
from typing import Any

import dp_accounting
import tensorflow as tf

from dpfl.mechanisms.client_noise import ClientNoiseQuery, with_seed_of_its_own
from dpfl.mechanisms.queries import clip_to_norm, global_norm
from dpfl.noise import normal_like, round_seed
from dpfl.randomness import Purpose, stateless_seed

GlobalState = collections.namedtuple("GlobalState", ["clip_norm", "scale", "seed", "round"])
SampleParams = collections.namedtuple("SampleParams", ["clip_norm", "scale", "seed"])


def l1_norm(record: Any) -> tf.Tensor:
    """L1 norm of all tensors of a structure together, a float32 scalar."""
    return tf.add_n([tf.reduce_sum(tf.abs(part)) for part in tf.nest.flatten(record)])


def laplace_like(structure: Any, seed: tf.Tensor) -> Any:
    """Independent Laplace draws of scale 1, float32, in the shapes of a structure.

    They are drawn in float64, whose uniform numbers reach into the tails as far as 36 scales, and then rounded.

    Args:
        structure: tensors.
        seed: int32, shape (2,); the draws are a function of it.
    """
    parts = tf.nest.flatten(structure)
    seeds = tf.random.experimental.stateless_split(seed, len(parts))

    def draw(part: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        # One uniform number on (-1, 1): its size gives the draw's size, which is exponential, and its sign the sign.
        uniform = 2 * tf.random.stateless_uniform(tf.shape(part), seed, dtype=tf.float64) - 1
        size = -tf.math.log(tf.maximum(1 - tf.abs(uniform), tf.constant(2.0**-53, tf.float64)))
        return tf.cast(tf.sign(uniform) * size, tf.float32)

    draws = [draw(part, seeds[index]) for index, part in enumerate(parts)]
    return tf.nest.pack_sequence_as(structure, draws)


class LocalSumQuery(ClientNoiseQuery):
    """Sum of records that each client clipped and noised before it let them go.

    The sum gets no noise of its own: that of an empty cohort is exactly zero.

    Args:
        clip_norm: the norm to which each record is clipped.
        scale: what the noise's draws of scale 1 are multiplied by.
        seed: the run's seed.
    """

    def __init__(self, clip_norm: float, scale: float, seed: int) -> None:
        self._clip_norm = clip_norm
        self._scale = scale
        self._seed = seed

    def initial_global_state(self) -> GlobalState:
        """Clip norm and scale of the noise (float32 scalars), seed (int32, 2), round 0 (int32 scalar)."""
        return GlobalState(
            tf.constant(self._clip_norm, tf.float32),
            tf.constant(self._scale, tf.float32),
            tf.constant(stateless_seed(self._seed, Purpose.CLIENT_NOISE), tf.int32),
            tf.constant(0, tf.int32),
        )

    def derive_sample_params(self, global_state: GlobalState) -> SampleParams:
        """Clip norm, scale of the noise, and the round's seed."""
        seed = round_seed(global_state.seed, global_state.round)
        return SampleParams(global_state.clip_norm, global_state.scale, seed)

    def preprocess_record(self, params: Any, record: Any) -> Any:
        """What a client sends: its record, clipped (to zero where its norm is not finite), plus noise.

        Args:
            params: from `client_params`, or from `derive_sample_params` where nobody says which client
                it is; the noise then cannot be repeated.
            record: a structure of float tensors. Private; what is returned may be released under the
                plan's guarantee.
        """
        params = with_seed_of_its_own(params)
        clipped = clip_to_norm(record, self.norm(record), params.clip_norm)
        noise = self.draws_like(record, params.seed)
        return tf.nest.map_structure(lambda part, draw: part + params.scale * draw, clipped, noise)

    def get_noised_result(
        self, sample_state: Any, global_state: GlobalState
    ) -> tuple[Any, GlobalState, dp_accounting.DpEvent]:
        """The sum as it is, the next round's state, and the event of one client's noised record."""
        event = self.event(global_state.scale / global_state.clip_norm)
        return sample_state, global_state._replace(round=global_state.round + 1), event

    def norm(self, record: Any) -> tf.Tensor:
        """The norm that is clipped, a float32 scalar."""
        raise NotImplementedError

    def draws_like(self, structure: Any, seed: tf.Tensor) -> Any:
        """Noise of scale 1 in the shapes of a structure, a function of the seed."""
        raise NotImplementedError

    def event(self, noise: tf.Tensor) -> dp_accounting.DpEvent:
        """The event of one noised record, at a scale of the noise relative to the clip norm."""
        raise NotImplementedError


class LocalGaussianSumQuery(LocalSumQuery):
    """Records clipped in L2 norm, each with Gaussian noise whose standard deviation is `scale`."""

    def norm(self, record: Any) -> tf.Tensor:
        """The L2 norm."""
        return global_norm(record)

    def draws_like(self, structure: Any, seed: tf.Tensor) -> Any:
        """Standard normal draws."""
        return normal_like(structure, seed)

    def event(self, noise: tf.Tensor) -> dp_accounting.DpEvent:
        """A Gaussian event."""
        return dp_accounting.GaussianDpEvent(noise)


class LocalLaplaceSumQuery(LocalSumQuery):
    """Records clipped in L1 norm, each with Laplace noise of scale `scale`."""

    def norm(self, record: Any) -> tf.Tensor:
        """The L1 norm."""
        return l1_norm(record)

    def draws_like(self, structure: Any, seed: tf.Tensor) -> Any:
        """Laplace draws of scale 1."""
        return laplace_like(structure, seed)

    def event(self, noise: tf.Tensor) -> dp_accounting.DpEvent:
        """A Laplace event."""
        return dp_accounting.LaplaceDpEvent(noise)
