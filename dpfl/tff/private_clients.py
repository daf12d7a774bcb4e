"""DP-SGD clients: client work for learning processes, and federated averaging put together with it."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import tensorflow as tf

from dpfl.clients import ClientTraining
from dpfl.clients.dp_sgd import ClientSeeds, client_numbers, client_seeds, run_seeds, train_privately
from dpfl.clients.example_privacy import ClientPlan
from dpfl.clients.per_example import check_model
from dpfl.clients.schedule import examples_seen
from dpfl.compression.subspace import Projection
from dpfl.errors import InputError
from dpfl.models.functional import FunctionalModel, ModelBuilder
from dpfl.randomness import check_seed
from dpfl.tff.batches import BatchSpec, class_labels, functional_model
from dpfl.tff.runtime import tensorflow_federated
from dpfl.tff.seeds import fresh_seeds

if TYPE_CHECKING:
    import tensorflow_federated as tff

_ALL_RECORDS = 2**31 - 1


class WorkState(NamedTuple):
    """What the client work keeps on the server.

    Attributes:
        round: rounds done, an int32 scalar.
        seeds: of the run: sampling, noise and random layers, int32, (3, 2). Where the work was built with a seed,
            whoever has them can take the clients' noise off: keep them, and checkpoints of them, as secret as the seed.
    """

    round: Any
    seeds: Any


def client_work(
    model: str | ModelBuilder | tf.keras.Model | FunctionalModel,
    plan: ClientPlan,
    *,
    input_spec: Any,
    num_classes: int | None = None,
    seed: int | None = None,
) -> tff.learning.templates.ClientWorkProcess:
    """Builds client work in which each client trains by DP-SGD on its own examples.

    A client collects all its batches, since minibatches are drawn from all of its records: how the dataset is batched
    makes no difference. It sends weights before minus weights after, with weight 1, whatever its number of records.
    An update that is not finite is sent as zeros with weight 0, as TFF's own clients do. A client without examples
    sends zeros, without noise: that it has none counts as public, as every client's number of records does, and there
    is no example to protect.

    There are no training metrics: nothing protects them. The process' state is a `WorkState`.

    Args:
        model: what `FunctionalModel` takes, or a `FunctionalModel`. The weights are its trainable ones, a list in the
            order of `FunctionalModel.shapes`; frozen ones are built in.
        plan: of the clients, from `plan_clients` or `Experiment.client_plan`: training, noise multiplier, records.
        input_spec: `element_spec` of the clients' datasets: batches (x, y) or OrderedDict(x=, y=), x of any numeric
            type and shape (batch, *example shape), y integer labels of shape (batch,) or (batch, 1).
        num_classes: number of classes; may be left out where a `FunctionalModel` is given.
        seed: of everything that is drawn, as in the in-graph engine: a client's minibatches and noise are then a
            function of the seed, the round and the client's index, an integer feature `client` in all of its records.
            For simulations, since whoever knows the seed can take the noise off. Without, each client draws
            fresh seeds of its own, which nobody else learns, from TensorFlow's generator; it is made for
            simulations, and no cryptographic source.

    Returns:
        A `tff.learning.templates.ClientWorkProcess`. Its results are updates, each of which protects the examples of
        its client under the plan's guarantee.

    Raises:
        InputError: there is no TensorFlow Federated on this machine, the plan is none, the datasets do not hold
            what is needed, or the model does not fit them or has gradients that cannot be told apart by example.
    """
    tff = tensorflow_federated()
    functional, spec = _private_model(model, plan, input_spec, num_classes, seed)
    return private_work(tff, functional, plan, spec, seed)


def build_dp_sgd_fed_avg(
    model: str | ModelBuilder | tf.keras.Model | FunctionalModel,
    plan: ClientPlan,
    *,
    input_spec: Any,
    num_classes: int | None = None,
    aggregator: tff.aggregators.AggregationFactory | None = None,
    server_optimizer: tff.learning.optimizers.Optimizer | None = None,
    seed: int | None = None,
) -> tff.learning.templates.LearningProcess:
    """Builds federated averaging of clients that train by DP-SGD.

    The released model protects each example under `plan.guarantee`, because each client's update does.

    Args:
        model: what `FunctionalModel` takes, or a `FunctionalModel`. A Keras model brings its initial weights; others
            follow the seed.
        plan: of the clients, as in `client_work`.
        input_spec: as in `client_work`.
        num_classes: as in `client_work`.
        aggregator: any TFF aggregation factory for a list of float32 tensors. None takes the mean of the clients that
            took part, zeros where nobody did; `tff.aggregators.DifferentiallyPrivateFactory` adds user-level privacy.
        server_optimizer: a TFF optimizer, which takes the mean of "before minus after" for a gradient. None takes
            SGD with learning rate 1: plain averaging.
        seed: as in `client_work`; without, initial weights are drawn afresh too.

    Returns:
        A `tff.learning.templates.LearningProcess` over `tff.learning.models.ModelWeights`, whose trainable weights are
        a list in the order of `FunctionalModel.shapes`, and whose others are none.

    Raises:
        InputError: as in `client_work`, or the aggregator or optimizer is not one of TFF's.
    """
    tff = tensorflow_federated()
    if not isinstance(server_optimizer, tff.learning.optimizers.Optimizer | None):
        raise InputError(
            f"server_optimizer must be one of tff.learning.optimizers (build_sgdm(1.0), say), but it was "
            f"{server_optimizer!r}."
        )
    if not isinstance(aggregator, tff.aggregators.AggregationFactory | None):
        raise InputError(
            "aggregator must be one of TFF's aggregation factories "
            f"(dpfl.tff.aggregator(plan), say), but it was {type(aggregator).__name__}."
        )
    functional, spec = _private_model(model, plan, input_spec, num_classes, seed)
    work = private_work(tff, functional, plan, spec, seed)
    if aggregator is None:
        # Where nobody came, or came through, it would be 0 / 0.
        aggregator = tff.aggregators.MeanFactory(no_nan_division=True)
    elif not isinstance(aggregator, tff.aggregators.WeightedAggregationFactory):
        aggregator = tff.aggregators.as_weighted_aggregator(aggregator)
    if server_optimizer is None:
        server_optimizer = tff.learning.optimizers.build_sgdm(1.0)
    weights = functional.initial_weights(_drawn_if_none(seed))
    return composed(tff, weights, work, aggregator, server_optimizer)


def composed(tff: Any, weights: list[np.ndarray], work: Any, aggregator: Any, server_optimizer: Any) -> Any:
    """A learning process of client work, a weighted aggregator and a server optimizer.

    Args:
        tff: TensorFlow Federated.
        weights: initial ones, float32.
        work: a `tff.learning.templates.ClientWorkProcess`.
        aggregator: a `tff.aggregators.WeightedAggregationFactory`.
        server_optimizer: a `tff.learning.optimizers.Optimizer`.
    """

    @tff.tensorflow.computation
    def initial_weights() -> Any:
        return tff.learning.models.ModelWeights([tf.constant(weight) for weight in weights], ())

    result_type = work.next.type_signature.result.result.member
    weights_type = initial_weights.type_signature.result
    return tff.learning.templates.compose_learning_process(
        initial_weights,
        tff.learning.templates.build_broadcast_process(weights_type),
        work,
        aggregator.create(result_type.update, result_type.update_weight),
        tff.learning.templates.build_apply_optimizer_finalizer(server_optimizer, weights_type),
    )


def _private_model(
    model: Any, plan: ClientPlan, input_spec: Any, num_classes: int | None, seed: int | None
) -> tuple[FunctionalModel, BatchSpec]:
    """The model and the datasets' elements; refuses what cannot be trained by DP-SGD."""
    if isinstance(plan, ClientTraining):
        raise InputError(
            "a plan is needed, from which the noise and its guarantee come: "
            + (
                "give dpfl.clients.example_privacy.plan_clients(training, target, sampler, records, rounds)."
                if plan.is_private
                else "give the training an example_clip and plan it by dpfl.clients.example_privacy.plan_clients; "
                "clients without example-level privacy are those of tff.learning.algorithms.build_unweighted_fed_avg."
            )
        )
    if not isinstance(plan, ClientPlan):
        raise InputError(
            f"plan must be a ClientPlan (Experiment.client_plan() gives one), but it was {type(plan).__name__}."
        )
    spec = BatchSpec.of(input_spec)
    if seed is not None:
        check_seed(seed)
        if spec.client is None:
            raise InputError(
                "with a seed, every client's draws depend on its index: let its dataset give OrderedDict(x=, y=, "
                "client=), client being the index in each record, or leave the seed out."
            )
    functional = functional_model(model, spec, num_classes)
    # Made up, as no data is there yet: different, and small enough for the first two words of any vocabulary.
    examples = np.random.default_rng(0).uniform(0, 2, (3, *spec.x.shape[1:])).astype(np.float32)
    check_model(functional.to_keras(functional.initial_weights(0)), examples)
    return functional, spec


