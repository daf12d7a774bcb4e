"""Distributed differential privacy: clients add shares of integer noise, and the server sees only their sum.

Kairouz, Liu & Steinke 2021 (2102.06387): the distributed discrete Gaussian; Agarwal, Kairouz & Liu 2021
(2110.04995): the Skellam mechanism. No one client's update needs to be trusted to the server, and yet the
noise on the sum is little more than a trusted server would add.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import dp_accounting
import pydantic
from typing_extensions import override

from dpfl.compression import Compression
from dpfl.errors import InputError
from dpfl.mechanisms.base import BaseMechanism
from dpfl.mechanisms.plan import Plan
from dpfl.privacy.events import DiscreteGaussianSumDpEvent, SkellamDpEvent
from dpfl.privacy.relations import Relation
from dpfl.sampling import BaseSampler

if TYPE_CHECKING:
    import tensorflow as tf

    from dpfl.mechanisms.queries import SumQuery

_MOST_BITS = 32  # sums are int32
_MOST_STEPS = 2.0**16  # float32 has 24 bits, of which the fraction that is rounded at random needs some
_WIDEST_SHARE = 2.0**17  # standard deviation in steps; the table of the distribution grows with it

_SECURE_AGGREGATION = (
    "The guarantee is against a server that sees nothing of a round but the sum of the clients' noised integers modulo "
    "a power of two (secure aggregation, which is simulated as this sum); it need not be trusted with single updates.",
    "It assumes that clients are honest: that each clips, rounds and adds its share of the noise, with randomness that "
    "nobody else knows, and that none drops out of a round, whose noise would lack its share.",
)


def padded_dimension(dimension: int) -> int:
    """The smallest power of two that is at least the dimension, to which updates are filled up."""
    return 1 << max(dimension - 1, 0).bit_length()


def squared_norm_bound(steps: float, dimension: int, beta: float) -> int:
    """The largest square of a rounded update's L2 norm, in integer steps.

    Kairouz, Liu & Steinke 2021 (2102.06387), theorem 1 and section 4.1, with a granularity of 1 and a clip of `steps`:
    min(c^2 + d/4 + sqrt(2 log(1/beta)) (c + sqrt(d)/2), (c + sqrt(d))^2), and integer, since squares of integers are.

    Args:
        steps: integer steps per clip norm.
        dimension: the number d of coordinates, after padding.
        beta: the largest probability with which a rounded vector may be too long; 0 for any length.
    """
    longest = (steps + math.sqrt(dimension)) ** 2
    if beta == 0:
        return math.floor(longest)
    slack = math.sqrt(2 * math.log(1 / beta)) * (steps + math.sqrt(dimension) / 2)
    return math.floor(min(steps**2 + dimension / 4 + slack, longest))


class DistributedMechanism(BaseMechanism):
    """Clips, rotates and rounds updates to integers, with a share of integer noise from each client.

    An update is clipped to an L2 norm, flattened and rotated at random (a Hadamard transform with random signs, new in
    each round, public and the same for all clients), so that no coordinate is much larger than the others; scaled, and
    rounded at random to integers, under the condition that the rounded vector is not too long. The
    client adds its share of the noise. The sum is known modulo 2 ** bits; the server rotates it
    back and divides it by the expected cohort.

    Attributes:
        clip_norm: the largest L2 norm of a client's update (all tensors together).
        noise_multiplier: standard deviation of the total noise on each coordinate of the sum, divided by the clip norm.
        steps: integer steps per clip norm, from 1 to 65,536. None takes the largest of 256; 8 sqrt(dimension), which
            lets rounding lengthen an update by about half a percent at most; and 4 sqrt(clients in a round), so
            that a share of the noise spans several steps.
        bits: what a client sends for a coordinate; the sum is known modulo 2 ** bits, at most 32.
        beta: rounding is repeated until a bound holds that one try misses with at most this probability, from 0 up to
            (excluding) 1. More makes the sensitivity smaller, and rounding slightly biased; 0 never repeats.
        k_stddevs: how many standard deviations of the sum's coordinates the modulus must cover on either side, so that
            hardly any wraps around. Wrapping costs accuracy, never privacy.
        distribution: of a share of the noise, in words.
    """

    steps: float | None = None
    bits: int = pydantic.Field(default=20, ge=2, le=_MOST_BITS)
    beta: float = pydantic.Field(default=math.exp(-0.5), ge=0, lt=1)
    k_stddevs: float = pydantic.Field(default=4.0, gt=0, allow_inf_nan=False)
    distribution: ClassVar[str]
    needs_dimension: ClassVar[bool] = True

    @pydantic.field_validator("steps")
    @classmethod
    def _check_steps(cls, steps: float | None) -> float | None:
        if steps is not None and not 1 <= steps <= _MOST_STEPS:
            raise InputError(
                f"the integer steps per clip norm must be a number from 1 to {_MOST_STEPS:g}, but it was {steps:g}; "
                "leave it out to choose it by the dimension."
            )
        return steps

    # What the kinds of noise say for themselves.

    def release(self, stddev: float, shares: int, dimension: int, squared_sensitivity: int) -> dp_accounting.DpEvent:
        """The event of one round for a client that takes part in it.

        Args:
            stddev: standard deviation of the total noise on a coordinate of the sum, in integer steps.
            shares: how many clients share the noise.
            dimension: the number of coordinates, after padding.
            squared_sensitivity: the largest square of the L2 norm of a client's integers.
        """
        raise NotImplementedError

    def share_cdf(self) -> Callable[[tf.Tensor], tf.Tensor]:
        """What gives the cumulative probabilities of a share from its standard deviation."""
        raise NotImplementedError

    # What is the same for all.

    @override
    def update_bytes(self, parameters: int) -> int:
        """Integers modulo 2 ** bits for the coordinates of the rotated update, packed."""
        return math.ceil(padded_dimension(parameters) * self.bits / 8)

    @override
    def check_compression(self, compression: Compression) -> None:
        """Refuses what would not make the integers fewer or smaller."""
        if compression.bits is not None:
            raise InputError(
                f"the mechanism {self.name} sends integers, of mechanism.bits bits a coordinate ({self.bits} now): "
                "set these in the place of compression.bits."
            )
        if compression.sparsity:
            raise InputError(
                f"the mechanism {self.name} rotates an update over all coordinates before it sends them, so that "
                "pruned ones would be sent and noised all the same: choose random_k or rank in the place of sparsity."
            )

    @override
    def assumptions(self, sampler: BaseSampler) -> tuple[str, ...]:
        return (*_SECURE_AGGREGATION, *sampler.assumptions)

    @override
    def check_sampler(self, sampler: BaseSampler, population: int, relation: Relation) -> None:
        """Refuses rounds without a sure number of clients, and neighbours whose noise is missing."""
        if sampler.smallest_cohort(population) == 0:
            raise InputError(
                f"the noise of the mechanism {self.name} is drawn by the clients, so a round needs a sure number of "
                f"them, which the sampler {sampler.name} does not give: choose the sampler everyone, cyclic or "
                "fixed_size."
            )
        if relation == "add_or_remove_one":
            known = " or ".join(other for other in sampler.relations if other != relation)
            raise InputError(
                f"a client that is added or removed takes its share of the noise of the mechanism {self.name} along, "
                f"which has no known analysis: choose the relation {known}."
            )
        sampler.check_relation(relation)

    @override
    def event(
        self, noise: float, sampler: BaseSampler, population: int, rounds: int, dimension: int | None
    ) -> dp_accounting.DpEvent:
        assert dimension is not None
        release = self.release(
            noise * self.steps_per_clip(sampler, population, dimension),
            sampler.smallest_cohort(population),
            padded_dimension(dimension),
            self.squared_sensitivity(sampler, population, dimension),
        )
        return sampler.event(release, population, rounds)

    def steps_per_clip(self, sampler: BaseSampler, population: int, dimension: int) -> float:
        """Integer steps per clip norm, chosen where none were given; they do not depend on the noise.

        Args:
            sampler: draws the cohorts.
            population: the number of clients.
            dimension: the number of coordinates of an update, before padding.
        """
        if self.steps is not None:
            return self.steps
        cohort = sampler.expected_cohort(population)
        wished = max(256.0, 8 * math.sqrt(padded_dimension(dimension)), 4 * math.sqrt(cohort))
        return min(wished, _MOST_STEPS)

    def squared_sensitivity(self, sampler: BaseSampler, population: int, dimension: int) -> int:
        """The largest square of the L2 norm of a client's integers before noise; see `squared_norm_bound`."""
        steps = self.steps_per_clip(sampler, population, dimension)
        return squared_norm_bound(steps, padded_dimension(dimension), self.beta)

    @override
    def structure(self, plan: Plan) -> tuple[Any, ...]:
        return (plan.dimension,)

    @override
    def sum_query(self, plan: Plan, seed: int, template: Any) -> SumQuery:
        from dpfl.mechanisms.distributed_queries import DistributedSumQuery

        assert plan.dimension is not None
        where = (plan.sampler, plan.population, plan.dimension)
        steps = self.steps_per_clip(*where)
        shares = max(plan.sampler.smallest_cohort(plan.population), 1)
        query = DistributedSumQuery(
            self.clip_norm,
            steps,
            self.squared_sensitivity(*where),
            plan.noise_multiplier * steps / math.sqrt(shares),
            self.share_cdf(),
            self.bits,
            seed,
            template,
        )
        if query.layout.dimension != plan.dimension:
            raise InputError(
                f"the template has {query.layout.dimension} weights but the plan is for updates of {plan.dimension}: "
                "plan with the model's number of weights."
            )
        return query

    @override
    def in_words(self, noise: float) -> str:
        return (
            f"the distributed {self.distribution} mechanism with noise multiplier {noise:g} (all clients' shares of "
            f"the noise together) on the sum modulo 2^{self.bits} of updates clipped to L2 norm {self.clip_norm:g}, "
            "rotated and rounded to integers"
        )

    @override
    def check_noise(self, noise: float, sampler: BaseSampler, population: int, dimension: int | None) -> None:
        """Refuses a modulus that the sum would wrap around, and noise beyond the tables.

        Kairouz, Liu & Steinke 2021 (2102.06387), section 4: after the rotation a coordinate of the sum of n
        clients varies with at most (n steps)^2 / d, plus n / 4 by rounding, plus the noise.
        """
        assert dimension is not None
        steps = self.steps_per_clip(sampler, population, dimension)
        cohort = sampler.expected_cohort(population)
        signal = (cohort * steps) ** 2 / padded_dimension(dimension) + cohort / 4
        reach = self.k_stddevs * math.sqrt(signal + (noise * steps) ** 2)
        needed = math.ceil(math.log2(reach)) + 1
        if needed > self.bits:
            advice = f"at least {needed} bits" if needed <= _MOST_BITS else "fewer clients or less noise"
            raise InputError(
                f"{self.k_stddevs:g} standard deviations of the sum are {reach:.0f} steps, beyond the modulus "
                f"2^{self.bits}: take {advice}, or fewer steps per clip norm than {steps:g}."
            )
        share = noise * steps / math.sqrt(max(sampler.smallest_cohort(population), 1))
        if share > _WIDEST_SHARE:
            raise InputError(
                f"a client's share of the noise has a standard deviation of {share:.0f} steps, beyond "
                f"{_WIDEST_SHARE:.0f}: take fewer steps per clip norm than {steps:g}."
            )


