"""Queries whose noise is correlated from round to round, so that sums over rounds are less noisy.

What they release in a round is the increment of a noisy prefix sum: server SGD adds the increments up.
"""

from __future__ import annotations

import collections
from typing import Any

import dp_accounting
import numpy as np
import tensorflow as tf

from dpfl.errors import InputError
from dpfl.mechanisms.queries import ClippingSumQuery
from dpfl.noise import normal_like, round_seed
from dpfl.randomness import Purpose, stateless_seed


class _CorrelatedSumQuery(ClippingSumQuery):
    """A sum of records clipped in L2 norm plus noise that depends on earlier rounds' noise.

    The global state has at least the field `clip_norm`. The memory of past noise in it is as private as
    the updates: whoever has it can take the noise off.
    """


class TreeSumQuery(_CorrelatedSumQuery):
    """Increments of prefix sums whose noise comes from a binary tree; see `dpfl.TreeAggregation`.

    With n the number of rounds since the tree began, the prefix sum's noise is that of one node for each 1 in
    the binary representation of n. Round n completes the node of level k and all below it on the
    right-hand edge, where k is the number of zeros at the end of n. Hence the increment: the noise
    of the new node of level k minus that of the nodes of levels 0 to k - 1 that it takes the place of.

    Args:
        clip_norm: L2 norm to which each record is clipped.
        stddev: standard deviation of the noise on each coordinate of a node.
        seed: the run's seed; the noise of a node is a function of it, the tree, the level and the index.
        restart_every: the number of rounds of a tree.
        levels: of the tree, at least the number of binary digits of the rounds in it; TensorFlow raises an error in
            the round that would need more.
        honaker: whether a node's noise is averaged with what its children say (Honaker 2015, the estimate
            from below).
        template: the structure of a record.
    """

    GlobalState = collections.namedtuple(
        "GlobalState", ["clip_norm", "stddev", "seed", "round", "restart_every", "nodes"]
    )

    def __init__(
        self, clip_norm: float, stddev: float, seed: int, restart_every: int, levels: int, honaker: bool, template: Any
    ) -> None:
        self._clip_norm = clip_norm
        self._stddev = stddev
        self._seed = seed
        self._restart_every = restart_every
        self._levels = levels
        self._honaker = honaker
        self._shapes = _shapes(template, "tree_aggregation")

    def initial_global_state(self) -> GlobalState:
        """Clip norm and noise (float32 scalars), seed (int32, 2), round 0, the rounds of a tree (int32 scalars), nodes.

        Of the nodes, the last completed left child of each level is kept: for each tensor of a
        record, float32 of shape (levels, *shape), at first zero. Private.
        """
        return self.GlobalState(
            tf.constant(self._clip_norm, tf.float32),
            tf.constant(self._stddev, tf.float32),
            tf.constant(stateless_seed(self._seed, Purpose.NOISE), tf.int32),
            tf.constant(0, tf.int32),
            tf.constant(self._restart_every, tf.int32),
            tuple(tf.zeros([self._levels, *shape]) for shape in self._shapes),
        )

    def get_noised_result(
        self, sample_state: Any, global_state: GlobalState
    ) -> tuple[Any, GlobalState, dp_accounting.DpEvent]:
        """Adds the increment of the tree's noise.

        Args:
            sample_state: the sum of preprocessed records. Private.
            global_state: the state of this round.

        Returns:
            The noisy increment, which may be released under the plan's guarantee; the next round's state; an event
            that says that the plan accounts for all rounds together.
        """
        state = global_state
        number = state.round % state.restart_every + 1
        seed = round_seed(state.seed, state.round // state.restart_every)
        level = _trailing_zeros(number)
        sums = tf.nest.flatten(sample_state)

        def node(level: tf.Tensor) -> list[tf.Tensor]:
            index = tf.bitwise.right_shift(number, level) - 1
            draws = normal_like(sums, round_seed(round_seed(seed, level), index))
            return [state.stddev * draw for draw in draws]

        if self._honaker:

            def parent(below: tf.Tensor, right: list[tf.Tensor]) -> tuple[tf.Tensor, list[tf.Tensor]]:
                own = node(below + 1)
                left = [nodes[below] for nodes in state.nodes]
                return below + 1, [v + 0.5 * (x + y) for v, x, y in zip(own, left, right, strict=True)]

            _, new = tf.while_loop(
                lambda below, _: below < level, parent, (tf.constant(0), node(tf.constant(0))), parallel_iterations=1
            )
            # An estimate from below counts each of a node's rounds 2 - 2 ** -level times.
            weights = 1 / (2 - 0.5 ** tf.range(self._levels, dtype=tf.float32))
        else:
            new = node(level)
            weights = tf.ones(self._levels)
        replaced = tf.where(tf.range(self._levels) < level, weights, 0.0)
        noisy = [
            part + weights[level] * value - tf.tensordot(replaced, nodes, 1)
            for part, value, nodes in zip(sums, new, state.nodes, strict=True)
        ]
        nodes = tuple(
            tf.tensor_scatter_nd_update(nodes, [[level]], value[None])
            for nodes, value in zip(state.nodes, new, strict=True)
        )
        return (
            tf.nest.pack_sequence_as(sample_state, noisy),
            state._replace(round=state.round + 1, nodes=nodes),
            dp_accounting.UnsupportedDpEvent(),
        )


class BandedSumQuery(_CorrelatedSumQuery):
    """Sums plus the rows of C^-1 z, for a banded C and independent z; see `dpfl.BandedMatrix`.

    By forward substitution: y_t = (z_t - sum over k of C[t, t - k] y_{t - k}) / C[t, t].

    Args:
        clip_norm: L2 norm to which each record is clipped.
        stddev: standard deviation of z on each coordinate.
        seed: the run's seed; z_t is a function of it and the round.
        rows: of C, shape (rounds, bands): entry [t, k] is C[t, t - k].
        template: the structure of a record.
    """

    GlobalState = collections.namedtuple("GlobalState", ["clip_norm", "stddev", "seed", "round", "rows", "past"])

    def __init__(self, clip_norm: float, stddev: float, seed: int, rows: np.ndarray, template: Any) -> None:
        self._clip_norm = clip_norm
        self._stddev = stddev
        self._seed = seed
        self._rows = rows
        self._shapes = _shapes(template, "banded_matrix")

    def initial_global_state(self) -> GlobalState:
        """Clip norm and noise (float32 scalars), seed (int32, 2), round 0 (int32 scalar), C, past noise.

        C is float32 of shape (rounds, bands). The past is the noise of the rounds before, the last
        one first: for each tensor of a record, float32 of shape (bands - 1, *shape), at first zero. Private.
        """
        bands = self._rows.shape[1]
        return self.GlobalState(
            tf.constant(self._clip_norm, tf.float32),
            tf.constant(self._stddev, tf.float32),
            tf.constant(stateless_seed(self._seed, Purpose.NOISE), tf.int32),
            tf.constant(0, tf.int32),
            tf.constant(self._rows, tf.float32),
            tuple(tf.zeros([bands - 1, *shape]) for shape in self._shapes),
        )

    def get_noised_result(
        self, sample_state: Any, global_state: GlobalState
    ) -> tuple[Any, GlobalState, dp_accounting.DpEvent]:
        """Adds the round's row of C^-1 z.

        Args:
            sample_state: the sum of preprocessed records. Private.
            global_state: the state of this round.

        Returns:
            The noisy sum, which may be released under the plan's guarantee; the next round's state; an event
            that says that the plan accounts for all rounds together.
        """
        state = global_state
        sums = tf.nest.flatten(sample_state)
        row = tf.gather(state.rows, state.round)
        draws = normal_like(sums, round_seed(state.seed, state.round))
        new = [
            (state.stddev * draw - tf.tensordot(row[1:], past, 1)) / row[0]
            for draw, past in zip(draws, state.past, strict=True)
        ]
        noisy = [part + value for part, value in zip(sums, new, strict=True)]
        past = tuple(tf.concat([value[None], past], axis=0)[:-1] for value, past in zip(new, state.past, strict=True))
        return (
            tf.nest.pack_sequence_as(sample_state, noisy),
            state._replace(round=state.round + 1, past=past),
            dp_accounting.UnsupportedDpEvent(),
        )


def _shapes(template: Any, mechanism: str) -> list[tf.TensorShape]:
    """The shapes of a record's tensors."""
    if template is None:
        raise InputError(
            f"{mechanism} keeps past noise, shaped like an update: give the query a template of one, as tensors, "
            "arrays or `tf.TensorSpec`s."
        )
    return [tf.TensorShape(getattr(part, "shape", ())) for part in tf.nest.flatten(template)]


def _trailing_zeros(number: tf.Tensor) -> tf.Tensor:
    """How many binary zeros a positive int32 ends in."""
    below = tf.bitwise.bitwise_and(tf.bitwise.invert(number), number - 1)
    return tf.cast(tf.raw_ops.PopulationCount(x=below), tf.int32)
