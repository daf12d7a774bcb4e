"""A plan's mechanism as an aggregator of TensorFlow Federated."""

from __future__ import annotations

import functools
import math
import secrets
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import tensorflow as tf
from tensorflow_privacy.privacy.dp_query.dp_query import SumAggregationDPQuery

from dpfl.errors import InputError
from dpfl.mechanisms import Plan
from dpfl.mechanisms.queries import MeanQuery, global_norm
from dpfl.randomness import check_seed
from dpfl.tff.runtime import tensorflow_federated
from dpfl.tff.seeds import fresh_seeds

if TYPE_CHECKING:
    import tensorflow_federated as tff


class AggregationMeasurements(NamedTuple):
    """What the measured aggregator of a simulation reports of a round; nothing protects it.

    Attributes:
        norms: sum of the L2 norms of the clients' updates before clipping, of those that are finite.
        clipped: number of clients whose update was clipped.
        non_finite: number of clients whose update was not finite, and counted as zero.
        clip_norm: the norm to which updates were clipped.
    """

    norms: Any
    clipped: Any
    non_finite: Any
    clip_norm: Any


def aggregator(plan: Plan, *, seed: int | None = None) -> tff.aggregators.AggregationFactory:
    """The plan's mechanism, for the `model_aggregator` of FedAvg, FedProx and FedSGD in `tff.learning.algorithms`.

    It runs `plan.query` in `tff.aggregators.DifferentiallyPrivateFactory`: every client's update is clipped as a
    whole, noise is added once to their sum (or where the mechanism adds it), and the sum is divided by the expected
    cohort. What the plan's guarantee says of the models holds if the cohorts come from the plan's own sampler
    (`plan.sampler.clients(seed, round, plan.population)`, with a seed that nobody learns), and nothing but the models
    is released: TFF's training metrics are not protected, and neither is `dp_query_metrics`. A round beyond those of a
    plan with a finite epsilon ends `next` with an error. Mime Lite is not covered: it also aggregates full gradients,
    by another aggregator, and that is a second release.

    Weighted builders hand over weights, which would break the sensitivity: they are ignored, except that a client
    with weight 0 (TFF's mark for an update that is not finite, and for no examples) counts as one that did not come.

    Mechanisms whose clients draw noise (local and distributed ones) draw it afresh in TFF, whatever the seed.

    Args:
        plan: of a mechanism, from `Experiment.plan` or a mechanism's own `plan`.
        seed: of the noise, which is then the in-graph engine's: for simulations, as whoever knows the seed can take
            the noise off. Without, every `initialize` draws seeds of its own, from the system's source of randomness
            and TensorFlow's. The process' state has them: keep it, and checkpoints of it, as secret as the data.

    Returns:
        A factory that is both a `tff.aggregators.UnweightedAggregationFactory` and a `WeightedAggregationFactory`.

    Raises:
        InputError: there is no TensorFlow Federated on this machine, the plan is none of a mechanism, or it weights
            by examples, which `tff.aggregators.MeanFactory` does.
    """
    tff = tensorflow_federated()
    if not isinstance(plan, Plan):
        raise InputError(
            f"plan must be the plan of a mechanism (Experiment.plan() gives one), but it was {type(plan).__name__}."
        )
    if plan.mechanism.weighting != "equal":
        raise InputError(
            "the plan weights clients by their examples, and its aggregator is TFF's own: give "
            "tff.aggregators.MeanFactory() to a weighted builder (tff.learning.algorithms.build_weighted_fed_avg)."
        )
    if plan.compression.sparsity:
        raise InputError(
            "pruning follows the released weights, which an aggregator does not see: run the experiment with "
            'engine="tff", or leave sparsity out.'
        )
    if seed is None:
        return _factories(tff).private(plan, secrets.randbits(64), afresh=True)
    return _factories(tff).private(plan, check_seed(seed), afresh=False)


def simulated(plan: Plan, seed: int) -> Any:
    """The aggregator of a simulation, which follows the released weights by `after_release`; see `aggregator`."""
    return _factories(tensorflow_federated()).private(plan, seed, afresh=False)


