"""Which examples a client sees at which local step, in graph: shuffled epochs or Poisson samples."""

from __future__ import annotations

import tensorflow as tf

from dpfl.privacy.example_level import ExampleSampling


def examples_seen(
    sizes: tf.Tensor,
    *,
    steps: tf.Tensor,
    epochs: tf.Tensor,
    batch_size: int | None,
    sampling: ExampleSampling = "shuffled",
) -> tf.Tensor:
    """How many examples clients process in a round, each counted as often as it is in a minibatch.

    A function of the sizes, which count as public, and never of what was drawn.

    Args:
        sizes: number of each client's examples, at least 1, (clients,), int32.
        steps: local steps of every client, a scalar; 0 where `epochs` counts instead.
        epochs: passes over the examples, a scalar; 0 where `steps` counts instead.
        batch_size: examples in a minibatch; None for all of a client's.
        sampling: how minibatches are drawn; of "poisson" samples the number is the expected one, before any limit.

    Returns:
        The numbers, (clients,), int32.
    """
    wanted, per_epoch = _local_steps(sizes, steps, epochs, batch_size)
    largest = sizes if batch_size is None else tf.minimum(batch_size, sizes)
    if sampling == "poisson":
        return wanted * largest
    whole_epochs = (wanted - 1) // per_epoch
    return whole_epochs * sizes + tf.minimum((wanted - whole_epochs * per_epoch) * largest, sizes)


