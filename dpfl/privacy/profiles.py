"""Privacy profiles: what one release reveals of one unit, as hockey-stick divergences.

The outputs with and without the unit are dominated by a pair of distributions P and Q. The pair is
all in its profile, the divergence delta(epsilon) = integral of max(P - e^epsilon Q, 0), of P from Q and
of Q from P (Zhu, Dong & Wang 2022, 2106.08567). At epsilon >= 0 both are enough, for at negative epsilon
delta_PQ(epsilon) = 1 - e^epsilon + e^epsilon delta_QP(-epsilon); and they lose no digits there.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import dp_accounting
import numpy as np
from dp_accounting import (
    GaussianDpEvent,
    LaplaceDpEvent,
    PoissonSampledDpEvent,
    SampledWithoutReplacementDpEvent,
    TruncatedSubsampledGaussianDpEvent,
)
from scipy import special, stats

from dpfl.privacy.balls_in_bins import divergences, loss_bounds
from dpfl.privacy.events import BallsInBinsDpEvent, RevealedPoissonSampledDpEvent
from dpfl.privacy.relations import Relation

# From an ascending array of epsilons >= 0, shape (n,), to divergences in [0, 1], shape (n,).
Profile = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Pair:
    """A dominating pair of distributions P and Q.

    Attributes:
        forward: the divergences of P (with the unit) from Q (without it).
        backward: the divergences of Q from P; the same object as `forward` if the pair is symmetric.
        bounds: returns the range of the losses log(P / Q) outside of which there is next to no mass; None if
            it is as easily found from the profiles.
    """

    forward: Profile
    backward: Profile
    bounds: Callable[[], tuple[float, float]] | None = None


def pair_of(event: dp_accounting.DpEvent, relation: Relation) -> Pair:
    """Returns the pair that dominates one release.

    Args:
        event: one release with noise, no composition.
        relation: the neighbouring relation.

    Raises:
        UnsupportedEventError: (of dp_accounting) no pair is known to dominate this event under this relation.
    """
    replaces = relation == "replace_one"
    match event:
        case GaussianDpEvent() | LaplaceDpEvent():
            return _symmetric(_additive(event, replaces))
        case RevealedPoissonSampledDpEvent(sampling_probability=rate, event=GaussianDpEvent() | LaplaceDpEvent()) if (
            relation != "add_or_remove_one"  # A sample that names the unit shows that it was there.
        ):
            # Whoever is not drawn has the loss 0, which adds nothing at epsilon >= 0.
            return _symmetric(functools.partial(_mixture, ((rate, _additive(event.event, replaces)),)))
        case PoissonSampledDpEvent(sampling_probability=rate, event=GaussianDpEvent(noise_multiplier=noise)) if (
            replaces
        ):
            return _symmetric(functools.partial(_replaced_in_sample, noise, rate))
        case PoissonSampledDpEvent(sampling_probability=rate, event=GaussianDpEvent() | LaplaceDpEvent()) if (
            not replaces
        ):
            return _sampled(_additive(event.event, replaces), rate)
        case TruncatedSubsampledGaussianDpEvent():
            return _truncated(event, relation)
        case SampledWithoutReplacementDpEvent(event=GaussianDpEvent()) if replaces:
            return _fixed_size(event)
        case BallsInBinsDpEvent(event=GaussianDpEvent()) if not replaces:
            forward, backward = (functools.partial(divergences, event, removes=removes) for removes in (True, False))
            return Pair(forward, backward, functools.partial(loss_bounds, event, removes=True))
    raise dp_accounting.UnsupportedEventError(f"There is no dominating pair for {event} under {relation}.")


def _symmetric(profile: Profile) -> Pair:
    return Pair(profile, profile)


def _additive(event: dp_accounting.DpEvent, replaces: bool) -> Profile:
    """The profile of noise alone; a replaced unit moves the sum by twice its contribution."""
    shift = (2 if replaces else 1) / event.noise_multiplier
    return functools.partial(_gaussian if isinstance(event, GaussianDpEvent) else _laplace, shift)


def _gaussian(shift: float, epsilons: np.ndarray) -> np.ndarray:
    """N(shift, 1) from N(0, 1): Balle & Wang (2018, 1805.06530), theorem 8, so that nothing overflows."""
    near, far = epsilons / shift - shift / 2, epsilons / shift + shift / 2
    # e^epsilon Phi(-far) with e^(epsilon - far^2 / 2) = e^(-near^2 / 2)
    below = 0.5 * np.exp(-(near**2) / 2) * special.erfcx(far / math.sqrt(2))
    return np.maximum(special.ndtr(-near) - below, 0)


def _laplace(shift: float, epsilons: np.ndarray) -> np.ndarray:
    """Laplace(shift, 1) from Laplace(0, 1)."""
    return -np.expm1(np.minimum((epsilons - shift) / 2, 0))


def _sampled(profile: Profile, rate: float) -> Pair:
    """P = (1 - rate) Q + rate P', where `profile` is that of P' from Q and of Q from P'."""

    def forward(epsilons: np.ndarray) -> np.ndarray:
        # P - e^epsilon Q = rate (P' - e^inner Q); beyond 50 the two epsilons differ by a constant.
        inner = np.log1p(np.expm1(np.minimum(epsilons, 50)) / rate) + np.maximum(epsilons - 50, 0)
        return rate * profile(inner)

    def backward(epsilons: np.ndarray) -> np.ndarray:
        # Q - e^epsilon P = weight (Q - e^inner P'); no loss exceeds -log(1 - rate).
        result = np.zeros_like(epsilons)
        shrunk = np.expm1(-epsilons)
        inside = shrunk > -rate
        inner = -np.log1p(shrunk[inside] / rate)
        result[inside] = np.exp(epsilons[inside]) * (rate + shrunk[inside]) * profile(inner)
        return result

    return Pair(forward, backward)


