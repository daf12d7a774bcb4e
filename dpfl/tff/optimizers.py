"""dpfl's optimizers as TensorFlow Federated's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from dpfl.clients import ClientTraining, optimizers
from dpfl.clients.optimizers import optimizer_numbers
from dpfl.tff.runtime import tensorflow_federated

Initialize = Callable[[list[tf.Tensor]], Any]
"""Takes weights, gives an optimizer's state."""
Apply = Callable[[list[tf.Tensor], list[Any], Any], tuple[list[tf.Tensor], Any]]
"""Takes weights, gradients and state, gives the next weights and state."""


def optimizer_of(initialize: Initialize, apply: Apply) -> Any:
    """A `tff.learning.optimizers.Optimizer` of two pure functions.

    Args:
        initialize: gives the state before the first step from weights, a list of float32 tensors; it may look at
            their shapes alone.
        apply: takes one step.
    """
    return _optimizer_class(tensorflow_federated())(initialize, apply)


def client_optimizer(training: ClientTraining) -> Any:
    """The optimizer of local steps, as `dpfl.clients.optimizers` has it, its numbers built in.

    FedProx's term is the optimizer's too, which remembers the weights of its first step: TFF 0.87's own
    `build_weighted_fed_prox` and `build_unweighted_fed_prox` add the term with the wrong sign, mu * (start - weights),
    which drives clients away from the round's start.
    """

    def initialize(weights: list[tf.Tensor]) -> Any:
        moments = optimizers.initial_moments(training.optimizer, weights)
        start = tuple(weights) if training.is_proximal else ()
        return tf.constant(0), start, tuple(tuple(moment) for moment in moments)

    def apply(weights: list[tf.Tensor], gradients: list[Any], state: Any) -> tuple[list[tf.Tensor], Any]:
        taken, start, moments = state
        numbers = optimizer_numbers(training)
        if training.is_proximal:
            is_first = tf.equal(taken, 0)
            start = tuple(tf.where(is_first, weight, old) for weight, old in zip(weights, start, strict=True))
            gradients = optimizers.with_proximal_term(gradients, weights, start, numbers.proximal_strength)
        moved, moments = optimizers.step(training.optimizer, weights, gradients, moments, numbers, taken)
        return moved, (taken + 1, start, tuple(tuple(moment) for moment in moments))

    return optimizer_of(initialize, apply)


@functools.cache
def _optimizer_class(tff: Any) -> Any:
    class Optimizer(tff.learning.optimizers.Optimizer):
        def __init__(self, initialize: Initialize, apply: Apply) -> None:
            self._initialize, self._apply = initialize, apply

        def initialize(self, specs: Any) -> Any:
            return self._initialize([tf.zeros(spec.shape, spec.dtype) for spec in tf.nest.flatten(specs)])

        def next(self, state: Any, weights: Any, gradients: Any) -> tuple[Any, Any]:
            moved, state = self._apply(tf.nest.flatten(weights), tf.nest.flatten(gradients), state)
            return state, tf.nest.pack_sequence_as(weights, moved)

    return Optimizer
