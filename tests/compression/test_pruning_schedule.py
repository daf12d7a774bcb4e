"""The schedule of pruning, against `tensorflow_model_optimization`'s; and that what is pruned stays zero."""

import math

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_model_optimization as tfmot

from dpfl.compression import Compression
from dpfl.simulation.server import ServerOptimizer, ServerStep

SHAPES = ((8, 5), (5,), (3, 3, 1, 2))


def theirs(sparsity: float, begin: int, end: int, every: int, rounds: int) -> list[float]:
    """The sparsity after each round of a schedule that is asked after each, and keeps its level in between."""
    schedule = tfmot.sparsity.keras.PolynomialDecay(0.0, sparsity, begin, end, power=3, frequency=every)
    level, levels = 0.0, []
    for step in range(rounds + 1):
        due, found = schedule(tf.constant(step))
        if bool(due) or step == end:  # dpfl reaches the sparsity at the end of the schedule, whatever the frequency
            level = float(found)
        levels.append(level)
    return levels


@pytest.mark.parametrize(
    ("sparsity", "begin", "end", "every", "rounds"),
    [
        (0.9, 10, 60, 1, 100),
        (0.5, 1, 30, 1, 30),
        (0.75, 5, 45, 10, 60),
        (0.99, 2, 20, 7, 40),
        (0.3, 3, 4, 1, 6),
    ],
)
def test_is_polynomial_decay_of_power_three(sparsity, begin, end, every, rounds):
    compression = Compression(
        sparsity=sparsity, pruning_begins=begin / rounds, pruning_ends=end / rounds, pruning_every=every
    )
    levels = [compression.sparsity_after(done, rounds) for done in range(rounds + 1)]
    np.testing.assert_allclose(levels, theirs(sparsity, begin, end, every, rounds), atol=1e-6)
    assert levels[-1] == sparsity
    assert np.all(np.diff(levels) >= 0)


@pytest.mark.parametrize("rounds", [1, 2, 3, 7, 50])
@pytest.mark.parametrize(("begins", "ends"), [(0.0, 0.0), (0.1, 0.6), (0.5, 0.5), (0.0, 1.0), (1.0, 1.0), (0.9, 0.91)])
def test_the_initial_model_is_whole_and_the_last_has_the_sparsity(rounds, begins, ends):
    compression = Compression(sparsity=0.8, pruning_begins=begins, pruning_ends=ends, pruning_every=3)
    levels = [compression.sparsity_after(done, rounds) for done in range(rounds + 1)]
    assert levels[0] == 0
    assert levels[-1] == 0.8
    assert np.all(np.diff(levels) >= 0)


def test_without_pruning_nothing_is_ever_pruned():
    assert [Compression().sparsity_after(done, 5) for done in range(6)] == [0] * 6


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_pruned_weights_stay_zero_whatever_the_servers_optimizer_remembers(optimizer):
    rounds, numbers = 12, np.random.default_rng(0)
    compression = Compression(sparsity=0.8, pruning_begins=0.2, pruning_ends=0.8)
    server = ServerStep(ServerOptimizer(name=optimizer, learning_rate=0.5), compression, SHAPES, rounds)
    weights = [tf.constant(numbers.normal(size=shape), tf.float32) for shape in SHAPES]
    state, was_zero = server.initial_state(weights), [np.zeros(shape, bool) for shape in SHAPES]
    settings = tuple(tf.constant(number, tf.float32) for number in server.optimizer.numbers())
    for done in range(rounds):
        update = [tf.constant(numbers.normal(size=shape), tf.float32) for shape in SHAPES]  # noise is everywhere here
        weights, state = server.apply(weights, update, state, settings, tf.constant(done))
        zero = [weight.numpy() == 0 for weight in weights]
        for before, after in zip(was_zero, zero, strict=True):
            assert np.all(after[before]), "a pruned weight moved"
        kept = sum(np.count_nonzero(weight) for weight in weights)
        assert kept == compression.sent_coordinates(SHAPES, done + 1, rounds)
        was_zero = zero
    assert [np.mean(zero) for zero in was_zero] == pytest.approx([0.8, 0, 14 / 18], abs=1e-6)


@pytest.mark.parametrize("feedback", [False, True])
def test_top_k_releases_so_many_changes_and_feedback_makes_the_others_later(feedback):
    compression = Compression(top_k=6, error_feedback=feedback)
    server = ServerStep(ServerOptimizer(), compression, SHAPES, 40)
    weights = [tf.zeros(shape) for shape in SHAPES]
    settings = tuple(tf.constant(number, tf.float32) for number in server.optimizer.numbers())
    numbers = np.random.default_rng(0)
    update = [tf.constant(numbers.uniform(0.5, 1, size=shape), tf.float32) for shape in SHAPES]
    state, moved = server.initial_state(weights), weights
    for done in range(40):
        before = moved
        moved, state = server.apply(moved, update, state, settings, tf.constant(done))
        changed = sum(np.count_nonzero(after - old) for after, old in zip(moved, before, strict=True))
        assert changed == 6
    touched = sum(np.count_nonzero(weight) for weight in moved)
    assert touched == (sum(map(math.prod, SHAPES)) if feedback else 6)
    if feedback:  # Nothing is lost: what was released and what is left are all updates together.
        for weight, left, part in zip(moved, state[1], update, strict=True):
            np.testing.assert_allclose(weight + left, 40 * part, rtol=1e-4)