def after_release(plan: Plan, state: Any, weights: Any) -> Any:
    """The state of a process built of `simulated`, after a round whose model is released.

    Args:
        plan: of the mechanism.
        state: of the learning process.
        weights: of the model that is released.
    """
    if not plan.compression.sparsity:
        return state
    query = BeforeMinusAfter(plan.query(0, [tf.TensorSpec(weight.shape) for weight in weights]))
    followed = query.after_release(state.aggregator.query_state, [tf.constant(weight) for weight in weights])
    return state._replace(aggregator=state.aggregator._replace(query_state=followed))


def measured(factory: Any) -> Any:
    """An aggregator that also reports `AggregationMeasurements`, for simulations.

    Args:
        factory: from `aggregator`, or a `tff.aggregators.MeanFactory`.

    Returns:
        A `tff.aggregators.WeightedAggregationFactory`.
    """
    return _factories(tensorflow_federated()).measured(factory)


class BeforeMinusAfter(SumAggregationDPQuery):
    """A query for updates with the other sign, as TFF's clients send them.

    The in-graph engine adds up weights after minus before. Turned twice, the noise is the engine's, sign and all.

    Args:
        query: of weights after minus before.
        afresh: whether each initial state has seeds of its own, mixed with the query's.
    """

    def __init__(self, query: MeanQuery, *, afresh: bool = False) -> None:
        self._query = query
        self._afresh = afresh

    def initial_global_state(self) -> Any:
        """The query's own state."""
        state = self._query.initial_global_state()
        return _with_fresh_seeds(state) if self._afresh else state

    def derive_sample_params(self, global_state: Any) -> Any:
        """The query's own parameters."""
        return self._query.derive_sample_params(global_state)

    def initial_sample_state(self, template: Any = None) -> Any:
        """The query's own sum of nobody's updates."""
        return self._query.initial_sample_state(template)

    def preprocess_record(self, params: Any, record: Any) -> Any:
        """What the query makes of the update after minus before."""
        return self._query.preprocess_record(params, tf.nest.map_structure(tf.negative, record))

    def get_noised_result(self, sample_state: Any, global_state: Any) -> tuple[Any, Any, Any]:
        """The query's result, before minus after."""
        result, state, event = self._query.get_noised_result(sample_state, global_state)
        return tf.nest.map_structure(tf.negative, result), state, event

    def clip_norm(self, global_state: Any) -> tf.Tensor:
        """The norm to which records are clipped in the next round, a float32 scalar."""
        return self._query.clip_norm(self._query.derive_sample_params(global_state))

    def rounds_done(self, global_state: Any) -> tf.Tensor:
        """How many sums were released, an int32 scalar."""
        return self._query.rounds_done(global_state)

    def record_norm(self, global_state: Any, update: Any) -> tf.Tensor:
        """See `MeanQuery.record_norm`."""
        return self._query.record_norm(global_state, update)

    def after_release(self, global_state: Any, weights: Any) -> Any:
        """See `MeanQuery.after_release`."""
        return self._query.after_release(global_state, weights)


def _with_fresh_seeds(state: Any) -> Any:
    """A query's initial state, and those in it, with seeds that neither of two sources is enough to know."""
    if not hasattr(state, "_asdict"):
        return state
    return state._replace(
        **{
            name: tf.bitwise.bitwise_xor(value, fresh_seeds(1)[0])
            if name == "seed" or name.endswith("_seed")
            else _with_fresh_seeds(value)
            for name, value in state._asdict().items()
        }
    )


class _Factories(NamedTuple):
    """Classes that can only be made once TFF is there."""

    private: Any
    measured: Any


