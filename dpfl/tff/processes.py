"""The learning process of an experiment: TFF's own algorithms with dpfl's clients, mechanism and server."""

from __future__ import annotations

import collections
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from dpfl.clients import ClientTraining
from dpfl.clients.example_privacy import ClientPlan
from dpfl.clients.schedule import minibatches
from dpfl.compression.subspace import Projection
from dpfl.models.functional import FunctionalModel
from dpfl.randomness import Purpose, stateless_seed
from dpfl.tff.batches import BatchSpec
from dpfl.tff.models import training_model
from dpfl.tff.optimizers import client_optimizer
from dpfl.tff.private_clients import composed, private_work
from dpfl.tff.runtime import tensorflow_federated

if TYPE_CHECKING:
    import tensorflow_federated as tff


def learning_process(
    model: FunctionalModel,
    training: ClientTraining,
    *,
    aggregator: tff.aggregators.WeightedAggregationFactory,
    server_optimizer: tff.learning.optimizers.Optimizer,
    seed: int,
    client_plan: ClientPlan | None = None,
    weighted: bool = False,
    projection: Projection | None = None,
) -> tff.learning.templates.LearningProcess:
    """Builds the process in which clients train as in the in-graph engine, to the same minibatches and noise.

    FedAvg is `tff.learning.algorithms.build_weighted_fed_avg`, which weights equally unless told otherwise, FedProx the
    same with `client_optimizer`'s proximal term, and FedSGD `build_fed_sgd`; clients that train by DP-SGD are
    `client_work`. A client lays out its minibatches itself, in the order of `dpfl.clients.schedule`, from `records` of
    its own.

    Args:
        model: the model as a function of its weights.
        training: what clients do.
        aggregator: of the updates, before minus after.
        server_optimizer: takes the aggregated update for a gradient.
        seed: of initial weights, minibatches, random layers and the noise of the clients.
        client_plan: the plan of clients that train by DP-SGD; None if they do not.
        weighted: whether clients weigh as much as the examples that they processed, and not all the same.
        projection: onto the weights that are trained; None for all.

    Returns:
        A `tff.learning.templates.LearningProcess` whose `next` takes, for each client, what `records` gives.
    """
    tff = tensorflow_federated()
    weights = model.initial_weights(seed)
    if client_plan is not None:
        spec = BatchSpec.of(_whole_spec(model))
        work = private_work(
            tff, model, client_plan, spec, seed, weighted=weighted, measured=True, projection=projection
        )
        process = composed(tff, weights, work, aggregator, server_optimizer)
        batches: Any = _whole
    else:
        functional = training_model(model, weights, projection)
        common = {"server_optimizer_fn": server_optimizer, "model_aggregator": aggregator}
        weighting = tff.learning.ClientWeighting.NUM_EXAMPLES if weighted else tff.learning.ClientWeighting.UNIFORM
        averaging = {**common, "client_optimizer_fn": client_optimizer(training), "client_weighting": weighting}
        loop = {"loop_implementation": tff.learning.LoopImplementation.DATASET_ITERATOR}  # the faster one
        if training.is_fed_sgd:
            process = tff.learning.algorithms.build_fed_sgd(functional, **common, **loop)
        else:
            process = tff.learning.algorithms.build_weighted_fed_avg(functional, **averaging, **loop)
        batches = _minibatches(model, training, seed, with_round=projection is not None)

    @tff.tensorflow.computation(tff.types.tensorflow_to_type(_records_spec(model)))
    def on_client(records: Any) -> tf.data.Dataset:
        return batches(records)

    return tff.simulation.compose_dataset_computation_with_learning_process(on_client, process)


def records(x: np.ndarray, y: np.ndarray, client: int, round_number: int) -> Any:
    """What a client of `learning_process` has in a round.

    Args:
        x: its examples, float32 (n, *example shape).
        y: their labels, int32 (n,).
        client: its index.
        round_number: from 0.
    """
    return collections.OrderedDict(x=x, y=y, client=np.int32(client), round=np.int32(round_number))


def _records_spec(model: FunctionalModel) -> Any:
    scalar = tf.TensorSpec([], tf.int32)
    return collections.OrderedDict(
        x=tf.TensorSpec([None, *model.example_shape]), y=tf.TensorSpec([None], tf.int32), client=scalar, round=scalar
    )


def _whole_spec(model: FunctionalModel) -> Any:
    labels = tf.TensorSpec([None], tf.int32)
    return collections.OrderedDict(x=tf.TensorSpec([None, *model.example_shape]), y=labels, client=labels)


def _whole(records: Any) -> tf.data.Dataset:
    """All of a client's examples in one batch, of which it draws its minibatches."""
    indices = tf.fill(tf.shape(records["y"]), records["client"])
    return tf.data.Dataset.from_tensors(collections.OrderedDict(x=records["x"], y=records["y"], client=indices))


def _minibatches(model: FunctionalModel, training: ClientTraining, seed: int, *, with_round: bool) -> Any:
    """Lays out a client's minibatches of a round as the in-graph engine does, with the seeds of random layers."""
    shuffling, layers = (stateless_seed(seed, purpose) for purpose in (Purpose.SHUFFLING, Purpose.MODEL))
    fold_in = tf.random.experimental.stateless_fold_in

    def laid_out(records: Any) -> Any:
        rows, mask = minibatches(
            tf.constant([0]),
            tf.size(records["y"])[None],
            records["client"][None],
            steps=tf.constant(training.steps or 0),
            epochs=tf.constant(training.epochs or 0),
            batch_size=training.batch_size,
            seed=tf.constant(shuffling),
            round_number=records["round"],
        )
        of_client = fold_in(fold_in(tf.constant(layers), records["round"]), records["client"])
        seeds = tf.map_fn(lambda step: fold_in(of_client, step), tf.range(tf.shape(rows)[1]))
        x = collections.OrderedDict(examples=tf.gather(records["x"], rows[0]), mask=mask[0], seed=seeds)
        if with_round:
            x["round"] = tf.fill(tf.shape(rows)[1:2], records["round"])
        return collections.OrderedDict(x=x, y=tf.gather(records["y"], rows[0]))

    # Traced outside of TFF, as models are.
    traced = tf.function(laid_out, autograph=False).get_concrete_function(_records_spec(model))
    return lambda records: tf.data.Dataset.from_tensor_slices(traced(records))
