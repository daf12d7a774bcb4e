"""Queries of distributed differential privacy: clients send integers with a share of the noise.

A client clips its update, rotates it, scales it to integer steps, rounds it at random, and adds its share of integer
noise; secure aggregation shows the server nothing but the clients' sum modulo a power of two, from which it undoes
rotation and scaling (Kairouz, Liu & Steinke 2021, 2102.06387, algorithms 1 and 2; Agarwal, Kairouz & Liu
2021, 2110.04995).

Secure aggregation is simulated as its sum: int32 sums wrap modulo 2 ** 32, of which 2 ** bits is a divisor, so that it
makes no difference whether clients, or the server at the end, reduce modulo 2 ** bits. Here the server does.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable
from typing import Any

import dp_accounting
import numpy as np
import tensorflow as tf
from scipy import linalg

from dpfl.errors import InputError
from dpfl.mechanisms.client_noise import ClientNoiseQuery, with_seed_of_its_own
from dpfl.mechanisms.queries import clip_to_norm, global_norm
from dpfl.noise import round_seed
from dpfl.randomness import Purpose, stateless_seed

GlobalState = collections.namedtuple(
    "GlobalState",
    ["clip_norm", "steps", "squared_bound", "share_stddev", "bits", "rotation_seed", "seed", "round"],
)
SampleParams = collections.namedtuple(
    "SampleParams", ["clip_norm", "steps", "squared_bound", "signs", "share_cdf", "seed"]
)

# How far a table of a share's distribution reaches: beyond lies less than the resolution of a float64 in [0, 1).
_REACH_STDDEVS, _REACH_STEPS = 9, 20
# One try succeeds with probability at least 1 - beta.
_MOST_TRIES = 100
_HADAMARD_BITS = 5  # 32 x 32 products: fastest


class Layout:
    """How the tensors of an update lie in one vector whose length is a power of two.

    Args:
        template: tensors, arrays or `tf.TensorSpec`s of known shape.
    """

    def __init__(self, template: Any) -> None:
        specs = [tf.TensorSpec(part.shape, tf.float32) for part in tf.nest.flatten(template)]
        self._structure = tf.nest.pack_sequence_as(template, specs)
        self._shapes = [spec.shape.as_list() for spec in specs]
        self._sizes = [math.prod(shape) for shape in self._shapes]
        self.dimension = sum(self._sizes)
        self.padded = 1 << max(self.dimension - 1, 0).bit_length()

    def to_vector(self, record: Any) -> tf.Tensor:
        """All tensors of a record as one float32 vector, filled up with zeros."""
        parts = [tf.reshape(part, [-1]) for part in tf.nest.flatten(record)]
        return tf.concat([*parts, tf.zeros([self.padded - self.dimension])], axis=0)

    def from_vector(self, vector: tf.Tensor) -> Any:
        """The record that `to_vector` made a vector of."""
        parts = tf.split(vector[: self.dimension], self._sizes)
        shaped = [tf.reshape(part, shape) for part, shape in zip(parts, self._shapes, strict=True)]
        return tf.nest.pack_sequence_as(self._structure, shaped)


def hadamard_transform(vector: tf.Tensor) -> tf.Tensor:
    """The Walsh-Hadamard transform, orthonormal and its own inverse.

    The matrix is a Kronecker product of small ones; each is multiplied to the last few bits of the coordinates'
    indices, which then move to the front, so that after all of them every bit is back in its place.

    Args:
        vector: float32; its length is a power of two.
    """
    bits = int(vector.shape[0]).bit_length() - 1
    factors = [_HADAMARD_BITS] * (bits // _HADAMARD_BITS) + [bits % _HADAMARD_BITS] * (bits % _HADAMARD_BITS > 0)
    for bits in factors:
        matrix = linalg.hadamard(1 << bits).astype(np.float32) / np.float32(math.sqrt(1 << bits))
        vector = tf.reshape(tf.matmul(matrix, tf.reshape(vector, [-1, 1 << bits]), transpose_b=True), [-1])
    return vector


def random_signs(length: int, seed: tf.Tensor) -> tf.Tensor:
    """Fair draws of 1 and -1, float32: with them the Hadamard transform rotates at random."""
    bits = tf.random.stateless_uniform([length], seed, minval=None, maxval=None, dtype=tf.int32)
    return tf.where(bits < 0, -1.0, 1.0)


def conditionally_rounded(vector: tf.Tensor, squared_bound: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Each coordinate rounded up or down at random, over again until the vector is short enough.

    Without the condition on its length the expected value of a rounded coordinate is the coordinate, up
    to the 23 bits of a uniform float32 (Kairouz, Liu & Steinke 2021, 2102.06387, section 4.1).

    Args:
        vector: float32.
        squared_bound: the largest square of the rounded vector's L2 norm, a float64 scalar.
        seed: int32, shape (2,).

    Returns:
        An int32 vector, whose norm keeps the bound whatever the seed.
    """
    floor = tf.floor(vector)
    fraction = vector - floor

    def attempt(number: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        draws = tf.random.stateless_uniform(tf.shape(vector), tf.random.experimental.stateless_fold_in(seed, number))
        rounded = floor + tf.cast(draws < fraction, tf.float32)
        # Squares of integers add up exactly in float64.
        return rounded, tf.reduce_sum(tf.square(tf.cast(rounded, tf.float64))) > squared_bound

    def again(number: tf.Tensor, *_: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        return number + 1, *attempt(number)

    _, rounded, too_long = tf.while_loop(
        lambda number, _, too_long: too_long & (number < _MOST_TRIES), again, (tf.constant(1), *attempt(tf.constant(0)))
    )
    # Towards zero a vector becomes no longer; this has never been needed.
    towards_zero = tf.sign(vector) * tf.floor(tf.abs(vector))
    return tf.cast(tf.where(too_long, towards_zero, rounded), tf.int32)


def _reach(stddev: tf.Tensor) -> tf.Tensor:
    return tf.cast(tf.math.ceil(_REACH_STDDEVS * stddev), tf.int32) + _REACH_STEPS


def _cumulative(probabilities: tf.Tensor) -> tf.Tensor:
    sums = tf.cumsum(probabilities)
    return sums / sums[-1]


def discrete_gaussian_cdf(stddev: tf.Tensor) -> tf.Tensor:
    """Cumulative probabilities of the discrete Gaussian at the integers from -r to r, float64, shape (2 r + 1,).

    The probability of x is proportional to exp(-x^2 / (2 stddev^2)) (Canonne, Kamath & Steinke 2020, 2004.00010).

    Args:
        stddev: a float64 scalar; r is 9 standard deviations and 20.
    """
    integers = tf.cast(tf.range(-_reach(stddev), _reach(stddev) + 1), tf.float64)
    # Without noise all weight is on zero.
    return _cumulative(tf.exp(-tf.square(integers / tf.maximum(stddev, tf.constant(1e-3, tf.float64))) / 2))


def skellam_cdf(stddev: tf.Tensor) -> tf.Tensor:
    """Cumulative probabilities of the symmetric Skellam distribution, shaped like `discrete_gaussian_cdf`.

    The difference of two Poisson draws of rate stddev^2 / 2; its probabilities are the Fourier coefficients of its
    characteristic function exp(stddev^2 (cos t - 1)), here to an absolute accuracy of about 1e-17.

    Args:
        stddev: a float64 scalar.
    """
    reach = _reach(stddev)
    bits = tf.math.ceil(tf.math.log(tf.cast(2 * reach + 1, tf.float64)) / math.log(2))
    length = tf.bitwise.left_shift(1, tf.cast(bits, tf.int32))  # enough for all integers from -r to r
    half_angles = tf.cast(tf.range(length // 2 + 1), tf.float64) * math.pi / tf.cast(length, tf.float64)
    characteristic = tf.exp(-2 * tf.square(stddev * tf.sin(half_angles)))
    coefficients = tf.signal.irfft(tf.complex(characteristic, tf.zeros_like(characteristic)), [length])
    probabilities = tf.maximum(coefficients, 0)
    return _cumulative(tf.concat([probabilities[-reach:], probabilities[: reach + 1]], axis=0))


def integer_noise(cdf: tf.Tensor, length: int, seed: tf.Tensor) -> tf.Tensor:
    """Independent draws from a symmetric distribution over the integers, int32, by the inverse of its cdf.

    The uniform numbers have 52 bits: a probability is off by at most 2^-52.

    Args:
        cdf: cumulative probabilities at the integers from -r to r, float64.
        length: how many draws.
        seed: int32, shape (2,); the draws are a function of it.
    """
    uniform = tf.random.stateless_uniform([length], seed, dtype=tf.float64)
    return tf.searchsorted(cdf, uniform, side="right") - tf.size(cdf) // 2


def centred(total: tf.Tensor, bits: tf.Tensor) -> tf.Tensor:
    """The representative modulo 2 ** bits that lies from -2 ** (bits - 1) up to, but excluding, 2 ** (bits - 1).

    Args:
        total: int32, known modulo 2 ** 32.
        bits: int32 scalar, from 1 to 32.
    """
    # Shifting to the left drops the upper bits; shifting back repeats the highest that is left, the sign.
    return tf.bitwise.right_shift(tf.bitwise.left_shift(total, 32 - bits), 32 - bits)


class DistributedSumQuery(ClientNoiseQuery):
    """Sum, modulo a power of two, of rotated and rounded records with a share of integer noise each.

    Args:
        clip_norm: L2 norm to which each record is clipped.
        steps: integer steps per clip norm.
        squared_bound: the largest square of the L2 norm of a rounded record, in steps.
        share_stddev: standard deviation of each client's noise on each coordinate, in steps.
        share_cdf: the cumulative probabilities of a share, from its standard deviation: `discrete_gaussian_cdf` or
            `skellam_cdf`.
        bits: the modulus is 2 ** bits.
        seed: the run's seed.
        template: the structure of a record.

    Raises:
        InputError: there is no template.
    """

    def __init__(
        self,
        clip_norm: float,
        steps: float,
        squared_bound: int,
        share_stddev: float,
        share_cdf: Callable[[tf.Tensor], tf.Tensor],
        bits: int,
        seed: int,
        template: Any,
    ) -> None:
        if template is None:
            raise InputError("updates are summed as rotated vectors: give the query the template of an update.")
        self.layout = Layout(template)
        self._numbers = (clip_norm, steps, squared_bound, share_stddev, bits)
        self._share_cdf = share_cdf
        self._seed = seed

    def initial_global_state(self) -> GlobalState:
        """The numbers as scalars, the seeds of rotations and of noise (int32, 2), round 0 (int32)."""
        clip_norm, steps, squared_bound, share_stddev, bits = self._numbers
        return GlobalState(
            tf.constant(clip_norm, tf.float32),
            tf.constant(steps, tf.float32),
            tf.constant(squared_bound, tf.float64),
            tf.constant(share_stddev, tf.float64),
            tf.constant(bits, tf.int32),
            tf.constant(stateless_seed(self._seed, Purpose.ROTATION), tf.int32),
            tf.constant(stateless_seed(self._seed, Purpose.CLIENT_NOISE), tf.int32),
            tf.constant(0, tf.int32),
        )

    def derive_sample_params(self, global_state: GlobalState) -> SampleParams:
        """What clients need of the round: the numbers, the rotation (public), the noise's distribution and seed."""
        return SampleParams(
            global_state.clip_norm,
            global_state.steps,
            global_state.squared_bound,
            self._signs(global_state),
            self._share_cdf(global_state.share_stddev),
            round_seed(global_state.seed, global_state.round),
        )

    def preprocess_record(self, params: Any, record: Any) -> tf.Tensor:
        """What a client sends.

        Args:
            params: from `client_params`, or from `derive_sample_params` where nobody says which client
                it is; rounding and noise then cannot be repeated.
            record: a structure of float32 tensors. Private.

        Returns:
            An int32 vector, the rounded record plus the client's share of the noise. Private: only the sum of
            enough of them has the noise of the plan.
        """
        params = with_seed_of_its_own(params)
        seeds = tf.random.experimental.stateless_split(params.seed, 2)
        rounded = conditionally_rounded(self._scaled(params, record), params.squared_bound, seeds[0])
        return rounded + integer_noise(params.share_cdf, self.layout.padded, seeds[1])

    def initial_sample_state(self, template: Any = None) -> tf.Tensor:
        """The empty sum: int32 zeros, as many as a padded record has coordinates."""
        return tf.zeros([self.layout.padded], tf.int32)

    def get_noised_result(
        self, sample_state: tf.Tensor, global_state: GlobalState
    ) -> tuple[Any, GlobalState, dp_accounting.DpEvent]:
        """Takes the sum modulo 2 ** bits and undoes scaling and rotation.

        Args:
            sample_state: the sum of what the clients sent, int32, in which overflows wrap around.
            global_state: the state of this round.

        Returns:
            The noisy sum in the template's structure, which may be released under the plan's guarantee; the next
            round's state; no event, since what a sum has cost depends on how many shares its noise
            has (the plan accounts for it).
        """
        steps = tf.cast(centred(sample_state, global_state.bits), tf.float32)
        vector = hadamard_transform(steps) * self._signs(global_state) * (global_state.clip_norm / global_state.steps)
        next_state = global_state._replace(round=global_state.round + 1)
        return self.layout.from_vector(vector), next_state, dp_accounting.UnsupportedDpEvent()

    def _signs(self, global_state: GlobalState) -> tf.Tensor:
        return random_signs(self.layout.padded, round_seed(global_state.rotation_seed, global_state.round))

    def _scaled(self, params: SampleParams, record: Any) -> tf.Tensor:
        """A record clipped, rotated and in integer steps, but not yet rounded."""
        vector = self.layout.to_vector(record)
        clipped = clip_to_norm(vector, global_norm(vector), params.clip_norm)
        rotated = hadamard_transform(clipped * params.signs) * (params.steps / params.clip_norm)
        # What float32 may have added to the norm would make rounding fail more often than beta says.
        norm = tf.sqrt(tf.reduce_sum(tf.square(tf.cast(rotated, tf.float64))))
        return rotated * tf.cast(tf.minimum(tf.cast(params.steps, tf.float64) / norm, 1), tf.float32)
