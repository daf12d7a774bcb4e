"""Plain federated averaging: the ceiling that private runs are compared with."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import dp_accounting

from dpfl.compression import Compression
from dpfl.config import Config
from dpfl.errors import InputError
from dpfl.mechanisms.base import check_rounds, guarantee_of
from dpfl.mechanisms.deployment import Deployment
from dpfl.mechanisms.plan import Plan
from dpfl.privacy import Privacy
from dpfl.sampling import BaseSampler

if TYPE_CHECKING:
    from dpfl.mechanisms.queries import MeanQuery
    from dpfl.mechanisms.weighted_queries import WeightedMeanQuery

_UNCOMPRESSED = Compression()


class NoMechanism(Config):
    """Averages the clients' updates, which are neither clipped nor noised.

    Attributes:
        weighting: "equal" sums the updates and divides by the expected cohort, as mechanisms with noise do.
            "examples" is the mean of McMahan et al. (2017, 1602.05629, algorithm 1): each update is weighted by how
            many examples its client processed in the round, over all epochs or local steps, and the sum is divided by
            the weights of those who came; where nobody came, and where no update is finite, the model stays. No other
            mechanism has it: one client could change such a mean by more than clip norm / expected cohort, for which
            noise is scaled. Clients that train by DP-SGD may be weighted, since how many records they have
            counts as public and their weights follow from that alone.
    """

    name: Literal["none"] = "none"
    weighting: Literal["equal", "examples"] = "equal"
    clip_norm: ClassVar[float] = math.inf
    needs_dimension: ClassVar[bool] = False
    clients_noise_alone: ClassVar[bool] = False

    def check(
        self, target: Privacy, sampler: BaseSampler, population: int, deployment: Deployment | None = None
    ) -> None:
        """Refuses an epsilon, which this mechanism cannot keep, and a cohort beyond the population."""
        sampler.check(population)
        if target.epsilon is not None:
            raise InputError(
                f"the mechanism none cannot keep epsilon {target.epsilon:g}: choose the mechanism gaussian, "
                "or epsilon none."
            )

    def check_compression(self, compression: Compression) -> None:
        """Whatever is compressed, no guarantee depends on it."""

    def update_bytes(self, parameters: int) -> int:
        """Bytes that a client sends in a round, where updates are not quantised: float32, and a weight if it has one.

        Args:
            parameters: the number of coordinates of an update.
        """
        return 4 * parameters + 4 * (self.weighting == "examples")

    def event(self, *_: Any) -> dp_accounting.DpEvent:
        """Whatever was done, nothing is guaranteed."""
        return dp_accounting.NonPrivateDpEvent()

    @property
    def works_side_by_side(self) -> bool:
        """Where clients count alike."""
        return self.weighting == "equal"

    def mean_query(self, plan: Plan, seed: int, template: Any) -> MeanQuery | WeightedMeanQuery:
        """The query that averages updates as they are; see `Plan.query`."""
        from dpfl.mechanisms.queries import GaussianSumQuery, MeanQuery
        from dpfl.mechanisms.weighted_queries import WeightedMeanQuery

        if self.weighting == "examples":
            return WeightedMeanQuery()
        return MeanQuery(GaussianSumQuery(math.inf, 0.0, seed), plan.expected_cohort)

    def structure(self, plan: Plan) -> tuple[Any, ...]:
        """What a compiled graph of the query depends on, beside the mechanism's name."""
        return (self.weighting,)

    def plan(
        self,
        target: Privacy,
        sampler: BaseSampler,
        population: int,
        rounds: int,
        *,
        dimension: int | None = None,
        deployment: Deployment | None = None,
        compression: Compression = _UNCOMPRESSED,
    ) -> Plan:
        """Returns the plan of a run without any guarantee.

        Raises:
            InputError: the target asks for an epsilon, or the cohort exceeds the population.
        """
        self.check(target, sampler, population)
        check_rounds(rounds)
        averaging = "averaging, weighted by examples," if self.weighting == "examples" else "plain averaging"
        guarantee = guarantee_of(
            self.event(),
            target,
            mechanism=f"{averaging} of unclipped updates without noise",
            sampler=sampler.in_words(population),
            steps=rounds,
        )
        return Plan(self, target, sampler, population, rounds, dimension, 0.0, guarantee, compression=compression)
