"""What must hold of a plan for its guarantee to be true, as functions that raise AssertionError.

Each takes a plan and looks at what it does, not at how: at the query's releases and at the cohorts.
`test_gaussian_*.py` and `test_sampling.py` hold the true mechanism to them; `test_broken_mechanisms.py`
shows that they catch mechanisms that are broken on purpose.

Statistical checks have fixed seeds, so that they pass or fail for good. Were the seeds drawn at random,
each bound would be overstepped with the probability that stands beside it.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from privacy.independent_accountants import fourier_epsilon
from scipy import stats

from dpfl.mechanisms import Plan
from dpfl.sampling import Poisson

# Of one statistic under the null hypothesis, before the correction for the number of statistics.
FALSE_ALARM = 1e-6
# Of float32 sums of a few dozen records.
ROUNDING = 1e-5


def release(query: Any, records: Sequence[Any], template: Any, state: Any = None) -> tuple[Any, Any]:
    """Runs one round by hand: what is released, as arrays, and the next state."""
    state = query.initial_global_state() if state is None else state
    params = query.derive_sample_params(state)
    total = query.initial_sample_state(tf.nest.map_structure(tf.zeros_like, template))
    for record in records:
        record = tf.nest.map_structure(lambda part: tf.constant(part, tf.float32), record)
        total = query.accumulate_preprocessed_record(total, query.preprocess_record(params, record))
    result, state, _ = query.get_noised_result(total, state)
    return tf.nest.map_structure(lambda part: part.numpy(), result), state


def without_noise(plan: Plan) -> Plan:
    """The same plan with a noise of standard deviation 0."""
    return dataclasses.replace(plan, noise_multiplier=0.0)


def unnoised_mean(plan: Plan, records: Sequence[Any], template: Any) -> np.ndarray:
    """What a round would release without noise, all tensors as one float64 vector."""
    return flat(release(without_noise(plan).query(0), records, template)[0])


def flat(record: Any) -> np.ndarray:
    """All tensors of a structure as one float64 vector."""
    return np.concatenate([np.asarray(part, np.float64).ravel() for part in tf.nest.flatten(record)])


def noise(plan: Plan, seed: int, rounds: int, shapes: Sequence[tuple[int, ...]]) -> list[list[np.ndarray]]:
    """What empty cohorts release in successive rounds, tensor by tensor as vectors."""
    template = [tf.zeros(shape) for shape in shapes]
    query, state, released = plan.query(seed), None, []
    for _ in range(rounds):
        result, state = release(query, [], template, state)
        released.append([np.asarray(part, np.float64).ravel() for part in result])
    return released


def wicked_records(clip: float) -> tuple[Any, list[Any]]:
    """A template, and records that somebody could send to break the sensitivity."""
    template = {"kernel": tf.zeros((2, 3)), "more": [tf.zeros(4), tf.zeros(())]}

    def record(kernel: Any, bias: Any, scalar: float) -> Any:
        full = [np.broadcast_to(np.float32(part), shape) for part, shape in ((kernel, (2, 3)), (bias, 4), (scalar, ()))]
        return {"kernel": full[0], "more": full[1:]}

    one_hot = np.eye(4, dtype=np.float32)[0]
    return template, [
        record(0, 0, 0),
        record(-0.0, 0, -0.0),
        record(0, clip * one_hot, 0),  # just at the clip
        record(0, -clip * one_hot, 0),
        record(0, 0.3 * clip * one_hot, -0.4 * clip),
        record(clip / math.sqrt(6), clip / 2, clip),  # each tensor at the clip, sqrt(3) times the clip together
        record(1e-30, -1e-30, 1e-38),
        record(3 * clip, -5 * clip, 7 * clip),
        record(-30 * clip, 50 * clip, -70 * clip),
        record(0, 1.0001 * clip * one_hot, 0),  # just beyond the clip
        record(1e15, 1e-15, -1e15),
        record(1e18, 0, 0),
        record(1e30, 1e30, 1e30),  # finite, but its norm is not in float32
        record(np.finfo(np.float32).max, 0, 0),
        record(0, np.nan * one_hot, 0),
        record(np.inf, 0, 0),
        record(0, 0, -np.inf),
        record(np.inf, -np.inf, np.nan),
    ]


def check_clipping(plan: Plan, template: Any, records: Sequence[Any]) -> None:
    """Every record contributes at most the clip, unchanged if it is shorter, in its own direction."""
    for record in records:
        sent = flat(record)
        with np.errstate(over="ignore", invalid="ignore"):
            norm = float(np.sqrt(np.sum(np.square(sent.astype(np.float32)))))
        received = unnoised_mean(plan, [record], template) * plan.sampler.cohort
        assert np.all(np.isfinite(received)), f"{record} made the sum {received}"
        length = float(np.linalg.norm(received))
        assert length <= plan.clip_norm * (1 + ROUNDING), f"{record} contributed {length:g}, clip {plan.clip_norm:g}"
        if not math.isfinite(norm):
            assert not received.any(), f"{record} is not finite but contributed {received}"
        elif norm <= plan.clip_norm * (1 - ROUNDING):
            assert np.allclose(received, sent, rtol=1e-6, atol=1e-36), (
                f"{record} is within the clip but became {received}"
            )
        else:
            cosine = received @ (sent / np.linalg.norm(sent)) / plan.clip_norm
            assert abs(cosine - 1) <= ROUNDING, f"{record} became {received}, not the clip in its own direction"


def check_sensitivity(plan: Plan, template: Any, records: Sequence[Any], others: Sequence[Any] = ()) -> None:
    """A neighbour moves the un-noised mean by at most clip / cohort, twice that if it is replaced.

    Neighbours are the cohort without one of its records, and with one of them replaced by another.
    """
    bound = plan.clip_norm / plan.sampler.cohort
    mean = unnoised_mean(plan, records, template)
    assert np.all(np.isfinite(mean)), f"the mean is {mean}"
    for index in range(len(records)):
        rest = [*records[:index], *records[index + 1 :]]
        removed = np.linalg.norm(unnoised_mean(plan, rest, template) - mean)
        assert removed <= bound * (1 + ROUNDING), (
            f"removing {records[index]} moved the mean by {removed / bound} bounds"
        )
        for other in others:
            neighbour = [*records[:index], other, *records[index + 1 :]]
            replaced = np.linalg.norm(unnoised_mean(plan, neighbour, template) - mean)
            assert replaced <= 2 * bound * (1 + ROUNDING), f"a replacement moved the mean by {replaced / bound} bounds"


def check_wicked_records(plan: Plan) -> None:
    """Clipping of records that somebody could send to break it."""
    check_clipping(plan, *wicked_records(plan.clip_norm))


def check_wicked_neighbours(plan: Plan) -> None:
    """The sensitivity in cohorts that somebody could gather to break it."""
    template, records = wicked_records(plan.clip_norm)
    long, opposite = records[7], records[8]
    check_sensitivity(plan, template, [long, opposite], others=[opposite, records[-1]])
    check_sensitivity(plan, template, [records[2]] * 3, others=[records[3]])
    check_sensitivity(plan, template, records)
    # What is not finite leaves everything else as it is, to the bit.
    harmless = [record for record in records if np.all(np.isfinite(flat(record)))]
    with_all, with_harmless = (unnoised_mean(plan, some, template) for some in (records, harmless))
    assert np.array_equal(with_all, with_harmless), "non-finite records changed the sum"


def check_denominator(plan: Plan) -> None:
    """The sum is divided by the expected cohort, whoever came: nobody's presence changes another's weight."""
    template = [tf.zeros(5)]
    record = [np.full(5, plan.clip_norm / 4, np.float32)]
    for came in (0, 1, 2, plan.sampler.cohort, 3 * plan.sampler.cohort):
        mean = unnoised_mean(plan, [record] * came, template)
        expected = np.full(5, came * plan.clip_norm / 4 / plan.sampler.cohort)
        assert np.allclose(mean, expected, rtol=ROUNDING, atol=0), f"{came} clients are divided by another number"


def check_noise_distribution(plan: Plan) -> None:
    """Noise on the mean is normal with mean 0 and standard deviation z * clip / cohort, also for an empty cohort."""
    scale = plan.noise_multiplier * plan.clip_norm / plan.sampler.cohort
    draws = np.concatenate([np.concatenate(tensors) for tensors in noise(plan, 11, 2, [(80_000,), (200, 200), (3, 1)])])
    count = len(draws)
    assert count > 200_000
    # Three statistics, each overstepped with probability 1e-6.
    centre = abs(draws.mean()) / scale * math.sqrt(count)
    assert centre <= stats.norm.isf(FALSE_ALARM / 2), f"the mean is {centre:.1f} standard errors from 0"
    spread = np.sum(np.square(draws / scale))
    low, high = stats.chi2.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], count)
    assert low <= spread <= high, f"the variance is {spread / count:.4f} times (z * clip / cohort) ** 2"
    fit = stats.kstest(draws / scale, "norm")
    assert fit.pvalue >= FALSE_ALARM, f"not normal: {fit}"
    # A cohort's noise is the empty cohort's.
    template, record = [tf.zeros(1000)], [np.full(1000, plan.clip_norm / 100, np.float32)]
    alone, _ = release(plan.query(3), [], template)
    among, _ = release(plan.query(3), [record] * 7, template)
    mean = unnoised_mean(plan, [record] * 7, template)
    assert np.allclose(flat(among) - mean, flat(alone), atol=1e-5 * scale), "the noise depends on the cohort"


def check_noise_independence(plan: Plan) -> None:
    """Tensors of a record, rounds and seeds have noise of their own, uncorrelated to all other."""
    size = 40_000
    streams = {
        (f"seed {seed}", f"round {number}", f"tensor {index}"): tensor
        for seed in (0, 1)
        for number, tensors in enumerate(noise(plan, seed, 3, [(size,), (size,), (size // 4, 4)]))
        for index, tensor in enumerate(tensors)
    }
    names, values = list(streams), np.stack(list(streams.values()))
    assert np.all(values.std(axis=1) > 0), "some noise is constant"
    pairs = len(names) * (len(names) - 1) // 2
    bound = stats.norm.isf(FALSE_ALARM / 2 / pairs) / math.sqrt(size)  # 1e-6 for all pairs together
    correlations = np.triu(np.corrcoef(values), k=1)
    first, second = np.unravel_index(np.argmax(np.abs(correlations)), correlations.shape)
    worst = correlations[first, second]
    assert abs(worst) <= bound, f"noise of {names[first]} and {names[second]} has correlation {worst:.3f}"
    # Neighbouring coordinates; 1e-6 for all streams together.
    serial = [np.corrcoef(stream[:-1], stream[1:])[0, 1] for stream in values]
    bound = stats.norm.isf(FALSE_ALARM / 2 / len(names)) / math.sqrt(size)
    assert np.max(np.abs(serial)) <= bound, "neighbouring coordinates share noise"


def check_noise_repeats(plan: Plan) -> None:
    """The noise is a function of seed and round: a second process, or a resumed run, draws the same."""
    first, second = (noise(plan, 5, 3, [(50,), (50,)]) for _ in range(2))
    assert np.array_equal(first, second), "the noise of a seed and round differs between two queries"
    template = [tf.zeros(50), tf.zeros(50)]
    _, state = release(plan.query(5), [], template)
    resumed, _ = release(plan.query(5), [], template, state)
    assert np.array_equal(resumed, first[1]), "a resumed run draws other noise"


def check_accounting(plan: Plan) -> None:
    """The stated epsilon is what an accountant of our own finds for the plan's rounds, rate and noise."""
    arguments = (plan.noise_multiplier, plan.sampling_rate, plan.rounds, plan.guarantee.delta)
    found = fourier_epsilon(*arguments, plan.guarantee.relation)
    stated = plan.guarantee.epsilon
    assert abs(stated / found - 1) <= 1e-3, f"states epsilon {stated:.4f} where {found:.4f} is true"


