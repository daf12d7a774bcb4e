"""Accountants that share no code with dp-accounting: a second opinion on every epsilon.

`fourier_epsilon` is written from the definitions: the privacy loss of one step on a mesh, by the
inverse of a monotone function, and its T-fold convolution by one FFT. Unlike prv_accountant it covers
both relations. `analytic_gaussian_epsilon` is the closed form of Balle & Wang (2018, 1805.06530,
theorem 8). `prv_epsilon` asks prv_accountant (Gopi et al. 2021, 2106.02848).
"""

import math
import warnings

import numpy as np
from prv_accountant import GaussianMechanism, PoissonSubsampledGaussianMechanism, PRVAccountant
from scipy import optimize, special


def analytic_gaussian_epsilon(noise: float, delta: float, *, steps: int = 1, sensitivity: float = 1.0) -> float:
    """Epsilon of `steps` unsampled Gaussian sums, which are one with sensitivity * sqrt(steps)."""
    mu = sensitivity * math.sqrt(steps) / noise

    def excess(epsilon: float) -> float:
        first = special.ndtr(mu / 2 - epsilon / mu)
        second = math.exp(epsilon + special.log_ndtr(-mu / 2 - epsilon / mu))
        return first - second - delta

    return 0.0 if excess(0) <= 0 else float(optimize.brentq(excess, 0, mu**2 / 2 + 40 * mu, xtol=1e-12))


def prv_epsilon(noise: float, rate: float, steps: int, delta: float) -> tuple[float, float, float]:
    """Lower bound, estimate and upper bound under add-or-remove-one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = PoissonSubsampledGaussianMechanism(rate, noise) if rate < 1 else GaussianMechanism(noise)
        accountant = PRVAccountant(loss, eps_error=0.01, delta_error=delta * 1e-3, max_self_compositions=steps)
        return accountant.compute_epsilon(delta, steps)


def fourier_epsilon(noise: float, rate: float, steps: int, delta: float, relation: str, mesh: float = 5e-4) -> float:
    """Epsilon of `steps` Gaussian sums over Poisson samples.

    Removing a client compares the mixture (1 - q) N(0, z^2) + q N(1, z^2) with N(0, z^2), adding one
    the other way round; replacing one compares the mixtures with N(1, z^2) and N(-1, z^2).
    """
    here, without, there = (1 - rate, rate, 1.0), (1.0, 0.0, 0.0), (1 - rate, rate, -1.0)
    if relation == "replace_one":
        pairs = [(here, there)]
    else:
        pairs = [(here, without), (without, here)]
    return max(_one_direction(first, second, noise, steps, delta, mesh) for first, second in pairs)


def _one_direction(
    first: tuple[float, float, float],
    second: tuple[float, float, float],
    noise: float,
    steps: int,
    delta: float,
    mesh: float,
) -> float:
    # Beyond 12 standard deviations lies less than 1e-32 of the mass.
    points = np.linspace(-1 - 12 * noise, 1 + 12 * noise, 400_001)
    loss = _log_density(first, points, noise) - _log_density(second, points, noise)
    mass = np.diff(_distribution(first, points, noise))
    middle = (loss[:-1] + loss[1:]) / 2
    # Losses go to the nearest mesh point; the errors have mean zero and average out over the steps.
    cells = np.rint(middle / mesh).astype(int)
    mean, variance = mass @ middle, mass @ middle**2 - (mass @ middle) ** 2
    reach = max(np.abs(middle[mass > delta * 1e-6 / steps]).max(), abs(mean) * steps + 15 * math.sqrt(variance * steps))
    size = 1 << math.ceil(math.log2(2 * (reach + 3) / mesh))
    inside = np.abs(cells) < size // 2
    one = np.zeros(size)
    np.add.at(one, cells[inside] % size, mass[inside])
    composed = np.fft.irfft(np.fft.rfft(one) ** steps, size)
    # The order of the FFT: 0, 1, ..., then the negative losses.
    positive = composed[1 : size // 2]
    losses = mesh * np.arange(1, size // 2)

    def excess(epsilon: float) -> float:
        above = losses > epsilon
        return float(positive[above] @ -np.expm1(epsilon - losses[above])) - delta

    return 0.0 if excess(0) <= 0 else float(optimize.brentq(excess, 0, losses[-1], xtol=1e-9))


def _log_density(mixture: tuple[float, float, float], x: np.ndarray, noise: float) -> np.ndarray:
    stay, move, shift = mixture
    with np.errstate(divide="ignore"):
        return np.logaddexp(np.log(stay) - x**2 / (2 * noise**2), np.log(move) - (x - shift) ** 2 / (2 * noise**2))


def _distribution(mixture: tuple[float, float, float], x: np.ndarray, noise: float) -> np.ndarray:
    stay, move, shift = mixture
    return stay * special.ndtr(x / noise) + move * special.ndtr((x - shift) / noise)
