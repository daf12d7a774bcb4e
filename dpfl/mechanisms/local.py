"""Local differential privacy: every client noises its own update before anybody sees it.

The noise of n clients adds up to sqrt(n) times one client's, where a trusted server, or secure aggregation
(`dpfl.mechanisms.distributed`), would need one client's noise on the whole sum: the price of trusting nobody
(Duchi, Jordan & Wainwright 2013, 1302.3203).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import dp_accounting
from typing_extensions import override

from dpfl.errors import InputError
from dpfl.mechanisms.base import BaseMechanism
from dpfl.mechanisms.plan import Plan
from dpfl.privacy.relations import Relation
from dpfl.sampling import SECRET_COHORTS, BaseSampler

if TYPE_CHECKING:
    from dpfl.mechanisms.queries import SumQuery

_NOBODY_IS_TRUSTED = (
    "The guarantee needs no trusted server: it is against the server and everybody else, who see each client's noised "
    "update and learn who took part in which round.",
    "It assumes that each client clips and noises its own update, with randomness that nobody else knows.",
)


class _LocalMechanism(BaseMechanism):
    """What local mechanisms have in common: no noise but the clients', and no amplification by sampling."""

    released: ClassVar[str] = "each client's noised updates of all rounds"
    clients_noise_alone: ClassVar[bool] = True

    @override
    def assumptions(self, sampler: BaseSampler) -> tuple[str, ...]:
        # Who takes part is no secret, but groups must not be made by a look at the data all the same.
        return (*_NOBODY_IS_TRUSTED, *(sentence for sentence in sampler.assumptions if sentence != SECRET_COHORTS))

    @override
    def noise_for_cohort(self, noise: float, share: float) -> float:
        """Every client brings noise of its own, so that the mean's falls with the root of the cohort."""
        return noise * math.sqrt(share)

    @override
    def check_sampler(self, sampler: BaseSampler, population: int, relation: Relation) -> None:
        """Accepts every sampler, since who takes part is no secret; refuses to hide whether a client exists."""
        if relation == "add_or_remove_one":
            raise InputError(
                f"the mechanism {self.name} shows everybody who took part, so that it cannot hide that a client was "
                "added or removed: choose the relation replace_one or replace_special."
            )


class LocalGaussian(_LocalMechanism):
    """Each client clips its update to an L2 norm and adds Gaussian noise to it.

    A client's update contributes at most `clip_norm` in L2 norm to what it sends; the noise on each of its
    coordinates has standard deviation `noise_multiplier * clip_norm`. The sum is divided by the
    expected cohort and gets no further noise; in a round without clients it is zero.

    Attributes:
        clip_norm: the largest L2 norm of a client's update (all tensors together).
        noise_multiplier: standard deviation of the noise on each coordinate of each client's update,
            divided by the clip norm.
    """

    name: Literal["local_gaussian"] = "local_gaussian"

    @override
    def event(
        self, noise: float, sampler: BaseSampler, population: int, rounds: int, dimension: int | None
    ) -> dp_accounting.DpEvent:
        return sampler.revealed_event(dp_accounting.GaussianDpEvent(noise), population, rounds)

    @override
    def sum_query(self, plan: Plan, seed: int, template: Any) -> SumQuery:
        from dpfl.mechanisms.local_queries import LocalGaussianSumQuery

        return LocalGaussianSumQuery(self.clip_norm, plan.noise_multiplier * self.clip_norm, seed)

    @override
    def in_words(self, noise: float) -> str:
        return (
            f"the local Gaussian mechanism with noise multiplier {noise:g}, which releases each client's update, "
            f"clipped to L2 norm {self.clip_norm:g}, with Gaussian noise of standard deviation "
            f"{noise * self.clip_norm:g} that the client itself adds,"
        )


class LocalLaplace(_LocalMechanism):
    """Each client clips its update to an L1 norm and adds Laplace noise to it.

    For small dimensions: the L1 norm of a vector of d coordinates is up to sqrt(d) times its L2 norm, so that a clip
    that leaves updates alone takes sqrt(d) times the noise.

    Attributes:
        clip_norm: the largest L1 norm of a client's update (all tensors together).
        noise_multiplier: scale b of the noise on each coordinate of each client's update (density
            proportional to exp(-|x| / b), standard deviation sqrt(2) b), divided by the clip norm.
    """

    name: Literal["local_laplace"] = "local_laplace"

    @override
    def event(
        self, noise: float, sampler: BaseSampler, population: int, rounds: int, dimension: int | None
    ) -> dp_accounting.DpEvent:
        return sampler.revealed_event(dp_accounting.LaplaceDpEvent(noise), population, rounds)

    @override
    def sum_query(self, plan: Plan, seed: int, template: Any) -> SumQuery:
        from dpfl.mechanisms.local_queries import LocalLaplaceSumQuery

        return LocalLaplaceSumQuery(self.clip_norm, plan.noise_multiplier * self.clip_norm, seed)

    @override
    def in_words(self, noise: float) -> str:
        return (
            f"the local Laplace mechanism with noise multiplier {noise:g}, which releases each client's update, "
            f"clipped to L1 norm {self.clip_norm:g}, with Laplace noise of scale "
            f"{noise * self.clip_norm:g} that the client itself adds,"
        )
