"""Privacy loss distributions: what many releases cost together, tightly.

The loss log(P / Q) of one release is put on a grid by connecting the dots of its profile, which is
pessimistic (Doroshenko et al. 2022, 2207.04380). The losses of all releases add up, so that their
distributions are convolved, by one real FFT (Koskela et al. 2020, 1906.03049). Where delta is small they are
tilted before by e^(tilt * loss), so that the losses that decide about delta are no longer rare: round-off
is then relative to delta, however small delta is, instead of about 1e-16.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence

import dp_accounting
import numpy as np
from dp_accounting import (
    ComposedDpEvent,
    GaussianDpEvent,
    NonPrivateDpEvent,
    NoOpDpEvent,
    PoissonSampledDpEvent,
    SelfComposedDpEvent,
)
from scipy import fft

from dpfl.errors import InputError
from dpfl.privacy.events import RevealedPoissonSampledDpEvent
from dpfl.privacy.profiles import Profile, pair_of
from dpfl.privacy.relations import Relation

_NEGLIGIBLE = 1e-24  # mass beyond the ends of one release's grid; it counts as an infinite loss
_OUTSIDE = 40.0  # the window of a composition leaves out e^-40 of the tilted mass
_SURPRISE_WITHIN_DIGITS = 14.0  # masses of e^-14 still have ten digits beside a mass of 1
_NO_MATTER = 60.0  # e^-60 in a spectrum, where round-off is about e^-36
_MOST_POINTS = 20_000_000  # of a grid: about 2 GB of arrays while it is computed
_WORTH_KEEPING = 1 << 18  # points of a grid; of 16 pairs of them, some hundred MB at most
_NEWTON_STEPS = 12  # before a tilt is sought by bisection, since two humps may mislead Newton's method
_LARGEST_EXPONENT = 600.0  # e^709 is the largest number there is, of which sums are taken
_REACHES = np.geomspace(1e-9, 1e7, 1500)


@dataclasses.dataclass(frozen=True)
class Loss:
    """The distribution of a privacy loss on a grid.

    Attributes:
        lower: the smallest loss, in intervals.
        masses: of the losses lower, lower + 1, ..., in intervals; shape (points,).
        infinity: the mass of an infinite loss.
        interval: between two losses of the grid.
    """

    lower: int
    masses: np.ndarray
    infinity: float
    interval: float

    @property
    def upper(self) -> int:
        """The largest finite loss, in intervals."""
        return self.lower + len(self.masses) - 1

    @functools.cached_property
    def losses(self) -> np.ndarray:
        """The finite losses, shape (points,)."""
        return np.arange(self.lower, self.upper + 1) * self.interval

    @functools.cached_property
    def log_masses(self) -> np.ndarray:
        """The logarithms of the masses, shape (points,)."""
        with np.errstate(divide="ignore"):
            return np.log(self.masses)


@dataclasses.dataclass(frozen=True)
class _Cumulants:
    """The logarithm of the moment-generating function at a tilt, and its first two derivatives there."""

    tilt: float
    value: float
    mean: float
    variance: float


def pld_epsilon(event: dp_accounting.DpEvent, delta: float, relation: Relation, interval: float) -> float:
    """Returns the epsilon that an event costs at a delta, by privacy loss distributions.

    Args:
        event: what is released.
        delta: the probability mass outside the bound, in (0, 1).
        relation: the neighbouring relation.
        interval: of the grid of losses; dividing it by a whole number never raises epsilon.

    Returns:
        Epsilon, an upper bound; infinity where nothing is guaranteed.

    Raises:
        UnsupportedEventError: (of dp_accounting) no dominating pair is known.
        MemoryError: the losses take more values than memory holds.
    """
    counts = releases(event, relation)
    if NonPrivateDpEvent() in counts:
        return math.inf
    sides = [_losses(release, relation, interval) for release in counts]
    # Where one release has two directions, all must be composed in both.
    directions = max((len(side) for side in sides), default=0)
    return max(
        (
            composed_epsilon([side[-1 if direction else 0] for side in sides], list(counts.values()), delta)
            for direction in range(directions)
        ),
        default=0.0,
    )


def has_pld(event: dp_accounting.DpEvent, relation: Relation) -> bool:
    """Whether `pld_epsilon` has an answer."""
    try:
        releases(event, relation)
    except dp_accounting.UnsupportedEventError:
        return False
    return True


def releases(event: dp_accounting.DpEvent, relation: Relation) -> dict[dp_accounting.DpEvent, int]:
    """Returns how often each single release is made.

    Those that reveal nothing are left out, those without noise are a `NonPrivateDpEvent`, and all Gaussian ones
    together are one.

    Args:
        event: what is released.
        relation: the neighbouring relation.

    Raises:
        UnsupportedEventError: (of dp_accounting) no pair is known to dominate a release under the relation.
        InputError: a release has negative noise, or a sampling probability outside [0, 1].
    """
    counts: dict[dp_accounting.DpEvent, int] = {}
    precision = 0.0  # of Gaussian noise, whose inverse squares add up
    for release, count in _flattened(event, 1):
        if isinstance(release, GaussianDpEvent):
            precision += count / release.noise_multiplier**2
            continue
        if not isinstance(release, NonPrivateDpEvent):
            pair_of(release, relation)
        counts[release] = counts.get(release, 0) + count
    if precision > 0:
        counts[GaussianDpEvent(1 / math.sqrt(precision))] = 1
    return counts


def _flattened(event: dp_accounting.DpEvent, count: int) -> Iterator[tuple[dp_accounting.DpEvent, int]]:
    """The single releases, each with how often it is made."""
    match event:
        case NoOpDpEvent() | SelfComposedDpEvent(count=0):
            return
        case SelfComposedDpEvent():
            yield from _flattened(event.event, count * event.count)
            return
        case ComposedDpEvent():
            for part in event.events:
                yield from _flattened(part, count)
            return
    rate = getattr(event, "sampling_probability", None)
    noise = getattr(getattr(event, "event", event), "noise_multiplier", None)
    _check_release(rate, noise)
    if rate == 0 or noise == math.inf:
        return
    if noise == 0:
        yield NonPrivateDpEvent(), count
    elif rate == 1 and isinstance(event, PoissonSampledDpEvent | RevealedPoissonSampledDpEvent):
        yield from _flattened(event.event, count)
    else:
        yield event, count


def _check_release(rate: float | None, noise: float | None) -> None:
    if rate is not None and not 0 <= rate <= 1:
        raise InputError(f"the sampling probability of an event must lie between 0 and 1, but it was {rate:g}.")
    if noise is not None and not noise >= 0:
        raise InputError(f"the noise multiplier of an event must not be negative, but it was {noise:g}.")


def _losses(release: dp_accounting.DpEvent, relation: Relation, interval: float) -> tuple[Loss, ...]:
    """The losses of one release: log(P / Q) under P and, unless it is the same, log(Q / P) under Q."""
    losses = _kept_losses(release, relation, interval)
    if len(losses[0].masses) > _WORTH_KEEPING:
        _kept_losses.cache_clear()
    return losses


@functools.lru_cache(maxsize=16)
def _kept_losses(release: dp_accounting.DpEvent, relation: Relation, interval: float) -> tuple[Loss, ...]:
    pair = pair_of(release, relation)
    low, high = pair.bounds() if pair.bounds else _reach(pair.forward, pair.backward)
    of_p = connected(pair.forward, pair.backward, (low, high), interval)
    if pair.forward is pair.backward:
        return (of_p,)
    low, high = (-high, -low) if pair.bounds else _reach(pair.backward, pair.forward)
    return of_p, connected(pair.backward, pair.forward, (low, high), interval)


def _reach(forward: Profile, backward: Profile) -> tuple[float, float]:
    """The range of losses with more than a negligible mass outside."""
    return (
        -_first_negligible(np.exp(-_REACHES) * backward(_REACHES)),
        _first_negligible(forward(_REACHES)),
    )


def _first_negligible(divergences: np.ndarray) -> float:
    negligible = divergences <= _NEGLIGIBLE
    if not negligible.any():
        raise MemoryError
    return float(_REACHES[np.argmax(negligible)])


def connected(forward: Profile, backward: Profile, reach: tuple[float, float], interval: float) -> Loss:
    """Returns the loss whose profile is a polygon in e^epsilon through a profile's points on a grid.

    A profile is convex in e^epsilon, so that the polygon lies above it (Doroshenko et al. 2022,
    2207.04380, algorithm 1). Below epsilon = 0 the line 1 - e^epsilon is left out of the divergences, since it
    does not bend, and would cost digits.

    Args:
        forward: the divergences of P from Q at epsilons >= 0.
        backward: those of Q from P.
        reach: the smallest and the largest loss to put on the grid, below and above 0.
        interval: of the grid.

    Raises:
        MemoryError: the grid would be too large.
    """
    below, above = max(math.ceil(-reach[0] / interval), 1), max(math.ceil(reach[1] / interval), 1)
    _check_points(below + above)
    epsilons = np.arange(max(below, above) + 1) * interval
    right = np.minimum.accumulate(np.clip(forward(epsilons[: above + 1]), 0, 1))
    left = np.exp(-epsilons[: below + 1]) * np.clip(backward(epsilons[: below + 1]), 0, 1)
    right[0] = max(right[0], left[0])
    rises = np.diff(np.concatenate([left[:0:-1], right]), prepend=left[-1] * math.exp(-interval), append=right[-1])
    masses = (rises[1:] - math.exp(interval) * rises[:-1]) / math.expm1(interval)
    masses[below] += 1  # of the line that was left out, which bends at 0
    return Loss(-below, np.maximum(masses, 0), float(right[-1]), interval)


def _check_points(points: int) -> None:
    if points > _MOST_POINTS:
        raise MemoryError


def composed_epsilon(losses: Sequence[Loss], counts: Sequence[int], delta: float) -> float:
    """Returns the epsilon of independent losses that add up.

    Args:
        losses: on grids of the same interval.
        counts: how often each of them adds up.
        delta: in (0, 1).

    Raises:
        MemoryError: the grid of their sum would be too large.
    """
    infinity = -math.expm1(sum(count * math.log1p(-loss.infinity) for loss, count in zip(losses, counts, strict=True)))
    if infinity >= delta:
        return math.inf
    interval = losses[0].interval
    plain = _cumulants(losses, counts, 0.0)
    surprise = -math.log(delta) - _SURPRISE_WITHIN_DIGITS
    likely = _surprising(losses, counts, plain, surprise) if surprise > 0 else plain
    window, outside = _window(losses, counts, likely)
    tilted = _convolved(losses, counts, likely.tilt, window)
    sums = np.arange(len(tilted)) * interval
    log_ratios = likely.value - likely.tilt * sums  # of plain to tilted masses
    masses = np.minimum(tilted * np.exp(np.minimum(log_ratios, _LARGEST_EXPONENT)), 1)
    # FFTs err by about 1e-16 for each loss that adds up.
    masses *= 1 + 1e-11 + 1e-14 * sum(counts)
    return _epsilon(masses, sums, infinity + outside, delta)


def _tilted(loss: Loss, tilt: float) -> tuple[np.ndarray, float]:
    """The tilted masses, which sum to 1, and the logarithm of what they were divided by."""
    exponents = loss.log_masses + tilt * loss.losses
    largest = exponents.max()
    weights = np.exp(exponents - largest)
    total = weights.sum()
    return weights / total, float(largest + math.log(total))


def _cumulants(losses: Sequence[Loss], counts: Sequence[int], tilt: float) -> _Cumulants:
    """Of the sum of all finite losses."""
    value = mean = variance = 0.0
    for loss, count in zip(losses, counts, strict=True):
        weights, log_total = _tilted(loss, tilt)
        first, second = weights @ loss.losses, weights @ loss.losses**2
        value += count * log_total
        mean += count * first
        variance += count * max(second - first**2, 1e-9 * loss.interval**2)
    return _Cumulants(tilt, value, mean, variance)


def _surprising(
    losses: Sequence[Loss], counts: Sequence[int], plain: _Cumulants, surprise: float, sign: int = 1
) -> _Cumulants:
    """Tilts until the likely losses are those that had a probability of about e^-surprise.

    The divergence of the tilted distribution from the plain one is about `surprise` there. What is computed
    with a tilt holds for any other too, but for round-off, so that a rough one will do.

    Args:
        losses: that add up.
        counts: how often each of them does.
        plain: the distribution to start from.
        surprise: how improbable the losses shall be, as the logarithm of one over their probability.
        sign: 1 for large losses, -1 for small ones.
    """
    low, high = -math.inf, math.log(50 / losses[0].interval)
    log_step = min(0.5 * math.log(2 * surprise / plain.variance), high)
    for tries in itertools.count():
        step = math.exp(log_step)
        at = _cumulants(losses, counts, plain.tilt + sign * step)
        excess = sign * step * at.mean - (at.value - plain.value) - surprise
        concentrated = step**2 * at.variance < 0.5  # The last loss of all is more likely than e^-surprise.
        low, high = (log_step, high) if excess < 0 else (low, log_step)
        if abs(excess) < 0.4 * surprise or (excess < 0 and concentrated) or high - low < 0.01:
            break
        log_step -= min(max(excess / (step**2 * at.variance), -1.5), 1.5)
        if tries > _NEWTON_STEPS or not low < log_step < high:
            log_step = (low + high) / 2 if math.isfinite(low) else high - 1.5
    return at


def _window(losses: Sequence[Loss], counts: Sequence[int], likely: _Cumulants) -> tuple[tuple[int, int], float]:
    """The sums, in intervals, that matter, and a bound on the plain mass above them (Chernoff)."""
    interval = losses[0].interval
    more, less = (_surprising(losses, counts, likely, _OUTSIDE, sign) for sign in (1, -1))
    lowest = (likely.value - less.value - _OUTSIDE) / (likely.tilt - less.tilt)
    highest = (more.value - likely.value + _OUTSIDE) / (more.tilt - likely.tilt)
    pairs = list(zip(losses, counts, strict=True))
    lower = max(min(math.floor(lowest / interval), 0), sum(count * loss.lower for loss, count in pairs))
    upper = max(math.ceil(highest / interval), 0)
    largest = sum(count * loss.upper for loss, count in pairs)
    if upper >= largest:
        return (lower, largest), 0.0
    return (lower, upper), math.exp(likely.value - likely.tilt * upper * interval - _OUTSIDE)


def _convolved(losses: Sequence[Loss], counts: Sequence[int], tilt: float, window: tuple[int, int]) -> np.ndarray:
    """The tilted masses of the sums from 0 to the end of the window.

    The FFT is cyclic: what lies outside of the window is added at its other end, a little tilted mass too much.
    """
    size = fft.next_fast_len(window[1] - window[0] + 1, real=True)
    _check_points(size)
    spectrum: np.ndarray | float = 1.0
    first = 0
    for loss, count in zip(losses, counts, strict=True):
        weights, _ = _tilted(loss, tilt)
        spectrum = spectrum * _power(fft.rfft(_folded(weights, size)), count)
        first += count * loss.lower
    return np.roll(np.maximum(fft.irfft(spectrum, size), 0), first % size)[: window[1] + 1]


def _power(values: np.ndarray, count: int) -> np.ndarray:
    """Powers of numbers within the unit circle; those below any round-off are not worth computing."""
    result = np.zeros_like(values)
    matter = np.abs(values) > math.exp(-_NO_MATTER / count)
    result[matter] = values[matter] ** count
    return result


def _folded(values: np.ndarray, size: int) -> np.ndarray:
    """A sequence wound around a circle of `size` points."""
    if len(values) <= size:
        return np.pad(values, (0, size - len(values)))
    return np.pad(values, (0, -len(values) % size)).reshape(-1, size).sum(0)


def _epsilon(masses: np.ndarray, sums: np.ndarray, infinity: float, delta: float) -> float:
    """The smallest epsilon >= 0 whose divergence is at most delta, by losses >= 0 and their masses."""
    tails = infinity + np.cumsum(masses[::-1])[::-1]
    if tails[0] < delta:
        return 0.0
    # delta(epsilon) = sum over loss > epsilon of mass (1 - e^(epsilon - loss)) is below the tail there.
    most = float(sums[np.count_nonzero(tails >= delta) - 1])
    discounts = np.cumsum((masses * np.exp(np.minimum(most - sums, _LARGEST_EXPONENT)))[::-1])[::-1]
    divergences = tails - np.exp(np.minimum(sums - most, _LARGEST_EXPONENT)) * discounts
    enough = divergences <= delta
    if infinity >= delta or not enough.any():
        return math.inf
    first = int(np.argmax(enough))
    if first == 0:
        return 0.0
    exact = most + math.log(max(tails[first] - delta, math.ulp(0)) / max(discounts[first], math.ulp(0)))
    return min(max(exact, float(sums[first - 1])), float(sums[first]))
