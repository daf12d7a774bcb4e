"""Gaussian noise as a pure function of a seed, in graph.

Clients and mechanisms draw from here and from nowhere else, so that both engines, a resumed run and
TensorFlow Federated draw the same noise.
"""

from __future__ import annotations

import math
from typing import Any

import tensorflow as tf


def normal_like(structure: Any, seed: tf.Tensor, stddev: tf.Tensor | float = 1.0) -> Any:
    """Independent normal float32 tensors of mean 0 in the shapes of a structure.

    Args:
        structure: tensors.
        seed: int32, shape (2,); the draws are a function of it.
        stddev: their standard deviation, a float32 scalar.
    """
    parts = tf.nest.flatten(structure)
    sizes = [tf.size(part) for part in parts]
    count = tf.add_n(sizes)
    drawn = _normal(count, seed, tf.convert_to_tensor(stddev, tf.float32))
    *draws, _ = tf.split(drawn, [*sizes, tf.size(drawn) - count], num=len(parts) + 1)
    shaped = [tf.reshape(draw, tf.shape(part)) for draw, part in zip(draws, parts, strict=True)]
    for draw, part in zip(shaped, parts, strict=True):
        draw.set_shape(part.shape)
    return tf.nest.pack_sequence_as(structure, shaped)


def _normal(count: tf.Tensor, seed: tf.Tensor, stddev: tf.Tensor) -> tf.Tensor:
    """At least `count` draws by Box and Muller's transform of uniforms of 64 bits.

    None is beyond 9.4 standard deviations (5e-21).
    `tf.random.stateless_normal` makes none beyond 5.68, so that whoever sees a value further out knows that the sum was
    another one: a loss without bound, with a probability of 1e-4 where epsilon is 10 and one round is made.

    The radius is sqrt(-2 log u). float32 holds a small u down to 2^-65, so that the tails have no holes. A large one is
    rounded to a multiple of 2^-24; -log u then gets a uniform offset as wide as that step, around zero, and is
    reflected at zero, so that the centre has none either.
    """
    pairs = (count + 31) // 32 * 16  # a multiple of 16 can be taken apart without copying
    bits = tf.random.stateless_uniform([3, pairs], seed, minval=None, maxval=None, dtype=tf.uint32)
    high, low, turn = tf.unstack(tf.cast(bits, tf.float32))
    below = low * 2.0**-64 + 2.0**-65
    offset = below * 2.0**9 - 2.0**-24
    radii = stddev * tf.sqrt(tf.abs(offset - 2.0 * tf.math.log(high * 2.0**-32 + below)))
    angles = turn * (2 * math.pi * 2.0**-32)
    return tf.concat([radii * tf.cos(angles), radii * tf.sin(angles)], axis=0)


def round_seed(seed: tf.Tensor, number: tf.Tensor) -> tf.Tensor:
    """The seed of a round, a client, or whatever else a number stands for: int32, shape (2,).

    All of its 64 bits depend on all of the seed. `stateless_fold_in` keeps 32 of them: of 100,000 runs some two would
    share all their noise, and whoever has a model could try all 2 ** 32 noises.

    Args:
        seed: int32, shape (2,). Not one that is split as well, of which round 0 would be the first part.
        number: int32 scalar.
    """
    mixed = tf.bitwise.bitwise_xor(seed, tf.stack([0, tf.cast(number, tf.int32)]))
    return tf.random.stateless_uniform([2], mixed, minval=None, maxval=None, dtype=tf.int32)
