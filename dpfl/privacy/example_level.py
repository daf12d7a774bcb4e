"""Example-level privacy: what each client's DP-SGD costs its own examples.

Every local step draws a minibatch from the client's own records, clips each example's gradient and adds Gaussian
noise (Abadi et al. 2016, 1607.00133). Where minibatches are Poisson samples every local step of every round in which
the client takes part is charged; where they are cut from shuffled epochs an example is in one of each epoch's steps,
and its place counts for nothing. An example lies with exactly one client, and the others' updates do not depend on it:
its guarantee is its client's alone (parallel composition, McSherry 2009).
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from typing import TYPE_CHECKING, Literal, get_args

import dp_accounting
import numpy as np

from dpfl.errors import InputError
from dpfl.privacy.accounting import PLD_INTERVAL, check_analysis, check_delta, epsilon
from dpfl.privacy.calibration import poisson_gaussian
from dpfl.privacy.relations import RELATION_IN_WORDS, UNIT_IN_WORDS, Accountant, Relation
from dpfl.privacy.rounding import rounded_up

if TYPE_CHECKING:
    import pandas as pd

ExampleSampling = Literal["poisson", "shuffled"]


@dataclasses.dataclass(frozen=True, eq=False)
class ClientEpsilons:
    """The guarantee of the examples of each client.

    The arrays have one entry for each client. They depend on how many records the clients have, which the
    guarantee takes as public: where it is not known anyway, they are for inspection, not for release.

    Attributes:
        records: how many examples the client has, int64.
        sampling_rates: the probability with which an example is drawn in a local step, float64; for shuffled
            minibatches the fraction of the records that a full minibatch holds.
        steps: how many local steps the client takes in all rounds together, int64.
        epsilons: what they cost at `delta`, float64; 0 for clients that never take part.
        delta: the probability mass outside the bounds.
        noise_multiplier: standard deviation of the noise of a local step divided by the clip norm.
        relation: the neighbouring relation.
        accountant: "pld" or "rdp".
        sampling: "poisson", or "shuffled" where minibatches are cut from shuffled epochs.
        max_batch_size: the size to which Poisson minibatches are truncated; None where they are not.
    """

    records: np.ndarray
    sampling_rates: np.ndarray
    steps: np.ndarray
    epsilons: np.ndarray
    delta: float
    noise_multiplier: float
    relation: Relation
    accountant: Accountant
    sampling: ExampleSampling = "poisson"
    max_batch_size: int | None = None

    @property
    def worst(self) -> float:
        """The largest epsilon of any client, which holds for every example."""
        return float(self.epsilons.max())

    def quantiles(self, *levels: float) -> np.ndarray:
        """The epsilons that these fractions of the clients do not exceed.

        Args:
            levels: in [0, 1].

        Returns:
            For each level the epsilon of some client, float64.

        Raises:
            InputError: a level is not in [0, 1].
        """
        if not all(isinstance(level, numbers.Real) and 0 <= level <= 1 for level in levels):
            raise InputError(f"quantiles are at levels from 0 to 1, but these were {', '.join(map(repr, levels))}.")
        return np.quantile(self.epsilons, levels, method="inverted_cdf")

    def frame(self) -> pd.DataFrame:
        """One row for each client: client, records, sampling_rate, steps, epsilon."""
        import pandas as pd

        return pd.DataFrame(
            {
                "client": np.arange(len(self.records)),
                "records": self.records,
                "sampling_rate": self.sampling_rates,
                "steps": self.steps,
                "epsilon": self.epsilons,
            }
        )

    def statement(self) -> str:
        """The guarantee as a paragraph, for those who may know the clients' record counts."""
        if math.isinf(self.worst):
            unprotected = int(np.isinf(self.epsilons).sum())
            return (
                f"No differential privacy is guaranteed to the examples of {unprotected} of the {len(self.epsilons)} "
                "clients: no noise that can be accounted for was added in their local steps."
            )
        median, high = (_stated(value) for value in self.quantiles(0.5, 0.95))
        promise = (
            f"({_stated(self.worst)}, {_stated(self.delta)})-differential privacy at example level: what is "
            f"released changes by at most this epsilon and delta when {UNIT_IN_WORDS['example']} "
            f"{RELATION_IN_WORDS[self.relation].format(data='the data of a client')} (relation {self.relation})"
        )
        return " ".join(
            (
                f"{promise}.",
                "Every example lies with exactly one client, so that the guarantee of an example is its client's "
                f"(parallel composition): over the {len(self.epsilons)} clients epsilon has median {median}, 95th "
                f"percentile {high} and maximum {_stated(self.worst)}.",
                f"Each local step adds Gaussian noise with noise multiplier {self.noise_multiplier:g} to the clipped "
                f"gradients of {self._minibatch_in_words()}; epsilon by the {self.accountant.upper()} accountant.",
                "Amplification by the sampling of clients is not counted.",
                "The epsilons depend on how many records each client has, which counts as public: where it is not "
                "known anyway, they are not for release.",
            )
        )

    def _minibatch_in_words(self) -> str:
        if self.sampling == "shuffled":
            return "a part of a shuffled epoch of the client's records, for which nothing is amplified"
        limit = "" if self.max_batch_size is None else f", of which at most {self.max_batch_size} are used"
        return f"a Poisson sample of the client's records{limit}, at a rate that is taken as known"


