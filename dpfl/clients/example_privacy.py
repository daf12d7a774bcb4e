"""Example-level privacy of a federated run: the one place where the clients' clip, noise and guarantee come from.

Every client pays for its own local steps at its own sampling rate (`dpfl.privacy.example_level`); what is promised is
the worst client's guarantee, with as many rounds as the sampler can ever draw it into, so that it holds before anybody
is drawn and whoever is. That clients are sampled amplifies nothing here: each single update counts as released.
"""

from __future__ import annotations

import dataclasses
import math

import dp_accounting
import numpy as np

from dpfl.clients.training import ClientTraining
from dpfl.errors import InputError
from dpfl.mechanisms.base import guarantee_of
from dpfl.privacy import Guarantee, Privacy
from dpfl.privacy.accounting import PLD_INTERVAL, epsilon
from dpfl.privacy.calibration import noise_for
from dpfl.privacy.example_level import ClientEpsilons, check_example_analysis, client_epsilons, client_event
from dpfl.privacy.ledger import Ledger
from dpfl.privacy.rounding import rounded_up
from dpfl.privacy.target import check_weak_delta
from dpfl.sampling import BaseSampler

_COARSE_INTERVAL = 16 * PLD_INTERVAL  # what fits on a coarse grid of privacy losses fits on a fine one
_RELEASED = "each client's updates of all rounds, and of everything that is computed from them,"

_EVERYWHERE = (
    "Each single update protects its client's examples before anybody sees it, so that no trusted server is needed; "
    "which clients take part in which round may be known.",
    "How many records each client has counts as public, and the split into training and held-out examples as fixed; "
    "the initial model depends on no example.",
    "One example is one record: whoever is behind several records is protected less.",
    "It does not cover figures measured along the way (accuracies, losses, update norms), nor the choice of "
    "hyperparameters by looking at them.",
    "Noise and minibatches are pseudo-random functions, the noise in float32, of the run's seed: whoever knows the "
    "seed can take the noise off, and runs with the same seed share it, so updates that are released need a seed of "
    "their own that stays secret.",
)
_POISSON = "Each client keeps secret which of its examples were in which minibatch."
_SHUFFLED = (
    "Minibatches are cut from a fresh shuffle in every epoch and round, which amplifies nothing: each example is "
    "charged for one step of each epoch, and this is known to hold only where an example is replaced, not added."
)


@dataclasses.dataclass(frozen=True, eq=False)
class ClientPlan:
    """What was decided for clients that clip their examples' gradients.

    Nothing else in dpfl computes the noise of a local step or what it costs.

    Attributes:
        training: what the clients do.
        target: whose delta, relation and accountant the guarantee has; where its unit is "example", its epsilon too.
        sampler: draws the cohorts.
        records: how many examples each client has, (clients,).
        rounds: the number of rounds.
        noise_multiplier: standard deviation of the noise on a minibatch's sum of clipped gradients, divided by the
            clip norm.
        guarantee: what holds for every example of every client, whoever is drawn.
    """

    training: ClientTraining
    target: Privacy
    sampler: BaseSampler
    records: np.ndarray
    rounds: int
    noise_multiplier: float
    guarantee: Guarantee

    @property
    def clip_norm(self) -> float:
        """The largest L2 norm of one example's gradient."""
        assert self.training.example_clip is not None
        return self.training.example_clip

    @property
    def is_private(self) -> bool:
        """Whether the guarantee's epsilon is finite."""
        return math.isfinite(self.guarantee.epsilon)

    def ledgers(self) -> list[Ledger]:
        """Ledgers of a run that has not begun, one for each client that may turn out the worst.

        The largest of their epsilons is an upper bound of what so many rounds cost any example.
        """
        if not self.is_private:
            return []

        def ledger(records: int) -> Ledger:
            return Ledger(
                lambda rounds: _event(self.training, self.noise_multiplier, records, self._most_rounds(rounds)),
                self.guarantee.delta,
                relation=self.guarantee.relation,
                accountant=self.target.accountant,
                budget=self.guarantee.epsilon,
            )

        return [ledger(records) for records in _candidates(self.training, self.records)]

    def realised(self, participations: np.ndarray) -> ClientEpsilons:
        """What a run cost the examples of each client.

        Args:
            participations: in how many rounds each client took part, (clients,).

        Returns:
            Upper bounds on a grid of privacy losses that is coarser than the guarantee's, but never above it.
        """
        assert self.training.batch_size is not None
        clients = client_epsilons(
            noise_multiplier=self.noise_multiplier,
            records=self.records,
            batch_size=self.training.batch_size,
            local_steps=np.array([self.training.local_steps(int(records)) for records in self.records]),
            participations=participations,
            delta=self.target.delta,
            relation=self.target.relation,
            accountant=self.target.accountant,
            sampling=self.training.example_sampling,
            max_batch_size=self.training.max_batch_size,
            pld_interval=_COARSE_INTERVAL,
        )
        return dataclasses.replace(clients, epsilons=np.minimum(clients.epsilons, self.guarantee.epsilon))

    def _most_rounds(self, rounds: int) -> int:
        return self.sampler.most_participations(len(self.records), rounds)


