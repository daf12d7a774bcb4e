"""DP-SGD on one client, in graph (Abadi et al. 2016, 1607.00133, algorithm 1).

In every local step the client draws a minibatch of its own examples, clips each example's gradient, adds Gaussian
noise to their sum and divides it by the EXPECTED size of a minibatch, since the actual one is private. The in-graph
engine and TensorFlow Federated's clients run this very function; `dpfl.clients.example_privacy` accounts for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import tensorflow as tf

from dpfl.clients import optimizers
from dpfl.clients.optimizers import OptimizerNumbers, optimizer_numbers, with_proximal_term
from dpfl.clients.per_example import clipped_gradients
from dpfl.clients.schedule import minibatches, poisson_minibatch
from dpfl.clients.training import ClientTraining
from dpfl.models.functional import FunctionalModel, cross_entropies
from dpfl.noise import normal_like, round_seed
from dpfl.randomness import Purpose, stateless_seed


class ClientNumbers(NamedTuple):
    """What private trainings that share a compiled graph differ in.

    Attributes:
        steps: local steps, int32 scalar; 0 where `epochs` counts instead.
        epochs: passes over the examples, int32 scalar; 0 where `steps` counts instead.
        clip_norm: the largest L2 norm of one example's gradient, float32 scalar.
        noise_multiplier: standard deviation of the noise on a minibatch's sum, in clip norms, float32 scalar.
        optimizer: learning rate, decays and proximal strength, float32 scalars.
    """

    steps: tf.Tensor
    epochs: tf.Tensor
    clip_norm: tf.Tensor
    noise_multiplier: tf.Tensor
    optimizer: OptimizerNumbers


class ClientSeeds(NamedTuple):
    """Seeds that no other run, round or client shares; each int32, shape (2,).

    Attributes:
        sampling: of the minibatches.
        noise: of the noise; whoever knows it can take the noise off.
        model: of random layers.
    """

    sampling: tf.Tensor
    noise: tf.Tensor
    model: tf.Tensor


class PrivateUpdate(NamedTuple):
    """What a client's private training gives.

    Attributes:
        update: weights after minus before, shaped like the weights; protects each of the client's examples.
        clipped_fraction: mean over the local steps of the fraction of a minibatch's examples whose gradient was
            longer than the clip norm, float32 scalar. Private: for inspection in simulations, not for release.
    """

    update: list[tf.Tensor]
    clipped_fraction: tf.Tensor


def client_numbers(training: ClientTraining, noise_multiplier: float) -> ClientNumbers:
    """A private training's numbers as tensors.

    Args:
        training: with an `example_clip`.
        noise_multiplier: of the clients' plan.
    """
    return ClientNumbers(
        steps=tf.constant(training.steps or 0, tf.int32),
        epochs=tf.constant(training.epochs or 0, tf.int32),
        clip_norm=tf.constant(training.example_clip, tf.float32),
        noise_multiplier=tf.constant(noise_multiplier, tf.float32),
        optimizer=optimizer_numbers(training),
    )


def run_seeds(seed: int) -> ClientSeeds:
    """The seeds of a run, of which `client_seeds` makes each client's own."""
    purposes = (Purpose.EXAMPLE_SAMPLING, Purpose.EXAMPLE_NOISE, Purpose.MODEL)
    return ClientSeeds(*(tf.constant(stateless_seed(seed, purpose)) for purpose in purposes))


def client_seeds(seeds: ClientSeeds, round_number: tf.Tensor, client: tf.Tensor) -> ClientSeeds:
    """The seeds of one client in one round.

    Args:
        seeds: of the run.
        round_number: the round, from 0, an int32 scalar.
        client: the client's index, an int32 scalar.
    """
    return ClientSeeds(*(round_seed(round_seed(seed, round_number), client) for seed in seeds))


def noisy_mean(
    sums: Sequence[tf.Tensor],
    *,
    clip_norm: tf.Tensor | float,
    noise_multiplier: tf.Tensor | float,
    expected_batch_size: tf.Tensor | float,
    seed: tf.Tensor,
) -> list[tf.Tensor]:
    """The Gaussian mechanism on the sum of a minibatch's clipped gradients, divided by the expected minibatch.

    Args:
        sums: one float32 tensor for each weight: the sum over the drawn examples of their clipped gradients, zeros
            where none was drawn. Private.
        clip_norm: the largest L2 norm of one example's gradient, all weights together.
        noise_multiplier: standard deviation of the noise on each coordinate of the sum, divided by `clip_norm`.
        expected_batch_size: what the noisy sum is divided by; never the actual number of examples, which is private.
        seed: int32, shape (2,); each may be used for one noise only.

    Returns:
        One tensor for each weight; may be released under the guarantee that accounts for the step.
    """
    noise = normal_like(list(sums), seed, tf.cast(noise_multiplier, tf.float32) * tf.cast(clip_norm, tf.float32))
    denominator = tf.cast(expected_batch_size, tf.float32)
    return [(part + draw) / denominator for part, draw in zip(sums, noise, strict=True)]


