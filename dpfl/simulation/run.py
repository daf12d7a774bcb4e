"""One run: plan -> rounds -> record."""

from __future__ import annotations

import collections
import json
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import dpfl
from dpfl.clients.example_privacy import ClientPlan
from dpfl.clients.per_example import check_model
from dpfl.data import FederatedData
from dpfl.mechanisms import Plan
from dpfl.models.functional import FunctionalModel
from dpfl.privacy.example_level import ClientEpsilons
from dpfl.simulation.engine import Engine, State
from dpfl.simulation.experiment import Experiment
from dpfl.simulation.result import Result

# Engines hold their data and compiled graphs: a few are kept for the runs that come next.
_ENGINES: collections.OrderedDict[tuple[Any, ...], tuple[FunctionalModel, Engine]] = collections.OrderedDict()
_KEPT_ENGINES = 4


def run(
    experiment: Experiment,
    plan: Plan,
    client_plan: ClientPlan | None,
    seed: int,
    advance: Callable[[int], None] = lambda rounds: None,
) -> Result:
    """Trains and evaluates one model.

    A run has the status "diverged" if its last loss is not finite, or if all updates of some round were
    not (they then count as zero). It takes its full number of rounds all the same: to stop on a private
    measurement would be a release that nothing accounts for.

    Args:
        experiment: what to run.
        plan: the experiment's plan.
        client_plan: the experiment's plan of its clients; None where they train without example-level privacy.
        seed: of everything random.
        advance: called with a number of rounds whenever so many more are done.

    Raises:
        InputError: the model does not fit the data, or its examples' gradients cannot be told apart.
    """
    started = time.perf_counter()
    model, engine = _engine(experiment, plan)
    state = engine.initial_state(plan, experiment.server, seed)
    settings = engine.settings(experiment.local, experiment.server, seed, client_plan)
    spending = _Spending(experiment, plan, client_plan)
    participations = np.zeros(plan.population, np.int64)

    history: list[dict[str, Any]] = []
    evaluation: dict[str, float] = {}
    for first in range(0, plan.rounds, experiment.evaluate_every):
        numbers = range(first, min(first + experiment.evaluate_every, plan.rounds))
        cohorts = [plan.sampler.clients(seed, number, plan.population) for number in numbers]
        state, measured = engine.run_rounds(state, cohorts, settings)
        evaluation = _evaluate(engine, state)
        for index, number in enumerate(numbers):
            participations[cohorts[index]] += 1
            values = {name: float(column[index]) for name, column in measured.items()}
            spent = {"epsilon_spent": spending.after(number + 1)}
            history.append({"round": number + 1, "cohort": len(cohorts[index]), **spent, **values})
        history[-1].update(evaluation)
        advance(len(numbers))

    lost_a_round = any(row["non_finite_updates"] == row["cohort"] > 0 for row in history)
    promised = spending.guarantee
    example_guarantee = None if client_plan is None else client_plan.guarantee
    realised = None if client_plan is None else client_plan.realised(participations)
    record = {
        "run_id": experiment.run_id(seed),
        "status": "diverged" if lost_a_round or not math.isfinite(evaluation["loss"]) else "finished",
        **_settings_columns(experiment, plan, client_plan, model),
        "rounds_done": plan.rounds,
        "epsilon_spent": promised.epsilon if math.isfinite(promised.epsilon) else None,
        "epsilon_extrapolated": None if plan.extrapolated is None else plan.extrapolated.epsilon,
        "user_epsilon": plan.guarantee.epsilon if plan.is_private else None,
        **_example_columns(client_plan, realised),
        "noise_multiplier": plan.noise_multiplier,
        "sampling_rate": plan.expected_cohort / plan.population,
        "seed": seed,
        **evaluation,
        "seconds": time.perf_counter() - started,
        "dpfl_version": dpfl.__version__,
    }
    return Result(
        record=record,
        history=history,
        guarantee=promised,
        extrapolated=plan.extrapolated,
        user_guarantee=plan.guarantee if experiment.privacy.unit == "user" or plan.is_private else None,
        example_guarantee=example_guarantee,
        client_epsilons=realised,
        weights=[weight.numpy() for weight in state.weights],
        functional_model=model,
    )


class _Spending:
    """What the rounds cost at the level of the target's unit.

    Args:
        experiment: whose target it is.
        plan: of the server.
        client_plan: of the clients.

    Attributes:
        guarantee: what holds after the last round.
    """

    def __init__(self, experiment: Experiment, plan: Plan, client_plan: ClientPlan | None) -> None:
        if experiment.privacy.unit == "user" or client_plan is None:
            self.guarantee, self._ledgers = plan.guarantee, [plan.ledger()]
        else:
            self.guarantee, self._ledgers = client_plan.guarantee, client_plan.ledgers()

    def after(self, rounds: int) -> float | None:
        """An upper bound of what the first so many rounds cost; None where nothing is guaranteed."""
        if not math.isfinite(self.guarantee.epsilon):
            return None
        # The last rounds' bounds, on a coarser grid, may lie above what all rounds together cost.
        return min(max(ledger.epsilon_after(rounds) for ledger in self._ledgers), self.guarantee.epsilon)


