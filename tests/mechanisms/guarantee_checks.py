"""What must hold of a plan for its guarantee to be true, as functions that raise AssertionError.

Each takes a plan and looks at what it does, not at how: at the query's releases and at the cohorts.
`test_gaussian_*.py` and `test_sampling.py` hold the true mechanisms and samplers to them;
`test_broken_mechanisms.py` shows that they catch those that are broken on purpose. Checks that speak of a
clip are about mechanisms that clip in L2 norm.

Statistical checks have fixed seeds, so that they pass or fail for good. Were the seeds drawn at random,
each bound would be overstepped with the probability that stands beside it.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import dp_accounting
import numpy as np
import tensorflow as tf
from privacy.independent_accountants import fourier_epsilon
from scipy import stats

from dpfl.mechanisms import Plan
from dpfl.privacy import Guarantee
from dpfl.sampling import BallsInBins, BaseSampler, CappedPoisson, Cyclic, CyclicPoisson, FixedSize, Poisson

# Of one statistic under the null hypothesis, before the correction for the number of statistics.
FALSE_ALARM = 1e-6
# Of float32 sums of a few dozen records.
ROUNDING = 1e-5


def release(query: Any, records: Sequence[Any], template: Any, state: Any = None) -> tuple[Any, Any]:
    """Runs one round by hand: what is released, as arrays, and the next state; records are of clients 0, 1, ..."""
    state = query.initial_global_state() if state is None else state
    params = query.derive_sample_params(state)
    of_client = getattr(query, "client_params", lambda params, client: params)
    total = query.initial_sample_state(tf.nest.map_structure(tf.zeros_like, template))
    for client, record in enumerate(records):
        record = tf.nest.map_structure(lambda part: tf.constant(part, tf.float32), record)
        preprocessed = query.preprocess_record(of_client(params, tf.constant(client)), record)
        total = query.accumulate_preprocessed_record(total, preprocessed)
    result, state, _ = query.get_noised_result(total, state)
    return tf.nest.map_structure(lambda part: part.numpy(), result), state


def changed(plan: Plan, *, clip_norm: float | None = None, cohort: int | None = None, **fields: Any) -> Plan:
    """The plan with another clip, another cohort or other fields; its guarantee stays, and no longer holds."""
    if clip_norm is not None:
        fields["mechanism"] = fields.get("mechanism", plan.mechanism).replace(clip_norm=clip_norm)
    if cohort is not None:
        fields["sampler"] = fields.get("sampler", plan.sampler).replace(cohort=cohort)
    return dataclasses.replace(plan, **fields)


def without_noise(plan: Plan) -> Plan:
    """The same plan with a noise of standard deviation 0."""
    return changed(plan, noise_multiplier=0.0)


def unnoised_mean(plan: Plan, records: Sequence[Any], template: Any) -> np.ndarray:
    """What a round would release without noise, all tensors as one float64 vector."""
    return flat(release(without_noise(plan).query(0, template), records, template)[0])


def flat(record: Any) -> np.ndarray:
    """All tensors of a structure as one float64 vector."""
    return np.concatenate([np.asarray(part, np.float64).ravel() for part in tf.nest.flatten(record)])


def noise(plan: Plan, seed: int, rounds: int, shapes: Sequence[tuple[int, ...]]) -> list[list[np.ndarray]]:
    """What empty cohorts release in successive rounds, tensor by tensor as vectors."""
    template = [tf.zeros(shape) for shape in shapes]
    query, state, released = plan.query(seed, template), None, []
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
        received = unnoised_mean(plan, [record], template) * plan.expected_cohort
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
    bound = plan.clip_norm / plan.expected_cohort
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
    cohort = round(plan.expected_cohort)
    for came in (0, 1, 2, cohort, 3 * cohort):
        mean = unnoised_mean(plan, [record] * came, template)
        expected = np.full(5, came * plan.clip_norm / 4 / plan.expected_cohort)
        assert np.allclose(mean, expected, rtol=ROUNDING, atol=0), f"{came} clients are divided by another number"


def check_noise_distribution(plan: Plan) -> None:
    """Noise on the mean is normal with mean 0 and standard deviation z * clip / cohort, also for an empty cohort."""
    scale = plan.noise_multiplier * plan.clip_norm / plan.expected_cohort
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
    alone, _ = release(plan.query(3, template), [], template)
    among, _ = release(plan.query(3, template), [record] * 7, template)
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
    _, state = release(plan.query(5, template), [], template)
    resumed, _ = release(plan.query(5, template), [], template, state)
    assert np.array_equal(resumed, first[1]), "a resumed run draws other noise"


def check_accounting(plan: Plan) -> None:
    """The stated epsilon is what an accountant of our own finds for the plan's rounds, rate and noise.

    It knows independent Gaussian noise on sums over Poisson samples, and over everybody.
    """
    rate = plan.sampler.rate(plan.population) if isinstance(plan.sampler, Poisson) else 1.0
    found = fourier_epsilon(plan.noise_multiplier, rate, plan.rounds, plan.guarantee.delta, plan.guarantee.relation)
    stated = plan.guarantee.epsilon
    assert abs(stated / found - 1) <= 1e-3, f"states epsilon {stated:.4f} where {found:.4f} is true"


def check_recorded_event(plan: Plan) -> None:
    """The event in the guarantee's JSON is that of the plan's sampler, noise and rounds, and costs what is stated."""
    recorded = Guarantee.from_json(plan.guarantee.to_json())
    event = recorded.privacy_event()
    assert event == plan.event(), f"the guarantee is for {event}, but the plan does {plan.event()}"
    found = recorded.recomputed_epsilon()
    assert found == plan.guarantee.epsilon, f"states epsilon {plan.guarantee.epsilon} where its event costs {found}"


def noise_over_rounds(plan: Plan, size: int, *, seed: int = 0) -> np.ndarray:
    """What empty cohorts release in the plan's rounds, one tensor of a size, in clip norms: shape (rounds, size)."""
    template = [tf.zeros(size)]
    query = plan.query(seed, template)
    one_round = tf.function(lambda state: query.get_noised_result(query.initial_sample_state(template), state)[:2])
    state, released = query.initial_global_state(), []
    for _ in range(plan.rounds):
        result, state = one_round(state)
        released.append(result[0].numpy().astype(np.float64) * plan.expected_cohort / plan.clip_norm)
    return np.stack(released)


