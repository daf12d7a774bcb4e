"""Small data and models for the tests of the Keras door."""

import numpy as np
import tensorflow as tf

import dpfl

CROSS_ENTROPY = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def data(examples=24, seed=0):
    draws = np.random.default_rng(seed)
    x = draws.normal(size=(examples, 6)).astype(np.float32)
    return x, (x[:, 0] + x[:, 1] > 0).astype(np.int64)


def sequential(seed=1, regularizer=None):
    tf.keras.utils.set_random_seed(seed)
    layers = [tf.keras.layers.Dense(5, "tanh", kernel_regularizer=regularizer), tf.keras.layers.Dense(2)]
    return tf.keras.Sequential(layers)


def functional(seed=1):
    tf.keras.utils.set_random_seed(seed)
    inputs = tf.keras.Input([6])
    hidden = tf.keras.layers.Dense(6, "tanh")(inputs)
    return tf.keras.Model(inputs, tf.keras.layers.Dense(2)(tf.keras.layers.Add()([hidden, inputs])))


class Subclassed(tf.keras.Model):
    def __init__(self):
        super().__init__()
        self.first, self.second = tf.keras.layers.Dense(5, "tanh"), tf.keras.layers.Dense(2)

    def call(self, inputs, training=None):
        return self.second(self.first(inputs))


def subclassed(seed=1):
    tf.keras.utils.set_random_seed(seed)
    return Subclassed()


def private(
    model=None,
    *,
    clip=1.0,
    noise=1.0,
    learning_rate=1.0,
    seed=7,
    loss=CROSS_ENTROPY,
    metrics=None,
    compiled=None,
    **settings,
):
    wrapped = dpfl.DPModel(sequential() if model is None else model, seed=seed)
    optimizer = dpfl.DPKerasSGDOptimizer(clip, noise, learning_rate=learning_rate, **settings)
    wrapped.compile(optimizer=optimizer, loss=loss, metrics=metrics, **(compiled or {}))
    return wrapped


def flat(model):
    return np.concatenate([weight.numpy().ravel() for weight in model.trainable_weights])


class Weights(tf.keras.callbacks.Callback):
    """Keeps the weights before and after every step."""

    def __init__(self):
        super().__init__()
        self.kept = []

    def on_train_begin(self, logs=None):
        self.kept.append(flat(self.model.model))

    def on_train_batch_end(self, batch, logs=None):
        self.kept.append(flat(self.model.model))

    @property
    def updates(self):
        return np.diff(self.kept, axis=0)
