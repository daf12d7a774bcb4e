"""The Gaussian mechanism on the sum of clipped updates (DP-FedAvg, McMahan et al. 2018, 1710.06963)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import dp_accounting
from typing_extensions import override

from dpfl.mechanisms.base import BaseMechanism, independent_rounds
from dpfl.mechanisms.plan import Plan
from dpfl.sampling import BaseSampler

if TYPE_CHECKING:
    from dpfl.mechanisms.queries import SumQuery


class Gaussian(BaseMechanism):
    """Clips each client's update to an L2 norm and adds Gaussian noise to the sum.

    Adding or removing a client changes the sum by at most `clip_norm` in L2 norm; the noise on each
    coordinate has standard deviation `noise_multiplier * clip_norm`. The sum is divided by the
    expected cohort.

    Attributes:
        clip_norm: the largest L2 norm of a client's update (all tensors together).
        noise_multiplier: standard deviation of the noise on the sum, divided by the clip norm.
        clipping: "flat" clips all tensors together; "per_layer" clips each tensor to an equal share,
            clip_norm / sqrt(number of tensors) (McMahan et al. 2018, section 3.2: per-layer
            clipping); "per_layer_by_size" to a share in proportion to the root of its size. The
            sensitivity is the same in all.
    """

    name: Literal["gaussian"] = "gaussian"
    clipping: Literal["flat", "per_layer", "per_layer_by_size"] = "flat"

    @property
    @override
    def works_side_by_side(self) -> bool:
        """Where all tensors are clipped together."""
        return self.clipping == "flat"

    @override
    def event(
        self, noise: float, sampler: BaseSampler, population: int, rounds: int, dimension: int | None
    ) -> dp_accounting.DpEvent:
        return independent_rounds(noise, sampler, population, rounds)

    @override
    def sum_query(self, plan: Plan, seed: int, template: Any) -> SumQuery:
        from dpfl.mechanisms.queries import GaussianSumQuery

        return GaussianSumQuery(self.clip_norm, plan.noise_multiplier * self.clip_norm, seed, self.clipping)

    @override
    def structure(self, plan: Plan) -> tuple[Any, ...]:
        return (self.clipping,)

    @override
    def in_words(self, noise: float) -> str:
        split = {
            "flat": "",
            "per_layer": " (in equal shares for each tensor)",
            "per_layer_by_size": " (in shares for each tensor by its size)",
        }[self.clipping]
        return (
            f"the Gaussian mechanism with noise multiplier {noise:g} on the sum of updates clipped "
            f"to L2 norm {self.clip_norm:g}{split}"
        )
