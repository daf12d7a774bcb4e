"""Updates compressed on their way into any aggregator of TensorFlow Federated."""

from __future__ import annotations

import functools
import math
import secrets
from typing import TYPE_CHECKING, Any, NamedTuple

import tensorflow as tf

from dpfl.compression import Compression
from dpfl.compression.codec import Codec
from dpfl.compression.subspace import Subspaces
from dpfl.errors import InputError
from dpfl.mechanisms.client_noise import with_seed_of_its_own
from dpfl.noise import round_seed
from dpfl.randomness import Purpose, check_seed, stateless_seed
from dpfl.tff.runtime import tensorflow_federated
from dpfl.tff.seeds import fresh_seeds

if TYPE_CHECKING:
    import tensorflow_federated as tff


class CompressedState(NamedTuple):
    """The state of a process of `compressed`.

    Attributes:
        subspace_seed: int32 (2,), public.
        rotation_seed: int32 (2,), public.
        rounding_seed: int32 (2,), of the clients.
        round: how many rounds are done, int32.
        inner: the inner process' state.
    """

    subspace_seed: Any
    rotation_seed: Any
    rounding_seed: Any
    round: Any
    inner: Any


class CompressedMeasurements(NamedTuple):
    """What a process of `compressed` measures in a round.

    Attributes:
        message_bytes: the length of the message that each client sends, int32; depends on no data.
        inner: the inner process' measurements, as private as it says.
    """

    message_bytes: Any
    inner: Any


class _Params(NamedTuple):
    """What clients are told: the subspace's own seed of the round, that of the rotation, and one of roundings."""

    subspace: Any
    signs_seed: Any
    seed: Any


def compressed(
    factory: tff.aggregators.AggregationFactory, compression: Compression, *, seed: int | None = None
) -> tff.aggregators.AggregationFactory:
    """An aggregator whose clients compress their updates, in front of any of TFF's own or of `dpfl.tff.aggregator`.

    Each client takes its update's coordinates in the round's subspace (`random_k`, `rank`), writes them as a message of
    the codec (`bits`, `rotation`), and hands the inner aggregator what is read in that message: an update of the same
    structure and shapes. So a client's update is compressed first and clipped after, and the clip of an inner
    `tff.aggregators.DifferentiallyPrivateFactory` bounds what is summed, which it would not if a quantiser were stacked
    beneath it as its `record_aggregation_factory`. Noise of the inner aggregator lies in all coordinates: for noise in
    the subspace alone give `dpfl.tff.aggregator` the plan of an `Experiment` with a compression.

    Clients of TFF's builders train all weights, and what their updates have outside of the subspace is dropped: with
    `random_k` a fraction k of all coordinates arrives, unscaled. An update that is not finite, in the subspace or
    outside, arrives as NaN throughout, and the inner aggregator does with it what it does: TFF's plain mean
    becomes NaN, and its sums for differential privacy too unless it zeroes (tff.learning's clients send zeros of weight
    0 instead, on their own). Weights pass as they are.

    A process measures `CompressedMeasurements`: the bytes of a client's message beside the inner measurements.

    Args:
        factory: the inner one, a `tff.aggregators.UnweightedAggregationFactory`, `WeightedAggregationFactory`, or both.
        compression: of updates; of it `bits`, `rotation`, `random_k` and `rank`.
        seed: of the subspaces and rotations, which are public: to repeat a simulation. Without, every `initialize`
            draws seeds of its own. Roundings are drawn afresh by every client in any case, since TFF does not tell them
            apart.

    Returns:
        A factory of the inner one's kinds.

    Raises:
        InputError: there is no TensorFlow Federated on this machine, the inner factory is none, or the compression
            is the server's in part; and from `create`, the updates are not of float32, or cannot be compressed so.
    """
    tff = tensorflow_federated()
    kinds = (tff.aggregators.UnweightedAggregationFactory, tff.aggregators.WeightedAggregationFactory)
    if not isinstance(factory, kinds):
        raise InputError(
            "factory must be an aggregation factory of tff.aggregators or tff.learning, or from dpfl.tff.aggregator, "
            f"but it was {type(factory).__name__}."
        )
    if not isinstance(compression, Compression):
        raise InputError(f"compression must be a dpfl.Compression, but it was {type(compression).__name__}.")
    if compression.sparsity:
        raise InputError(
            "pruning follows the released weights, which an aggregator does not see: run the experiment with "
            'engine="tff", or leave sparsity out.'
        )
    if compression.top_k is not None:
        raise InputError(
            "top_k is a choice of the server among the released changes, which comes after an aggregator: run the "
            'experiment with engine="tff", or leave top_k out.'
        )
    maker = _factories(tff)[tuple(isinstance(factory, kind) for kind in kinds)]
    if seed is None:
        return maker(factory, compression, secrets.randbits(64), afresh=True)
    return maker(factory, compression, check_seed(seed), afresh=False)


