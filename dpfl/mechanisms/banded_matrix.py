"""Banded matrix factorisation (Choquette-Choo et al. 2023, 2306.08153)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import dp_accounting
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


class BandedMatrix(BaseMechanism):
    """Adds noise that later rounds partly take back: x_t + (C^-1 z)_t in round t, with a banded C.

    x_t is the round's sum of clipped updates, z_t independent Gaussian noise, and C lower-triangular
    with `bands` diagonals, chosen before training so that the models' noise after each of the planned
    rounds is smallest in the mean square (see `dpfl.mechanisms.strategies`). What is released is C^-1 (C x + z),
    so that the noise protects C x: a client that takes part in one round changes it by a column
    of C times its update. Columns have norm 1, hence a sensitivity of one clip norm. One band is DP-SGD.

    Where a client's rounds lie at least `bands` apart, its columns share no row, and the rounds that
    they reach are released one after the other as if each were one Gaussian sum with `noise_multiplier`. Which client
    takes part in its round may then be sampled: by theorem 4 of 2306.08153, with groups that take turns and a
    Poisson sample of the group whose turn it is (algorithm 2), all rounds cost as much as ceil(rounds / groups)
    Poisson-sampled Gaussians at the rate within the group. This is the event of `dpfl.CyclicPoisson`.

    Where they lie less than `bands` apart, the columns of one client overlap, and nothing is amplified by sampling. Put
    each m-th of its rounds into a class of their own, m = ceil(bands / period): within a class columns share no
    row, so that k rounds move C x by sqrt(k) at most, and the classes' sum bounds the sensitivity
    whatever C is. It is an upper bound (5 to 40 % above the exact value for 100 rounds), but even the exact value
    makes the models noisier than as many bands as the period would: more of them do not pay.

    Attributes:
        clip_norm: the largest L2 norm of a client's update (all tensors together).
        noise_multiplier: standard deviation of z divided by the clip norm.
        bands: the number of diagonals of C; more of them make later models less noisy, and need a
            longer period or more groups. At most the number of rounds are used.
        momentum: of the server, in [0, 1); C is chosen for it, the guarantee does not depend on it.
    """

    name: Literal["banded_matrix"] = "banded_matrix"
    bands: int = pydantic.Field(ge=1)
    momentum: float = pydantic.Field(default=0.0, ge=0, lt=1)

    @override
    def check_sampler(self, sampler: BaseSampler, population: int, relation: Relation) -> None:
        """Refuses samplers that put nothing between two rounds of a client, unless there is one band.

        Raises:
            InputError: the sampler has no period, or no analysis under the relation.
        """
        super().check_sampler(sampler, population, relation)
        self._overlaps(sampler, population)

    def _overlaps(self, sampler: BaseSampler, population: int) -> int:
        """How many rounds of a client may share a row of C."""
        if self.bands == 1:
            return 1
        period = sampler.period(population)
        if period is None:
            raise InputError(
                f"banded_matrix with {self.bands} bands needs a sampler that separates a client's rounds, which "
                f"{sampler.name} does not: choose cyclic_poisson with at least {self.bands} groups, cyclic or "
                "everyone, or 1 band."
            )
        return math.ceil(self.bands / period)

    @override
    def event(
        self, noise: float, sampler: BaseSampler, population: int, rounds: int, dimension: int | None
    ) -> dp_accounting.DpEvent:
        """Valid for the first rounds of every longer run: what a cut takes off a column only lowers its norm."""
        overlaps = self._overlaps(sampler, population)
        if overlaps == 1:
            return sampler.event(dp_accounting.GaussianDpEvent(noise), population, rounds)
        period = sampler.period(population)
        assert period is not None  # else there is no overlap
        participations = math.ceil(rounds / period)
        sensitivity = sum(
            math.sqrt(math.ceil((participations - first) / overlaps)) for first in range(min(overlaps, participations))
        )
        return dp_accounting.GaussianDpEvent(noise / sensitivity)

    @override
    def check_compression(self, compression: Compression) -> None:
        refuse_changing_subspaces(self.name, compression)

    @override
    def sum_query(self, plan: Plan, seed: int, template: Any) -> SumQuery:
        from dpfl.mechanisms.correlated_queries import BandedSumQuery
        from dpfl.mechanisms.strategies import as_rows, banded_strategy

        rows = as_rows(banded_strategy(plan.rounds, self.bands, self.momentum))
        return BandedSumQuery(self.clip_norm, plan.noise_multiplier * self.clip_norm, seed, rows, template)

    @override
    def structure(self, plan: Plan) -> tuple[Any, ...]:
        return (plan.rounds, min(self.bands, plan.rounds))

    @override
    def in_words(self, noise: float) -> str:
        bands = "1 band" if self.bands == 1 else f"{self.bands} bands"
        return (
            f"banded matrix factorisation ({bands}, columns of norm 1) with noise multiplier {noise:g} on "
            f"the sum of updates clipped to L2 norm {self.clip_norm:g}"
        )