def client_event(
    *,
    noise_multiplier: float,
    records: int,
    batch_size: int,
    local_steps: int,
    participations: int,
    sampling: ExampleSampling = "poisson",
    max_batch_size: int | None = None,
) -> dp_accounting.DpEvent:
    """Returns what one client's DP-SGD releases of each of its examples, in all rounds together.

    Args:
        noise_multiplier: standard deviation of the noise on the sum of the clipped gradients divided by the clip norm.
        records: how many examples the client has, at least 1.
        batch_size: the (expected) number of examples in a minibatch, at least 1.
        local_steps: how many steps it takes in a round, at least 1.
        participations: in how many rounds it takes part; 0 releases nothing.
        sampling: "poisson": each step draws each record with probability min(1, batch_size / records). "shuffled": each
            round starts a new epoch, of ceil(records / batch_size) steps, in each of which every record is in one
            step.
        max_batch_size: the size to which a larger Poisson minibatch is truncated; None for no truncation.
    """
    if participations == 0:
        return dp_accounting.NoOpDpEvent()
    if sampling == "shuffled":
        epochs = -(-local_steps // -(-records // batch_size))
        return poisson_gaussian(noise_multiplier, 1.0, epochs * participations)
    rate, steps = min(1.0, batch_size / records), local_steps * participations
    plain = poisson_gaussian(noise_multiplier, rate, steps)
    if max_batch_size is None or max_batch_size >= records or noise_multiplier == 0:
        return plain
    truncated = dp_accounting.TruncatedSubsampledGaussianDpEvent(records, rate, max_batch_size, noise_multiplier)
    return dp_accounting.SelfComposedDpEvent(truncated, steps)


def check_example_analysis(
    relation: Relation,
    accountant: Accountant,
    *,
    records: np.ndarray,
    sampling: ExampleSampling = "poisson",
    max_batch_size: int | None = None,
) -> None:
    """Refuses minibatches that have no known analysis under a relation or by an accountant.

    Args:
        relation: the neighbouring relation.
        accountant: "pld" or "rdp".
        records: how many examples each client has, integers of shape [clients].
        sampling: "poisson" or "shuffled".
        max_batch_size: the size to which Poisson minibatches are truncated; None where they are not.

    Raises:
        InputError: there is no analysis.
    """
    check_analysis(relation, accountant)
    if sampling not in get_args(ExampleSampling):
        known = ", ".join(get_args(ExampleSampling))
        raise InputError(f"there is no sampling of examples {sampling!r}: choose {known}.")
    if sampling == "shuffled":
        if relation == "add_or_remove_one":
            raise InputError(
                "shuffled minibatches have no known analysis under the relation add_or_remove_one, because an example "
                "more moves the others to other minibatches: choose the relation replace_one or replace_special, or "
                "Poisson minibatches."
            )
        if max_batch_size is not None:
            raise InputError(
                "shuffled minibatches are never larger than the batch size: leave the largest minibatch out, or choose "
                "Poisson minibatches."
            )
    elif max_batch_size is not None and accountant == "rdp" and max_batch_size < np.max(records):
        raise InputError(
            f"Poisson minibatches truncated at {max_batch_size} examples have no known analysis by the RDP accountant: "
            "choose the accountant pld, or no truncation."
        )


def client_epsilons(
    *,
    noise_multiplier: float,
    records: np.ndarray,
    batch_size: int,
    local_steps: int | np.ndarray,
    participations: int | np.ndarray,
    delta: float,
    relation: Relation = "add_or_remove_one",
    accountant: Accountant = "pld",
    sampling: ExampleSampling = "poisson",
    max_batch_size: int | None = None,
    pld_interval: float = PLD_INTERVAL,
) -> ClientEpsilons:
    """Returns the example-level guarantee of each client that trains by DP-SGD.

    With Poisson minibatches a local step draws each of the client's records with probability batch_size / records. A
    client with fewer records than `batch_size` takes all of them in every step, at rate 1 and without amplification.
    The rates are taken as known, as everywhere in the accounting of DP-SGD.

    Args:
        noise_multiplier: standard deviation of the noise on the sum of the clipped gradients divided by the clip norm.
        records: how many examples each client has, at least 1; integers of shape [clients].
        batch_size: the expected number of examples in a minibatch, at least 1.
        local_steps: how many steps a client takes in a round, at least 1: one number for all, or integers of shape
            [clients].
        participations: in how many rounds each client takes part: one number for all, or integers of shape [clients].
        delta: in (0, 1).
        relation: the neighbouring relation, between data sets of a client that differ in one example.
        accountant: "pld" or "rdp".
        sampling: how a local step draws its minibatch, as `client_event` has it.
        max_batch_size: the size to which a larger Poisson minibatch is truncated, at least 1; None for no truncation.
        pld_interval: discretisation of the privacy loss; a larger one takes less time, and gives larger bounds.

    Raises:
        InputError: a value is out of range, or the accountant has no analysis under this relation.
    """
    check_delta(delta)
    counts = _whole_numbers("each client's number of records", records, least=1)
    rounds = _whole_numbers("each client's number of rounds", participations, least=0)
    each_round = _whole_numbers("each client's number of local steps", local_steps, least=1)
    for what, value in (("the batch size", batch_size), ("the largest minibatch", max_batch_size)):
        if value is not None and _whole_numbers(what, value, least=1).ndim:
            raise InputError(f"{what} must be one number for all clients.")
    if not isinstance(noise_multiplier, numbers.Real):
        raise InputError(f"the noise multiplier must be a number, but it was {noise_multiplier!r}.")
    if (
        counts.ndim != 1
        or not len(counts)
        or any(part.shape not in ((), counts.shape) for part in (rounds, each_round))
    ):
        raise InputError(
            "the records must be one number for each client, and the participations and local steps one number for all "
            f"or for each, but their shapes were {counts.shape}, {rounds.shape} and {each_round.shape}."
        )
    if noise_multiplier:  # without, there is nothing to analyse
        check_example_analysis(relation, accountant, records=counts, sampling=sampling, max_batch_size=max_batch_size)
    each_round, rounds = np.broadcast_to(each_round, counts.shape), np.broadcast_to(rounds, counts.shape)
    events = [
        client_event(
            noise_multiplier=noise_multiplier,
            records=int(count),
            batch_size=batch_size,
            local_steps=int(steps),
            participations=int(taken),
            sampling=sampling,
            max_batch_size=max_batch_size,
        )
        for count, steps, taken in zip(counts, each_round, rounds, strict=True)
    ]
    costs: dict[dp_accounting.DpEvent, float] = {dp_accounting.NoOpDpEvent(): 0.0}
    for event in events:
        if event not in costs:
            costs[event] = epsilon(event, delta, relation=relation, accountant=accountant, pld_interval=pld_interval)
    return ClientEpsilons(
        records=counts,
        sampling_rates=np.minimum(1.0, batch_size / counts),
        steps=rounds * each_round,
        epsilons=np.array([costs[event] for event in events]),
        delta=delta,
        noise_multiplier=noise_multiplier,
        relation=relation,
        accountant=accountant,
        sampling=sampling,
        max_batch_size=max_batch_size,
    )


def _whole_numbers(what: str, values: int | np.ndarray, least: int) -> np.ndarray:
    numbers = np.asarray(values)
    if not np.issubdtype(numbers.dtype, np.integer) or (numbers < least).any():
        raise InputError(f"{what} must be a whole number of at least {least}.")
    return numbers.astype(np.int64)


def _stated(value: float) -> str:
    """A bound in words, rounded up to four digits."""
    return "inf" if math.isinf(value) else f"{rounded_up(value, 4):g}"