class _Sent(NamedTuple):
    """What a client sends: before minus after, its weight, and for simulations how many gradients it clipped."""

    update: list[Any]
    weight: Any
    clipped_fraction: Any


def private_work(
    tff: Any,
    model: FunctionalModel,
    plan: ClientPlan,
    spec: BatchSpec,
    seed: int | None,
    *,
    weighted: bool = False,
    measured: bool = False,
    projection: Projection | None = None,
) -> Any:
    """`client_work` of what was checked.

    Weighted, clients weigh as much as the examples that they process. Measured, the process reports the clients'
    `clipped_fraction`s, summed up. With a projection they train the weights that it leaves.
    """
    run = np.stack(run_seeds(_drawn_if_none(seed)))
    state_type = tff.to_type(WorkState(np.int32, (np.int32, [3, 2])))
    tensors = [tff.TensorType(np.float32, shape) for shape in model.shapes]
    weights_type = tff.to_type(tff.learning.models.ModelWeights(tensors, ()))
    data_type = tff.SequenceType(tff.types.tensorflow_to_type(spec.elements))
    traced = _traced(model, plan, spec, projection, seeded=seed is not None)

    @tff.tensorflow.computation(state_type, weights_type, data_type)
    @tf.function(autograph=False)
    def train(state: WorkState, weights: Any, dataset: tf.data.Dataset) -> Any:
        x, y, indices = _collected(dataset, spec)
        sent = traced(state, list(weights.trainable), x, y, indices)
        weight = sent.weight * _examples_seen(plan.training, tf.size(y)) if weighted else sent.weight
        return tff.learning.templates.ClientResult(sent.update, weight), sent.clipped_fraction

    @tff.tensorflow.computation
    def initial_state() -> WorkState:
        return WorkState(tf.constant(0), tf.constant(run))

    @tff.tensorflow.computation(state_type)
    def next_state(state: WorkState) -> WorkState:
        return WorkState(state.round + 1, state.seeds)

    @tff.federated_computation
    def initialize() -> Any:
        return tff.federated_eval(initial_state, tff.SERVER)

    @tff.federated_computation(
        initialize.type_signature.result,
        tff.FederatedType(weights_type, tff.CLIENTS),
        tff.FederatedType(data_type, tff.CLIENTS),
    )
    def next_round(state: Any, weights: Any, datasets: Any) -> Any:
        results, clipped = tff.federated_map(train, (tff.federated_broadcast(state), weights, datasets))
        measurements = tff.federated_sum(clipped) if measured else tff.federated_value((), tff.SERVER)
        return tff.templates.MeasuredProcessOutput(tff.federated_map(next_state, state), results, measurements)

    return tff.learning.templates.ClientWorkProcess(initialize, next_round)


