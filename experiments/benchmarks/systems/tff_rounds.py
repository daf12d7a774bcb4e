"""A round of TensorFlow Federated's federated averaging, with its own aggregator for central Gaussian privacy.

The aggregator clips the updates, adds the noise to their sum and divides by the expected number of clients. Variants:

- "functional-iterator": a `FunctionalModel` trained by a loop over the dataset's iterator
  (`LoopImplementation.DATASET_ITERATOR`), on clients that are `tf.data.Dataset`s, which TFF serialises in each round;
- "iterator-tensors": the same on clients that are arrays, cut into minibatches, of which the clients make
  their datasets (`tff.simulation.compose_dataset_computation_with_learning_process`);
- "iterator-resident": the same on clients that are numbers, with all arrays in the clients' computation;
- "functional": a `FunctionalModel`, by the loop that is TFF's default, on datasets;
- "keras": a Keras model, likewise.

The executor and its worker keep their defaults. On a busy machine with 2 processors, one thread within TensorFlow's
operations, no oneDNN, and `max_concurrent_computation_calls` of 1, 2 and 4 made no difference beyond what rounds differ
by; one thread across operations was slower.
"""

from __future__ import annotations

import collections
import re
from typing import Any

import grpc
import numpy as np
import tensorflow as tf
from checks import check_round
from keras_models import gradient_of, new_model, use_threads
from protocol import Work, serve
from workloads import CLIP_NORM, LEARNING_RATE, NOISE_MULTIPLIER, WORKLOADS, FederatedWorkload

# It imports TFF, and sees to it that TFF's worker process ends with this one. No more of dpfl is used.
from dpfl.tff.runtime import tensorflow_federated

tff = tensorflow_federated()


def process_of(workload: str, variant: str, noise_multiplier: float, clip_norm: float, clients: int) -> Any:
    """Returns TFF's learning process on datasets."""
    work, iterates = WORKLOADS[workload], "iterator" in variant
    inputs = tf.TensorSpec((None, *work.example), tf.int32 if work.words else tf.float32)
    spec = collections.OrderedDict(x=inputs, y=tf.TensorSpec((None,), tf.int32))
    loss = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    if variant == "keras":
        model: Any = lambda: tff.learning.models.from_keras_model(new_model(workload), loss, spec)  # noqa: E731
    else:
        model = tff.learning.models.functional_model_from_keras(new_model(workload), loss, spec)
    loops = tff.learning.LoopImplementation
    return tff.learning.algorithms.build_unweighted_fed_avg(
        model,
        client_optimizer_fn=tff.learning.optimizers.build_sgdm(LEARNING_RATE),
        server_optimizer_fn=tff.learning.optimizers.build_sgdm(1.0),
        model_aggregator=tff.aggregators.DifferentiallyPrivateFactory.gaussian_fixed(
            noise_multiplier, float(clients), clip_norm
        ),
        loop_implementation=loops.DATASET_ITERATOR if iterates else loops.DATASET_REDUCE,
    )


class Training:
    """A process with its state, from the workload's first weights, and the data of clients who all take part."""

    def __init__(
        self, workload: str, variant: str, noise_multiplier: float, clip_norm: float, x: np.ndarray, y: np.ndarray
    ) -> None:
        work, clients = WORKLOADS[workload], len(x)
        process = process_of(workload, variant, noise_multiplier, clip_norm, clients)
        batches = collections.OrderedDict(
            x=x.reshape(clients, work.local_steps, work.batch, *work.example),
            y=y.reshape(clients, work.local_steps, work.batch),
        )
        each = [collections.OrderedDict((name, part[k]) for name, part in batches.items()) for k in range(clients)]
        self._data: list[Any] = each
        if variant.endswith("tensors"):
            process = _composed(process, _from_tensors(work))
        elif variant.endswith("resident"):
            process = _composed(process, _from_number(batches))
            self._data = list(range(clients))
        else:
            self._data = [tf.data.Dataset.from_tensor_slices(one) for one in each]
        self._process = process
        first = tff.learning.models.ModelWeights(
            _in_container_of(variant, work.first_weights()), _in_container_of(variant, [])
        )
        self._state = process.set_model_weights(process.initialize(), first)

    def next_round(self) -> None:
        """Does a round.

        Raises:
            RuntimeError: if TFF's worker cannot; the message is what it says, in one line.
        """
        try:
            self._state = self._process.next(self._state, self._data).state
        except grpc.RpcError as error:
            raise RuntimeError(re.sub(r"{{.*?}} *", "", error.details())) from error

    def weights(self) -> list[np.ndarray]:
        """The global weights."""
        return [np.asarray(each) for each in self._process.get_model_weights(self._state).trainable]


def _in_container_of(variant: str, weights: list[np.ndarray]) -> Any:
    """Keras models' weights are lists, functional models' tuples: TFF tells them apart."""
    return weights if variant == "keras" else tuple(weights)


def _composed(process: Any, on_client: Any) -> Any:
    return tff.simulation.compose_dataset_computation_with_learning_process(on_client, process)


def _from_tensors(work: FederatedWorkload) -> Any:
    inputs = tf.TensorSpec((work.local_steps, None, *work.example), tf.int32 if work.words else tf.float32)
    spec = collections.OrderedDict(x=inputs, y=tf.TensorSpec((work.local_steps, None), tf.int32))

    @tff.tensorflow.computation(tff.types.tensorflow_to_type(spec))
    def on_client(batches: Any) -> tf.data.Dataset:
        return tf.data.Dataset.from_tensor_slices(batches)

    return on_client


def _from_number(batches: dict[str, np.ndarray]) -> Any:
    @tff.tensorflow.computation(np.int32)
    def on_client(client: tf.Tensor) -> tf.data.Dataset:
        own = collections.OrderedDict((name, tf.constant(part)[client]) for name, part in batches.items())
        return tf.data.Dataset.from_tensor_slices(own)

    return on_client


def prepare(workload: str, variant: str, threads: int) -> Work:
    """Rounds of one process, checked against federated averaging in NumPy."""
    use_threads(threads)
    work = WORKLOADS[workload]

    def one_round(noise_multiplier: float, clip_norm: float, x: np.ndarray, y: np.ndarray) -> list[np.ndarray]:
        training = Training(workload, variant, noise_multiplier, clip_norm, x, y)
        training.next_round()
        return training.weights()

    check_round(one_round, gradient_of(workload), work)
    training = Training(workload, variant, NOISE_MULTIPLIER, CLIP_NORM, *work.client_examples())
    facts = {"version": tff.__version__, "parameters": work.parameters, "clients": work.clients}
    return Work(training.next_round, facts)


if __name__ == "__main__":
    serve(prepare)
