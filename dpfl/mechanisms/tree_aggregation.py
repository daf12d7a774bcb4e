"""DP-FTRL: prefix sums by tree aggregation (Kairouz et al. 2021, 2103.00039)."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, Literal

import dp_accounting
import numpy as np
import pydantic
from typing_extensions import override

from dpfl.compression import Compression
from dpfl.errors import InputError
from dpfl.mechanisms.base import BaseMechanism, refuse_changing_subspaces
from dpfl.mechanisms.plan import Plan
from dpfl.privacy.relations import Relation
from dpfl.sampling import BaseSampler

if TYPE_CHECKING:
    from dpfl.mechanisms.queries import SumQuery

VarianceReduction = Literal["none", "honaker"]
_NEVER = 2**31 - 1  # more rounds than an int32 counts


class TreeAggregation(BaseMechanism):
    """Releases prefix sums of the clipped updates with the noise of a binary tree.

    Noise is added to the nodes of a binary tree over the rounds; the sum of the first t rounds is put together from
    at most log2(t) + 1 noisy nodes, so that the model's noise grows with log t instead of t. Privacy
    needs no random sampling, only that a client's rounds lie apart.

    Each round releases the increment of the noisy prefix sum, so that a server that adds up what it gets (SGD, learning
    rate eta) holds theta_t = theta_0 + eta S_t, which is DP-FTRL. Momentum on the increments,
    m_t = gamma m_{t-1} + (S_t - S_{t-1}), is its momentum variant, whose recursion is on the prefix sums:
    v_t = gamma v_{t-1} + S_t, theta_t = theta_0 + eta v_t. For v_t - v_{t-1} obeys the recursion of m_t.

    With `restart_every` a finished tree's last noisy prefix sum, of all rounds so far, stays in the model as it is, and
    a new tree begins with nothing: its first increment has the noise of one node. So the noise of finished trees adds
    up, while no tree, and no count of a client's rounds in one node, gets larger.

    Attributes:
        clip_norm: the largest L2 norm of a client's update (all tensors together).
        noise_multiplier: standard deviation of one node's noise divided by the clip norm.
        restart_every: the rounds after which a new tree starts; None for a single tree.
        variance_reduction: "honaker" averages each node with what its children say, from below
            (Honaker 2015; as in TensorFlow Privacy's `EfficientTreeAggregator`); "none" releases sums of nodes as they
            are.
    """

    name: Literal["tree_aggregation"] = "tree_aggregation"
    restart_every: int | None = pydantic.Field(default=None, ge=1)
    variance_reduction: VarianceReduction = "honaker"

    @override
    def check_sampler(self, sampler: BaseSampler, population: int, relation: Relation) -> None:
        """Refuses samplers that put nothing between two rounds of a client.

        Raises:
            InputError: the sampler has no period, or no analysis under the relation.
        """
        super().check_sampler(sampler, population, relation)
        self._period(sampler, population)

    def _period(self, sampler: BaseSampler, population: int) -> int:
        period = sampler.period(population)
        if period is None:
            raise InputError(
                f"tree_aggregation needs a sampler that separates a client's rounds, which {sampler.name} does not: "
                "choose cyclic, cyclic_poisson or everyone."
            )
        return period

    def sensitivity(self, rounds: int, period: int) -> float:
        """How far one client moves all noisy nodes of the first rounds together, in L2 norm, in clip norms.

        The root of the sum, over the nodes that are complete, of the square of the number of the
        client's rounds in the node; the largest over the client's phases. Nobody can move them further, as updates of
        one direction and full length in all rounds do so. Without variance reduction right children are never used,
        and so not counted.

        Args:
            rounds: so many have been released, at least 1.
            period: a client takes part in rounds that are congruent modulo it.
        """
        horizon = 1 << (rounds - 1).bit_length()
        return float(
            _sensitivities(horizon, period, self.restart_every, self.variance_reduction == "honaker")[rounds - 1]
        )

    @override
    def event(
        self, noise: float, sampler: BaseSampler, population: int, rounds: int, dimension: int | None
    ) -> dp_accounting.DpEvent:
        """All noisy nodes are one Gaussian release, and what is released is a function of them.

        This also holds where updates depend on earlier releases (Denisov et al. 2022, 2202.08312).
        """
        return dp_accounting.GaussianDpEvent(noise / self.sensitivity(rounds, self._period(sampler, population)))

    @override
    def check_compression(self, compression: Compression) -> None:
        refuse_changing_subspaces(self.name, compression)

    @override
    def sum_query(self, plan: Plan, seed: int, template: Any) -> SumQuery:
        from dpfl.mechanisms.correlated_queries import TreeSumQuery

        return TreeSumQuery(
            self.clip_norm,
            plan.noise_multiplier * self.clip_norm,
            seed,
            restart_every=self.restart_every or _NEVER,
            levels=self._levels(plan.rounds),
            honaker=self.variance_reduction == "honaker",
            template=template,
        )

    @override
    def structure(self, plan: Plan) -> tuple[Any, ...]:
        return (self.variance_reduction, self._levels(plan.rounds))

    def _levels(self, rounds: int) -> int:
        return min(self.restart_every or rounds, rounds).bit_length()

    @override
    def in_words(self, noise: float) -> str:
        restarts = "" if self.restart_every is None else f", a new tree every {self.restart_every} rounds"
        estimate = ", with Honaker's estimate from below" if self.variance_reduction == "honaker" else ""
        return (
            f"tree aggregation (DP-FTRL{estimate}{restarts}) with noise multiplier {noise:g} on each node, on the sum "
            f"of updates clipped to L2 norm {self.clip_norm:g}"
        )


@functools.lru_cache(maxsize=256)
def _sensitivities(rounds: int, period: int, restart_every: int | None, all_nodes: bool) -> np.ndarray:
    """`TreeAggregation.sensitivity` after 1, 2, ..., rounds rounds.

    Args:
        rounds: the number of rounds.
        period: a client takes part in rounds that are congruent modulo it.
        restart_every: the rounds of a tree; None for a single tree.
        all_nodes: counts right children too.
    """
    squares = np.zeros(period if period < rounds else rounds, dtype=np.int64)  # by phase, beside what all have
    of_all, largest = 0, 0
    result = np.zeros(rounds)
    tree = restart_every or rounds
    for done in range(1, rounds + 1):
        number = (done - 1) % tree + 1
        level = (number & -number).bit_length() - 1
        for size in (1 << k for k in range(0 if all_nodes else level, level + 1)):
            # Of the last `size` rounds every phase has `turns`, and those of the first `more` rounds one more.
            turns, more = divmod(size, period)
            of_all += turns**2
            first = (done - size) % period
            for window in (squares[first : first + more], squares[: max(first + more - period, 0)]):
                if window.size:
                    window += 2 * turns + 1
                    largest = max(largest, int(window.max()))
        result[done - 1] = math.sqrt(of_all + largest)
    result.setflags(write=False)
    return result