def with_penalties(gradients: Sequence[tf.Tensor], penalties: Sequence[tf.Tensor | None]) -> list[tf.Tensor]:
    """Noisy gradients with those of the weights' regularisation, which depend on no data and need no noise."""
    pairs = zip(gradients, penalties, strict=True)
    return [gradient if penalty is None else gradient + penalty for gradient, penalty in pairs]


def train_privately(
    model: FunctionalModel,
    weights: Sequence[tf.Tensor],
    x: tf.Tensor,
    y: tf.Tensor,
    *,
    training: ClientTraining,
    numbers: ClientNumbers,
    seeds: ClientSeeds,
    onto: Callable[[list[tf.Tensor]], list[tf.Tensor]] = list,
) -> PrivateUpdate:
    """Trains one client on its own examples by DP-SGD. Only inside a `tf.function`.

    Each local step draws a minibatch (a Poisson sample at the rate min(1, batch_size / n), or the next part of a
    shuffled epoch), clips, adds noise even where nobody was drawn, divides by min(batch_size, n), adds the gradient of
    the model's weight penalties and of FedProx's proximal term, which depend on no example, and lets the optimizer
    take its step. An example whose gradient is not finite counts as zero. n counts as public.

    Args:
        model: the model as a function of its weights.
        weights: float32 tensors, as `model.shapes` says.
        x: the client's examples, (n, *example shape), n at least 1. Private.
        y: their labels, (n,), int32. Private.
        training: its structure alone is compiled in (`ClientTraining.structure`); its numbers are not looked at.
        numbers: what is looked at.
        seeds: of this client in this round.
        onto: projects noisy gradients onto the weights that are trained, which are public: post-processing.
    """
    before = [tf.convert_to_tensor(weight) for weight in weights]
    records, batch_size = tf.shape(y)[0], training.batch_size
    assert batch_size is not None  # with an example_clip
    expected_batch_size = tf.minimum(batch_size, records)
    per_epoch = (records + batch_size - 1) // batch_size
    steps = tf.where(numbers.steps > 0, numbers.steps, numbers.epochs * per_epoch)
    if training.example_sampling == "shuffled":
        rows_of, mask_of = _shuffled(records, batch_size, numbers, seeds.sampling)

    def minibatch(step: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        if training.example_sampling == "shuffled":
            return rows_of[step], mask_of[step]
        return poisson_minibatch(
            records,
            step,
            batch_size=batch_size,
            max_batch_size=training.max_batch_size,
            seed=seeds.sampling,
        )

    def body(
        step: tf.Tensor, weights: list[tf.Tensor], moments: tuple[list[tf.Tensor], ...], clipped: tf.Tensor
    ) -> tuple[tf.Tensor, list[tf.Tensor], tuple[list[tf.Tensor], ...], tf.Tensor]:
        rows, mask = minibatch(step)
        model_seed = round_seed(seeds.model, step)
        found = clipped_gradients(
            lambda microbatch: model.bind(weights, round_seed(model_seed, microbatch)),
            weights,
            cross_entropies,
            tf.gather(x, rows),
            tf.gather(y, rows),
            mask,
            clip_norm=numbers.clip_norm,
            clipping=training.example_clipping,
            microbatch_size=training.microbatch_size,
        )
        mean = noisy_mean(
            found.sums,
            clip_norm=numbers.clip_norm,
            noise_multiplier=numbers.noise_multiplier,
            expected_batch_size=expected_batch_size,
            seed=round_seed(seeds.noise, step),
        )
        gradients = with_penalties(mean, found.penalties)
        if training.is_proximal:
            gradients = with_proximal_term(gradients, weights, before, numbers.optimizer.proximal_strength)
        gradients = onto(gradients)
        weights, moments = optimizers.step(training.optimizer, weights, gradients, moments, numbers.optimizer, step)
        longer = tf.reduce_sum(mask * tf.cast(found.norms > numbers.clip_norm, tf.float32))
        return step + 1, weights, moments, clipped + longer / tf.maximum(tf.reduce_sum(mask), 1.0)

    start = (tf.constant(0), before, optimizers.initial_moments(training.optimizer, before), tf.constant(0.0))
    _, after, _, clipped = tf.while_loop(lambda step, *_: step < steps, body, start, parallel_iterations=1)
    update = [new - old for new, old in zip(after, before, strict=True)]
    return PrivateUpdate(update, clipped / tf.cast(tf.maximum(steps, 1), tf.float32))


def _shuffled(
    records: tf.Tensor, batch_size: int, numbers: ClientNumbers, seed: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """All minibatches of a round's shuffled epochs: rows and mask, (steps, batch_size)."""
    rows, mask = minibatches(
        tf.constant([0]),
        records[None],
        tf.constant([0]),
        steps=numbers.steps,
        epochs=numbers.epochs,
        batch_size=batch_size,
        seed=seed,
        round_number=tf.constant(0),
    )
    return rows[0], mask[0]