def _replaced_in_sample(noise: float, rate: float, epsilons: np.ndarray) -> np.ndarray:
    """(1 - rate) N(0, noise^2) + rate N(-1, noise^2) from the same with N(1, noise^2).

    The loss falls along the line, so that it exceeds epsilon below one point, which dp-accounting's
    supplementary material on privacy loss distributions derives (`GaussianPrivacyLoss`).
    """
    if rate == 1:
        return _gaussian(2 / noise, epsilons)
    with np.errstate(divide="ignore"):
        log_sinh = epsilons / 2 + np.log(-np.expm1(-epsilons) / 2)
    log_ratio = 0.5 / noise**2 + math.log1p(-rate) - math.log(rate) + log_sinh
    # arcsinh(e^x), which is x + log 2 for large x
    inverse = np.arcsinh(np.exp(np.minimum(log_ratio, 300))) + np.maximum(log_ratio - 300, 0)
    point = -(noise**2) * (inverse + epsilons / 2)
    ours = (1 - rate) * special.ndtr(point / noise) + rate * special.ndtr((point + 1) / noise)
    log_theirs = np.logaddexp(
        math.log1p(-rate) + special.log_ndtr(point / noise), math.log(rate) + special.log_ndtr((point - 1) / noise)
    )
    return np.maximum(ours - np.exp(epsilons + log_theirs), 0)


def _truncated(event: TruncatedSubsampledGaussianDpEvent, relation: Relation) -> Pair:
    """A Poisson sample with a cap: Ganesh (2025, 2508.15089), as in dp-accounting.

    Where the cap is reached, a unit that takes part also drives another one out. The profile is
    linear in the mixture of the two cases.
    """
    rate, cap = event.sampling_probability, event.truncated_batch_size
    free = pair_of(PoissonSampledDpEvent(rate, GaussianDpEvent(event.noise_multiplier)), relation)
    full = stats.binom.sf(cap - 1, event.dataset_size - 1, rate)
    if full == 0:
        return free
    drawn = min(stats.binom.sf(cap, event.dataset_size, rate) * cap / full / event.dataset_size, 1)
    capped = functools.partial(_replaced_in_sample, event.noise_multiplier / 2, drawn)
    return Pair(
        functools.partial(_mixture, ((full, capped), (1 - full, free.forward))),
        functools.partial(_mixture, ((full, capped), (1 - full, free.backward))),
    )


def _fixed_size(event: SampledWithoutReplacementDpEvent) -> Pair:
    """A sample of fixed size without replacement: Zhu, Dong & Wang (2022, 2106.08567), subset sampling.

    With A = (1 - q) N(0, z^2) + q N(2, z^2) against N(0, z^2) and B its reverse, the profile lies below
    that of A at epsilon >= 0 and below that of B at epsilon < 0. Their maximum is again the profile of
    a pair, and one that may be composed; that of A alone may not (Lebeda et al. 2024, 2405.20769).
    """
    rate = event.sample_size / event.source_dataset_size
    return _symmetric(_sampled(_additive(event.event, replaces=True), rate).forward)


def _mixture(parts: tuple[tuple[float, Profile], ...], epsilons: np.ndarray) -> np.ndarray:
    return sum((weight * profile(epsilons) for weight, profile in parts), np.zeros_like(epsilons))
