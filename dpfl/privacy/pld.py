"""dp-accounting's PLD accountant, with the Poisson-subsampled Gaussian computed on arrays.

dp-accounting 0.6 inverts the privacy loss in a Python loop over the points of its grid, which is most
of what composing such an event costs. The same formulas on arrays give the same distribution.
"""

from __future__ import annotations

import math
from typing import Any

import dp_accounting
import numpy as np
from dp_accounting.pld import PLDAccountant, pld_pmf
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution
from dp_accounting.pld.privacy_loss_mechanism import AdjacencyType, GaussianPrivacyLoss

_SUBSAMPLED = (dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, dp_accounting.NeighboringRelation.REPLACE_SPECIAL)


class FasterPLDAccountant(PLDAccountant):
    """`dp_accounting.pld.PLDAccountant`, to the same numbers."""

    def _maybe_compose(self, event: dp_accounting.DpEvent, count: int, do_compose: bool) -> Any:
        if (
            do_compose
            and isinstance(event, dp_accounting.PoissonSampledDpEvent)
            and isinstance(event.event, dp_accounting.GaussianDpEvent)
            and 0 < event.sampling_probability < 1
            and event.event.noise_multiplier > 0
            and self.neighboring_relation in _SUBSAMPLED
        ):
            distributions = (
                _distribution(
                    event.event.noise_multiplier, event.sampling_probability, side, self._value_discretization_interval
                )
                for side in (AdjacencyType.REMOVE, AdjacencyType.ADD)
            )
            composed = PrivacyLossDistribution(*distributions).self_compose(count)
            self._pld = self._pld.compose(composed)  # type: ignore[has-type]
            return None
        return super()._maybe_compose(event, count, do_compose)


def _distribution(noise_multiplier: float, rate: float, side: AdjacencyType, interval: float) -> pld_pmf.PLDPmf:
    """The privacy loss of one step, connected between the dots (Doroshenko et al. 2022, 2207.04380)."""
    loss = GaussianPrivacyLoss(noise_multiplier, sampling_prob=rate, adjacency_type=side)
    bounds = loss.connect_dots_bounds()
    lower, upper = math.floor(bounds.epsilon_lower / interval), math.ceil(bounds.epsilon_upper / interval)
    divergences = _divergences(loss, np.arange(lower, upper + 1) * interval)
    return pld_pmf.create_pmf_pessimistic_connect_dots_fixed_gap(interval, lower, upper, divergences)


def _divergences(loss: GaussianPrivacyLoss, epsilons: np.ndarray) -> np.ndarray:
    """The hockey-stick divergence at each epsilon, as `GaussianPrivacyLoss.get_delta_for_epsilon`."""
    rate = loss.sampling_prob
    removes = loss.adjacency_type == AdjacencyType.REMOVE
    limit = math.log1p(-rate)  # of the loss without the unit in the sample
    inside = epsilons > limit if removes else epsilons < -limit
    inner = epsilons[inside] if removes else -epsilons[inside]
    # log((exp(inner) - (1 - rate)) / rate), the loss of an unsampled Gaussian at the same point
    with np.errstate(divide="ignore", over="ignore"):
        unsampled = inner - math.log(rate) + np.log1p(-np.exp(math.log(1 - rate) - inner))
    cutoffs = -0.5 - unsampled * loss.standard_deviation**2 if removes else 0.5 + unsampled * loss.standard_deviation**2
    divergences = -np.expm1(np.minimum(epsilons, 0)) if removes else np.zeros_like(epsilons)
    divergences[inside] = loss.mu_upper_cdf(cutoffs) - np.exp(epsilons[inside] + loss.mu_lower_log_cdf(cutoffs))
    return np.clip(divergences, 0, 1)