def squared_mean_shift(event: dp_accounting.DpEvent) -> float:
    """What Gaussian sums cost a unit that is sampled whenever it can be: mu^2 of Gaussian DP, 1 / z^2 for each sum."""
    match event:
        case dp_accounting.GaussianDpEvent():
            return 1 / event.noise_multiplier**2
        case dp_accounting.SelfComposedDpEvent():
            return event.count * squared_mean_shift(event.event)
        case dp_accounting.PoissonSampledDpEvent():
            return squared_mean_shift(event.event)
    raise AssertionError(f"{event} is not made of Gaussian sums")


def check_noise_hides_a_client(plan: Plan, *, size: int = 40_000) -> None:
    """All rounds together tell a client from none no better than the event says, whatever it sends in its rounds.

    Where noise is correlated over rounds with covariance S, a client that adds the vector u to the rounds' sums
    is as visible as a shift by sqrt(u' S^-1 u) standard deviations. It takes part in the rounds of its phase,
    each time by a full clip norm, in the same direction or the opposite. The estimate of u' S^-1 u from so
    many coordinates has an inverse chi-squared distribution: 1e-6 for all u together.
    """
    draws, rounds = noise_over_rounds(plan, size), plan.rounds
    values, vectors = np.linalg.eigh(draws @ draws.T / size)
    whitening = vectors / np.sqrt(np.maximum(values, 1e-9 * values.max()))
    period = plan.sampler.period(plan.population) or 1
    clients = []
    for phase in range(min(period, rounds)):
        turns = np.arange(phase, rounds, period)
        for signs in itertools.product([1.0], *[[1.0, -1.0]] * (len(turns) - 1)):
            clients.append(np.zeros(rounds))
            clients[-1][turns] = signs
    shifts = np.sum(np.square(np.array(clients) @ whitening), axis=1)
    luck = size / stats.chi2.ppf(FALSE_ALARM / len(clients), size - rounds + 1)
    stated = squared_mean_shift(plan.event())
    worst = int(shifts.argmax())
    assert shifts[worst] <= stated * luck, (
        f"a client that sends {clients[worst]} is seen at {math.sqrt(shifts[worst] / stated):.3f} times what is stated"
    )