# From here on everything runs in graph, on one client.


def _traced(
    model: FunctionalModel, plan: ClientPlan, spec: BatchSpec, projection: Projection | None, *, seeded: bool
) -> Any:
    """A client's training, traced outside of TFF.

    In TFF's graphs `==` on tensors compares objects, not values, and Keras falls back to TensorFlow 1: traced
    here, it is the graph of the in-graph engine.
    """

    def train(state: WorkState, weights: list[tf.Tensor], x: tf.Tensor, y: tf.Tensor, indices: tf.Tensor) -> _Sent:
        return _train(model, plan, state, weights, x, y, indices if seeded else None, projection)

    labels = tf.TensorSpec([None], tf.int32)
    return tf.function(train, autograph=False).get_concrete_function(
        WorkState(tf.TensorSpec([], tf.int32), tf.TensorSpec([3, 2], tf.int32)),
        [tf.TensorSpec(shape) for shape in model.shapes],
        tf.TensorSpec([None, *spec.x.shape[1:]]),
        labels,
        labels,
    )


def _train(
    model: FunctionalModel,
    plan: ClientPlan,
    state: WorkState,
    weights: list[tf.Tensor],
    x: tf.Tensor,
    y: tf.Tensor,
    indices: tf.Tensor | None,
    projection: Projection | None,
) -> _Sent:
    """What one client sends: zeros where it has no examples, and with weight 0 where its update is not finite."""
    records = tf.shape(y)[0]
    if plan.is_private:
        _check_covered(plan, state.round, records)
    if indices is None:
        seeds, client = _fresh_seeds(state.seeds), tf.constant(0)
    else:
        seeds, client = ClientSeeds(*tf.unstack(state.seeds)), tf.concat([indices, [0]], axis=0)[0]
        tf.debugging.assert_equal(indices, client, "the feature client must be the same in all of a client's records.")

    def trained() -> _Sent:
        update, clipped_fraction = train_privately(
            model,
            weights,
            x,
            y,
            training=plan.training,
            numbers=client_numbers(plan.training, plan.noise_multiplier),
            seeds=client_seeds(seeds, state.round, client),
            onto=list if projection is None else projection.onto(weights, state.round),
        )
        finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(part)) for part in update])
        sent = [tf.where(finite, -part, tf.zeros_like(part)) for part in update]
        return _Sent(sent, tf.cast(finite, tf.float32), clipped_fraction)

    def idle() -> _Sent:
        return _Sent([tf.zeros_like(weight) for weight in weights], tf.constant(1.0), tf.constant(0.0))

    return tf.cond(records > 0, trained, idle)


