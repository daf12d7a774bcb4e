"""What the elements of a client's dataset hold, and the model that takes them."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from dpfl.errors import InputError
from dpfl.models.functional import FunctionalModel


class BatchSpec(NamedTuple):
    """What the elements of a client's dataset hold, as `tf.TensorSpec`s of batches."""

    x: tf.TensorSpec
    y: tf.TensorSpec
    client: tf.TensorSpec | None
    elements: Any

    @classmethod
    def of(cls, input_spec: Any) -> BatchSpec:
        """Takes a dataset's `element_spec`; refuses what does not describe batches of examples and labels."""
        if isinstance(input_spec, Mapping) and {"x", "y"} <= set(input_spec):
            parts = [input_spec["x"], input_spec["y"], input_spec.get("client")]
        elif isinstance(input_spec, Sequence) and len(input_spec) == 2:
            parts = [*input_spec, None]
        else:
            parts = []
        if not parts or not all(isinstance(part, tf.TensorSpec | None) for part in parts):
            raise InputError(
                "input_spec must be the element_spec of a dataset of batches (x, y) or OrderedDict(x=, y=), one tensor "
                f"each, but it was {input_spec!r}."
            )
        if isinstance(input_spec, dict) and not isinstance(input_spec, collections.OrderedDict):
            raise InputError(
                "TensorFlow Federated needs datasets of named features to give collections.OrderedDict, not dict: map "
                "the dataset to collections.OrderedDict(x=, y=)."
            )
        x, y, client = parts
        if x.shape.rank is None or x.shape.rank < 2 or None in x.shape[1:]:
            raise InputError(
                f"x must have the shape (batch, *example shape), known but for the batch, but it was {x.shape}: batch "
                "the dataset (dataset.batch(20)), examples of one feature as (batch, 1)."
            )
        if y.shape.rank not in (1, 2) or (y.shape.rank == 2 and y.shape[1] != 1) or not y.dtype.is_integer:
            raise InputError(
                "y must hold integer labels of shape (batch,) or (batch, 1), but it was "
                f"{y.dtype.name} of shape {y.shape}: batch the dataset, and give classes from 0, not one-hot vectors."
            )
        if client is not None and not (client.dtype.is_integer and client.shape.rank == 1):
            raise InputError(
                "the feature client must hold the client's index, an integer of shape (batch,), but it was "
                f"{client.dtype.name} of shape {client.shape}."
            )
        return cls(x, y, client, input_spec)


def functional_model(model: Any, spec: BatchSpec, num_classes: int | None) -> FunctionalModel:
    """The model as a function of its weights, fitted to the datasets; refuses one that does not fit."""
    example_shape = tuple(spec.x.shape[1:])
    if isinstance(model, FunctionalModel):
        return model.fitted_to(example_shape, model.num_classes if num_classes is None else num_classes)
    if num_classes is None:
        raise InputError("num_classes is missing: give the number of classes, 10 for digits.")
    return FunctionalModel(model, example_shape, num_classes)


def class_labels(y: tf.Tensor) -> tf.Tensor:
    """Labels of shape (batch,) or (batch, 1) as int32, (batch,)."""
    return tf.cast(tf.reshape(y, [-1]), tf.int32)