def check_rounds_are_charged(plan: Plan, *, seeds: int = 300) -> None:
    """The event has at least as many sums of a client, times their sampling rate, as it takes part in on average.

    Below it by chance with probability 6e-7: a client's sums vary no more than independent draws do.
    """
    event, times, rate = plan.event(), 1, 1.0
    if isinstance(event, dp_accounting.SelfComposedDpEvent):
        event, times = event.event, event.count
    if isinstance(event, dp_accounting.PoissonSampledDpEvent):
        rate = event.sampling_probability
    counts = np.stack([participation(plan.sampler, plan.population, plan.rounds, s).sum(axis=0) for s in range(seeds)])
    assert counts.max() <= times, f"a client takes part {counts.max():g} times, but {times} are charged"
    slack = 5 * math.sqrt(times * rate * (1 - rate) / counts.size)
    assert counts.mean() <= times * rate + slack, (
        f"clients take part {counts.mean():.3f} times on average, but {times * rate:.3f} times are charged"
    )


def check_count_is_charged(plan: Plan, *, rounds: int = 3000) -> None:
    """Of adaptive clipping: the noise of the sum and of the count are enough for both together, and independent.

    The count is read off the clip norm. Noise multipliers z of the sum and 2 sigma of the count (whose sensitivity is
    1/2) cost as much as one of (z^-2 + (2 sigma)^-2)^-1/2 (1905.03871, theorem 1). 1e-6 for each of the three.
    """
    size, cohort = 20, plan.expected_cohort
    template = [tf.zeros(size)]
    query = plan.query(3, template)

    @tf.function
    def run() -> Any:
        def body(number: tf.Tensor, state: Any, sums: Any, clips: Any) -> Any:
            clip = state.numerator_state.clip_norm
            result, state, _ = query.get_noised_result(query.initial_sample_state(template), state)
            clips = clips.write(number, clip).write(number + 1, state.numerator_state.clip_norm)
            return number + 1, state, sums.write(number, result[0] * cohort / clip), clips

        arrays = [tf.TensorArray(tf.float32, length, clear_after_read=False) for length in (rounds, rounds + 1)]
        start = (tf.constant(0), query.initial_global_state(), *arrays)
        _, _, sums, clips = tf.while_loop(lambda number, *_: number < rounds, body, start)
        return sums.stack(), clips.stack()

    sums, clips = (values.numpy().astype(np.float64) for values in run())
    fractions = plan.mechanism.quantile - np.diff(np.log(clips)) / plan.mechanism.clip_learning_rate
    assert np.all((fractions > 0) & (fractions < 1)), "the count's noise is cut off"
    counts = (fractions - 0.5) * cohort

    largest_sum = np.sum(sums**2) / stats.chi2.ppf(FALSE_ALARM, sums.size)
    largest_count = np.sum(counts**2) / stats.chi2.ppf(FALSE_ALARM, counts.size)
    together = 1 / math.sqrt(1 / largest_sum + 1 / (4 * largest_count))
    assert together >= plan.noise_multiplier, (
        f"sum and count have a noise multiplier of {together:.3f} together, but {plan.noise_multiplier:.3f} is stated"
    )
    correlations = np.abs(np.corrcoef(np.column_stack([counts, sums]), rowvar=False)[0, 1:])
    bound = stats.norm.isf(FALSE_ALARM / 2 / size) / math.sqrt(rounds)
    assert correlations.max() <= bound, f"the count's noise has correlation {correlations.max():.3f} with the sum's"


def check_count_sensitivity(plan: Plan) -> None:
    """Of adaptive clipping: one client moves the un-noised count by 1/2, or, replaced by another, by 1."""
    template, records = wicked_records(plan.clip_norm)
    quiet = without_noise(plan)

    def count(cohort: Sequence[Any]) -> float:
        _, state = release(quiet.query(0, template), cohort, template)
        moved = math.log(float(state.numerator_state.clip_norm) / plan.clip_norm) / plan.mechanism.clip_learning_rate
        return (plan.mechanism.quantile - moved) * plan.expected_cohort

    few = [records[4], records[7], records[14]]
    for index, other in itertools.product(range(len(few)), records):
        rest = few[:index] + few[index + 1 :]
        removed = abs(count(few) - count(rest))
        assert removed <= 0.5 + 1e-4, f"removing {few[index]} moved the count by {removed:.3f}"
        replaced = abs(count(few) - count([*rest, other]))
        assert replaced <= 1 + 1e-4, f"a replacement moved the count by {replaced:.3f}"


