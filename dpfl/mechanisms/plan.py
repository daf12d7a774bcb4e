"""The plan: the one object from which sampler, clip, noise, denominator and accountant come."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import dp_accounting

from dpfl.compression import Compression
from dpfl.errors import InputError
from dpfl.privacy import Guarantee, Privacy
from dpfl.privacy.ledger import Ledger
from dpfl.sampling import BaseSampler

if TYPE_CHECKING:
    from tensorflow_privacy import DPQuery

    from dpfl.mechanisms.base import BaseMechanism
    from dpfl.mechanisms.none import NoMechanism


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a mechanism decided for a target, a population and a number of rounds.

    Nothing else in dpfl computes a noise scale, a denominator or an epsilon for training.

    Attributes:
        mechanism: clips, sums and noises.
        target: the guarantee that was asked for.
        sampler: draws the cohorts that the guarantee assumes.
        population: the number of clients.
        rounds: the number of rounds; fewer than asked for where the noise is given and epsilon is a budget.
        dimension: the number of coordinates of an update, where the mechanism needs it; else None.
        noise_multiplier: of the mechanism's noise, as the mechanism defines it.
        guarantee: what the run will have guaranteed when all its rounds are done.
        extrapolated: what the same noise on the mean would guarantee in a larger deployment; None
            where no deployment was given.
    """

    mechanism: BaseMechanism | NoMechanism
    target: Privacy
    sampler: BaseSampler
    population: int
    rounds: int
    dimension: int | None
    noise_multiplier: float
    guarantee: Guarantee
    extrapolated: Guarantee | None = None
    compression: Compression = dataclasses.field(default_factory=Compression)

    @property
    def clip_norm(self) -> float:
        """The largest norm of a client's update in the first round; infinity where nothing is clipped."""
        return self.mechanism.clip_norm

    @property
    def expected_cohort(self) -> float:
        """How many clients are expected in a round: what mechanisms divide sums by, whoever came."""
        return self.sampler.expected_cohort(self.population)

    @property
    def is_private(self) -> bool:
        """Whether the guarantee's epsilon is finite."""
        return math.isfinite(self.guarantee.epsilon)

    @property
    def structure(self) -> tuple[Any, ...]:
        """What a compiled graph of the query depends on: plans that agree in it can share one."""
        of_mechanism = (self.mechanism.name, *self.mechanism.structure(self))
        if not self.compression.of_updates:
            return of_mechanism
        # Pruning follows a schedule over all rounds.
        return (*of_mechanism, self.rounds, str(self.compression))

    def event(self, rounds: int | None = None) -> dp_accounting.DpEvent:
        """The privacy event of the first so many rounds, or of all.

        Args:
            rounds: at least 1; None for all.
        """
        return self.mechanism.event(
            self.noise_multiplier,
            self.sampler,
            self.population,
            self.rounds if rounds is None else rounds,
            self.dimension,
        )

    def ledger(self) -> Ledger:
        """Returns the ledger of a run that has not begun."""
        guarantee = self.guarantee
        accountant = "pld" if guarantee.accountant == "none" else guarantee.accountant
        return Ledger(
            self.event,
            guarantee.delta,
            relation=guarantee.relation,
            accountant=accountant,
            budget=guarantee.epsilon,
        )

    def query(self, seed: int, template: Any = None) -> DPQuery:
        """Returns the TensorFlow Privacy query that aggregates the cohort's updates.

        It clips each update, sums, adds noise, and divides by the expected cohort, never by the
        actual one, which is private. It runs in the in-graph engine and, unchanged, inside
        `tff.aggregators.DifferentiallyPrivateFactory`. Where a mechanism without protection weights by
        examples it runs in the in-graph engine alone.

        Args:
            seed: the run's seed; the noise is a pure function of it and the round.
            template: the structure of an update, as tensors, arrays or `tf.TensorSpec`s; needed by
                mechanisms that keep past noise or rotate updates and by compression, ignored by the others.

        Raises:
            InputError: the template is needed and there is none, or such updates cannot be compressed so.
        """
        if not self.compression.of_updates:
            return self.mechanism.mean_query(self, seed, template)
        return self._compressed_query(seed, template)

    def _compressed_query(self, seed: int, template: Any) -> DPQuery:
        import tensorflow as tf

        from dpfl.mechanisms.compressed_queries import CompressedMeanQuery

        if template is None:
            raise InputError("updates are compressed by their shapes: give the query the template of an update.")
        shapes = [tuple(part.shape) for part in tf.nest.flatten(template)]
        records = [tf.TensorSpec(shape) for shape in self.compression.record_shapes(shapes)]
        inner = self.mechanism.mean_query(self, seed, records)
        after_noise = self.mechanism.clients_noise_alone
        return CompressedMeanQuery(inner, self.compression, template, self.rounds, seed, after_noise=after_noise)
