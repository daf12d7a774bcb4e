"""Noise that clients draw themselves: who draws with which seed.

Where an engine says which client's update it hands over (`SumQuery.client_params`), a client's randomness is a
pure function of (seed, round, client). TFF tells all clients the same and has no index to tell them apart, so there
each draws a seed of its own from the machine's entropy: the noise has the right distribution and no two clients
share it, but it cannot be repeated.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import tensorflow as tf

from dpfl.mechanisms.queries import SumQuery
from dpfl.noise import round_seed

_LOWEST, _HIGHEST = tf.int32.limits


class ClientParams(NamedTuple):
    """Sample params whose `seed` is one client's alone.

    Attributes:
        of_client: the sample params, a named tuple with a field `seed`.
    """

    of_client: Any


class ClientNoiseQuery(SumQuery):
    """A sum of records that clients noise themselves; its sample params are a named tuple with a field `seed`."""

    def client_params(self, params: Any, client: tf.Tensor) -> ClientParams:
        """The sample params as one client uses them.

        Args:
            params: from `derive_sample_params`.
            client: the client's index, int32 scalar.
        """
        return ClientParams(params._replace(seed=round_seed(params.seed, client)))

    def clip_norm(self, params: Any) -> tf.Tensor:
        """The clip norm, a float32 scalar."""
        return (params.of_client if isinstance(params, ClientParams) else params).clip_norm


def with_seed_of_its_own(params: Any) -> Any:
    """Sample params with a seed that no other client has, whether or not an engine told whose they are.

    Args:
        params: from `derive_sample_params`, or from `client_params`.
    """
    if isinstance(params, ClientParams):
        return params.of_client
    # The raw operation: `tf.random.uniform` obeys `tf.random.set_seed`, after which each of TFF's sessions would
    # start from the same state and all clients would draw the same noise.
    draw = tf.raw_ops.RandomUniformInt(shape=[2], minval=_LOWEST, maxval=_HIGHEST, seed=0, seed2=0)
    return params._replace(seed=params.seed + draw)
