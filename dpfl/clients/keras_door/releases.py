"""What a training has released, and what that costs: rows of a ledger, privacy events and the guarantee."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import get_args

import dp_accounting
import numpy as np

from dpfl.clients.per_example import Clipping
from dpfl.privacy import Accountant, Guarantee, Relation, accountant_for, epsilon
from dpfl.privacy.accounting import accountant_name, check_analysis, check_delta
from dpfl.privacy.events import as_dict
from dpfl.privacy.example_level import ExampleSampling, check_example_analysis, client_event
from dpfl.privacy.target import check_weak_delta

_SAMPLINGS: tuple[ExampleSampling, ...] = get_args(ExampleSampling)
_CLIPPINGS: tuple[Clipping, ...] = get_args(Clipping)
_CLIPPED: dict[Clipping, str] = {
    "flat": "clipped to L2 norm {norm:g}",
    "per_layer": "clipped to L2 norm {norm:g} (in equal shares for each layer)",
    "automatic": "scaled to L2 norms below {norm:g}",
}
_EVERYWHERE = (
    "The number of examples counts as public, and the split into training and other examples as fixed; the model's "
    "initial weights, its layers and the preprocessing of the examples depend on none of them.",
    "It does not cover figures measured along the way (losses and metrics on the training examples and on others), nor "
    "the choice of hyperparameters, or of the epoch whose weights are kept, by looking at them.",
    "Noise and sampling are pseudo-random functions, the noise in float32, of a seed: whoever knows it can take the "
    "noise off, so it must stay secret, and models trained from the same seed must not be released together.",
)


@dataclasses.dataclass(frozen=True)
class Release:
    """What every step of a call of fit releases: a noisy sum of clipped gradients.

    Attributes:
        sampling: "poisson" or "shuffled".
        examples: the number of training examples.
        batch_size: the (expected) number of examples in a minibatch.
        max_batch_size: the largest Poisson minibatch; None where the size is not limited.
        noise_multiplier: standard deviation of the noise divided by the clip norm; 0 for none.
        clip_norm: the largest L2 norm of an example's clipped gradient.
        clipping: "flat", "per_layer" or "automatic".
    """

    sampling: ExampleSampling
    examples: int
    batch_size: int
    max_batch_size: int | None
    noise_multiplier: float
    clip_norm: float
    clipping: Clipping

    @classmethod
    def columns(cls) -> int:
        """How many numbers a row of the ledger has."""
        return len(dataclasses.fields(cls))

    def row(self) -> np.ndarray:
        """The release as numbers, (columns,), float64."""
        values = dataclasses.asdict(self)
        values["sampling"] = _SAMPLINGS.index(self.sampling)
        values["clipping"] = _CLIPPINGS.index(self.clipping)
        values["max_batch_size"] = self.max_batch_size or 0
        return np.array(list(values.values()), np.float64)

    @classmethod
    def from_row(cls, row: np.ndarray) -> Release:
        """The release that `row` wrote."""
        sampling, examples, batch_size, max_batch_size, noise_multiplier, clip_norm, clipping = row.tolist()
        return cls(
            _SAMPLINGS[int(sampling)],
            int(examples),
            int(batch_size),
            int(max_batch_size) or None,
            noise_multiplier,
            clip_norm,
            _CLIPPINGS[int(clipping)],
        )

    def event(self, charges: int) -> dp_accounting.DpEvent:
        """The privacy event of so many charges, at least 1: of steps if Poisson, of passes if shuffled."""
        if not self.noise_multiplier:
            return dp_accounting.NonPrivateDpEvent()
        return client_event(
            noise_multiplier=self.noise_multiplier,
            records=self.examples,
            batch_size=self.batch_size,
            local_steps=1,  # of a pass an example is in one step, whichever that is
            participations=charges,
            sampling=self.sampling,
            max_batch_size=self.max_batch_size,
        )

    def mechanism_in_words(self) -> str:
        """The mechanism as a clause of the guarantee's statement."""
        noise = f"with noise multiplier {self.noise_multiplier:g}" if self.noise_multiplier else "without noise"
        clipped = _CLIPPED[self.clipping].format(norm=self.clip_norm)
        return f"the Gaussian mechanism {noise} on the sum of the examples' gradients {clipped}"

    def sampler_in_words(self) -> str:
        """The sampling as a clause of the guarantee's statement."""
        if self.sampling == "shuffled":
            return (
                f"on minibatches of {self.batch_size} of the {self.examples} training examples in an order that is "
                "drawn anew in every pass (each pass counts once, without amplification)"
            )
        words = (
            f"on a Poisson sample of the {self.examples} training examples at rate "
            f"{self.batch_size / self.examples:g} (expected batch size {self.batch_size})"
        )
        if self.max_batch_size is not None:
            words += f", of which at most {self.max_batch_size} are used"
        return words


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row of the ledger: what was released, and how often.

    Attributes:
        release: what every step released.
        charges: how many noisy sums one example may have been in (that it could have been drawn for).
        steps: how many steps there were.
    """

    release: Release
    charges: int
    steps: int


def event_of(entries: Sequence[Entry]) -> dp_accounting.DpEvent:
    """The privacy event of a ledger whose entries all have charges."""
    parts = [entry.release.event(entry.charges) for entry in entries]
    if any(isinstance(part, dp_accounting.NonPrivateDpEvent) for part in parts):
        return dp_accounting.NonPrivateDpEvent()
    return parts[0] if len(parts) == 1 else dp_accounting.ComposedDpEvent(parts)


def check_analysable(
    entries: Sequence[Entry], delta: float, relation: Relation, accountant: Accountant, allow_weak_delta: bool
) -> None:
    """Refuses a delta, relation or accountant under which a ledger has no guarantee worth its name."""
    check_delta(delta)
    check_analysis(relation, accountant)
    for release in (entry.release for entry in entries):
        if release.noise_multiplier:  # without, there is nothing to analyse
            check_example_analysis(
                relation,
                accountant,
                records=np.array([release.examples]),
                sampling=release.sampling,
                max_batch_size=release.max_batch_size,
            )
        check_weak_delta(delta, release.examples, allow_weak_delta, "examples")


def spent(entries: Sequence[Entry], delta: float, relation: Relation, accountant: Accountant) -> float:
    """The epsilon of a ledger; 0 of an empty one, infinity where a step had no noise."""
    if not entries:
        return 0.0
    event = event_of(entries)
    if isinstance(event, dp_accounting.NonPrivateDpEvent):
        return math.inf
    return epsilon(event, delta, relation=relation, accountant=accountant)


def guarantee_of(entries: Sequence[Entry], delta: float, relation: Relation, accountant: Accountant) -> Guarantee:
    """The guarantee of a ledger with at least one entry, with its description."""
    event = event_of(entries)
    private = not isinstance(event, dp_accounting.NonPrivateDpEvent)
    answering = accountant_for(event, relation, accountant) if private else "none"
    steps = sum(entry.steps for entry in entries)
    assumptions: tuple[str, ...] = _EVERYWHERE
    if any(entry.release.sampling == "poisson" for entry in entries):
        assumptions = (*assumptions, "Which examples were drawn in which step stays secret.")
    mechanism, sampler = entries[0].release.mechanism_in_words(), entries[0].release.sampler_in_words()
    if len(entries) > 1:
        mechanism = "the Gaussian mechanism on the sum of the examples' clipped gradients"
        sampler = "in parts that are composed as if all were on the same examples: " + "; ".join(
            f"{entry.steps} of {entry.release.mechanism_in_words()}, {entry.release.sampler_in_words()}"
            for entry in entries
        )
    return Guarantee(
        unit="example",
        relation=relation,
        epsilon=spent(entries, delta, relation, accountant),
        delta=delta,
        mechanism=mechanism,
        sampler=sampler,
        steps=steps,
        accountant=answering,
        accounted_by=accountant_name(answering) if answering != "none" else "none",
        released="the model's weights after every step",
        assumptions=assumptions if private else (),
        event=as_dict(event),
    )