def check_client_noise(plan: Plan, clients: int, multiplier: float) -> None:
    """So many clients' own noise amounts to this multiplier of the clip norm on their sum, or to more.

    Below it by chance with probability 1e-6 for normal noise; of rotated integers, with the 2 % that are left to them.
    """
    size, rounds = 4096, 5
    template = [tf.zeros(size)]
    query, state, squares = plan.query(1, template), None, 0.0
    for _ in range(rounds):
        result, state = release(query, [[np.zeros(size, np.float32)]] * clients, template, state)
        squares += float(np.sum(np.square(flat(result) * plan.expected_cohort / plan.clip_norm)))
    found = math.sqrt(squares / stats.chi2.ppf(FALSE_ALARM, size * rounds))
    assert found >= 0.98 * multiplier, (
        f"{clients} clients noise their sum by {found:.3f} clips instead of {multiplier:.3f}"
    )


def check_clients_differ(plan: Plan, seed: int = 2) -> None:
    """Two clients with the same update send different things: 1e-6 for their correlation."""
    size = 40_000
    template = [tf.zeros(size)]
    query = plan.query(seed, template)
    params = query.derive_sample_params(query.initial_global_state())
    sent = [
        flat(query.preprocess_record(query.client_params(params, tf.constant(client)), template)) for client in (0, 1)
    ]
    correlation = np.corrcoef(*sent)[0, 1]
    assert abs(correlation) <= stats.norm.isf(FALSE_ALARM / 2) / math.sqrt(size), (
        f"the noise of two clients has correlation {correlation:.3f}"
    )


def participation(sampler: BaseSampler, population: int, rounds: int, seed: int = 0) -> np.ndarray:
    """Who takes part in which round: zeros and ones of shape (rounds, population)."""
    took_part = np.zeros((rounds, population))
    for number in range(rounds):
        cohort = sampler.clients(seed, number, population)
        assert cohort.dtype == np.int32
        assert np.all(np.diff(cohort) > 0), f"clients are not ascending and unique: {cohort}"
        assert cohort.size == 0 or (cohort[0] >= 0 and cohort[-1] < population)
        took_part[number, cohort] = 1
    return took_part


def check_poisson(sampler: Poisson, population: int, *, rounds: int = 3000, seed: int = 0) -> None:
    """Every client takes part in every round independently of all else, with probability cohort / population."""
    check_independent(participation(sampler, population, rounds, seed), sampler.cohort / population)


def check_independent(took_part: np.ndarray, rate: float) -> None:
    """All entries of a matrix of zeros and ones, rounds by clients, are independently 1 with a probability."""
    rounds, population = took_part.shape
    variance = rate * (1 - rate)

    check_counts("client", took_part.sum(axis=0), rounds, rate)

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

    check_rounds_are_independent(took_part, rate)


def check_counts(what: str, counts: np.ndarray, trials: int, rate: float) -> None:
    """Each count is binomial; out of bounds with probability 1e-6 for all together, dependent or not."""
    low, high = stats.binom.ppf([FALSE_ALARM / 2 / counts.size, 1 - FALSE_ALARM / 2 / counts.size], trials, rate)
    least, most = counts.argmin(), counts.argmax()
    assert low <= counts.min(), f"{what} {least} took part {counts.min():g} times of {trials}, at least {low:g} are due"
    assert counts.max() <= high, f"{what} {most} took part {counts.max():g} times of {trials}, at most {high:g} are due"


def check_rounds_are_independent(took_part: np.ndarray, rate: float) -> None:
    """The same client in successive rounds; 6e-7 if clients of a round do not depend on each other."""
    rounds, population = took_part.shape
    centred = took_part - rate
    serial = np.sum(centred[:-1] * centred[1:]) / (rate * (1 - rate)) / math.sqrt(population * (rounds - 1))
    assert abs(serial) <= 5, f"taking part depends on the round before: {serial:.1f} standard errors"


def pairs_together(took_part: np.ndarray) -> np.ndarray:
    """How often each two clients took part in the same round."""
    together = took_part.T @ took_part
    return together[np.triu_indices(len(together), k=1)]


def check_fixed_size(sampler: FixedSize, population: int, *, rounds: int = 3000, seed: int = 0) -> None:
    """Every round has `cohort` clients, each set of them with the same probability, whoever came before."""
    took_part = participation(sampler, population, rounds, seed)
    sizes = took_part.sum(axis=1)
    assert np.all(sizes == sampler.cohort), f"rounds have from {sizes.min():g} to {sizes.max():g} clients"
    rate = sampler.cohort / population
    check_counts("client", took_part.sum(axis=0), rounds, rate)
    check_counts("pair", pairs_together(took_part), rounds, rate * (sampler.cohort - 1) / (population - 1))
    check_rounds_are_independent(took_part, rate)


