"""Renyi differential privacy (Mironov 2017, 1702.07476): an upper bound where no tighter accountant has an answer.

An event's Renyi divergences at many orders add up over composition; the best order gives epsilon (Canonne
et al. 2020, 2004.00010, proposition 12). dp-accounting supplies the curves where it has them right. It
does not double the sensitivity of Gaussian and Laplace noise where a unit is replaced
(google/differential-privacy issue 378), and takes the noise of fixed-size samples as relative to what a
replacement changes; here all noise is relative to the contribution of one unit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import dp_accounting
import numpy as np
from dp_accounting import dp_event
from dp_accounting.rdp import RdpAccountant
from dp_accounting.rdp import rdp_privacy_accountant as library
from scipy import special

from dpfl.privacy.events import (
    DiscreteGaussianSumDpEvent,
    RevealedPoissonSampledDpEvent,
    SkellamDpEvent,
    with_noise,
)
from dpfl.privacy.relations import Relation

# dp-accounting leaves gaps of a factor 2 above 63, which cost up to 6 % of a small epsilon.
_LARGE_ORDERS = (70, 80, 90, 100, 114, 128, 144, 161, 181, 203, 228, 256, 304, 362, 431, 512, 609, 724, 861, 1024)
ORDERS = tuple(float(order) for order in sorted({*library.DEFAULT_RDP_ORDERS, *_LARGE_ORDERS}))

_MOST_POINTS = 200_000  # of the mesh of an integral; only orders of no use with so little noise need more
_REACH = 14  # standard deviations: further out lies less than 1e-43 of a Gaussian
_ROUNDING = 1e-14  # of the logarithm of an integral, times the order: added, for tiny rates are within it
_MOST_DIFFERENCES = 256  # beyond this order dp-accounting, too, takes the simpler bound
_LEAST_SHARE_VARIANCE = 0.25 * (1 - 1e-9)  # 1/4, and what rounding may take off a share of exactly 1/2

_Curve = Callable[[Any, np.ndarray, Relation], np.ndarray]


def rdp_epsilon(event: dp_accounting.DpEvent, delta: float, relation: Relation) -> float:
    """Returns the epsilon that an event costs at a delta, by Renyi divergences.

    Args:
        event: what is released.
        delta: the probability mass outside the bound, in (0, 1).
        relation: the neighbouring relation.

    Returns:
        Epsilon, an upper bound; infinity where nothing is guaranteed.

    Raises:
        UnsupportedEventError: (of dp_accounting) there is no Renyi analysis of the event under the relation.
    """
    return epsilon_of_divergences(renyi_divergences(event, np.array(ORDERS), relation), delta)


def epsilon_of_divergences(divergences: np.ndarray, delta: float) -> float:
    """Returns the epsilon that Renyi divergences at the orders `ORDERS` allow at a delta."""
    return float(library.compute_epsilon(ORDERS, divergences, delta)[0])


def renyi_divergences(event: dp_accounting.DpEvent, orders: np.ndarray, relation: Relation) -> np.ndarray:
    """Returns upper bounds on the Renyi divergence that an event allows between neighbours.

    Args:
        event: what is released.
        orders: the orders, all above 1.
        relation: the neighbouring relation.

    Returns:
        One divergence for each order; infinity where there is no bound.

    Raises:
        UnsupportedEventError: (of dp_accounting) there is no Renyi analysis of the event under the relation.
    """
    if isinstance(event, dp_accounting.SelfComposedDpEvent):
        return event.count * renyi_divergences(event.event, orders, relation) if event.count else np.zeros(len(orders))
    if isinstance(event, dp_accounting.ComposedDpEvent):
        return sum((renyi_divergences(part, orders, relation) for part in event.events), np.zeros(len(orders)))
    curve = _CURVES.get(type(event), _of_library)
    return curve(event, orders, relation)


def _of_library(event: dp_accounting.DpEvent, orders: np.ndarray, relation: Relation) -> np.ndarray:
    neighbours = dp_accounting.NeighboringRelation[relation.upper()]
    return RdpAccountant(orders, neighbours).compose(event).rdp


def _additive_noise(event: dp_accounting.DpEvent, orders: np.ndarray, relation: Relation) -> np.ndarray:
    return _of_library(with_noise(event, 1 / _sensitivity(relation)), orders, relation)


def _sensitivity(relation: Relation) -> int:
    """What a neighbour changes in a sum, in contributions of one unit."""
    return 2 if relation == "replace_one" else 1


def _unsupported(event: dp_accounting.DpEvent, relation: Relation) -> dp_accounting.UnsupportedEventError:
    return dp_accounting.UnsupportedEventError(f"There is no Renyi analysis of {event} under {relation}.")


def _gaussian_noise(event: dp_accounting.DpEvent) -> float | None:
    """The noise multiplier of the one Gaussian that composed Gaussians amount to; None if they are not all Gaussian.

    dp-accounting has this function too, but it is wrong there for noise multipliers of type int.
    """
    precision = _gaussian_precision(event)
    if precision is None:
        return None
    return 1 / math.sqrt(precision) if precision else math.inf


def _gaussian_precision(event: dp_accounting.DpEvent) -> float | None:
    """The sum of 1 / z^2 over composed Gaussians; None if they are not all Gaussian."""
    if isinstance(event, dp_accounting.GaussianDpEvent):
        return float(event.noise_multiplier) ** -2 if event.noise_multiplier else math.inf
    if isinstance(event, dp_accounting.SelfComposedDpEvent):
        one = _gaussian_precision(event.event)
        return None if one is None else event.count * one if event.count else 0.0
    if isinstance(event, dp_accounting.ComposedDpEvent):
        parts = [_gaussian_precision(part) for part in event.events]
        return None if None in parts else sum(part for part in parts if part is not None)
    return None


def _poisson_sampled(event: dp_accounting.PoissonSampledDpEvent, orders: np.ndarray, relation: Relation) -> np.ndarray:
    noise = _gaussian_noise(event.event)
    if noise is None:
        raise _unsupported(event, relation)
    return np.array(_poisson_sampled_gaussian(event.sampling_probability, noise, tuple(orders), relation))


@functools.lru_cache(maxsize=1024)
def _poisson_sampled_gaussian(rate: float, noise: float, orders: tuple[float, ...], relation: Relation) -> np.ndarray:
    if rate == 0 or math.isinf(noise):
        return np.zeros(len(orders))
    if noise == 0:
        return np.full(len(orders), np.inf)
    if rate == 1:
        return np.array(orders) * _sensitivity(relation) ** 2 / (2 * noise**2)
    return np.array([_integrated(rate, noise, order, relation) for order in orders])


def _integrated(rate: float, noise: float, order: float, relation: Relation) -> float:
    """The Renyi divergence of (1-q) N(0, z^2) + q N(1, z^2) from what a neighbour without the unit releases.

    That is N(0, z^2) where the unit is removed, the dearer direction (Mironov, Talwar & Zhang 2019, 1908.10530,
    theorem 5), and (1-q) N(0, z^2) + q N(-1, z^2) where it is replaced, the pair that dp-accounting's privacy loss
    distributions take (`AdjacencyType.REPLACE`), and its own mirror image. dp-accounting sums a series for
    fractional orders, without the signs of its terms, which gives up to some per cent more. The trapezoidal rule
    converges exponentially once its step is below the standard deviation and below the distance of the
    nearest complex zero of a density, pi z^2.
    """
    step = min(noise, noise**2) / 4
    # The integrand peaks at the order at most; with N(-1, z^2) in the other mixture, at most at 2 order - 1.
    furthest = 2 * order if relation == "replace_one" else order
    first, last = -1 - _REACH * noise, furthest + 1 + _REACH * noise
    if (last - first) / step > _MOST_POINTS:
        return math.inf
    points = np.arange(first, last, step)
    log_others = -(points**2) / (2 * noise**2)

    def log_density(shift: float) -> np.ndarray:
        log_unit = -((points - shift) ** 2) / (2 * noise**2)
        return np.logaddexp(math.log(rate) + log_unit, math.log1p(-rate) + log_others)

    log_without = log_density(-1) if relation == "replace_one" else log_others
    log_integral = special.logsumexp(order * log_density(1) + (1 - order) * log_without)
    log_scale = math.log(step / (noise * math.sqrt(2 * math.pi)))
    return float((max(log_integral + log_scale, 0) + _ROUNDING * order) / (order - 1))


def _revealed_sample(event: RevealedPoissonSampledDpEvent, orders: np.ndarray, relation: Relation) -> np.ndarray:
    """With the sample revealed, the likelihood ratio is 1 if the unit is not in it."""
    if relation == "add_or_remove_one":  # A sample that contains the unit shows that it was there.
        raise _unsupported(event, relation)
    rate = event.sampling_probability
    if rate == 0:
        return np.zeros(len(orders))
    drawn = (orders - 1) * renyi_divergences(event.event, orders, relation) + math.log(rate)
    not_drawn = math.log1p(-rate) if rate < 1 else -math.inf
    return np.logaddexp(not_drawn, drawn) / (orders - 1)


def _without_replacement(
    event: dp_accounting.SampledWithoutReplacementDpEvent, orders: np.ndarray, relation: Relation
) -> np.ndarray:
    """Wang, Balle & Kasiviswanathan 2019 (1808.00087), theorem 9, and theorem 27 for Gaussian noise.

    Sampling never makes neighbours more distinct than they are when both are surely in the sample.
    """
    if relation != "replace_one":
        raise _unsupported(event, relation)
    everyone = renyi_divergences(event.event, orders, relation)
    rate = event.sample_size / event.source_dataset_size
    if rate == 0 or not everyone.any():
        return np.zeros(len(orders))
    noise = _gaussian_noise(event.event)
    if rate == 1 or noise == 0:
        return everyone

    def at_integers(integers: np.ndarray) -> np.ndarray:
        moments = _without_replacement_moments(renyi_divergences(event.event, integers, relation), integers)
        if noise is not None:
            moments = np.minimum(moments, _gaussian_moments(noise / 2, len(integers)))
        return _binomial_cumulants(rate, moments, integers) / (integers - 1)

    return np.minimum(everyone, _between_integers(at_integers, orders))


def _without_replacement_moments(inner: np.ndarray, integers: np.ndarray) -> np.ndarray:
    """Logs of theorem 9's factors of rate^j binomial(order, j), for j = 2, 3, ..., where epsilon(inf) is infinite."""
    moments = (integers - 1) * inner + math.log(2)
    with np.errstate(over="ignore"):
        second = inner[0] + np.log(-np.expm1(-inner[0])) if inner[0] > 0 else -math.inf
    moments[0] = min(moments[0], math.log(4) + second)
    return moments


