"""The workloads' models in Keras 2, for the systems on TensorFlow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
from checks import Gradient, check_parameters
from protocol import Work
from workloads import LEARNING_RATE, SEED, WORKLOADS, FederatedWorkload

layers = tf.keras.layers
Step = Callable[[], object]


def _cnn() -> tf.keras.Model:
    return tf.keras.Sequential(
        [
            tf.keras.Input((28, 28, 1)),
            layers.Conv2D(16, 8, strides=2, padding="same", activation="relu"),
            layers.MaxPool2D(2, 1),
            layers.Conv2D(32, 4, strides=2, padding="valid", activation="relu"),
            layers.MaxPool2D(2, 1),
            layers.Flatten(),
            layers.Dense(32, activation="relu"),
            layers.Dense(10),
        ]
    )


def _mlp() -> tf.keras.Model:
    return tf.keras.Sequential([tf.keras.Input((784,)), layers.Dense(100, activation="relu"), layers.Dense(10)])


def _lstm() -> tf.keras.Model:
    return tf.keras.Sequential(
        [tf.keras.Input((50,), dtype=tf.int32), layers.Embedding(100, 32), layers.LSTM(64), layers.Dense(2)]
    )


def _transformer() -> tf.keras.Model:
    tokens = tf.keras.Input((32,), dtype=tf.int32)
    hidden = layers.Embedding(1_000, 64)(tokens)
    attended = layers.MultiHeadAttention(num_heads=4, key_dim=16)(hidden, hidden)
    hidden = layers.LayerNormalization()(layers.Add()([hidden, attended]))
    forward = layers.Dense(64)(layers.Dense(128, activation="relu")(hidden))
    hidden = layers.LayerNormalization()(layers.Add()([hidden, forward]))
    return tf.keras.Model(tokens, layers.Dense(10)(layers.GlobalAveragePooling1D()(hidden)))


def _softmax() -> tf.keras.Model:
    return tf.keras.Sequential([tf.keras.Input((64,)), layers.Dense(10)])


def _cifar() -> tf.keras.Model:
    return tf.keras.Sequential(
        [
            tf.keras.Input((32, 32, 3)),
            layers.Conv2D(32, 3, activation="relu"),
            layers.Conv2D(64, 3, activation="relu"),
            layers.MaxPool2D(2),
            layers.Flatten(),
            layers.Dense(128, activation="relu"),
            layers.Dense(10),
        ]
    )


def _characters() -> tf.keras.Model:
    return tf.keras.Sequential(
        [tf.keras.Input((80,), dtype=tf.int32), layers.Embedding(90, 8), layers.LSTM(128), layers.Dense(90)]
    )


def _large() -> tf.keras.Model:
    hidden = [layers.Dense(units, activation="relu") for units in (1_000, 200)]
    return tf.keras.Sequential([tf.keras.Input((784,)), *hidden, layers.Dense(10)])


MODELS: dict[str, Callable[[], tf.keras.Model]] = {
    "dpsgd-cnn": _cnn,
    "dpsgd-mlp": _mlp,
    "dpsgd-lstm": _lstm,
    "dpsgd-transformer": _transformer,
    "fedavg-mlp": _mlp,
    "fedavg-softmax": _softmax,
    "fedavg-cnn": _cifar,
    "fedavg-shakespeare": _characters,
    "fedavg-large": _large,
}


def use_threads(threads: int, within_operation: int | None = None) -> None:
    """Lets TensorFlow use so many threads across operations and within each; before it does anything."""
    tf.config.threading.set_intra_op_parallelism_threads(within_operation or threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)


def new_model(workload: str) -> tf.keras.Model:
    """Returns the workload's model with its first weights, the same at every call.

    Raises:
        ValueError: if the number of weights is not the workload's.
    """
    tf.keras.utils.set_random_seed(SEED)
    model, work = MODELS[workload](), WORKLOADS[workload]
    check_parameters(sum(int(np.prod(each.shape)) for each in model.trainable_weights), work.parameters)
    if isinstance(work, FederatedWorkload):
        model.set_weights(work.first_weights())
    return model


def gradient_of(workload: str) -> Gradient:
    """Returns what `check_round` calls `gradient`, by Keras."""
    model = new_model(workload)
    loss = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def gradient(weights: list[np.ndarray], x: np.ndarray, y: np.ndarray) -> list[np.ndarray]:
        model.set_weights(weights)
        with tf.GradientTape() as tape:
            mean_loss = loss(y, model(x))
        return [tf.convert_to_tensor(each).numpy() for each in tape.gradient(mean_loss, model.trainable_weights)]

    return gradient


def step_of(model: tf.keras.Model, data: Any) -> Step:
    """Returns a function that does one training step of a compiled model in a `tf.function` and waits for its end.

    Args:
        model: compiled.
        data: what its `train_step` takes, the same in each step.
    """
    tensors = tf.nest.map_structure(tf.convert_to_tensor, data)
    train = tf.function(lambda: model.train_step(tensors))

    def step() -> None:
        train()
        model.trainable_weights[-1].numpy()

    return step


def plain_model(workload: str) -> tf.keras.Model:
    """Returns the workload's model, compiled for plain SGD."""
    model = new_model(workload)
    model.compile(
        tf.keras.optimizers.SGD(LEARNING_RATE), tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    return model


def change(model: tf.keras.Model, step: Step) -> np.ndarray:
    """Returns what one step changes in all weights of the model, as one vector."""
    before = [each.numpy() for each in model.trainable_weights]
    step()
    changes = [each.numpy() - old for each, old in zip(model.trainable_weights, before, strict=True)]
    return np.concatenate([each.ravel() for each in changes])


def work(model: tf.keras.Model, workload: str, version: str) -> Work:
    """Returns the training step of a compiled model on the workload's data as a worker's work."""
    facts = {"version": version, "parameters": WORKLOADS[workload].parameters}
    return Work(step_of(model, WORKLOADS[workload].examples()), facts)
