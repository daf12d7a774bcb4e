"""The privacy-accuracy trade-off over epsilon, clip norm and round frequency, as one study."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

from dpfl.clients import ClientTraining
from dpfl.compression import Compression
from dpfl.data import FederatedData
from dpfl.errors import InputError
from dpfl.mechanisms import Deployment, Gaussian
from dpfl.privacy import Guarantee, Privacy, best_of
from dpfl.sampling import Poisson
from dpfl.simulation import Experiment, ServerOptimizer
from dpfl.study.axes import round_frequency
from dpfl.study.study import Study


def tradeoff(
    data: FederatedData,
    *,
    model: Any = "softmax",
    epsilons: Sequence[float | None],
    clip_norms: Sequence[float],
    rounds: Sequence[int],
    local_work: int,
    privacy: Privacy,
    cohort: int,
    batch_size: int,
    learning_rate: float,
    server: ServerOptimizer,
    seeds: int,
    deployment: Deployment | None = None,
    compression: Compression | None = None,
    engine: Literal["graph", "tff"] = "graph",
) -> Study:
    """Returns the study of epsilon x clip norm x number of rounds, with plain averaging beside it.

    The local work of a client is held fixed: with more rounds it takes fewer local steps in each.
    Plain federated averaging (no clip, no noise) runs at every number of rounds where "none" is
    among the epsilons: it is the ceiling.

    Args:
        data: the federated dataset.
        model: as `Experiment` takes it.
        epsilons: targets; None clips without noise.
        clip_norms: largest L2 norms of an update.
        rounds: numbers of rounds.
        local_work: local steps of a client over all rounds, if it took part in each.
        privacy: what the epsilons share: delta, relation, accountant.
        cohort: expected number of clients in a round.
        batch_size: examples in a client's minibatch.
        learning_rate: of the clients' SGD.
        server: the server's optimizer.
        seeds: number of seeds.
        deployment: the larger population that the epsilons are for; None for the data's clients.
        compression: how updates and models are made smaller, those of plain averaging too; None if they are not.
        engine: as `Experiment` takes it.

    Raises:
        InputError: a value is wrong, or the local work cannot be split evenly into the rounds.
    """
    frequency = round_frequency(rounds, local_work)
    for name, values in (("epsilon", epsilons), ("clip norm", clip_norms), ("number of rounds", rounds)):
        if not values:
            raise InputError(f"the grid needs at least one {name}.")
    first_rounds, first_steps = frequency["rounds", "local.steps"][0]
    base = Experiment(
        data=data,
        model=model,
        local=ClientTraining(learning_rate=learning_rate, batch_size=batch_size, steps=first_steps),
        mechanism=Gaussian(clip_norm=clip_norms[0]),
        privacy=privacy,
        sampler=Poisson(cohort=cohort),
        rounds=first_rounds,
        server=server,
        deployment=deployment,
        compression=compression or Compression(),
        engine=engine,
    )
    axes: dict[Any, Any] = {"privacy.epsilon": epsilons, "mechanism.clip_norm": clip_norms, **frequency}
    return Study(base, axes, seeds=seeds, ceiling=None in epsilons)


def tuning_prices(study: Study, over: Sequence[str]) -> dict[float, float]:
    """Returns what each target epsilon becomes where the best of several settings is released.

    It is the price of a random number of trials (geometric, and on average as many as there are settings), each of a
    setting drawn at random, of which only the best is released (`dpfl.privacy.best_of`).

    Args:
        study: whose experiments differ in the settings, among others.
        over: the settings that are chosen, such as `["mechanism.clip_norm"]`.

    Raises:
        InputError: the price of what was released is not known.
    """
    prices = {}
    for target in sorted({experiment.privacy.epsilon or 0.0 for experiment in study.experiments} - {0.0}):
        experiments = [experiment for experiment in study.experiments if experiment.privacy.epsilon == target]
        settings = {tuple(_setting(experiment, path) for path in over) for experiment in experiments}
        guarantees = [_promised(experiment) for experiment in experiments]
        events = set(guarantee.privacy_event() for guarantee in guarantees)
        prices[target] = best_of(
            sorted(events, key=repr),
            guarantees[0].delta,
            trials=len(settings),
            relation=guarantees[0].relation,
        )
    return prices


def _promised(experiment: Experiment) -> Guarantee:
    """The guarantee that an experiment's epsilon speaks of."""
    plan = experiment.plan()
    clients = experiment.client_plan(plan.rounds) if experiment.privacy.unit == "example" else None
    return clients.guarantee if clients is not None else plan.extrapolated or plan.guarantee


def _setting(experiment: Experiment, path: str) -> Any:
    return functools.reduce(getattr, path.split("."), experiment)
