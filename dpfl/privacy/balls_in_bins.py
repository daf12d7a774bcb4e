"""The privacy loss of balls-in-bins sampling with Gaussian noise, bounded from above without simulation.

Each unit falls into one of k releases at random (Chua et al. 2024, 2412.16802; Choquette-Choo et al. 2024,
2410.06266; Feldman & Shenfeld 2025, 2502.08202). Of the r releases that are made, the worst case shows with the
unit P = (1/k) sum_j N(e_j, z^2 I) + (1 - r/k) N(0, z^2 I), where e_j is the j-th unit vector, and Q = N(0, z^2 I)
without it. Their likelihood ratio is S = (Y_1 + ... + Y_r + k - r) / k, where under Q the Y_j are independent and
lognormal with mean 1: Y_j = exp(x / z^2 - 1 / (2 z^2)) for x from N(0, z^2). The hockey-stick divergences are

    H(P||Q) = E_Q (S - e^epsilon)_+   and   H(Q||P) = E_Q (1 - e^epsilon S)_+.

Both are means of convex functions of every Y_j. Moving the mass between two points of a grid to these points, with
its mean preserved, can only raise them (convex order), also after each of the convolutions that make the
r-fold sum. Hence the results are upper bounds whatever the grid, and tight on a fine one.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import dp_accounting
import numpy as np
from scipy import special

from dpfl.errors import InputError
from dpfl.privacy.events import BallsInBinsDpEvent

_POINTS = 2000  # of a grid; more of them would lower epsilon by less than 0.1 %
_REACH = 10.5  # standard deviations of the logarithm: beyond lies less than e^-50 of the mass
_NEGLIGIBLE = math.exp(-50)  # dp-accounting's own choice for the Gaussian
_LEAST_NOISE = 0.05  # with less, the largest likelihood ratios exceed what a float holds
_LARGEST_LOSS = 700.0  # of which a float holds the exponential
_ROWS = 256  # of a convolution at a time, which bounds the memory to some megabytes


@dataclasses.dataclass(frozen=True)
class _Sum:
    """A discrete distribution that bounds the sum of some Y_j in convex order.

    Attributes:
        values: ascending points.
        masses: of the points; they sum to 1.
        lost: the mean that was cut off above the largest point.
    """

    values: np.ndarray
    masses: np.ndarray
    lost: float


def divergences(event: BallsInBinsDpEvent, epsilons: np.ndarray, removes: bool) -> np.ndarray:
    """Returns upper bounds on the hockey-stick divergence between neighbours.

    The neighbours differ in a unit that is added, removed, or replaced by an empty contribution.

    Args:
        event: the bins and the releases, with Gaussian noise.
        epsilons: where to evaluate them, of any sign and in any order.
        removes: True for H(P||Q), where the unit is removed; False for H(Q||P), where it is added.

    Returns:
        A divergence in [0, 1] for each epsilon.

    Raises:
        InputError: the event is not Gaussian, has too little noise or an impossible number of releases.
    """
    ratios, masses, lost = _likelihood_ratios(event)
    inside = np.clip(epsilons, -_LARGEST_LOSS, _LARGEST_LOSS)
    thresholds = np.exp(inside if removes else -inside)
    first = np.searchsorted(ratios, thresholds)
    if removes:
        # (a + b - t)_+ <= (a - t)_+ + b: what was cut off counts as a loss without bound.
        above, above_weighted = _sums_from_above(masses), _sums_from_above(masses * ratios)
        found = above_weighted[first] - thresholds * above[first] + lost
    else:
        # Without what was cut off the ratio is too small, and the divergence too large.
        below, below_weighted = _sums_from_below(masses), _sums_from_below(masses * ratios)
        found = below[first] - below_weighted[first] / thresholds
    return np.clip(found, 0, 1)


def loss_bounds(event: BallsInBinsDpEvent, removes: bool) -> tuple[float, float]:
    """Returns the range of the privacy loss outside of which its mass is below e^-50 on either side.

    Args:
        event: the bins and the releases, with Gaussian noise.
        removes: True for the loss log(P/Q) under P; False for log(Q/P) under Q.

    Raises:
        InputError: the event is not Gaussian, has too little noise or an impossible number of releases.
    """
    ratios, masses, _ = _likelihood_ratios(event)
    if removes:
        masses = masses * ratios
    below, above = _sums_from_below(masses)[1:], _sums_from_above(masses)[:-1]
    inside = ratios[(below > _NEGLIGIBLE) & (above > _NEGLIGIBLE) & (ratios > 0)]
    lowest, highest = math.log(inside[0]), math.log(inside[-1])
    return (lowest, highest) if removes else (-highest, -lowest)


def _likelihood_ratios(event: BallsInBinsDpEvent) -> tuple[np.ndarray, np.ndarray, float]:
    """The values of S, their masses under Q, and the mean that was cut off."""
    if not isinstance(event.event, dp_accounting.GaussianDpEvent):
        raise InputError("balls-in-bins sampling has a known analysis for Gaussian noise alone.")
    if not event.event.noise_multiplier >= _LEAST_NOISE:
        raise InputError(
            f"balls-in-bins sampling is analysed for noise multipliers from {_LEAST_NOISE:g}, "
            f"but it was {event.event.noise_multiplier:g}."
        )
    if not 1 <= event.releases <= event.bins:
        raise InputError(
            f"of {event.bins} bins at least 1 and at most all must be released, but it was {event.releases}."
        )
    total = _sum_of(event.releases, float(event.event.noise_multiplier))
    return (total.values + (event.bins - event.releases)) / event.bins, total.masses, total.lost / event.bins


def _sums_from_above(masses: np.ndarray) -> np.ndarray:
    """The sum of all masses from each index on, and 0 after the last."""
    return np.append(np.cumsum(masses[::-1])[::-1], 0)


def _sums_from_below(masses: np.ndarray) -> np.ndarray:
    """The sum of all masses before each index, and of all."""
    return np.insert(np.cumsum(masses), 0, 0)


@functools.lru_cache(maxsize=64)
def _sum_of(count: int, noise: float) -> _Sum:
    """Bounds the sum of `count` of the Y_j, by doubling."""
    if count == 1:
        return _lognormal(noise)
    half = _sum_of(count // 2, noise)
    double = _convolved(half, half, _grid(count - count % 2, noise))
    return _convolved(double, _sum_of(1, noise), _grid(count, noise)) if count % 2 else double


def _grid(count: int, noise: float) -> np.ndarray:
    """Points that are dense where the logarithm of the sum of `count` Y_j is likely, and reach into its tails.

    The logarithms are the hyperbolic sine of equidistant points: equidistant within a standard deviation or
    so from the middle, and ever wider apart further out.
    """
    spread = 1 / noise
    # The relative standard deviation of the sum, as long as that is small; the lognormal's own if not.
    width = min(math.sqrt(special.expm1(min(spread**2, 500)) / count), spread)
    middle = math.log(count) - width**2 / 2
    low, high = -(spread**2) / 2 - _REACH * spread, math.log(count) + spread**2 / 2 + _REACH * spread
    logarithms = middle + width * np.sinh(
        np.linspace(math.asinh((low - middle) / width), math.asinh((high - middle) / width), _POINTS)
    )
    return np.insert(np.exp(logarithms), 0, 0)


def _lognormal(noise: float) -> _Sum:
    """One Y_j on its grid."""
    spread, grid = 1 / noise, _grid(1, noise)
    with np.errstate(divide="ignore"):
        cuts = np.log(grid) / spread
    # Of each cell between points: its mass, and its mass times its mean.
    masses, weighted = _normal_masses(cuts + spread / 2), _normal_masses(cuts - spread / 2)
    upward = np.clip((weighted - grid[:-1] * masses) / np.diff(grid), 0, masses)
    beyond, beyond_weighted = special.ndtr(-cuts[-1] - spread / 2), special.ndtr(-cuts[-1] + spread / 2)
    spread_out = np.append(masses - upward, beyond)
    spread_out[1:] += upward
    return _Sum(grid, spread_out, float(max(beyond_weighted - grid[-1] * beyond, 0)))


def _normal_masses(cuts: np.ndarray) -> np.ndarray:
    """The mass of a standard normal between ascending cuts, accurate in both tails."""
    return np.where(cuts[:-1] > 0, -np.diff(special.ndtr(-cuts)), np.diff(special.ndtr(cuts)))


def _convolved(first: _Sum, second: _Sum, grid: np.ndarray) -> _Sum:
    """The sum of two independent sums, moved to the points of a grid with its mean preserved."""
    masses = np.zeros(len(grid))
    cut_off = 0.0
    for start in range(0, len(first.values), _ROWS):
        rows = slice(start, start + _ROWS)
        sums = (first.values[rows, None] + second.values).ravel()
        weights = (first.masses[rows, None] * second.masses).ravel()
        beyond = sums > grid[-1]
        cut_off += float(weights[beyond] @ (sums[beyond] - grid[-1]))
        np.minimum(sums, grid[-1], out=sums)
        cells = np.minimum(np.searchsorted(grid, sums, side="right") - 1, len(grid) - 2)
        upward = weights * (sums - grid[cells]) / (grid[cells + 1] - grid[cells])
        masses += np.bincount(cells, weights - upward, len(grid))
        masses += np.bincount(cells + 1, upward, len(grid))
    return _Sum(grid, masses, first.lost + second.lost + cut_off)
