"""One run: plan -> rounds -> record."""

from __future__ import annotations

import collections
import json
import math
import time
from collections.abc import Callable
from typing import Any

import dpfl
from dpfl.mechanisms import Plan
from dpfl.models.functional import FunctionalModel
from dpfl.simulation.engine import Engine, Measurements, State
from dpfl.simulation.experiment import Experiment
from dpfl.simulation.result import Result

# Engines hold their data and compiled graphs: a few are kept for the runs that come next.
_ENGINES: collections.OrderedDict[tuple[Any, ...], tuple[FunctionalModel, Engine]] = collections.OrderedDict()
_KEPT_ENGINES = 4


def run(experiment: Experiment, plan: Plan, seed: int, advance: Callable[[int], None] = lambda rounds: None) -> Result:
    """Trains and evaluates one model.

    A run has the status "diverged" if its last loss is not finite, or if all updates of some round were
    not (they then count as zero). It takes its full number of rounds all the same: to stop on a private
    measurement would be a release that nothing accounts for.

    Args:
        experiment: what to run.
        plan: the experiment's plan.
        seed: of everything random.
        advance: called with a number of rounds whenever so many more are done.

    Raises:
        InputError: the model does not fit the data.
    """
    started = time.perf_counter()
    model, engine = _engine(experiment, plan)
    state = engine.initial_state(plan, experiment.server, seed)
    settings = engine.settings(experiment.local, experiment.server, seed)

    history: list[dict[str, Any]] = []
    evaluation: dict[str, float] = {}
    ledger = plan.ledger()
    for first in range(0, plan.rounds, experiment.evaluate_every):
        numbers = range(first, min(first + experiment.evaluate_every, plan.rounds))
        cohorts = [plan.sampler.clients(seed, number, plan.population) for number in numbers]
        state, measured = engine.run_rounds(state, cohorts, settings)
        evaluation = _evaluate(engine, state)
        for index, number in enumerate(numbers):
            values = {name: float(measured[name][index]) for name in Measurements._fields}
            ledger.advance()
            # The last rounds' bounds, on a coarser grid, may lie above what all rounds together cost.
            spent = {"epsilon_spent": min(ledger.epsilon, plan.guarantee.epsilon) if plan.is_private else None}
            history.append({"round": number + 1, "cohort": len(cohorts[index]), **spent, **values})
        history[-1].update(evaluation)
        advance(len(numbers))

    lost_a_round = any(row["non_finite_updates"] == row["cohort"] > 0 for row in history)
    record = {
        "run_id": experiment.run_id(seed),
        "status": "diverged" if lost_a_round or not math.isfinite(evaluation["loss"]) else "finished",
        **_settings_columns(experiment, plan, model),
        "rounds_done": ledger.rounds,
        "epsilon_spent": plan.guarantee.epsilon if plan.is_private else None,
        "epsilon_extrapolated": None if plan.extrapolated is None else plan.extrapolated.epsilon,
        "noise_multiplier": plan.noise_multiplier,
        "sampling_rate": plan.expected_cohort / plan.population,
        "seed": seed,
        **evaluation,
        "seconds": time.perf_counter() - started,
        "dpfl_version": dpfl.__version__,
    }
    weights = [weight.numpy() for weight in state.weights]
    return Result(record, history, plan.guarantee, plan.extrapolated, weights, model)


def _engine(experiment: Experiment, plan: Plan) -> tuple[FunctionalModel, Engine]:
    data, model = experiment.data, experiment.model
    key = (
        data.fingerprint,
        model if isinstance(model, str) else model.key,
        experiment.local.batch_size,
        experiment.server.name,
        plan.structure,
    )
    if key not in _ENGINES:
        if isinstance(model, str):
            model = FunctionalModel(model, data.example_shape, data.num_classes)
        query = plan.query(0, model.initial_weights(0))
        _ENGINES[key] = model, Engine(data, model, experiment.local.batch_size, experiment.server, query)
        if len(_ENGINES) > _KEPT_ENGINES:
            _ENGINES.popitem(last=False)
    _ENGINES.move_to_end(key)
    return _ENGINES[key]


def _evaluate(engine: Engine, state: State) -> dict[str, float]:
    accuracy, loss = engine.evaluate(state, "test")
    validation_accuracy, validation_loss = engine.evaluate(state, "validation")
    return {
        "accuracy": accuracy,
        "loss": loss,
        "validation_accuracy": validation_accuracy,
        "validation_loss": validation_loss,
    }


def _settings_columns(experiment: Experiment, plan: Plan, model: FunctionalModel) -> dict[str, Any]:
    """The settings as columns of `runs.csv`, in the field's words."""
    privacy, local, server = experiment.privacy, experiment.local, experiment.server
    promised, deployment = plan.extrapolated or plan.guarantee, experiment.deployment
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
        "delta": None if privacy.epsilon is None else privacy.delta,
        "clip_norm": experiment.mechanism.clip_norm if math.isfinite(experiment.mechanism.clip_norm) else None,
        "rounds": experiment.rounds,
        "local_steps": local.steps,
        "local_epochs": local.epochs,
        "batch_size": local.batch_size,
        "learning_rate": local.learning_rate,
        "server_optimizer": server.name,
        "server_learning_rate": server.learning_rate,
        "cohort": plan.expected_cohort,
        "deployment_clients": None if deployment is None else deployment.clients,
        "deployment_cohort": None if deployment is None else deployment.cohort,
    }
