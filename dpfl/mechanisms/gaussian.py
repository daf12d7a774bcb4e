"""The Gaussian mechanism on the sum of clipped updates (DP-FedAvg, McMahan et al. 2018, 1710.06963)."""

from __future__ import annotations

from typing import Literal

import dp_accounting
import pydantic

from dpfl.config import Config
from dpfl.errors import InputError
from dpfl.mechanisms.plan import Plan
from dpfl.privacy import Guarantee, Privacy, epsilon, noise_multiplier, poisson_gaussian
from dpfl.privacy.accounting import accountant_name
from dpfl.privacy.target import check_weak_delta
from dpfl.sampling import Poisson

_SMALLEST_CLIP_NORM, _LARGEST_CLIP_NORM = 1e-9, 1e9

_CENTRAL_ASSUMPTIONS = (
    "The guarantee assumes a server that is trusted with the single updates and keeps secret who took "
    "part in which round.",
    "The number of clients, and with it the sampling rate, counts as public, and the split into training and held-out "
    "examples as fixed.",
    "It does not cover figures measured along the way (accuracies, losses, update norms), nor the choice of "
    "hyperparameters by looking at them.",
    "The noise is a pseudo-random function, in float32, of the run's seed: whoever knows the seed can take it off, and "
    "runs with the same seed share it, so a model that is released needs a seed of its own that stays secret.",
)


class Gaussian(Config):
    """Clips each client's update to an L2 norm and adds Gaussian noise to the sum.

    Adding or removing a client changes the sum by at most `clip_norm` in L2 norm; the noise on each
    coordinate has standard deviation `noise_multiplier * clip_norm`. The sum is divided by the
    expected cohort.

    Attributes:
        clip_norm: the largest L2 norm of a client's update (all tensors together), between 1e-9 and
            1e9: beyond, squares leave the range of float32 and norms would be wrong.
    """

    name: Literal["gaussian"] = "gaussian"
    clip_norm: float

    @pydantic.model_validator(mode="after")
    def _check(self) -> Gaussian:
        if not _SMALLEST_CLIP_NORM <= self.clip_norm <= _LARGEST_CLIP_NORM:
            raise InputError(
                f"the clip norm must be a positive number between {_SMALLEST_CLIP_NORM:g} and {_LARGEST_CLIP_NORM:g}, "
                f"but it was {self.clip_norm:g}; to train without clipping use the mechanism none."
            )
        return self

    def check(self, target: Privacy, sampler: Poisson, population: int) -> None:
        """Refuses settings that no noise can reconcile: a weak delta, a cohort beyond the population."""
        sampler.rate(population)
        if target.epsilon is not None:
            check_weak_delta(target.delta, population, target.allow_weak_delta)

    def plan(self, target: Privacy, sampler: Poisson, population: int, rounds: int) -> Plan:
        """Calibrates the noise for a target.

        Args:
            target: the guarantee asked for; with epsilon None updates are clipped but not noised.
            sampler: draws the cohorts.
            population: the number of clients.
            rounds: the number of rounds, each of which releases one noisy sum.

        Raises:
            InputError: the target cannot be met.
        """
        self.check(target, sampler, population)
        rate = sampler.rate(population)
        if target.epsilon is None:
            multiplier = 0.0
            assumptions: tuple[str, ...] = ()
        else:
            multiplier = noise_multiplier(
                target.epsilon,
                target.delta,
                sampling_rate=rate,
                steps=rounds,
                relation=target.relation,
                accountant=target.accountant,
            )
            assumptions = _CENTRAL_ASSUMPTIONS
        event: dp_accounting.DpEvent = poisson_gaussian(multiplier, rate, rounds)
        spent = epsilon(event, target.delta, relation=target.relation, accountant=target.accountant)
        guarantee = Guarantee(
            unit=target.unit,
            relation=target.relation,
            epsilon=spent,
            delta=target.delta,
            mechanism=(
                f"the Gaussian mechanism with noise multiplier {multiplier:g} on the sum of updates clipped "
                f"to L2 norm {self.clip_norm:g}"
            ),
            sampler=sampler.in_words(population),
            steps=rounds,
            accountant=accountant_name(target.accountant),
            released="the models after all rounds",
            assumptions=assumptions,
        )
        return Plan(self.name, sampler, population, rounds, self.clip_norm, multiplier, guarantee)
