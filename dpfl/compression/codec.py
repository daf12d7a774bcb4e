"""The codec of updates: a vector of float32 becomes bytes, and the bytes a vector again, in graph.

Uniform stochastic quantisation in buckets (Alistarh et al. 2017, 1610.02132, section 3.2), after a random rotation
where asked for (Suresh et al. 2017, 1611.00429, section 3). What comes out of `decode` has the vector for its expected
value, up to the rounding of float32, whatever the vector is; its norm may be larger, so it is clipped after this.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from scipy import linalg

BUCKET = 128
"""How many coordinates share a scale, and are rotated together."""
_GROUP = 8  # so many codes of b bits are b bytes


class Codec(NamedTuple):
    """How a vector is written.

    A message is, in this order: the codes of all coordinates, `bits` bits each, filled up with zeros to whole groups of
    8 codes; and the scale of each bucket, float32, little-endian. Without `bits` it is the coordinates in float32.

    Attributes:
        bits: of a coordinate, from 1 to 8; None for float32.
        rotation: whether buckets are rotated, for which the last one is filled up with zeros.
    """

    bits: int | None
    rotation: bool

    @property
    def top(self) -> float:
        """The largest level: levels go from minus this to this in steps of 1, with 0 among them from 2 bits on."""
        assert self.bits is not None
        return 0.5 if self.bits == 1 else float(2 ** (self.bits - 1) - 1)

    def encode(self, vector: tf.Tensor, signs_seed: tf.Tensor, rounding_seed: tf.Tensor) -> tf.Tensor:
        """The message of a vector.

        Args:
            vector: float32 (coordinates,). Private, and so is the message.
            signs_seed: int32 (2,), of the rotation: the same for all clients of a round, and public.
            rounding_seed: int32 (2,), of the client's roundings.

        Returns:
            uint8 (bytes,).
        """
        if self.bits is None:
            return tf.reshape(tf.bitcast(vector, tf.uint8), [-1])
        buckets = self._in_buckets(vector)
        if self.rotation:
            buckets = _rotated(buckets * _signs(tf.shape(buckets), signs_seed))
        largest = tf.reduce_max(tf.abs(buckets), axis=1)
        finite = tf.reduce_all(tf.math.is_finite(buckets), axis=1)
        scales = tf.where(finite, largest, float("nan"))
        levels = tf.math.divide_no_nan(buckets, largest[:, None]) * self.top + self.top
        draws = tf.random.stateless_uniform(tf.shape(buckets), rounding_seed)
        rounded = tf.clip_by_value(tf.floor(levels + draws), 0.0, 2 * self.top)
        codes = tf.reshape(tf.cast(tf.where(finite[:, None], rounded, 0.0), tf.int64), [-1])
        sent = _packed(codes[: self._codes(tf.shape(vector)[0])], self.bits)
        return tf.concat([sent, tf.reshape(tf.bitcast(scales, tf.uint8), [-1])], axis=0)

    def decode(self, message: tf.Tensor, length: tf.Tensor, signs_seed: tf.Tensor) -> tf.Tensor:
        """The vector of a message. A bucket that held a number that is not finite comes back as NaN.

        Args:
            message: uint8 (bytes,), from `encode`.
            length: the number of coordinates, an int32 scalar, known to both sides.
            signs_seed: as `encode` had it.
        """
        if self.bits is None:
            return tf.bitcast(tf.reshape(message, [-1, 4]), tf.float32)
        codes = self._codes(length)
        packed = (codes + _GROUP - 1) // _GROUP * self.bits
        scales = tf.bitcast(tf.reshape(message[packed:], [-1, 4]), tf.float32)
        levels = tf.cast(_unpacked(message[:packed], self.bits)[:codes], tf.float32) - self.top
        buckets = self._in_buckets(levels) * (scales[:, None] / self.top)
        if self.rotation:
            buckets = _rotated(buckets) * _signs(tf.shape(buckets), signs_seed)
        return tf.reshape(buckets, [-1])[:length]

    def message_bytes(self, coordinates: int) -> int:
        """The length of the message of so many coordinates, found by writing one.

        Args:
            coordinates: at least 1.
        """
        seed = tf.zeros(2, tf.int32)
        return int(tf.size(self.encode(tf.zeros(coordinates), seed, seed)))

    def _codes(self, length: tf.Tensor) -> tf.Tensor:
        """How many codes are sent: those of whole buckets where these were rotated."""
        return (length + BUCKET - 1) // BUCKET * BUCKET if self.rotation else length

    def _in_buckets(self, vector: tf.Tensor) -> tf.Tensor:
        """(buckets, 128), the last one filled up with zeros."""
        missing = -tf.shape(vector)[0] % BUCKET
        return tf.reshape(tf.concat([vector, tf.zeros([missing])], axis=0), [-1, BUCKET])


@functools.cache
def _hadamard() -> np.ndarray:
    return (linalg.hadamard(BUCKET) / math.sqrt(BUCKET)).astype(np.float32)


def _rotated(buckets: tf.Tensor) -> tf.Tensor:
    """Each bucket's Walsh-Hadamard transform, orthonormal and its own inverse."""
    return tf.matmul(buckets, _hadamard())


def _signs(shape: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    bits = tf.random.stateless_uniform(shape, seed, minval=None, maxval=None, dtype=tf.int32)
    return tf.where(bits < 0, -1.0, 1.0)


def _packed(codes: tf.Tensor, bits: int) -> tf.Tensor:
    """Codes of so many bits, int64 (codes,), as bytes: 8 codes are as many bytes as a code has bits."""
    groups = tf.reshape(tf.concat([codes, tf.zeros([-tf.shape(codes)[0] % _GROUP], tf.int64)], axis=0), [-1, _GROUP])
    shifted = tf.bitwise.left_shift(groups, tf.range(_GROUP, dtype=tf.int64) * bits)
    # Codes do not overlap, so that their sum is all of their bits; in two's complement this holds up to 64 of them.
    words = tf.reduce_sum(shifted, axis=1)
    return tf.reshape(tf.bitcast(words, tf.uint8)[:, :bits], [-1])


def _unpacked(packed: tf.Tensor, bits: int) -> tf.Tensor:
    """The codes in whole groups, int64."""
    groups = tf.reshape(packed, [-1, bits])
    words = tf.bitcast(tf.pad(groups, [[0, 0], [0, 8 - bits]]), tf.int64)
    places = tf.range(_GROUP, dtype=tf.int64) * bits
    codes = tf.bitwise.bitwise_and(tf.bitwise.right_shift(words[:, None], places), tf.constant(2**bits - 1, tf.int64))
    return tf.reshape(codes, [-1])