def check_capped(sampler: CappedPoisson, population: int, *, rounds: int = 3000, seed: int = 0) -> None:
    """A Poisson sample; where it exceeds the cap, a random part of it, of just that size."""
    took_part = participation(sampler, population, rounds, seed)
    cap, rate = sampler.largest_cohort(population), sampler.cohort / population
    sizes = took_part.sum(axis=1).astype(int)
    assert sizes.max() <= cap, f"a round has {sizes.max()} clients, though at most {cap} may come"

    drawn = np.arange(population + 1)
    chances = stats.binom.pmf(drawn, population, rate)
    taken = np.minimum(drawn, cap)
    # Each size's count is binomial: 1e-6 for all sizes together.
    for size in range(cap + 1):
        chance = chances[taken == size].sum()
        low, high = stats.binom.ppf([FALSE_ALARM / 2 / (cap + 1), 1 - FALSE_ALARM / 2 / (cap + 1)], rounds, chance)
        count = np.sum(sizes == size)
        assert low <= count <= high, f"{count} rounds of {rounds} have {size} clients, {rounds * chance:.1f} are due"

    check_counts("client", took_part.sum(axis=0), rounds, chances @ taken / population)
    both = chances @ (taken * (taken - 1)) / (population * (population - 1))
    check_counts("pair", pairs_together(took_part), rounds, both)
    check_rounds_are_independent(took_part, chances @ taken / population)


def check_cyclic(sampler: Cyclic, population: int, *, seed: int = 0) -> None:
    """Everybody takes part just once in a period, always in the same of its rounds; groups differ by one at most."""
    period = sampler.period(population)
    took_part = participation(sampler, population, 3 * period, seed)
    times = took_part[:period].sum(axis=0)
    assert np.all(times == 1), f"client {times.argmax()} took part {times.max():g} times in a period of {period} rounds"
    assert np.array_equal(took_part[:-period], took_part[period:]), (
        f"the groups change after a period of {period} rounds"
    )
    sizes = took_part.sum(axis=1)
    assert sizes.max() - sizes.min() <= 1, f"groups have from {sizes.min():g} to {sizes.max():g} clients"
    assert sizes.max() <= sampler.cohort


def check_cyclic_poisson(sampler: CyclicPoisson, population: int, *, turns: int = 3000, seed: int = 0) -> None:
    """In its group's turns a client takes part independently at rate cohort * groups / population, and never else."""
    groups = sampler.groups
    took_part = participation(sampler, population, turns * groups, seed).reshape(turns, groups, population)
    phases = np.count_nonzero(took_part.sum(axis=0), axis=0)
    assert phases.max() <= 1, f"client {phases.argmax()} took part in the turns of {phases.max()} groups"
    members = np.count_nonzero(took_part.sum(axis=0), axis=1)
    assert members.max() - members.min() <= 1, f"groups have from {members.min()} to {members.max()} clients"
    check_independent(took_part.sum(axis=1), sampler.cohort * groups / population)


def check_balls_in_bins(sampler: BallsInBins, population: int, *, epochs: int = 2000, seed: int = 0) -> None:
    """In each epoch everybody takes part just once, in a round by chance, independently of others and of epochs."""
    bins = sampler.bins(population)
    took_part = participation(sampler, population, epochs * bins, seed).reshape(epochs, bins, population)
    times = took_part.sum(axis=1)
    assert np.all(times == 1), f"somebody took part {times.min():g} times in an epoch, somebody {times.max():g} times"
    check_counts("client and bin", took_part.sum(axis=0).ravel(), epochs, 1 / bins)
    same_bin = sum(pairs_together(took_part[:, turn]) for turn in range(bins))
    check_counts("pair", same_bin, epochs, 1 / bins)
    # The same bin in successive epochs: binomial over clients and epochs; 1e-6.
    again = np.sum(took_part[:-1] * took_part[1:])
    check_counts("everybody again, client", np.array([again]), (epochs - 1) * population, 1 / bins)


EVERY_CHECK = (
    check_wicked_records,
    check_wicked_neighbours,
    check_denominator,
    check_noise_distribution,
    check_noise_independence,
    check_noise_repeats,
    check_accounting,
    check_recorded_event,
)
