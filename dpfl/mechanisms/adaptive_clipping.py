"""Clipping that follows a quantile of the updates' norms (Andrew et al. 2021, 1905.03871)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import dp_accounting
import pydantic
from typing_extensions import override

from dpfl.errors import InputError
from dpfl.mechanisms.base import BaseMechanism, independent_rounds
from dpfl.mechanisms.plan import Plan
from dpfl.sampling import BaseSampler

if TYPE_CHECKING:
    from dpfl.mechanisms.queries import SumQuery


class AdaptiveClipping(BaseMechanism):
    """The Gaussian mechanism whose clip norm moves towards a quantile of the updates' norms.

    Each round releases two sums: of the clipped updates, and of one bit per client, which says whether the update
    was within the clip norm C. With b the noisy fraction of such clients, C <- C exp(-eta (b - quantile))
    (1905.03871, section 2). The bits enter as b_i - 1/2, so that one client changes their sum by at
    most 1/2. Both together cost what one Gaussian with `noise_multiplier` z costs (theorem 1): the
    sum's noise has the standard deviation z_sum C with z_sum = (z^-2 - (2 sigma_b)^-2)^-1/2, and the
    count's sigma_b = count_noise * expected cohort.

    An update that is not finite counts neither as within nor as beyond the clip norm: it changes neither sum. The
    clip norm of every round may be released, since it is computed from noisy counts. It stays between 1e-9 and 1e9.
    Without privacy it adapts to the exact count.

    Attributes:
        clip_norm: the largest L2 norm of a client's update (all tensors together) in the first round.
        noise_multiplier: z, the noise multiplier of one Gaussian that costs what a round costs.
        quantile: the fraction of updates that should not exceed the clip norm, from 0 to 1.
        clip_learning_rate: eta; the clip norm changes by a factor of at most exp(eta) in a round.
        count_noise: standard deviation of the noise on the count as a fraction of the expected cohort.
    """

    name: Literal["adaptive_clipping"] = "adaptive_clipping"
    quantile: float = pydantic.Field(default=0.5, ge=0, le=1)
    clip_learning_rate: float = pydantic.Field(default=0.2, ge=0, allow_inf_nan=False)
    count_noise: float = pydantic.Field(default=0.05, gt=0, allow_inf_nan=False)

    @property
    @override
    def works_side_by_side(self) -> bool:
        """Each run has a clip norm of its own."""
        return True

    @override
    def event(
        self, noise: float, sampler: BaseSampler, population: int, rounds: int, dimension: int | None
    ) -> dp_accounting.DpEvent:
        return independent_rounds(noise, sampler, population, rounds)

    def count_stddev(self, expected_cohort: float) -> float:
        """Standard deviation of the noise on the count, in clients."""
        return self.count_noise * expected_cohort

    def sum_noise(self, noise: float, expected_cohort: float) -> float:
        """The noise multiplier of the sum of updates: what the count leaves of the total `noise`.

        Args:
            noise: the total, below twice the count's standard deviation.
            expected_cohort: the expected number of clients in a round.
        """
        share = noise / (2 * self.count_stddev(expected_cohort))
        return noise / math.sqrt(1 - share**2)

    @override
    def check_noise(self, noise: float, sampler: BaseSampler, population: int, dimension: int | None) -> None:
        """Refuses a noise that the count's noise alone would fall short of.

        Raises:
            InputError: says from which cohort or count noise on there is room.
        """
        cohort = sampler.expected_cohort(population)
        most = 2 * self.count_stddev(cohort)
        if noise >= most:
            raise InputError(
                f"the noise multiplier {noise:g} must be below {most:g}, twice the standard deviation of the noise on "
                f"the clipped count, so that some is left for the updates: choose an expected cohort above "
                f"{noise / (2 * self.count_noise):.4g} clients or a count noise above {noise / (2 * cohort):.4g}."
            )

    @override
    def sum_query(self, plan: Plan, seed: int, template: Any) -> SumQuery:
        from dpfl.mechanisms.adaptive_queries import AdaptiveClippingSumQuery

        cohort = plan.expected_cohort
        private = plan.noise_multiplier > 0
        return AdaptiveClippingSumQuery(
            clip_norm=self.clip_norm,
            noise_multiplier=self.sum_noise(plan.noise_multiplier, cohort) if private else 0.0,
            count_stddev=self.count_stddev(cohort) if private else 0.0,
            quantile=self.quantile,
            learning_rate=self.clip_learning_rate,
            expected_cohort=cohort,
            seed=seed,
        )

    @override
    def in_words(self, noise: float) -> str:
        return (
            f"the Gaussian mechanism with noise multiplier {noise:g} in all on two sums: of updates clipped to an L2 "
            f"norm that starts at {self.clip_norm:g} and follows quantile {self.quantile:g} of their norms, and of one "
            f"bit each for being within it (with noise of standard deviation {self.count_noise:g} times the expected "
            "cohort),"
        )