@functools.cache
def _factories(tff: Any) -> _Factories:
    def absent_if(weightless: Any, value: Any) -> Any:
        """NaN, which queries take as an update of nobody, where the weight is zero."""
        return tf.nest.map_structure(lambda part: tf.where(weightless, tf.fill(tf.shape(part), math.nan), part), value)

    class Private(tff.aggregators.UnweightedAggregationFactory, tff.aggregators.WeightedAggregationFactory):
        def __init__(self, plan: Plan, seed: int, *, afresh: bool) -> None:
            self._plan, self._seed, self._afresh = plan, seed, afresh

        def query(self, value_type: Any) -> BeforeMinusAfter:
            query = self._plan.query(self._seed, tff.types.type_to_tf_tensor_specs(value_type))
            return BeforeMinusAfter(query, afresh=self._afresh)

        def create(self, value_type: Any, weight_type: Any = None) -> Any:
            query = self.query(value_type)
            process = tff.aggregators.DifferentiallyPrivateFactory(query).create(value_type)
            state_type, values_type = (
                process.initialize.type_signature.result,
                tff.FederatedType(value_type, tff.CLIENTS),
            )
            rounds = self._plan.rounds if self._plan.is_private else np.iinfo(np.int32).max

            @tff.tensorflow.computation(state_type.member)
            @tf.function(autograph=False)
            def covered(state: Any) -> Any:
                tf.debugging.assert_less(
                    query.rounds_done(state.query_state),
                    rounds,
                    f"the plan's {rounds} rounds are done and its guarantee covers no more: plan more rounds.",
                )
                return state

            if weight_type is None:

                @tff.federated_computation(state_type, values_type)
                def next_unweighted(state: Any, values: Any) -> Any:
                    return process.next(tff.federated_map(covered, state), values)

                return tff.templates.AggregationProcess(process.initialize, next_unweighted)

            @tff.tensorflow.computation(value_type, weight_type)
            def counted(value: Any, weight: Any) -> Any:
                return absent_if(weight <= 0, value)

            @tff.federated_computation(state_type, values_type, tff.FederatedType(weight_type, tff.CLIENTS))
            def next_weighted(state: Any, values: Any, weights: Any) -> Any:
                return process.next(tff.federated_map(covered, state), tff.federated_map(counted, (values, weights)))

            return tff.templates.AggregationProcess(process.initialize, next_weighted)

    class Measured(tff.aggregators.WeightedAggregationFactory):
        def __init__(self, factory: Any) -> None:
            self._factory = factory

        def create(self, value_type: Any, weight_type: Any) -> Any:
            float_type = tff.TensorType(np.float32)
            process = self._factory.create(value_type, weight_type)
            state_type = process.initialize.type_signature.result
            query = self._factory.query(value_type) if isinstance(self._factory, Private) else None

            @tff.tensorflow.computation(state_type.member)
            def clip_norm_of(state: Any) -> Any:
                return tf.constant(math.inf) if query is None else query.clip_norm(state.query_state)

            @tff.tensorflow.computation(float_type, state_type.member, value_type, weight_type)
            def of_client(clip_norm: Any, state: Any, value: Any, weight: Any) -> Any:
                norm = global_norm(value) if query is None else query.record_norm(state.query_state, value)
                came = (weight > 0) & tf.math.is_finite(norm)
                return (
                    tf.where(came, norm, 0.0),
                    tf.cast(came & (norm > clip_norm), tf.float32),
                    tf.cast(~came, tf.float32),
                )

            @tff.tensorflow.computation(value_type, weight_type)
            def finite(value: Any, weight: Any) -> Any:
                # Entries can be finite where the norm, which queries go by, is not.
                is_finite = tf.math.is_finite(global_norm(value))
                kept = tf.nest.map_structure(lambda part: tf.where(is_finite, part, tf.zeros_like(part)), value)
                return kept, tf.where(is_finite, weight, tf.zeros_like(weight))

            @tff.federated_computation(
                state_type, tff.FederatedType(value_type, tff.CLIENTS), tff.FederatedType(weight_type, tff.CLIENTS)
            )
            def next_round(state: Any, values: Any, weights: Any) -> Any:
                values, weights = tff.federated_map(finite, (values, weights))
                clip_norm = tff.federated_map(clip_norm_of, state)
                shared = (tff.federated_broadcast(clip_norm), tff.federated_broadcast(state))
                seen = tff.federated_sum(tff.federated_map(of_client, (*shared, values, weights)))
                output = process.next(state, values, weights)
                measurements = tff.federated_zip(AggregationMeasurements(seen[0], seen[1], seen[2], clip_norm))
                return tff.templates.MeasuredProcessOutput(output.state, output.result, measurements)

            return tff.templates.AggregationProcess(process.initialize, next_round)

    return _Factories(Private, Measured)
