"""From epsilon to the noise that it needs, always rounded to the safe side."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import dp_accounting
from scipy import optimize

from dpfl.errors import InputError
from dpfl.privacy.accounting import PLD_INTERVAL, check_analysis, check_delta, check_epsilon, epsilon
from dpfl.privacy.memory import remembered
from dpfl.privacy.relations import Accountant, Relation
from dpfl.privacy.rounding import rounded_up

# The calibrated epsilon lies between (1 - _SLACK) of the target and the target.
_SLACK = 1e-3
_SMALLEST_NOISE, _LARGEST_NOISE = 0.02, 1e5
_LEAST_ACCOUNTABLE_NOISE = 0.01  # with less, the privacy loss takes more values than memory holds
_SIGNIFICANT_DIGITS = 6
_NARROWEST = 1e-5  # of a bracket in log noise, above the rounding to six digits


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
    """Returns the smallest noise multiplier that keeps a target, rounded up to six digits.

    The epsilon of the result (`dpfl.privacy.epsilon` of `poisson_gaussian`) is at most the target,
    and at most 0.1 % below it unless epsilon jumps there, as RDP's may. Answers are kept in the user's cache folder.

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
    check_sampling(sampling_rate, steps)
    ever_sampled = 1 - (1 - sampling_rate) ** steps
    if delta >= ever_sampled:
        raise InputError(
            f"delta {delta:g} is not below the probability {ever_sampled:.3g} that a unit takes part at all, so that "
            "no noise would be needed and nobody would be protected; choose a smaller delta."
        )
    return _calibrate(float(target_epsilon), float(delta), float(sampling_rate), int(steps), relation, accountant)


@remembered
def _calibrate(
    target: float,
    delta: float,
    sampling_rate: float,
    steps: int,
    relation: Relation,
    accountant: Accountant,
) -> float:
    """Finds the root on a coarse grid, then moves it until the fine grid confirms it."""

    def log_excess(log_noise: float, interval: float) -> float:
        """Log of (epsilon / target): positive where the target is exceeded."""
        event = poisson_gaussian(math.exp(log_noise), sampling_rate, steps)
        spent = epsilon(event, delta, relation=relation, accountant=accountant, pld_interval=interval)
        return math.log(max(spent, 1e-12) / target)

    # Coarse enough that one evaluation takes some milliseconds, and an upper bound all the same.
    coarse = min(max(target * 1e-3, PLD_INTERVAL), 1e-2)
    start = _central_limit_noise(target, delta, sampling_rate, steps)
    low, high = _bracket(functools.partial(log_excess, interval=coarse), start, target, delta)
    root = optimize.brentq(log_excess, low, high, args=(coarse,), xtol=1e-5)

    # Epsilon falls roughly as noise ** -slope; from here each step starts at a confirmed distance.
    slope = max((log_excess(root, coarse) - log_excess(root + 0.01, coarse)) / 0.01, 0.5)
    too_little, enough = -math.inf, math.inf
    while True:
        noise = rounded_up(math.exp(root), _SIGNIFICANT_DIGITS)
        tried = math.log(noise)
        excess = log_excess(tried, PLD_INTERVAL)
        if excess <= 0:
            enough = min(enough, tried)
        else:
            too_little = max(too_little, tried)
        # Where epsilon jumps, nothing lies closer below the target than the safe side of the jump.
        if -_SLACK <= excess <= 0 or enough - too_little < _NARROWEST:
            return rounded_up(math.exp(enough), _SIGNIFICANT_DIGITS)
        root = tried + (excess + _SLACK / 2) / slope
        if not too_little < root < enough:
            root = (too_little + enough) / 2


def _central_limit_noise(target: float, delta: float, sampling_rate: float, steps: int) -> float:
    """A first guess from Gaussian DP's central limit theorem (Dong et al. 2019, 1905.02383, section 5)."""
    mu = 1 / dp_accounting.get_sigma_gaussian(target, delta)
    return 1 / math.sqrt(math.log1p((mu / sampling_rate) ** 2 / steps))


def _bracket(log_excess: Callable[[float], float], start: float, target: float, delta: float) -> tuple[float, float]:
    """Widens an interval of log noise around a guess until the target lies inside."""
    log_smallest, log_largest = math.log(_SMALLEST_NOISE), math.log(_LARGEST_NOISE)
    low = high = min(max(math.log(start), log_smallest), log_largest)
    step = 0.1
    if log_excess(high) > 0:
        while log_excess(high) > 0:
            if high >= log_largest:
                raise InputError(
                    f"epsilon {target:g} at delta {delta:g} cannot be met with any noise multiplier up to "
                    f"{_LARGEST_NOISE:g}; choose a larger epsilon, a larger delta or fewer rounds."
                )
            low, high, step = high, min(high + step, log_largest), 2 * step
        return low, high
    while log_excess(low) <= 0:
        if low <= log_smallest:
            raise InputError(
                f"epsilon {target:g} at delta {delta:g} is so large that hardly any noise is needed "
                f"(noise multiplier below {_SMALLEST_NOISE:g}), which protects nobody; choose a smaller epsilon."
            )
        low, high, step = max(low - step, log_smallest), low, 2 * step
    return low, high