def _engine(experiment: Experiment, plan: Plan) -> tuple[FunctionalModel, Engine]:
    data, model = experiment.data, experiment.model
    key = (
        data.fingerprint,
        model if isinstance(model, str) else model.key,
        experiment.local.structure,
        experiment.server.name,
        plan.structure,
    )
    if key not in _ENGINES:
        if isinstance(model, str):
            model = FunctionalModel(model, data.example_shape, data.num_classes)
        if experiment.local.is_private:
            check_model(model.to_keras(model.initial_weights(0)), _three_examples(data))
        query = plan.query(0, model.initial_weights(0))
        _ENGINES[key] = model, Engine(data, model, experiment.local, experiment.server, query)
        if len(_ENGINES) > _KEPT_ENGINES:
            _ENGINES.popitem(last=False)
    _ENGINES.move_to_end(key)
    return _ENGINES[key]


def _three_examples(data: FederatedData) -> np.ndarray:
    """Examples that a model takes, drawn at random; they are looked at on the way and not kept."""
    return data.x[np.random.default_rng(0).choice(data.num_examples, size=3, replace=data.num_examples < 3)]


def _evaluate(engine: Engine, state: State) -> dict[str, float]:
    accuracy, loss = engine.evaluate(state, "test")
    validation_accuracy, validation_loss = engine.evaluate(state, "validation")
    return {
        "accuracy": accuracy,
        "loss": loss,
        "validation_accuracy": validation_accuracy,
        "validation_loss": validation_loss,
    }


def _example_columns(client_plan: ClientPlan | None, realised: ClientEpsilons | None) -> dict[str, Any]:
    """What clients that train by DP-SGD do and keep, as columns of `runs.csv`; None where they do not."""
    names = (
        "example_clip_norm",
        "example_noise_multiplier",
        "example_clipping",
        "example_sampling",
        "max_batch_size",
        "example_epsilon",
        "example_epsilon_worst",
        "example_epsilon_median",
    )
    if client_plan is None or realised is None:
        return dict.fromkeys(names)
    training = client_plan.training
    epsilons = (client_plan.guarantee.epsilon, realised.worst, float(realised.quantiles(0.5)[0]))
    values = (
        client_plan.clip_norm,
        client_plan.noise_multiplier,
        training.example_clipping,
        training.example_sampling,
        training.max_batch_size,
        *(epsilon if math.isfinite(epsilon) else None for epsilon in epsilons),
    )
    return dict(zip(names, values, strict=True))


def _settings_columns(
    experiment: Experiment, plan: Plan, client_plan: ClientPlan | None, model: FunctionalModel
) -> dict[str, Any]:
    """The settings as columns of `runs.csv`, in the field's words."""
    privacy, local, server = experiment.privacy, experiment.local, experiment.server
    promised, deployment = plan.extrapolated or plan.guarantee, experiment.deployment
    if privacy.unit == "example" and client_plan is not None:
        promised = client_plan.guarantee
    has_delta = privacy.epsilon is not None or plan.is_private or (client_plan is not None and client_plan.is_private)
    return {
        "dataset": experiment.data.name,
        "data_fingerprint": experiment.data.fingerprint,
        "clients": experiment.data.num_clients,
        "examples": experiment.data.num_examples,
        "model": model.key,
        "parameters": model.parameters,
        "mechanism": experiment.mechanism.name,
        "mechanism_settings": json.dumps(experiment.mechanism.model_dump()),
        "unit": privacy.unit,
        "relation": privacy.relation,
        "sampler": experiment.sampler.name,
        "accountant": privacy.accountant if promised.accountant == "none" else promised.accountant,
        "epsilon": privacy.epsilon,
        "delta": privacy.delta if has_delta else None,
        "clip_norm": experiment.mechanism.clip_norm if math.isfinite(experiment.mechanism.clip_norm) else None,
        "rounds": experiment.rounds,
        "local_steps": local.steps,
        "local_epochs": local.epochs,
        "batch_size": local.batch_size,
        "client_optimizer": local.optimizer,
        "learning_rate": local.learning_rate,
        "client_settings": json.dumps(local.model_dump()),
        "server_optimizer": server.name,
        "server_learning_rate": server.learning_rate,
        "cohort": plan.expected_cohort,
        "deployment_clients": None if deployment is None else deployment.clients,
        "deployment_cohort": None if deployment is None else deployment.cohort,
    }
