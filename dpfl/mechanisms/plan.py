"""The plan: the one object from which sampler, clip, noise, denominator and accountant come."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from dpfl.privacy import Guarantee
from dpfl.sampling import Poisson

if TYPE_CHECKING:
    from tensorflow_privacy import DPQuery


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a mechanism decided for a target, a population and a number of rounds.

    Nothing else in dpfl computes a noise scale, a denominator or an epsilon for training.

    Attributes:
        mechanism: the mechanism's name, as records state it.
        sampler: draws the cohorts that the guarantee assumes.
        population: the number of clients.
        rounds: the number of rounds.
        clip_norm: the largest L2 norm of a client's update; infinity where nothing is clipped.
        noise_multiplier: standard deviation of the noise on the sum, divided by the clip norm.
        guarantee: what the run will have guaranteed when all its rounds are done.
    """

    mechanism: str
    sampler: Poisson
    population: int
    rounds: int
    clip_norm: float
    noise_multiplier: float
    guarantee: Guarantee

    @property
    def sampling_rate(self) -> float:
        """The probability with which a client takes part in a round."""
        return self.sampler.rate(self.population)

    @property
    def noise_stddev(self) -> float:
        """Standard deviation of the noise on each coordinate of the sum of clipped updates."""
        return self.noise_multiplier * self.clip_norm if self.noise_multiplier else 0.0

    def query(self, seed: int) -> DPQuery:
        """Returns the TensorFlow Privacy query that aggregates the cohort's updates.

        It clips each update, sums, adds noise, and divides by the expected cohort, never by the
        actual one, which is private. It runs in the in-graph engine and, unchanged, inside
        `tff.aggregators.DifferentiallyPrivateFactory`.

        Args:
            seed: the run's seed; the noise is a pure function of it and the round.
        """
        from tensorflow_privacy import NormalizedQuery

        from dpfl.mechanisms.queries import StatelessGaussianSumQuery

        total = StatelessGaussianSumQuery(self.clip_norm, self.noise_stddev, seed)
        return NormalizedQuery(total, float(self.sampler.cohort))

    @property
    def is_private(self) -> bool:
        """Whether the guarantee's epsilon is finite."""
        return math.isfinite(self.guarantee.epsilon)
