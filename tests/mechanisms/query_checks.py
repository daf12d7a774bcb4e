"""What must hold of every query, and what tests of mechanisms with a memory share."""

import functools
import math
from typing import Any

import numpy as np
import tensorflow as tf
from guarantee_checks import FALSE_ALARM, flat, release
from scipy import stats

from dpfl.mechanisms import Plan
from dpfl.privacy import Privacy

# Of a whole run's float32 sums.
TOLERANCE = 1e-4


@functools.lru_cache(maxsize=256)
def planned(mechanism: Any, sampler: Any, population: int, rounds: int, noise: float = 1.5) -> Plan:
    """A plan with a given noise, and a delta that no small population is too small for."""
    target = Privacy(epsilon=None, delta=1e-3, accountant="rdp", allow_weak_delta=True)
    return mechanism.replace(noise_multiplier=noise).plan(target, sampler, population, rounds)


def run(query: Any, records: Any, template: Any, state: Any = None) -> tuple[np.ndarray, list[Any]]:
    """Runs one round for each list of records: what is released, shape (rounds, size), and the state after each."""
    released, states = [], []
    for cohort in records:
        result, state = release(query, cohort, template, state)
        released.append(flat(result))
        states.append(state)
    return np.stack(released), states


def noise_of(query: Any, rounds: int, size: int) -> np.ndarray:
    """What empty cohorts release, shape (rounds, size)."""
    template = [tf.zeros(size)]
    compiled = tf.function(lambda state: query.get_noised_result(query.initial_sample_state(template), state)[:2])
    state, released = query.initial_global_state(), []
    for _ in range(rounds):
        result, state = compiled(state)
        released.append(result[0].numpy().astype(np.float64))
    return np.stack(released)


def check_covariance(samples: np.ndarray, expected: np.ndarray) -> None:
    """The rows of samples, one column a draw, have mean 0 and the expected covariance.

    False alarm below 2e-6 for all entries together, by the central limit theorem.
    """
    rows, draws = samples.shape
    found = samples @ samples.T / draws
    variances = np.diag(expected)
    spread = np.sqrt((np.outer(variances, variances) + expected**2) / draws)
    bound = stats.norm.isf(FALSE_ALARM / 2 / (rows * (rows + 1) / 2))
    worst = np.max(np.abs(found - expected) / spread)
    assert worst <= bound, f"a covariance is {worst:.1f} standard errors from theory (at most {bound:.1f})"
    means = np.abs(samples.mean(axis=1)) / np.sqrt(variances / draws)
    assert means.max() <= stats.norm.isf(FALSE_ALARM / 2 / rows), "the noise has a mean"


def check_runs_in_graph(plan: Plan, clients: int, seed: int = 5) -> None:
    """Rounds in a `tf.while_loop` in a `tf.function`, clients in a `tf.vectorized_map`, do as eager ones do."""
    template = {"kernel": tf.zeros((3, 2)), "more": (tf.zeros(4), tf.zeros(()))}
    numbers = np.random.default_rng(seed)
    records = tf.nest.map_structure(
        lambda part: tf.constant(numbers.normal(size=(plan.rounds, clients, *part.shape)), tf.float32), template
    )
    query = plan.query(seed, template)

    @tf.function
    def in_graph(state: Any) -> Any:
        def body(number: tf.Tensor, state: Any, released: Any) -> Any:
            params = query.derive_sample_params(state)
            cohort = tf.nest.map_structure(lambda part: part[number], records)
            preprocessed = tf.vectorized_map(lambda record: query.preprocess_record(params, record), cohort)
            summed = tf.nest.map_structure(lambda part: tf.reduce_sum(part, axis=0), preprocessed)
            total = query.accumulate_preprocessed_record(query.initial_sample_state(template), summed)
            result, state, _ = query.get_noised_result(total, state)
            vector = tf.concat([tf.reshape(part, [-1]) for part in tf.nest.flatten(result)], axis=0)
            return number + 1, state, released.write(number, vector)

        array = tf.TensorArray(tf.float32, size=plan.rounds)
        _, state, array = tf.while_loop(lambda number, *_: number < plan.rounds, body, (tf.constant(0), state, array))
        return array.stack(), state

    found, state = in_graph(query.initial_global_state())
    cohorts = [
        [tf.nest.map_structure(lambda part, t=t, c=c: part[t, c], records) for c in range(clients)]
        for t in range(plan.rounds)
    ]
    expected, states = run(query, cohorts, template)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE * np.abs(expected).max())
    for one, other in zip(tf.nest.flatten(state), tf.nest.flatten(states[-1]), strict=True):
        np.testing.assert_allclose(one, other, atol=TOLERANCE * np.max(np.abs(other), initial=1))


def check_resumes(plan: Plan) -> None:
    """From any round's state, kept as arrays, a new query goes on as if nothing had happened, to the bit."""
    template = [tf.zeros(3), tf.zeros((2, 2))]
    cohorts = [[[np.full(3, t + 1, np.float32), np.full((2, 2), -t, np.float32)]] for t in range(plan.rounds)]
    undisturbed, states = run(plan.query(9, template), cohorts, template)
    for done, state in enumerate(states[:-1], start=1):
        kept = tf.nest.map_structure(lambda part: tf.constant(part.numpy()), state)
        resumed, _ = run(plan.query(9, template), cohorts[done:], template, kept)
        np.testing.assert_array_equal(resumed, undisturbed[done:])


def check_seeds(plan: Plan) -> None:
    """The same seed has the same noise; two seeds' noise is uncorrelated, with a false alarm of 1e-6."""
    size = 20_000
    first, again, other = (noise_of(plan.query(seed, [tf.zeros(size)]), plan.rounds, size) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    correlations = [np.corrcoef(one, two)[0, 1] for one in first for two in other]
    assert np.max(np.abs(correlations)) <= stats.norm.isf(FALSE_ALARM / 2 / len(correlations)) / math.sqrt(size)
