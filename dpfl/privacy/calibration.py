"""From epsilon to the noise, the rounds or the cohort that it allows, always rounded to the safe side."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import dp_accounting

from dpfl.errors import InputError
from dpfl.privacy.accounting import PLD_INTERVAL, accountant_for, check_analysis, check_delta, check_epsilon, epsilon
from dpfl.privacy.events import RevealedPoissonSampledDpEvent, with_noise
from dpfl.privacy.memory import remembered
from dpfl.privacy.pld import releases
from dpfl.privacy.relations import Accountant, Relation
from dpfl.privacy.rounding import rounded_up

# The calibrated epsilon lies between (1 - _SLACK) of the target and the target.
_SLACK = 1e-3
_SMALLEST_NOISE, _LARGEST_NOISE = 0.02, 1e5
_LEAST_ACCOUNTABLE_NOISE = 0.01  # with less, the privacy loss takes more values than memory holds
_SIGNIFICANT_DIGITS = 6
_COARSER = 4  # from one grid of privacy losses to the next; grids are nested, and a coarser one never gives less
_LONGEST_STEP = 3.0  # in log noise
_COUNTING_INTERVAL = 16 * PLD_INTERVAL  # of the first search for a count


def poisson_gaussian(noise_multiplier: float, sampling_rate: float, steps: int) -> dp_accounting.DpEvent:
    """Returns the event of `steps` Gaussian sums, each over a Poisson sample.

    Args:
        noise_multiplier: standard deviation of the noise divided by the clip norm.
        sampling_rate: the probability with which each unit takes part in a step, in (0, 1].
        steps: how many sums are released: rounds for user-level, local steps for example-level.

    Raises:
        InputError: the sampling rate is outside (0, 1], steps is below 1, or the noise is negative.
    """
    if noise_multiplier != 0 and not _LEAST_ACCOUNTABLE_NOISE <= noise_multiplier < math.inf:
        raise InputError(
            f"the noise multiplier must be 0 (no noise), or finite and at least {_LEAST_ACCOUNTABLE_NOISE:g}, "
            f"but it was {noise_multiplier:g}."
        )
    check_sampling(sampling_rate, steps)
    gaussian = dp_accounting.GaussianDpEvent(noise_multiplier)
    if sampling_rate < 1:
        return dp_accounting.SelfComposedDpEvent(dp_accounting.PoissonSampledDpEvent(sampling_rate, gaussian), steps)
    return dp_accounting.SelfComposedDpEvent(gaussian, steps)


def check_sampling(sampling_rate: float, steps: int) -> None:
    """Refuses a sampling rate outside (0, 1], fewer than one step, and a part of a step."""
    if not 0 < sampling_rate <= 1:
        raise InputError(
            f"the sampling rate must lie between 0 (excluded) and 1, but it was {sampling_rate:g}: "
            "give the expected cohort divided by the number of clients."
        )
    if not steps >= 1 or steps % 1 != 0:
        raise InputError(f"at least 1 step must be released, and a whole number of them, but it was {steps}.")


def noise_multiplier(
    target_epsilon: float,
    delta: float,
    *,
    sampling_rate: float,
    steps: int,
    relation: Relation = "add_or_remove_one",
    accountant: Accountant = "pld",
) -> float:
    """Returns the smallest noise multiplier of Gaussian sums over Poisson samples that keeps a target.

    This is `noise_for` of `poisson_gaussian(1, sampling_rate, steps)`.

    Args:
        target_epsilon: the epsilon that must not be exceeded, positive.
        delta: in (0, 1).
        sampling_rate: in (0, 1].
        steps: how many noisy sums are released, at least 1.
        relation: the neighbouring relation.
        accountant: "pld" or "rdp".

    Raises:
        InputError: a value is out of range, or no noise multiplier up to 100,000 meets the target.
    """
    check_epsilon(target_epsilon)
    check_delta(delta)
    check_analysis(relation, accountant)
    event = poisson_gaussian(1.0, float(sampling_rate), int(steps) if steps % 1 == 0 else steps)
    return noise_for(event, target_epsilon, delta, relation=relation, accountant=accountant)


def noise_for(
    event: dp_accounting.DpEvent,
    target_epsilon: float,
    delta: float,
    *,
    relation: Relation = "add_or_remove_one",
    accountant: Accountant = "pld",
) -> float:
    """Returns the smallest factor on all noise of an event that keeps a target, rounded up to six digits.

    The epsilon of the result (`dpfl.privacy.epsilon` of `with_noise(event, factor)`) is at most the target,
    and at most 0.1 % below it unless epsilon jumps there, as RDP's may. Answers are kept in the user's cache folder.

    Args:
        event: what is released, with noise of size 1 if the factor shall be the noise itself.
        target_epsilon: the epsilon that must not be exceeded, positive.
        delta: in (0, 1).
        relation: the neighbouring relation.
        accountant: "pld", which is RDP for events without a known privacy loss distribution, or "rdp".

    Raises:
        InputError: a value is out of range, there is no analysis of the event under the relation, or no factor
            between 0.02 and 100,000 is the smallest that meets the target.
    """
    check_epsilon(target_epsilon)
    check_delta(delta)
    answering = accountant_for(event, relation, accountant)
    ever_sampled = _participation(event)
    if delta >= ever_sampled:
        raise InputError(
            f"delta {delta:g} is not below the probability {ever_sampled:.3g} that a unit takes part at all, so that "
            "no noise would be needed and nobody would be protected; choose a smaller delta."
        )
    return _calibrate(event, float(target_epsilon), float(delta), relation, answering)


def _participation(event: dp_accounting.DpEvent) -> float:
    """At least the probability that a unit takes part in any release."""
    match event:
        case dp_accounting.NoOpDpEvent():
            return 0.0
        case dp_accounting.SelfComposedDpEvent():
            return 1 - (1 - _participation(event.event)) ** event.count
        case dp_accounting.ComposedDpEvent():
            return 1 - math.prod(1 - _participation(part) for part in event.events)
        case dp_accounting.PoissonSampledDpEvent() | RevealedPoissonSampledDpEvent():
            return event.sampling_probability * _participation(event.event)
        case dp_accounting.SampledWithoutReplacementDpEvent():
            return event.sample_size / event.source_dataset_size * _participation(event.event)
        case dp_accounting.TruncatedSubsampledGaussianDpEvent():
            return event.sampling_probability
    return 1.0


@remembered
def _calibrate(
    event: dp_accounting.DpEvent, target: float, delta: float, relation: Relation, accountant: Accountant
) -> float:
    """Finds the noise on a coarse grid of privacy losses, then on finer ones until they make no difference.

    Grids are nested, so that an epsilon on a coarse one is never below that on the finest, which counts.
    """

    @functools.cache
    def excess(noise: float, interval: float) -> float:
        """Log of (epsilon / target): positive where the target is exceeded."""
        try:
            spent = epsilon(
                with_noise(event, noise), delta, relation=relation, accountant=accountant, pld_interval=interval
            )
        except InputError:  # The noise is too little to be accounted for.
            spent = math.inf
        return math.log(min(max(spent, 1e-12), 1e12) / target)

    coarser, *finer = _intervals(event, target, delta, relation) if accountant == "pld" else [PLD_INTERVAL]
    search = functools.partial(_search, target=target, delta=delta)
    # On a finer grid epsilon is a little smaller: what comes close to the target now, will do then.
    closest = -_SLACK / 2 if finer else -_SLACK
    noise, slope = search(functools.partial(excess, interval=coarser), 1.0, 1.0, closest, 0.0)
    for interval in finer:
        # The error falls with the square of the interval, so that a 15th of the difference is left; 3 for safety.
        error = 3 / (_COARSER**2 - 1) * (excess(noise, coarser) - excess(noise, interval))
        if interval == PLD_INTERVAL or error < _SLACK / 4:
            left = 0.0 if interval == PLD_INTERVAL else max(error, 0.0)
            return search(functools.partial(excess, interval=interval), noise, slope, left - _SLACK, 0.0)[0]
        coarser = interval
    return noise


def _intervals(event: dp_accounting.DpEvent, target: float, delta: float, relation: Relation) -> list[float]:
    """Grids of privacy losses from coarse to fine.

    Connecting the dots adds about interval^2 / 6 to the variance of each loss. With as many losses as are
    composed, the coarsest grid changes epsilon, about sqrt(2 log(1 / delta)) standard deviations, by some tenths
    of a percent.
    """
    losses = sum(releases(event, relation).values())
    deviation = target / math.sqrt(2 * max(-math.log(delta), 1))
    coarsest = min(0.1 * deviation * math.sqrt(6 / max(losses, 1)), 0.1 * target)
    levels = max(math.floor(math.log(coarsest / PLD_INTERVAL, _COARSER)), 0)
    return [PLD_INTERVAL * _COARSER**level for level in range(levels, -1, -1)]


def _search(
    excess: Callable[[float], float],
    noise: float,
    slope: float,
    lowest: float,
    highest: float,
    *,
    target: float,
    delta: float,
) -> tuple[float, float]:
    """Changes noise, by secants that stay inside of the bracket, until lowest <= excess <= highest.

    Args:
        excess: of a noise of six digits; falls as noise grows.
        noise: to start with.
        slope: by how much excess is expected to fall as log noise grows.
        lowest: of the excesses sought.
        highest: of the excesses sought.
        target: the epsilon that the excess is relative to, for refusals.
        delta: of the target, for refusals.

    Returns:
        The noise and the slope there. Where epsilon jumps across the range, the noise on the jump's safe side.

    Raises:
        InputError: there is no such noise.
    """
    too_little, enough = 0.0, math.inf
    while True:
        found = excess(noise)
        if lowest <= found <= highest:
            return noise, slope
        if found > highest:
            too_little = noise
        else:
            enough = noise
        _check_limits(too_little, enough, target, delta)
        step = (found - (lowest + highest) / 2) / slope
        step = min(max(step, -_LONGEST_STEP), _LONGEST_STEP)
        tried = rounded_up(min(max(noise * math.exp(step), _SMALLEST_NOISE), _LARGEST_NOISE), _SIGNIFICANT_DIGITS)
        if not too_little < tried < enough:
            tried = rounded_up(math.sqrt(too_little * enough), _SIGNIFICANT_DIGITS)
            if tried >= enough:
                return enough, slope
        slope = max((found - excess(tried)) / math.log(tried / noise), 0.5)
        noise = tried


def _check_limits(too_little: float, enough: float, target: float, delta: float) -> None:
    if too_little >= _LARGEST_NOISE:
        raise InputError(
            f"epsilon {target:g} at delta {delta:g} cannot be met with any noise multiplier up to "
            f"{_LARGEST_NOISE:g}; choose a larger epsilon, a larger delta or fewer rounds."
        )
    if enough <= _SMALLEST_NOISE:
        raise InputError(
            f"epsilon {target:g} at delta {delta:g} is so large that hardly any noise is needed "
            f"(noise multiplier below {_SMALLEST_NOISE:g}), which protects nobody; choose a smaller epsilon."
        )


def largest_count(
    event_of: Callable[[int], dp_accounting.DpEvent],
    target_epsilon: float,
    delta: float,
    *,
    smallest: int = 1,
    largest: int,
    relation: Relation = "add_or_remove_one",
    accountant: Accountant = "pld",
) -> int:
    """Returns the largest number, of rounds or of a cohort, that stays within a target.

    Args:
        event_of: what is released for such a number; its epsilon must not fall as the number grows.
        target_epsilon: the epsilon that must not be exceeded, positive.
        delta: in (0, 1).
        smallest: the first number to consider.
        largest: the last number to consider.
        relation: the neighbouring relation.
        accountant: "pld", which is RDP for events without a known privacy loss distribution, or "rdp".

    Raises:
        InputError: even the smallest number exceeds the target, a value is out of range, or there is no analysis of
            an event under the relation.
    """
    check_epsilon(target_epsilon)
    check_delta(delta)
    if smallest > largest:
        raise InputError(f"the largest number to try, {largest}, must not be below the smallest, {smallest}.")

    def spent(number: int, interval: float) -> float:
        return epsilon(event_of(number), delta, relation=relation, accountant=accountant, pld_interval=interval)

    def fits(number: int, interval: float) -> bool:
        return spent(number, interval) <= target_epsilon

    # What fits on a coarse grid fits on a fine one, and little more.
    coarse, fine = (functools.partial(fits, interval=interval) for interval in (_COUNTING_INTERVAL, PLD_INTERVAL))
    number = _last(fine, _last(coarse, smallest - 1, largest), largest)
    if number < smallest:
        raise InputError(
            f"even the smallest number, {smallest} (of rounds, or of clients in a cohort), costs epsilon "
            f"{rounded_up(spent(smallest, PLD_INTERVAL), 4):g} at delta {delta:g}, more than {target_epsilon:g}; "
            "choose a larger epsilon or more noise."
        )
    return number


def _last(fits: Callable[[int], bool], number: int, largest: int) -> int:
    """The last number up to the largest that fits, from one that does: by doubling steps, then by halving them."""
    step, too_large = 1, largest + 1
    while number + 1 < too_large:
        tried = min(number + step, too_large - 1)
        if fits(tried):
            number, step = tried, 2 * step
        else:
            too_large, step = tried, max(step // 2, 1)
    return number
