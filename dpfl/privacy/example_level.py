"""Example-level privacy: what each client's DP-SGD costs its own examples.

Every local step draws a Poisson minibatch from the client's own records, clips each example's gradient and adds
Gaussian noise (Abadi et al. 2016, 1607.00133), so that every local step of every round in which the client takes part
is charged. An example lies with exactly one client, and the others' updates do not depend on it: its guarantee is
its client's alone (parallel composition, McSherry 2009).
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from typing import TYPE_CHECKING

import numpy as np

from dpfl.errors import InputError
from dpfl.privacy.accounting import check_analysis, check_delta, epsilon
from dpfl.privacy.calibration import poisson_gaussian
from dpfl.privacy.relations import RELATION_IN_WORDS, UNIT_IN_WORDS, Accountant, Relation
from dpfl.privacy.rounding import rounded_up

if TYPE_CHECKING:
    import pandas as pd


@dataclasses.dataclass(frozen=True, eq=False)
class ClientEpsilons:
    """The guarantee of the examples of each client.

    The arrays have one entry for each client. They depend on how many records the clients have, which is
    private where it is not known anyway: they are for inspection, not for release.

    Attributes:
        records: how many examples the client has, int64.
        sampling_rates: the probability with which an example is drawn in a local step, float64.
        steps: how many local steps the client takes in all rounds together, int64.
        epsilons: what they cost at `delta`, float64; 0 for clients that never take part.
        delta: the probability mass outside the bounds.
        noise_multiplier: standard deviation of the noise of a local step divided by the clip norm.
        relation: the neighbouring relation.
        accountant: "pld" or "rdp".
    """

    records: np.ndarray
    sampling_rates: np.ndarray
    steps: np.ndarray
    epsilons: np.ndarray
    delta: float
    noise_multiplier: float
    relation: Relation
    accountant: Accountant

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
        median, high = (_stated(value) for value in self.quantiles(0.5, 0.95))
        if math.isinf(self.worst):
            promise = "No differential privacy is guaranteed to the examples of all clients: the largest epsilon is inf"
        else:
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
                "gradients of a Poisson sample of the client's records, at a rate that is taken as known; epsilon by "
                f"the {self.accountant.upper()} accountant.",
                "Amplification by the sampling of clients is not counted.",
                "The epsilons depend on how many records each client has, which is private: they are not for release.",
            )
        )


def client_epsilons(
    *,
    noise_multiplier: float,
    records: np.ndarray,
    batch_size: int,
    local_steps: int,
    participations: int | np.ndarray,
    delta: float,
    relation: Relation = "add_or_remove_one",
    accountant: Accountant = "pld",
) -> ClientEpsilons:
    """Returns the example-level guarantee of each client that trains by DP-SGD.

    A local step draws each of the client's records with probability batch_size / records. A client with fewer
    records than `batch_size` takes all of them in every step, at rate 1 and without amplification. The rates are taken
    as known, as everywhere in the accounting of DP-SGD.

    Args:
        noise_multiplier: standard deviation of the noise on the sum of the clipped gradients divided by the clip norm.
        records: how many examples each client has, at least 1; integers of shape [clients].
        batch_size: the expected number of examples in a minibatch, at least 1.
        local_steps: how many steps a client takes in a round, at least 1.
        participations: in how many rounds each client takes part: one number for all, or integers of shape [clients].
        delta: in (0, 1).
        relation: the neighbouring relation, between data sets of a client that differ in one example.
        accountant: "pld" or "rdp".

    Raises:
        InputError: a value is out of range, or the accountant has no analysis under this relation.
    """
    check_delta(delta)
    check_analysis(relation, accountant)
    counts = _whole_numbers("each client's number of records", records, least=1)
    rounds = _whole_numbers("each client's number of rounds", participations, least=0)
    for what, value in (("the batch size", batch_size), ("the number of local steps", local_steps)):
        if _whole_numbers(what, value, least=1).ndim:
            raise InputError(f"{what} must be one number for all clients.")
    if not isinstance(noise_multiplier, numbers.Real):
        raise InputError(f"the noise multiplier must be a number, but it was {noise_multiplier!r}.")
    if counts.ndim != 1 or not len(counts) or rounds.shape not in ((), counts.shape):
        raise InputError(
            "the records must be one number for each client, and the participations one number for all or for each, "
            f"but their shapes were {counts.shape} and {rounds.shape}."
        )
    rates = np.minimum(1.0, batch_size / counts)
    steps = np.broadcast_to(rounds * local_steps, counts.shape)
    distinct, which = np.unique(np.stack([rates, steps.astype(np.float64)]), axis=1, return_inverse=True)

    def cost(rate: float, taken: float) -> float:
        if taken == 0:
            return 0.0
        event = poisson_gaussian(noise_multiplier, float(rate), int(taken))
        return epsilon(event, delta, relation=relation, accountant=accountant)

    costs = np.array([cost(rate, taken) for rate, taken in distinct.T])
    return ClientEpsilons(counts, rates, steps, costs[which.reshape(-1)], delta, noise_multiplier, relation, accountant)


def _whole_numbers(what: str, values: int | np.ndarray, least: int) -> np.ndarray:
    numbers = np.asarray(values)
    if not np.issubdtype(numbers.dtype, np.integer) or (numbers < least).any():
        raise InputError(f"{what} must be a whole number of at least {least}.")
    return numbers.astype(np.int64)


def _stated(value: float) -> str:
    """A bound in words, rounded up to four digits."""
    return "inf" if math.isinf(value) else f"{rounded_up(value, 4):g}"
