"""Gaussian noise as a pure function of a seed, in graph.

Clients and mechanisms draw from here and from nowhere else, so that both engines, a resumed run and
TensorFlow Federated draw the same noise.
"""

from __future__ import annotations

import math
from typing import Any

import tensorflow as tf


def normal_like(structure: Any, seed: tf.Tensor) -> Any:
    """Independent standard normal float32 tensors in the shapes of a structure.

    Args:
        structure: tensors.
        seed: int32, shape (2,); the draws are a function of it.
    """
    parts = tf.nest.flatten(structure)
    sizes = [tf.size(part) for part in parts]
    draws = tf.split(_normal(tf.add_n(sizes), seed), sizes, num=len(parts))
    shaped = [tf.reshape(draw, tf.shape(part)) for draw, part in zip(draws, parts, strict=True)]
    for draw, part in zip(shaped, parts, strict=True):
        draw.set_shape(part.shape)
    return tf.nest.pack_sequence_as(structure, shaped)


def _normal(count: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Box and Muller's transform of uniforms of 64 bits: no draw is beyond 9.4 standard deviations (5e-21).

    `tf.random.stateless_normal` makes none beyond 5.68, so that whoever sees a value further out knows that the sum was
    another one: a loss without bound, with a probability of 1e-4 where epsilon is 10 and one round is made.

    The uniform u of the radius sqrt(-2 log u) is never rounded to 1 or 0: below 1/2 it is taken as it is, with the bits
    that float32 can hold down to 2^-65, above through 1 - u, so that neither the tails nor the centre have holes.
    """
    pairs = (count + 1) // 2
    bits = tf.random.stateless_uniform([3, pairs], seed, minval=None, maxval=None, dtype=tf.uint32)
    below, above = _as_fraction(bits[:2]), _as_fraction(tf.bitwise.invert(bits[:2]))
    radii = tf.sqrt(-2 * tf.where(below < 0.5, tf.math.log(below), tf.math.log1p(-above)))
    angles = tf.cast(bits[2], tf.float32) * (2 * math.pi * 2.0**-32)
    return tf.concat([radii * tf.cos(angles), radii * tf.sin(angles)], axis=0)[:count]


def _as_fraction(bits: tf.Tensor) -> tf.Tensor:
    """64 bits in two rows of 32, the higher first, as a number in (0, 1), half a step above its lower end."""
    high, low = tf.unstack(tf.cast(bits, tf.float32))
    return (high + (low + 0.5) * 2.0**-32) * 2.0**-32


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