def _collected(dataset: tf.data.Dataset, spec: BatchSpec) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """All of a client's examples, n of them: x float32 (n, *example shape), y and the client's index int32 (n,)."""

    def parts(*batch: Any) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        x, y, client = (*batch, None) if len(batch) > 1 else (batch[0]["x"], batch[0]["y"], batch[0].get("client"))
        labels = class_labels(y)
        return tf.cast(x, tf.float32), labels, tf.zeros_like(labels) if client is None else tf.cast(client, tf.int32)

    nothing = (tf.zeros([0, *spec.x.shape[1:]]), tf.zeros([0], tf.int32), tf.zeros([0], tf.int32))
    whole = dataset.map(parts).unbatch().batch(_ALL_RECORDS)
    return whole.reduce(nothing, lambda _, batch: batch)


def _examples_seen(training: ClientTraining, records: tf.Tensor) -> tf.Tensor:
    """How many examples a client with so many records processes in a round, a float32 scalar."""
    numbers = client_numbers(training, 0.0)
    seen = examples_seen(
        records[None],
        steps=numbers.steps,
        epochs=numbers.epochs,
        batch_size=training.batch_size,
        sampling=training.example_sampling,
    )
    return tf.cast(seen[0], tf.float32)


def _check_covered(plan: ClientPlan, round_number: tf.Tensor, records: tf.Tensor) -> None:
    """Stops a client of which the plan's guarantee would not be true."""
    known = tf.constant(np.unique(np.append(plan.records, 0)), tf.int32)
    tf.debugging.assert_less(
        round_number,
        plan.rounds,
        f"the plan's {plan.rounds} rounds are done and its guarantee covers no more: plan more rounds.",
    )
    tf.debugging.assert_equal(
        tf.reduce_any(known == records),
        True,
        "a client's number of records is none of those in the plan, so that its guarantee does not cover it: plan "
        "with the clients' numbers of records.",
    )


def _fresh_seeds(run: tf.Tensor) -> ClientSeeds:
    """Seeds of this client alone, mixed with the run's so that neither of the two sources is enough to know them."""
    return ClientSeeds(*tf.unstack(tf.bitwise.bitwise_xor(run, fresh_seeds(3))))


def _drawn_if_none(seed: int | None) -> int:
    return secrets.randbits(64) if seed is None else seed