def check_clients(training: ClientTraining, target: Privacy, records: np.ndarray) -> None:
    """Refuses a client training that cannot keep a target, whatever its noise.

    Args:
        training: what the clients do.
        target: the guarantee asked for.
        records: how many examples each client has, (clients,).

    Raises:
        InputError: an example-level target without an example_clip, a noise that cannot be calibrated, an epsilon
            without noise, minibatches without an analysis, or a delta that is no privacy for the examples.
    """
    if target.unit == "example" and not training.is_private:
        raise InputError(
            "the unit example needs clients that clip each example's gradient: give the client training an "
            "example_clip (1.0, say), or choose the unit user."
        )
    if not training.is_private:
        return
    if target.unit == "user" and training.example_noise is None:
        raise InputError(
            "example_noise=None calibrates the clients' noise to a target of unit example, but the target's unit is "
            "user: give the example_noise (0 clips without noise), or choose the unit example."
        )
    if target.unit == "example" and target.epsilon is not None and training.example_noise == 0:
        raise InputError(
            f"without noise in the local steps epsilon {target.epsilon:g} cannot be kept: leave example_noise out, so "
            "that it is calibrated, or choose epsilon none."
        )
    if not _adds_noise(training, target):
        return
    check_example_analysis(
        target.relation,
        target.accountant,
        records=records,
        sampling=training.example_sampling,
        max_batch_size=training.max_batch_size,
    )
    # Of all clients' examples together: with delta = 1 / examples each client could publish each of its examples
    # with that probability, and one example would be expected to be published.
    check_weak_delta(target.delta, int(np.sum(records)), target.allow_weak_delta, "examples")


def plan_clients(
    training: ClientTraining, target: Privacy, sampler: BaseSampler, records: np.ndarray, rounds: int
) -> ClientPlan:
    """Calibrates the noise of the clients' local steps, or accounts for the one that is given.

    Args:
        training: what the clients do, with an `example_clip`.
        target: the guarantee asked for. Where its unit is "example" its epsilon is met by every client; a given
            `example_noise` makes it a budget. Where its unit is "user" only its delta, relation and
            accountant count, and `example_noise` is given.
        sampler: draws the cohorts.
        records: how many examples each client has, (clients,).
        rounds: the number of rounds.

    Raises:
        InputError: the target cannot be met.
    """
    check_clients(training, target, records)
    candidates = _candidates(training, records)
    participations = sampler.most_participations(len(records), rounds)
    budget = target.epsilon if target.unit == "example" else None
    noise = training.example_noise
    if noise is None:
        noise = 0.0 if budget is None else _calibrated(training, target, candidates, participations)
    worst = candidates[0]
    event: dp_accounting.DpEvent = dp_accounting.NonPrivateDpEvent()
    if noise:
        worst, spent = _worst(training, target, candidates, participations, noise)
        if budget is not None and spent > budget:
            raise InputError(
                f"with example_noise {noise:g} the examples of the worst client would spend epsilon "
                f"{rounded_up(spent, 4):g} in {rounds} rounds, more than the budget of {budget:g}: leave example_noise "
                "out, so that it is calibrated, or choose fewer rounds or a larger epsilon."
            )
        event = _event(training, noise, worst, participations)
    guarantee = guarantee_of(
        event,
        target.replace(unit="example"),
        mechanism=_mechanism_in_words(training, noise),
        sampler=_sampling_in_words(training, worst),
        steps=participations * training.local_steps(worst),
        released=_RELEASED,
        assumptions=_assumptions(training, worst, len(records), participations, rounds) if noise else (),
    )
    return ClientPlan(training, target, sampler, records, rounds, noise, guarantee)


def _adds_noise(training: ClientTraining, target: Privacy) -> bool:
    return target.epsilon is not None if training.example_noise is None else training.example_noise > 0


