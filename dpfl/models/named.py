"""The models that have a name. Each takes the shape of one example and the number of classes, and gives logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dpfl.errors import InputError

if TYPE_CHECKING:
    import tensorflow as tf


def softmax(example_shape: Sequence[int], num_classes: int) -> tf.keras.Model:
    """Softmax regression: one dense layer, zero initial weights (a convex problem needs no others)."""
    import tensorflow as tf

    return tf.keras.Sequential(
        [
            tf.keras.layers.Input(tuple(example_shape)),
            tf.keras.layers.Flatten(),
            tf.keras.layers.Dense(num_classes, kernel_initializer="zeros"),
        ]
    )


def mlp(example_shape: Sequence[int], num_classes: int) -> tf.keras.Model:
    """One hidden layer of 100 units with ReLU."""
    import tensorflow as tf

    return tf.keras.Sequential(
        [
            tf.keras.layers.Input(tuple(example_shape)),
            tf.keras.layers.Flatten(),
            tf.keras.layers.Dense(100, activation="relu"),
            tf.keras.layers.Dense(num_classes),
        ]
    )


def cnn(example_shape: Sequence[int], num_classes: int) -> tf.keras.Model:
    """Two convolutions of 3 x 3 with 16 and 32 channels, each with 2 x 2 max-pooling, then a dense layer.

    Raises:
        InputError: examples are not images of shape (height, width, channels), at least 4 x 4.
    """
    import tensorflow as tf

    check_named("cnn", example_shape)
    return tf.keras.Sequential(
        [
            tf.keras.layers.Input(tuple(example_shape)),
            tf.keras.layers.Conv2D(16, 3, padding="same", activation="relu"),
            tf.keras.layers.MaxPool2D(),
            tf.keras.layers.Conv2D(32, 3, padding="same", activation="relu"),
            tf.keras.layers.MaxPool2D(),
            tf.keras.layers.Flatten(),
            tf.keras.layers.Dense(num_classes),
        ]
    )


NAMED = {"softmax": softmax, "mlp": mlp, "cnn": cnn}


def dense_parameters(name: str, example_shape: Sequence[int], num_classes: int) -> int | None:
    """The number of weights of a named model made of dense layers alone; None of any other (needs no TensorFlow)."""
    features = math.prod(example_shape)
    return {"softmax": (features + 1) * num_classes, "mlp": (features + 1) * 100 + 101 * num_classes}.get(name)


def check_named(name: str, example_shape: Sequence[int]) -> None:
    """Refuses a name that no model has, and examples that the model cannot take (needs no TensorFlow)."""
    if name not in NAMED:
        raise InputError(
            f"there is no model '{name}': choose {', '.join(NAMED)}, or give a function that returns a Keras model."
        )
    if name == "cnn" and (len(example_shape) != 3 or min(example_shape[:2]) < 4):
        raise InputError(
            f"the model cnn needs images of shape (height, width, channels) of at least 4 x 4, but examples have "
            f"shape {tuple(example_shape)}: use the model mlp or softmax."
        )
