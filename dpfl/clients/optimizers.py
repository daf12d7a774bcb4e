"""The clients' optimizers, and FedProx's term, as pure functions over explicit state, in graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from dpfl.clients.training import ClientTraining, Optimizer


class OptimizerNumbers(NamedTuple):
    """The numbers of a client's optimizer, float32 scalars: one graph serves every value of them.

    The proximal strength is for `with_proximal_term` alone.
    """

    learning_rate: tf.Tensor
    momentum: tf.Tensor
    second_momentum: tf.Tensor
    adaptivity: tf.Tensor
    proximal_strength: tf.Tensor


def optimizer_numbers(training: ClientTraining) -> OptimizerNumbers:
    """The numbers of a training's optimizer as tensors."""
    return OptimizerNumbers(
        *(tf.constant(getattr(training, name), tf.float32) for name in OptimizerNumbers._fields),
    )


def initial_moments(optimizer: Optimizer, weights: Sequence[tf.Tensor]) -> tuple[list[tf.Tensor], ...]:
    """What an optimizer remembers before a round's first local step: lists of zeros shaped like the weights."""
    count = {"sgd": 0, "momentum": 1, "adam": 2}[optimizer]
    return tuple([tf.zeros_like(weight) for weight in weights] for _ in range(count))


def step(
    optimizer: Optimizer,
    weights: Sequence[tf.Tensor],
    gradients: Sequence[Any],
    moments: tuple[list[tf.Tensor], ...],
    numbers: OptimizerNumbers,
    step_number: tf.Tensor,
) -> tuple[list[tf.Tensor], tuple[list[tf.Tensor], ...]]:
    """Takes one local step.

    "momentum" is Polyak's heavy ball, "adam" that of Kingma & Ba (2015, 1412.6980) in the form at the end of section 2,
    with epsilon hat, as in Keras and TFF: the constant is added before the bias of the second moment is corrected.

    Args:
        optimizer: the kind.
        weights: before the step.
        gradients: one for each weight; None for a weight that the loss does not reach, which then stays, and
            `tf.IndexedSlices` as embeddings give them.
        moments: from `initial_moments` or the step before.
        numbers: of the optimizer.
        step_number: from 0, an int32 scalar.

    Returns:
        The weights and the moments after the step.
    """
    rate, decay, second_decay, adaptivity, _ = numbers
    descents = [
        tf.zeros_like(weight) if gradient is None else tf.convert_to_tensor(gradient)
        for weight, gradient in zip(weights, gradients, strict=True)
    ]
    kept: tuple[list[tf.Tensor], ...] = ()
    if optimizer == "sgd":
        moves = [rate * descent for descent in descents]
    elif optimizer == "momentum":
        first = [decay * mean + descent for mean, descent in zip(moments[0], descents, strict=True)]
        moves, kept = [rate * mean for mean in first], (first,)
    else:
        first, second = (
            [old * mean + (1 - old) * power(descent) for mean, descent in zip(means, descents, strict=True)]
            for old, means, power in ((decay, moments[0], tf.identity), (second_decay, moments[1], tf.square))
        )
        taken = tf.cast(step_number + 1, tf.float32)
        corrected = rate * tf.sqrt(1 - tf.pow(second_decay, taken)) / (1 - tf.pow(decay, taken))
        moves = [corrected * mean / (tf.sqrt(square) + adaptivity) for mean, square in zip(first, second, strict=True)]
        kept = (first, second)
    return [weight - move for weight, move in zip(weights, moves, strict=True)], kept


def with_proximal_term(
    gradients: Sequence[Any], weights: Sequence[tf.Tensor], start: Sequence[tf.Tensor], strength: tf.Tensor
) -> list[Any]:
    """Adds the gradient of FedProx's proximal term, strength / 2 * ||weights - start||^2.

    Li et al. 2020 (1812.06127), equation 2. It looks at no example, only at weights, which under DP-SGD come from noisy
    gradients: it needs no noise.

    Args:
        gradients: one for each weight; None, which stays, for a weight that the loss does not reach and that has not
            moved either.
        weights: at which the gradients were taken.
        start: the weights at the round's start.
        strength: mu, a float32 scalar.
    """
    return [
        None if gradient is None else tf.convert_to_tensor(gradient) + strength * (weight - first)
        for gradient, weight, first in zip(gradients, weights, start, strict=True)
    ]
