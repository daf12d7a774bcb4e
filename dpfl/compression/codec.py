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
        return self.encode_by(vector, signs_seed, self.draws(tf.shape(vector)[-1], rounding_seed))

    def draws(self, length: tf.Tensor, rounding_seed: tf.Tensor) -> tf.Tensor:
        """What a client rounds by: uniform numbers from 0 to 1, float32, as many as buckets have coordinates.

        Args:
            length: the number of coordinates, an int32 scalar.
            rounding_seed: int32 (2,).
        """
        if self.bits is None:
            return tf.zeros([0])
        return tf.random.stateless_uniform([(length + BUCKET - 1) // BUCKET * BUCKET], rounding_seed)

    def encode_by(self, vector: tf.Tensor, signs_seed: tf.Tensor, draws: tf.Tensor) -> tf.Tensor:
        """The messages of vectors, by given draws.

        Args:
            vector: float32 (..., coordinates). Private.
            signs_seed: as of `encode`.
            draws: from `draws`, for each vector its own.

        Returns:
            uint8 (..., bytes).
        """
        if self.bits is None:
            return _bytes_of(vector)
        buckets = _in_buckets(vector)
        if self.rotation:
            buckets = _rotated(buckets * _signs(tf.shape(buckets)[-2:], signs_seed))
        largest = tf.reduce_max(tf.abs(buckets), axis=-1)
        finite = tf.reduce_all(tf.math.is_finite(buckets), axis=-1)
        scales = tf.where(finite, largest, float("nan"))
        levels = tf.math.divide_no_nan(buckets, largest[..., None]) * self.top + self.top
        floor = tf.floor(levels)
        # A comparison, since the float32 sum of a level and a draw close to 1 is the level after the next.
        up = tf.cast(tf.reshape(draws, tf.shape(buckets)) < levels - floor, tf.float32)
        rounded = tf.clip_by_value(floor + up, 0.0, 2 * self.top)
        codes = _joined(tf.cast(tf.where(finite[..., None], rounded, 0.0), tf.int64), 2)
        sent = _packed(codes[..., : self._codes(tf.shape(vector)[-1])], self.bits)
        return tf.concat([sent, _bytes_of(scales)], axis=-1)

    def decode(self, message: tf.Tensor, length: tf.Tensor, signs_seed: tf.Tensor) -> tf.Tensor:
        """The vectors of messages. A bucket that held a number that is not finite comes back as NaN.

        Args:
            message: uint8 (..., bytes), from `encode`.
            length: the number of coordinates, an int32 scalar, known to both sides.
            signs_seed: as `encode` had it.

        Returns:
            float32 (..., coordinates).
        """
        if self.bits is None:
            return _floats_of(message)
        codes = self._codes(length)
        packed = (codes + _GROUP - 1) // _GROUP * self.bits
        scales = _floats_of(message[..., packed:])
        levels = tf.cast(_unpacked(message[..., :packed], self.bits)[..., :codes], tf.float32) - self.top
        buckets = _in_buckets(levels) * (scales[..., None] / self.top)
        if self.rotation:
            buckets = _rotated(buckets) * _signs(tf.shape(buckets)[-2:], signs_seed)
        return _joined(buckets, 2)[..., :length]

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


@functools.cache
def _hadamard() -> np.ndarray:
    return (linalg.hadamard(BUCKET) / math.sqrt(BUCKET)).astype(np.float32)


def _rotated(buckets: tf.Tensor) -> tf.Tensor:
    """Each bucket's Walsh-Hadamard transform, orthonormal and its own inverse."""
    return tf.matmul(buckets, _hadamard())


def _signs(shape: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    bits = tf.random.stateless_uniform(shape, seed, minval=None, maxval=None, dtype=tf.int32)
    return tf.where(bits < 0, -1.0, 1.0)


def _split(tensor: tf.Tensor, *last: int) -> tf.Tensor:
    """The last axis as several, of which the first has the length that is left."""
    return tf.reshape(tensor, tf.concat([tf.shape(tensor)[:-1], [-1, *last]], axis=0))


def _joined(tensor: tf.Tensor, axes: int) -> tf.Tensor:
    """So many of the last axes as one."""
    return tf.reshape(tensor, tf.concat([tf.shape(tensor)[:-axes], [-1]], axis=0))


def _filled(tensor: tf.Tensor, multiple: int) -> tf.Tensor:
    """The last axis filled up with zeros to a multiple."""
    missing = -tf.shape(tensor)[-1] % multiple
    return tf.pad(tensor, [[0, 0]] * (len(tensor.shape) - 1) + [[0, missing]])


def _in_buckets(vector: tf.Tensor) -> tf.Tensor:
    """(..., buckets, 128), the last one filled up with zeros."""
    return _split(_filled(vector, BUCKET), BUCKET)


def _bytes_of(floats: tf.Tensor) -> tf.Tensor:
    return _joined(tf.bitcast(floats, tf.uint8), 2)


def _floats_of(message: tf.Tensor) -> tf.Tensor:
    return tf.bitcast(_split(message, 4), tf.float32)


def _packed(codes: tf.Tensor, bits: int) -> tf.Tensor:
    """Codes of so many bits, int64 (..., codes), as bytes: 8 codes are as many bytes as a code has bits."""
    groups = _split(_filled(codes, _GROUP), _GROUP)
    shifted = tf.bitwise.left_shift(groups, tf.range(_GROUP, dtype=tf.int64) * bits)
    # Codes do not overlap, so that their sum is all of their bits; in two's complement this holds up to 64 of them.
    words = tf.reduce_sum(shifted, axis=-1)
    return _joined(tf.bitcast(words, tf.uint8)[..., :bits], 2)


def _unpacked(packed: tf.Tensor, bits: int) -> tf.Tensor:
    """The codes in whole groups, int64."""
    groups = _split(packed, bits)
    padding = [[0, 0]] * (len(groups.shape) - 1) + [[0, 8 - bits]]
    words = tf.bitcast(tf.pad(groups, padding), tf.int64)
    places = tf.range(_GROUP, dtype=tf.int64) * bits
    codes = tf.bitwise.bitwise_and(tf.bitwise.right_shift(words[..., None], places), tf.constant(2**bits - 1, tf.int64))
    return _joined(codes, 2)