@functools.lru_cache(maxsize=64)
def _gaussian_moments(noise: float, count: int) -> np.ndarray:
    """Theorem 27's logs of four times the central moments of a Gaussian's likelihood ratio, for j = 2, 3, ...

    Args:
        noise: standard deviation divided by what replacing a unit changes.
        count: how many moments; those that are not computed are infinite.
    """
    differences, _ = library._get_forward_diffs(lambda x: x * (x + 1) / (2 * noise**2), _MOST_DIFFERENCES)
    moments = np.full(count, np.inf)
    powers = np.arange(3, min(count + 1, _MOST_DIFFERENCES) + 1)
    lower, upper = 2 * (powers // 2) - 1, 2 * ((powers + 1) // 2) - 1
    moments[powers - 2] = math.log(4) + (differences[lower] + differences[upper]) / 2
    return moments


def _binomial_cumulants(rate: float, moments: np.ndarray, integers: np.ndarray) -> np.ndarray:
    """log(1 + sum over j from 2 to n of binomial(n, j) rate^j exp(moments_j)) for each integer order n."""
    n, j = integers[:, None], integers[None, :]
    with np.errstate(invalid="ignore"):
        log_binomials = special.gammaln(n + 1) - special.gammaln(j + 1) - special.gammaln(np.maximum(n - j, 0) + 1)
        terms = np.where(j <= n, log_binomials + j * math.log(rate) + moments, -np.inf)
    return np.logaddexp(0, special.logsumexp(terms, axis=1))


def _between_integers(curve: Callable[[np.ndarray], np.ndarray], orders: np.ndarray) -> np.ndarray:
    """Bounds at any order from bounds at integer orders.

    (order - 1) times the Renyi divergence is convex in the order and vanishes at 1, so that it lies below the
    straight lines between integers (Wang et al. 2019, 1808.00087, corollary 10).
    """
    integers = np.arange(2.0, math.ceil(max(orders)) + 1)
    cumulants = np.interp(orders, [1, *integers], [0, *((integers - 1) * curve(integers))])
    return np.where(np.isnan(cumulants), np.inf, cumulants) / (orders - 1)


def _repeated_and_selected(
    event: dp_event.RepeatAndSelectDpEvent, orders: np.ndarray, relation: Relation
) -> np.ndarray:
    return repeated_and_selected(renyi_divergences(event.event, orders, relation), orders, event.mean, event.shape)


def repeated_and_selected(once: np.ndarray, orders: np.ndarray, mean: float, shape: float) -> np.ndarray:
    """Renyi divergences of the best of a random number of trials (Papernot & Steinke 2022, theorems 2 and 6).

    Args:
        once: of one trial, one for each order.
        orders: the orders, all above 1.
        mean: of the number of trials.
        shape: of the truncated negative binomial distribution of that number; infinity is Poisson.
    """
    return library._compute_rdp_repeat_and_select(orders, once, mean, shape)


def _skellam(event: SkellamDpEvent, orders: np.ndarray, relation: Relation) -> np.ndarray:
    """Agarwal, Kairouz & Liu 2021 (2110.04995), theorem 3.5, which holds for integer orders."""
    _check_shares(event, relation)
    if event.standard_deviation == 0:
        return np.full(len(orders), np.inf)
    l1, l2 = _sensitivity(relation) * event.l1_sensitivity, _sensitivity(relation) * event.l2_sensitivity
    variance = event.standard_deviation**2

    def at_integers(integers: np.ndarray) -> np.ndarray:
        excess = ((2 * integers - 1) * l2**2 + 6 * l1) / (4 * variance**2)
        return integers * l2**2 / (2 * variance) + np.minimum(excess, 3 * l1 / (2 * variance))

    return _between_integers(at_integers, orders)


def _discrete_gaussian_sum(event: DiscreteGaussianSumDpEvent, orders: np.ndarray, relation: Relation) -> np.ndarray:
    """Kairouz, Liu & Steinke 2021 (2102.06387), proposition 14: how far a sum of shares is from one Gaussian.

    There sigma is the standard deviation of one share, which must be at least 1/2 (at 0.1 the proposition is wrong);
    the sensitivity is divided by that of the sum. One share alone is a discrete Gaussian, whatever its sigma.
    """
    _check_shares(event, relation)
    share_variance = event.standard_deviation**2 / event.summands
    if share_variance == 0 or (event.summands > 1 and share_variance < _LEAST_SHARE_VARIANCE):
        return np.full(len(orders), np.inf)
    shares = np.arange(1, event.summands)
    distance = 10 * np.exp(-2 * math.pi**2 * share_variance * shares / (shares + 1)).sum()
    scale = _sensitivity(relation) * event.l2_sensitivity / event.standard_deviation
    return np.minimum(
        orders * scale**2 / 2 + distance * event.dimension,
        orders * (scale + distance * math.sqrt(event.dimension)) ** 2 / 2,
    )


def _check_shares(event: SkellamDpEvent | DiscreteGaussianSumDpEvent, relation: Relation) -> None:
    """A unit that is added or removed takes its share of the noise along, which no analysis covers."""
    if relation == "add_or_remove_one":
        raise _unsupported(event, relation)


_CURVES: dict[type[dp_accounting.DpEvent], _Curve] = {
    dp_accounting.GaussianDpEvent: _additive_noise,
    dp_accounting.LaplaceDpEvent: _additive_noise,
    dp_accounting.PoissonSampledDpEvent: _poisson_sampled,
    dp_event.RepeatAndSelectDpEvent: _repeated_and_selected,
    dp_accounting.SampledWithoutReplacementDpEvent: _without_replacement,
    DiscreteGaussianSumDpEvent: _discrete_gaussian_sum,
    RevealedPoissonSampledDpEvent: _revealed_sample,
    SkellamDpEvent: _skellam,
}