def check_poisson(sampler: Poisson, population: int, *, rounds: int = 3000, seed: int = 0) -> None:
    """Every client takes part in every round independently of all else, with probability cohort / population."""
    rate = sampler.cohort / population
    took_part = np.zeros((rounds, population))
    for number in range(rounds):
        cohort = sampler.clients(seed, number, population)
        assert cohort.dtype == np.int32
        assert np.all(np.diff(cohort) > 0), f"clients are not ascending and unique: {cohort}"
        assert cohort.size == 0 or (cohort[0] >= 0 and cohort[-1] < population)
        took_part[number, cohort] = 1
    variance = rate * (1 - rate)

    # Each client's count is binomial; 1e-6 for all clients together.
    low, high = stats.binom.ppf([FALSE_ALARM / 2 / population, 1 - FALSE_ALARM / 2 / population], rounds, rate)
    counts = took_part.sum(axis=0)
    assert low <= counts.min(), f"client {counts.argmin()} took part {counts.min():g} times of {rounds}"
    assert counts.max() <= high, f"client {counts.argmax()} took part {counts.max():g} times of {rounds}"

    # All together; 6e-7.
    surplus = (took_part.sum() - took_part.size * rate) / math.sqrt(took_part.size * variance)
    assert abs(surplus) <= 5, f"clients take part at rate {took_part.mean():.4f}, not {rate:.4f}"

    # The size of a cohort has the binomial's variance; 6e-7 by the central limit theorem.
    squares = np.square(took_part.sum(axis=1) - population * rate) / (population * variance)
    deviation = (squares.sum() - rounds) / math.sqrt(rounds * (2 + (1 - 6 * variance) / (population * variance)))
    assert abs(deviation) <= 5, f"the variance of cohort sizes is {squares.mean():.3f} times the binomial's"

    # Each pair's correlation; 1e-6 for all pairs together, and a tenth more for the normal approximation.
    centred = took_part - rate
    correlations = centred.T @ centred / (rounds * variance)
    pairs = np.abs(correlations[np.triu_indices(population, k=1)])
    bound = 1.1 * stats.norm.isf(FALSE_ALARM / 2 / len(pairs)) / math.sqrt(rounds)
    assert pairs.max() <= bound, f"two clients take part with correlation {pairs.max():.3f}"

    # The same client in successive rounds; 6e-7.
    serial = np.sum(centred[:-1] * centred[1:]) / variance / math.sqrt(population * (rounds - 1))
    assert abs(serial) <= 5, f"taking part depends on the round before: {serial:.1f} standard errors"


EVERY_CHECK = (
    check_wicked_records,
    check_wicked_neighbours,
    check_denominator,
    check_noise_distribution,
    check_noise_independence,
    check_noise_repeats,
    check_accounting,
)