class DistributedDiscreteGaussian(DistributedMechanism):
    """Shares of the noise are discrete Gaussians (Kairouz, Liu & Steinke 2021, 2102.06387).

    Their sum is not quite a discrete Gaussian itself; what that costs is in the event, and vanishes where a share
    spans a few steps. The settings are those of `DistributedMechanism`.
    """

    name: Literal["discrete_gaussian"] = "discrete_gaussian"
    distribution: ClassVar[str] = "discrete Gaussian"

    @override
    def release(self, stddev: float, shares: int, dimension: int, squared_sensitivity: int) -> dp_accounting.DpEvent:
        return DiscreteGaussianSumDpEvent(stddev, shares, dimension, math.sqrt(squared_sensitivity))

    @override
    def share_cdf(self) -> Callable[[tf.Tensor], tf.Tensor]:
        from dpfl.mechanisms.distributed_queries import discrete_gaussian_cdf

        return discrete_gaussian_cdf


class DistributedSkellam(DistributedMechanism):
    """Shares of the noise are Skellam distributed (Agarwal, Kairouz & Liu 2021, 2110.04995).

    That is the difference of two Poisson draws; their sum is Skellam distributed, too, however many there are. The
    settings are those of `DistributedMechanism`.
    """

    name: Literal["skellam"] = "skellam"
    distribution: ClassVar[str] = "Skellam"

    @override
    def release(self, stddev: float, shares: int, dimension: int, squared_sensitivity: int) -> dp_accounting.DpEvent:
        # The L1 norm is at most sqrt(d) times the L2 norm and, of integers, at most its square.
        l1_sensitivity = min(math.isqrt(dimension * squared_sensitivity), squared_sensitivity)
        return SkellamDpEvent(stddev, math.sqrt(squared_sensitivity), l1_sensitivity)

    @override
    def share_cdf(self) -> Callable[[tf.Tensor], tf.Tensor]:
        from dpfl.mechanisms.distributed_queries import skellam_cdf

        return skellam_cdf
