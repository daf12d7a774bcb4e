"""Clipped sums by an explicit loop over examples: what every other way of computing them has to equal."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf


@dataclasses.dataclass(frozen=True)
class NaiveGradients:
    """`sums`, one array per weight; `norms` and `losses`, (batch,); `largest`, of all clipped gradients' elements."""

    sums: list[np.ndarray]
    norms: np.ndarray
    losses: np.ndarray
    largest: float


def naive_clipped_gradients(
    call: Callable[[Any], Any],
    weights: Sequence[Any],
    losses_of: Callable[[Any, Any], tf.Tensor],
    x: Any,
    y: Any,
    example_weights: Any,
    *,
    clip_norm: float,
    clipping: str = "flat",
    layers: Sequence[Any],
    alone: bool = True,
) -> NaiveGradients:
    """One tape for each example; clips each gradient in float64, then adds.

    `layers` names, for each weight, the layer that it belongs to (for "per_layer"). Where a model draws random numbers
    that depend on an example's place in the minibatch, `alone=False` runs it on the whole minibatch every time and
    takes one loss of it.
    """
    example_weights = np.asarray(example_weights, np.float32)
    gradients, losses = [], []
    for example, weight in enumerate(example_weights):
        place = slice(example, example + 1) if alone else slice(None)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(list(weights))
            outputs = call(tf.nest.map_structure(lambda part, place=place: part[place], x))
            loss = losses_of(outputs, tf.nest.map_structure(lambda part, place=place: part[place], y))
            loss = loss[0 if alone else example]
            weighted = loss * weight
        found = tape.gradient(weighted, list(weights), unconnected_gradients=tf.UnconnectedGradients.ZERO)
        gradients.append([tf.convert_to_tensor(part).numpy().astype(np.float64) for part in found])
        losses.append(float(loss))
    clipped = [clip(gradient, clip_norm, clipping, layers) for gradient in gradients]
    return NaiveGradients(
        sums=[np.sum(parts, axis=0) for parts in zip(*clipped, strict=True)],
        norms=np.array([norm(gradient) for gradient in gradients]),
        losses=np.array(losses),
        largest=max(np.abs(part).max(initial=0.0) for gradient in clipped for part in gradient),
    )


def clip(gradient: list[np.ndarray], clip_norm: float, clipping: str, layers: Sequence[Any]) -> list[np.ndarray]:
    """One example's gradient, clipped; zeros if it is not finite."""
    if not np.isfinite(norm(gradient)):
        return [np.zeros_like(part) for part in gradient]
    if clipping == "automatic":
        return [part * clip_norm / (norm(gradient) + 0.01) for part in gradient]
    if clipping == "flat":
        return [part * min(1.0, clip_norm / max(norm(gradient), 1e-300)) for part in gradient]
    assert clipping == "per_layer"
    share = clip_norm / np.sqrt(len(set(layers)))
    norms = {
        layer: norm([part for part, owner in zip(gradient, layers, strict=True) if owner == layer]) for layer in layers
    }
    return [part * min(1.0, share / max(norms[layer], 1e-300)) for part, layer in zip(gradient, layers, strict=True)]


def norm(gradient: Sequence[np.ndarray]) -> float:
    """The L2 norm of all parts together."""
    return float(np.sqrt(sum(np.sum(np.square(np.asarray(part, np.float64))) for part in gradient)))


def layer_names(model: tf.keras.Model) -> list[str]:
    """The layer that each trainable variable was made in, from the variables' names."""
    return [variable.name.rpartition("/")[0] for variable in model.trainable_variables]
