"""Seeds that nobody chooses."""

from __future__ import annotations

import tensorflow as tf


def fresh_seeds(count: int) -> tf.Tensor:
    """Draws seeds anew at each evaluation of the graph, int32 (count, 2).

    The raw operation, because `tf.random.uniform` follows `tf.random.set_seed`, after which all that draw by it would
    share their noise, in all rounds. It is made for simulations, and no cryptographic source: mix in one.
    """
    smallest, largest = tf.constant(tf.int32.min), tf.constant(tf.int32.max)
    return tf.raw_ops.RandomUniformInt(shape=[count, 2], minval=smallest, maxval=largest, seed=0, seed2=0)