class _Client:
    """What happens to updates of a shape on the way to the server, in graph.

    Args:
        compression: of updates.
        specs: `tf.TensorSpec`s of an update's tensors.

    Raises:
        InputError: the tensors are not of float32, or cannot be compressed so.
    """

    def __init__(self, compression: Compression, specs: list[tf.TensorSpec]) -> None:
        other = [spec for spec in specs if spec.dtype != tf.float32 or not spec.shape.is_fully_defined()]
        if other:
            raise InputError(
                "updates that are compressed must be float32 tensors of known shapes, but one has "
                f"{other[0].dtype.name} and shape {other[0].shape}: aggregate it apart."
            )
        shapes = [tuple(spec.shape) for spec in specs]
        self._subspaces = Subspaces(compression, shapes, rounds=1)
        self._codec = Codec(compression.bits, compression.rotation)
        self.message_bytes = self._codec.message_bytes(sum(math.prod(shape) for shape in self._subspaces.record_shapes))

    def params(self, state: CompressedState) -> _Params:
        """What clients are told of a round."""
        subspace, rotation, rounding = state.subspace_seed, state.rotation_seed, state.rounding_seed
        return _Params(
            self._subspaces.of_round(subspace, state.round),
            round_seed(rotation, state.round),
            round_seed(rounding, state.round),
        )

    def arriving(self, params: _Params, update: Any) -> Any:
        """What the server reads of a client's update."""
        own = with_seed_of_its_own(params)
        tensors = tf.nest.flatten(update)
        finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(tensor)) for tensor in tensors])
        sent = self._subspaces.sent(own.subspace, self._subspaces.records(own.subspace, tensors))
        message = self._codec.encode(sent, own.signs_seed, own.seed)
        read = self._codec.decode(message, tf.size(sent), own.signs_seed)
        arrived = self._subspaces.updates(own.subspace, self._subspaces.received(own.subspace, read))
        arrived = [
            tf.ensure_shape(tf.where(finite, part, tf.fill(tf.shape(part), math.nan)), tensor.shape)
            for part, tensor in zip(arrived, tensors, strict=True)
        ]
        return tf.nest.pack_sequence_as(update, arrived)


@functools.cache
def _factories(tff: Any) -> dict[tuple[bool, ...], Any]:
    """Classes by whether they are unweighted and weighted factories, which can only be made once TFF is there."""

    class Base:
        def __init__(self, factory: Any, compression: Compression, seed: int, *, afresh: bool) -> None:
            self._factory, self._compression, self._seed, self._afresh = factory, compression, seed, afresh

        def create(self, value_type: Any, weight_type: Any = None) -> Any:
            specs = tf.nest.flatten(tff.types.type_to_tf_tensor_specs(value_type))
            client = _Client(self._compression, specs)
            types = (value_type,) if weight_type is None else (value_type, weight_type)
            process = self._factory.create(*types)
            purposes = (Purpose.SUBSPACE, Purpose.ROTATION, Purpose.ROUNDING)

            @tff.tensorflow.computation
            def seeds() -> Any:
                constants = [tf.constant(stateless_seed(self._seed, purpose)) for purpose in purposes]
                if self._afresh:
                    drawn = fresh_seeds(len(constants))
                    constants = [tf.bitwise.bitwise_xor(value, drawn[at]) for at, value in enumerate(constants)]
                return (*constants, tf.constant(0))

            @tff.federated_computation
            def initialize() -> Any:
                own, inner = tff.federated_eval(seeds, tff.SERVER), process.initialize()
                return tff.federated_zip(CompressedState(own[0], own[1], own[2], own[3], inner))

            state_type = initialize.type_signature.result

            @tff.tensorflow.computation(state_type.member)
            def params_of(state: Any) -> Any:
                return client.params(state)

            @tff.tensorflow.computation(params_of.type_signature.result, value_type)
            @tf.function(autograph=False)
            def arriving(params: Any, value: Any) -> Any:
                return client.arriving(params, value)

            @tff.tensorflow.computation(state_type.member)
            def further(state: Any) -> Any:
                return state.subspace_seed, state.rotation_seed, state.rounding_seed, state.round + 1

            @tff.tensorflow.computation
            def message_bytes() -> Any:
                return tf.constant(client.message_bytes)

            def through(state: Any, values: Any, *weights: Any) -> Any:
                told = tff.federated_broadcast(tff.federated_map(params_of, state))
                arrived = tff.federated_map(arriving, (told, values))
                output = process.next(state.inner, arrived, *weights)
                own = tff.federated_map(further, state)
                after = tff.federated_zip(CompressedState(own[0], own[1], own[2], own[3], output.state))
                measured = CompressedMeasurements(tff.federated_eval(message_bytes, tff.SERVER), output.measurements)
                return tff.templates.MeasuredProcessOutput(after, output.result, tff.federated_zip(measured))

            clients = [tff.FederatedType(of_client, tff.CLIENTS) for of_client in types]
            if weight_type is None:

                @tff.federated_computation(state_type, *clients)
                def next_unweighted(state: Any, values: Any) -> Any:
                    return through(state, values)

                return tff.templates.AggregationProcess(initialize, next_unweighted)

            @tff.federated_computation(state_type, *clients)
            def next_weighted(state: Any, values: Any, weights: Any) -> Any:
                return through(state, values, weights)

            return tff.templates.AggregationProcess(initialize, next_weighted)

    class Unweighted(Base, tff.aggregators.UnweightedAggregationFactory):
        def create(self, value_type: Any) -> Any:  # type: ignore[override]
            return super().create(value_type)

    class Weighted(Base, tff.aggregators.WeightedAggregationFactory):
        def create(self, value_type: Any, weight_type: Any) -> Any:  # type: ignore[override]
            return super().create(value_type, weight_type)

    class Both(Base, tff.aggregators.UnweightedAggregationFactory, tff.aggregators.WeightedAggregationFactory):
        pass

    return {(True, False): Unweighted, (False, True): Weighted, (True, True): Both}
