"""The query of averaging weighted by examples."""

from __future__ import annotations

import collections
from typing import Any, NamedTuple

import dp_accounting
import tensorflow as tf
from tensorflow_privacy.privacy.dp_query.dp_query import SumAggregationDPQuery

from dpfl.errors import InputError
from dpfl.mechanisms.queries import clip_to_norm, global_norm


class ClientWeight(NamedTuple):
    """Sample params of one client.

    Attributes:
        weight: a float32 scalar.
    """

    weight: tf.Tensor


class WeightedMeanQuery(SumAggregationDPQuery):
    """The mean of records weighted by how many examples their clients processed: neither clipped nor noised.

    The sum of weighted records is divided by the sum of these very weights, which depend on who came, so that no noise
    could be scaled to what one client changes. See `dpfl.NoMechanism`.
    """

    SampleState = collections.namedtuple("SampleState", ["total", "weight"])
    only_clips = False  # See `SumQuery.only_clips`.

    def initial_global_state(self) -> tuple[()]:
        """Nothing: the rounds are alike."""
        return ()

    def derive_sample_params(self, global_state: tuple[()]) -> tuple[()]:
        """Nothing that all clients share."""
        return ()

    def client_params(self, params: tuple[()], client: tf.Tensor, examples: tf.Tensor) -> ClientWeight:
        """The sample params as one client uses them.

        Args:
            params: from `derive_sample_params`.
            client: the client's index, which is not looked at.
            examples: how many examples it processed in the round, an int32 scalar.
        """
        return ClientWeight(tf.cast(examples, tf.float32))

    def clip_norm(self, params: tuple[()]) -> tf.Tensor:
        """Infinity: nothing is clipped."""
        return tf.constant(float("inf"))

    def sent_and_norm(self, params: Any, record: Any) -> tuple[SampleState, tf.Tensor]:
        """See `MeanQuery.sent_and_norm`."""
        return self.preprocess_record(params, record), global_norm(record)

    def onto(self, params: tuple[()], gradients: list[tf.Tensor]) -> list[tf.Tensor]:
        """See `MeanQuery.onto`."""
        return gradients

    def after_release(self, global_state: Any, weights: Any) -> Any:
        """See `MeanQuery.after_release`."""
        return global_state

    def exact_result(self, sample_state: SampleState, global_state: tuple[()]) -> None:
        """See `MeanQuery.exact_result`: there is no noise to compare with."""

    def initial_sample_state(self, template: Any = None) -> SampleState:
        """A sum of zero in the template's structure, and a weight of zero."""
        return self.SampleState(super().initial_sample_state(template), tf.constant(0.0))

    def preprocess_record(self, params: ClientWeight, record: Any) -> SampleState:
        """Weights a record. One that is not finite counts with neither value nor weight, as if nobody had come.

        Args:
            params: from `client_params`.
            record: a structure of float tensors.

        Raises:
            InputError: nobody says how many examples the client processed.
        """
        if not isinstance(params, ClientWeight):
            raise InputError(
                "weighting by examples needs each client's number of them, which only client_params tells this query: "
                "in TensorFlow Federated, give tff.aggregators.MeanFactory() to a weighted builder."
            )
        norm = global_norm(record)
        weight = tf.where(tf.math.is_finite(norm), params.weight, 0.0)
        finite = clip_to_norm(record, norm, tf.constant(float("inf")))
        return self.SampleState(tf.nest.map_structure(lambda part: weight * part, finite), weight)

    def get_noised_result(
        self, sample_state: SampleState, global_state: tuple[()]
    ) -> tuple[Any, tuple[()], dp_accounting.DpEvent]:
        """Divides the sum by the sum of weights.

        Args:
            sample_state: the sums over the cohort.
            global_state: nothing.

        Returns:
            The mean, zeros where nobody came; nothing; the event of a release without protection.
        """
        mean = tf.nest.map_structure(lambda part: tf.math.divide_no_nan(part, sample_state.weight), sample_state.total)
        return mean, global_state, dp_accounting.NonPrivateDpEvent()