def minibatches(
    starts: tf.Tensor,
    sizes: tf.Tensor,
    clients: tf.Tensor,
    *,
    steps: tf.Tensor,
    epochs: tf.Tensor,
    batch_size: int | None,
    seed: tf.Tensor,
    round_number: tf.Tensor,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Lays out the minibatches of some clients for a round.

    The order of a client's examples in an epoch depends on (seed, round, client, epoch) alone, not
    on which other clients are trained beside it.

    Args:
        starts: first row of each client's examples, (clients,), int32.
        sizes: number of each client's examples, at least 1, (clients,), int32.
        clients: index of each client, (clients,), int32.
        steps: local steps of every client, a scalar; 0 where `epochs` counts instead.
        epochs: passes over the examples, a scalar; 0 where `steps` counts instead.
        batch_size: examples in a minibatch; None for all of a client's, padded to the largest of these clients.
        seed: the seed of shuffling, (2,), int32.
        round_number: the round, a scalar, int32.

    Returns:
        Rows of the examples, (clients, most steps, batch_size), int32, and a mask of the same shape
        that is 1.0 where a row counts: the last minibatch of an epoch may be smaller, and clients
        with fewer steps than the others have empty minibatches at the end.
    """
    wanted, per_epoch = _local_steps(sizes, steps, epochs, batch_size)
    seen = tf.reduce_max(examples_seen(sizes, steps=steps, epochs=epochs, batch_size=batch_size))
    whole_epochs = (wanted - 1) // per_epoch
    places = tf.reduce_max(sizes) if batch_size is None else batch_size

    # Each client's epochs stand one behind the other, so that large and small clients share a layout
    # without a place for every epoch of the smallest times every example of the largest.
    lengths = (whole_epochs + 1) * sizes
    place = tf.range(tf.reduce_max(lengths))[None, :]
    epoch, example = place // sizes[:, None], place % sizes[:, None]
    draws = _hash(seed, round_number, clients[:, None], epoch, example)
    by_epoch = tf.bitwise.left_shift(tf.cast(epoch, tf.int64), tf.constant(40, tf.int64)) + draws
    keys = tf.where(place < lengths[:, None], by_epoch, tf.int64.max)
    # Only so many places are ever seen: a partial sort spares large clients the rest.
    order = tf.math.top_k(-keys, seen).indices % sizes[:, None]

    step = tf.range(tf.reduce_max(wanted))[None, :]
    within = (step % per_epoch[:, None])[:, :, None] * places + tf.range(places)
    counts = (within < sizes[:, None, None]) & (step < wanted[:, None])[:, :, None]
    looked_up = (step // per_epoch[:, None] * sizes[:, None])[:, :, None] + within
    chosen = tf.gather(order, tf.where(counts, looked_up, 0), batch_dims=1)
    return starts[:, None, None] + tf.where(counts, chosen, 0), tf.cast(counts, tf.float32)


def poisson_minibatch(
    records: tf.Tensor, step: tf.Tensor, *, batch_size: int, max_batch_size: int | None, seed: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Draws each of a client's examples independently with the probability min(1, batch_size / records).

    Where more than `max_batch_size` are drawn, a uniformly random part of them is kept (those with the smallest
    uniforms), as `dp_accounting.TruncatedSubsampledGaussianDpEvent` has it.

    Args:
        records: number of the client's examples, at least 1, an int32 scalar.
        step: the local step, an int32 scalar.
        batch_size: the expected number of examples in a minibatch.
        max_batch_size: the largest number of examples in a minibatch; None for all that are drawn.
        seed: of this client's sampling in this round, int32, (2,).

    Returns:
        Rows of the examples, int32, (drawn,), ascending and counted from the client's first; and a mask of the same
        shape that is 1.0 where a row counts. Where none is drawn there is one row all the same, which does not
        count. Both are private: the guarantee relies on nobody learning who was drawn.
    """
    draws = _hash(seed, tf.constant(0), tf.constant(0), step, tf.range(records))
    # Rounded down, so that the rate is never above the one that is accounted; 2 ** 40 where all take part.
    wanted = tf.cast(tf.minimum(batch_size, records), tf.int64)
    taken = draws < tf.bitwise.left_shift(wanted, tf.constant(40, tf.int64)) // tf.cast(records, tf.int64)
    if max_batch_size is None:
        rows = tf.cast(tf.where(taken)[:, 0], tf.int32)
    else:
        kept = tf.minimum(tf.reduce_sum(tf.cast(taken, tf.int32)), max_batch_size)
        in_order = tf.math.top_k(-draws, tf.minimum(max_batch_size, records)).indices
        rows = tf.sort(in_order[:kept])
    drawn = tf.size(rows)
    length = tf.maximum(drawn, 1)
    return tf.concat([rows, [0]], axis=0)[:length], tf.cast(tf.range(length) < drawn, tf.float32)


def _local_steps(
    sizes: tf.Tensor, steps: tf.Tensor, epochs: tf.Tensor, batch_size: int | None
) -> tuple[tf.Tensor, tf.Tensor]:
    """Local steps of each client in a round, and of an epoch, both (clients,), int32."""
    per_epoch = tf.ones_like(sizes) if batch_size is None else (sizes + batch_size - 1) // batch_size
    return tf.where(steps > 0, tf.fill(tf.shape(sizes), steps), epochs * per_epoch), per_epoch


def _hash(
    seed: tf.Tensor, round_number: tf.Tensor, client: tf.Tensor, epoch: tf.Tensor, example: tf.Tensor
) -> tf.Tensor:
    """Uniform int64 values from 0 to 2 ** 40 - 1, each a function of its own indices, which broadcast.

    SplitMix64's finaliser (Steele et al. 2014, OOPSLA) as a counter-based generator, because
    TensorFlow's stateless generators take one seed a call and would tie a client's order to its
    place in the cohort. Sampling and shuffling need no more; noise never comes from here.
    """

    def mix(state: tf.Tensor, value: tf.Tensor) -> tf.Tensor:
        bits = state + (tf.cast(value, tf.uint64) + 1) * tf.constant(0x9E3779B97F4A7C15, tf.uint64)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            shifted = tf.bitwise.right_shift(bits, tf.constant(shift, tf.uint64))
            bits = tf.bitwise.bitwise_xor(bits, shifted) * tf.constant(factor, tf.uint64)
        return tf.bitwise.bitwise_xor(bits, tf.bitwise.right_shift(bits, tf.constant(31, tf.uint64)))

    words = tf.bitcast(seed, tf.uint32)
    state = mix(mix(tf.cast(words[0], tf.uint64), words[1]), round_number)
    values = mix(mix(mix(state, client), epoch), example)
    return tf.bitcast(tf.bitwise.right_shift(values, tf.constant(24, tf.uint64)), tf.int64)