def _event(training: ClientTraining, noise: float, records: int, participations: int) -> dp_accounting.DpEvent:
    """What a client with so many examples releases of each of them in so many rounds."""
    assert training.batch_size is not None
    return client_event(
        noise_multiplier=noise,
        records=records,
        batch_size=training.batch_size,
        local_steps=training.local_steps(records),
        participations=participations,
        sampling=training.example_sampling,
        max_batch_size=training.max_batch_size,
    )


def _candidates(training: ClientTraining, records: np.ndarray) -> list[int]:
    """Record counts of clients of which one is the worst: others cost no more, whatever the noise and the rounds."""
    distinct = [int(count) for count in np.unique(records)]
    if training.example_sampling == "poisson" and training.max_batch_size is None:
        # Of clients that take as many steps, those with the fewest records draw each with the highest probability.
        fewest: dict[int, int] = {}
        for count in distinct:
            fewest.setdefault(training.local_steps(count), count)
        return list(fewest.values())
    events = {_event(training, 1.0, count, 1): count for count in reversed(distinct)}
    return sorted(events.values())


def _calibrated(training: ClientTraining, target: Privacy, candidates: list[int], participations: int) -> float:
    """The smallest noise with which no client exceeds the target, of those that `noise_for` finds."""
    assert target.epsilon is not None
    noise = 0.0
    worst, _ = _worst(training, target, candidates, participations, 1.0)
    while True:
        found = noise_for(
            _event(training, 1.0, worst, participations),
            target.epsilon,
            target.delta,
            relation=target.relation,
            accountant=target.accountant,
        )
        if found <= noise:
            raise InputError(
                f"epsilon {target.epsilon:g} cannot be accounted for at delta {target.delta:g}: choose a larger delta."
            )
        noise = found
        # Which client is the worst depends on the noise: look again at the one that was found.
        worst, spent = _worst(training, target, candidates, participations, noise)
        if spent <= target.epsilon:
            return noise


def _worst(
    training: ClientTraining, target: Privacy, candidates: list[int], participations: int, noise: float
) -> tuple[int, float]:
    """The record count of the client whose examples pay most, and what they pay."""

    def spent(records: int, interval: float) -> float:
        return epsilon(
            _event(training, noise, records, participations),
            target.delta,
            relation=target.relation,
            accountant=target.accountant,
            pld_interval=interval,
        )

    # A coarser grid never gives less: who is below another's fine epsilon there is not the worst.
    coarse = sorted(((spent(records, _COARSE_INTERVAL), records) for records in candidates), reverse=True)
    worst, most = coarse[0][1], -math.inf
    for bound, records in coarse:
        if bound <= most:
            break
        fine = spent(records, PLD_INTERVAL)
        if fine > most:
            worst, most = records, fine
    return worst, most


def _mechanism_in_words(training: ClientTraining, noise: float) -> str:
    how = {
        "flat": "clipped to L2 norm",
        "per_layer": "clipped layer by layer, in equal shares, to L2 norm",
        "automatic": "scaled (AUTO-S) to at most the L2 norm",
    }[training.example_clipping]
    with_noise = f"the Gaussian mechanism with noise multiplier {noise:g} on" if noise else "no noise on"
    return f"{with_noise} the sum of a minibatch's gradients, that of each example {how} {training.example_clip:g},"


def _sampling_in_words(training: ClientTraining, records: int) -> str:
    size = f"{records} records"
    if training.example_sampling == "shuffled":
        return f"on minibatches of {training.batch_size} from shuffled epochs of a client's {size}"
    limit = "" if training.max_batch_size is None else f", of which at most {training.max_batch_size} are used"
    assert training.batch_size is not None
    rate = min(1.0, training.batch_size / records)
    return f"on Poisson samples of a client's {size} at rate {rate:.6g}{limit}"


def _assumptions(
    training: ClientTraining, worst: int, clients: int, participations: int, rounds: int
) -> tuple[str, ...]:
    whose = (
        f"Every example lies with exactly one of the {clients} clients, so that its guarantee is its client's "
        f"(parallel composition): stated is that of the worst client, one with {worst} records,"
        if clients > 1
        else f"Every example lies with the one client, which has {worst} records: stated is its guarantee,"
    )
    promised = (
        f"{whose} charged for {participations} of the {rounds} rounds, the most that it can ever be drawn into; "
        "amplification by the sampling of clients is not counted."
    )
    return (promised, *_EVERYWHERE, _SHUFFLED if training.example_sampling == "shuffled" else _POISSON)
