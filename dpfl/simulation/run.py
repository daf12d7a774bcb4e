"""One run: plan -> rounds -> record."""

from __future__ import annotations

import collections
import contextlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

import dpfl
from dpfl.clients.example_privacy import ClientPlan
from dpfl.clients.per_example import check_model
from dpfl.compression import Compression
from dpfl.compression.lite import check_convertible, measured_columns
from dpfl.data import FederatedData
from dpfl.mechanisms import Plan
from dpfl.models.functional import FunctionalModel
from dpfl.privacy import Guarantee
from dpfl.privacy.example_level import ClientEpsilons
from dpfl.privacy.ledger import Ledger
from dpfl.simulation.checkpoints import Checkpoint, Checkpoints, Progress
from dpfl.simulation.engine import Engine, GraphRounds, TogetherRounds
from dpfl.simulation.experiment import Experiment
from dpfl.simulation.result import Result
from dpfl.simulation.rounds import Rounds
from dpfl.simulation.server import ServerStep
from dpfl.simulation.together import graph_key
from dpfl.simulation.traffic import Traffic

if TYPE_CHECKING:
    from dpfl.simulation.ray_rounds import Actors

# Engines hold their data and compiled graphs: a few are kept for the runs that come next.
_ENGINES: collections.OrderedDict[tuple[Any, ...], tuple[FunctionalModel, Engine]] = collections.OrderedDict()
_KEPT_ENGINES = 4
_EVALUATION = ("accuracy", "loss", "validation_accuracy", "validation_loss")


def run(
    experiment: Experiment,
    plan: Plan,
    client_plan: ClientPlan | None,
    seed: int,
    advance: Callable[[int], None] = lambda rounds: None,
    checkpoints: Checkpoints | None = None,
    actors: Actors | None = None,
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
        checkpoints: where to keep the run while it goes on, and to look for what was kept of it; None for nowhere.
        actors: of a Ray cluster, that train the clients; None to train them in this process.

    Raises:
        InputError: the model does not fit the data, its examples' gradients cannot be told apart, TensorFlow Lite
            cannot convert it and is asked to, or the run's checkpoint is another plan's or in another process' hands.
    """
    started = time.perf_counter()
    model, rounds = _start(experiment, plan, client_plan, seed, actors)
    check_convertible(model, experiment.compression.lite)
    costs = _Costs(experiment, plan, client_plan)
    with contextlib.nullcontext() if checkpoints is None else checkpoints.of(experiment.run_id(seed)) as checkpoint:
        traffic = Traffic(plan, model, plan.population)
        done = _train(experiment, plan, seed, rounds, costs, traffic, started, advance, checkpoint)

    return _result(experiment, plan, client_plan, seed, model, done, costs, rounds.weights())


def run_together(planned: Sequence[tuple[Experiment, Plan]], seed: int, advance: Callable[[int], None]) -> list[Result]:
    """Trains and evaluates several models side by side, to what `run` gives each, up to the rounding of float32.

    Args:
        planned: experiments with their plans, all of the same `together_key`.
        seed: of everything random.
        advance: called with a number of rounds, of all runs, whenever so many more are done.

    Raises:
        InputError: the model does not fit the data, or TensorFlow Lite cannot convert it and is asked to.
    """
    started = time.perf_counter()
    experiment, plan = planned[0]
    model, engine = _graph_engine(experiment, plan, together=True)
    for each, _ in planned:
        check_convertible(model, each.compression.lite)
    steps = [_server_step(each, own, model) for each, own in planned]
    rounds = TogetherRounds(engine, planned, steps, seed)
    costs = [_Costs(experiment, plan, None) for experiment, plan in planned]
    traffics = [Traffic(plan, model, plan.population) for _, plan in planned]
    participations = np.zeros(plan.population, np.int64)
    histories: list[list[dict[str, Any]]] = [[] for _ in planned]
    for first in range(0, plan.rounds, experiment.evaluate_every):
        numbers = range(first, min(first + experiment.evaluate_every, plan.rounds))
        cohorts = [plan.sampler.clients(seed, number, plan.population) for number in numbers]
        for cohort in cohorts:
            participations[cohort] += 1
        measured, evaluations = rounds.run(cohorts), rounds.evaluate()
        for own, history, values, cost, traffic in zip(evaluations, histories, measured, costs, traffics, strict=True):
            history += _rows(numbers, cohorts, values, cost, traffic)
            history[-1].update(zip(_EVALUATION, own, strict=True))
        advance(len(numbers) * len(planned))
    seconds = (time.perf_counter() - started) / len(planned)
    return [
        _result(experiment, plan, None, seed, model, Progress(participations, history, seconds), cost, weights)
        for (experiment, plan), history, cost, weights in zip(planned, histories, costs, rounds.weights(), strict=True)
    ]


def _result(
    experiment: Experiment,
    plan: Plan,
    client_plan: ClientPlan | None,
    seed: int,
    model: FunctionalModel,
    done: Progress,
    costs: _Costs,
    weights: list[np.ndarray],
) -> Result:
    """What a run leaves behind after its last round."""
    history, evaluation = done.history, {name: done.history[-1][name] for name in _EVALUATION}
    lost_a_round = any(row["non_finite_updates"] == row["cohort"] > 0 for row in history)
    promised = costs.target.guarantee
    example_guarantee = None if client_plan is None else client_plan.guarantee
    realised = None if client_plan is None else client_plan.realised(done.participations)
    record = {
        "run_id": experiment.run_id(seed),
        "status": "diverged" if lost_a_round or not math.isfinite(evaluation["loss"]) else "finished",
        "reason": None,
        **_settings_columns(experiment, plan, client_plan, model.key, model.parameters),
        "rounds_done": plan.rounds,
        "epsilon_spent": promised.epsilon if math.isfinite(promised.epsilon) else None,
        "epsilon_extrapolated": None if plan.extrapolated is None else plan.extrapolated.epsilon,
        "user_epsilon": plan.guarantee.epsilon if plan.is_private else None,
        **_example_columns(client_plan, realised),
        "noise_multiplier": plan.noise_multiplier,
        "sampling_rate": plan.expected_cohort / plan.population,
        "seed": seed,
        **evaluation,
        **_measured_columns(history, done.participations),
        **measured_columns(model, weights, experiment.compression.lite, experiment.data.x_test, experiment.data.y_test),
        "seconds": done.seconds,
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
        weights=weights,
        functional_model=model,
    )


def failed_record(
    experiment: Experiment, plan: Plan, client_plan: ClientPlan | None, seed: int, reason: str
) -> dict[str, Any]:
    """The record of a run that came to nothing, with the columns that are known without it.

    Args:
        experiment: what was to run.
        plan: of the server.
        client_plan: of the clients.
        seed: of the run.
        reason: why there is no result, in words.
    """
    model = experiment.model
    key, parameters = (model, None) if isinstance(model, str) else (model.key, model.parameters)
    return {
        "run_id": experiment.run_id(seed),
        "status": "failed",
        "reason": reason,
        **_settings_columns(experiment, plan, client_plan, key, parameters),
        "rounds_done": 0,
        "noise_multiplier": plan.noise_multiplier,
        "sampling_rate": plan.expected_cohort / plan.population,
        "seed": seed,
        "dpfl_version": dpfl.__version__,
    }


def _train(
    experiment: Experiment,
    plan: Plan,
    seed: int,
    rounds: Rounds,
    costs: _Costs,
    traffic: Traffic,
    started: float,
    advance: Callable[[int], None],
    checkpoint: Checkpoint | None,
) -> Progress:
    """Does the rounds that the checkpoint does not hold yet, and keeps them there.

    Args:
        experiment: what to run.
        plan: of the server.
        seed: of the run.
        rounds: before the first round.
        costs: of the rounds.
        traffic: of the clients, before the first round.
        started: when this process began with the run, by `time.perf_counter`.
        advance: called with a number of rounds whenever so many more are done, those of the checkpoint first.
        checkpoint: of the run; None to keep nothing.
    """
    progress = Progress(np.zeros(plan.population, np.int64), [], 0.0)
    periods = [experiment.evaluate_every]
    if checkpoint is not None:
        periods.append(checkpoint.every)
        kept = checkpoint.read(rounds.state(), plan.population, costs.ledger)
        if kept is not None:
            state, progress = kept
            rounds.restore(state)
            traffic.catch_up(
                [plan.sampler.clients(seed, number, plan.population) for number in range(len(kept[1].history))]
            )
    participations, history = progress.participations, progress.history

    def so_far() -> Progress:
        return Progress(participations, history, progress.seconds + time.perf_counter() - started)

    advance(len(history))
    while (first := len(history)) < plan.rounds:
        end = min(plan.rounds, *(first - first % every + every for every in periods))
        numbers = range(first, end)
        cohorts = [plan.sampler.clients(seed, number, plan.population) for number in numbers]
        measured = rounds.run(cohorts)
        for cohort in cohorts:
            participations[cohort] += 1
        history += _rows(numbers, cohorts, measured, costs, traffic)
        if end % experiment.evaluate_every == 0 or end == plan.rounds:
            history[-1].update(_evaluate(rounds))
        if checkpoint is not None and (end % checkpoint.every == 0 or end == plan.rounds):
            checkpoint.write(rounds.state(), so_far(), costs.ledger(end))
        advance(len(numbers))
    return so_far()


def _rows(
    numbers: Sequence[int],
    cohorts: Sequence[np.ndarray],
    measured: Mapping[str, np.ndarray],
    costs: _Costs,
    traffic: Traffic,
) -> list[dict[str, Any]]:
    """The history of some rounds, without evaluations."""
    return [
        {
            "round": number + 1,
            "cohort": len(cohort),
            "epsilon_spent": costs.target.after(number + 1),
            **{name: float(column[index]) for name, column in measured.items()},
            "bytes_up": traffic.up(number) * len(cohort),
            "bytes_down": traffic.down(number, cohort),
        }
        for index, (number, cohort) in enumerate(zip(numbers, cohorts, strict=True))
    ]


class _Cost:
    """What the rounds cost at the level of one unit.

    Args:
        guarantee: what holds after the last round.
        ledgers: of a run that has not begun, of which the dearest counts.
    """

    def __init__(self, guarantee: Guarantee, ledgers: list[Ledger]) -> None:
        self.guarantee, self._ledgers = guarantee, ledgers

    def after(self, rounds: int) -> float | None:
        """An upper bound of what the first so many rounds cost; None where nothing is guaranteed."""
        if not math.isfinite(self.guarantee.epsilon):
            return None
        # The last rounds' bounds, on a coarser grid, may lie above what all rounds together cost.
        return min(max(ledger.epsilon_after(rounds) for ledger in self._ledgers), self.guarantee.epsilon)


class _Costs:
    """What the rounds cost at the level of every unit that is protected.

    Args:
        experiment: whose target it is.
        plan: of the server.
        client_plan: of the clients.

    Attributes:
        target: the cost at the level of the target's unit.
    """

    def __init__(self, experiment: Experiment, plan: Plan, client_plan: ClientPlan | None) -> None:
        self._plan, self._client_plan = plan, client_plan
        self._by_unit = {"user": _Cost(plan.guarantee, [plan.ledger()])}
        if client_plan is not None:
            self._by_unit["example"] = _Cost(client_plan.guarantee, client_plan.ledgers())
        self.target = self._by_unit[experiment.privacy.unit]

    def ledger(self, rounds: int) -> dict[str, Any]:
        """What the first so many rounds cost, and by which plans, as plain values."""
        plan, client_plan = self._plan, self._client_plan
        return {
            "rounds": rounds,
            "planned_rounds": plan.rounds,
            "epsilon_spent": {unit: cost.after(min(rounds, plan.rounds)) for unit, cost in self._by_unit.items()},
            "noise_multiplier": plan.noise_multiplier,
            "example_noise_multiplier": None if client_plan is None else client_plan.noise_multiplier,
            "guarantees": {unit: cost.guarantee.as_dict() for unit, cost in self._by_unit.items()},
            "extrapolated": None if plan.extrapolated is None else plan.extrapolated.as_dict(),
        }


def _start(
    experiment: Experiment, plan: Plan, client_plan: ClientPlan | None, seed: int, actors: Actors | None = None
) -> tuple[FunctionalModel, Rounds]:
    """The model, and the run before its first round on the experiment's engine."""
    if experiment.engine == "tff":
        from dpfl.simulation.tff_engine import TffRounds

        model = _model(experiment)
        return model, TffRounds(experiment, model, _server_step(experiment, plan, model), plan, client_plan, seed)
    model, engine = _graph_engine(experiment, plan)
    server = _server_step(experiment, plan, model)
    state = engine.initial_state(plan, server, seed)
    settings = engine.settings(experiment.local, server, seed, client_plan)
    if actors is None:
        return model, GraphRounds(engine, state, settings)
    from dpfl.simulation.ray_rounds import RayRounds, Work

    work = Work(experiment.data, model, experiment.local, server, plan, client_plan, seed)
    return model, RayRounds(actors, engine, state, settings, work)


def _server_step(experiment: Experiment, plan: Plan, model: FunctionalModel) -> ServerStep:
    return ServerStep(experiment.server, plan.compression, tuple(model.shapes), plan.rounds)


def _model(experiment: Experiment) -> FunctionalModel:
    """The experiment's model as a function of its weights; refused where its clients cannot train it."""
    data, model = experiment.data, experiment.model
    if isinstance(model, str):
        model = FunctionalModel(model, data.example_shape, data.num_classes)
    if experiment.local.is_private:
        check_model(model.to_keras(model.initial_weights(0)), _three_examples(data))
    return model


def _graph_engine(experiment: Experiment, plan: Plan, together: bool = False) -> tuple[FunctionalModel, Engine]:
    data, key = experiment.data, (together, *graph_key(experiment, plan))
    if key not in _ENGINES:
        model = _model(experiment)
        query, server = plan.query(0, model.initial_weights(0)), _server_step(experiment, plan, model)
        _ENGINES[key] = model, Engine(data, model, experiment.local, server, query, together)
        if len(_ENGINES) > _KEPT_ENGINES:
            _ENGINES.popitem(last=False)
    _ENGINES.move_to_end(key)
    return _ENGINES[key]


def _three_examples(data: FederatedData) -> np.ndarray:
    """Examples that a model takes, drawn at random; they are looked at on the way and not kept."""
    return data.x[np.random.default_rng(0).choice(data.num_examples, size=3, replace=data.num_examples < 3)]


def _evaluate(rounds: Rounds) -> dict[str, float]:
    return dict(zip(_EVALUATION, (*rounds.evaluate("test"), *rounds.evaluate("validation")), strict=True))


def _measured_columns(history: Sequence[Mapping[str, Any]], participations: np.ndarray) -> dict[str, Any]:
    """What was measured over all rounds, as columns of `runs.csv`."""
    ratios = [row["signal_to_noise"] for row in history if math.isfinite(row["signal_to_noise"])]
    clip_norm = history[-1]["clip_norm"]
    totals = {name: sum(row[name] for row in history) for name in ("bytes_up", "bytes_down")}
    updates = int(participations.sum())
    means = [total / updates if updates else None for total in totals.values()]
    return {
        "final_clip_norm": clip_norm if math.isfinite(clip_norm) else None,
        "signal_to_noise": float(np.median(ratios)) if ratios else None,
        **totals,
        **dict(zip(("update_bytes", "model_bytes"), means, strict=True)),
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


def _compression_columns(compression: Compression) -> dict[str, Any]:
    """How updates and models are made smaller, as columns of `runs.csv`."""
    names = ("bits", "rotation", "random_k", "rank", "sparsity", "top_k", "error_feedback")
    return {
        "compression": compression.in_words(),
        "compression_settings": json.dumps(compression.model_dump()),
        **{name: getattr(compression, name) for name in names},
    }


def _settings_columns(
    experiment: Experiment, plan: Plan, client_plan: ClientPlan | None, model_key: str, parameters: int | None
) -> dict[str, Any]:
    """The settings as columns of `runs.csv`, in the field's words."""
    privacy, local, server = experiment.privacy, experiment.local, experiment.server
    promised, deployment = plan.extrapolated or plan.guarantee, experiment.deployment
    if privacy.unit == "example" and client_plan is not None:
        promised = client_plan.guarantee
    has_delta = privacy.epsilon is not None or plan.is_private or (client_plan is not None and client_plan.is_private)
    return {
        "configuration": experiment.configuration,
        "dataset": experiment.data.name,
        "data_fingerprint": experiment.data.fingerprint,
        "clients": experiment.data.num_clients,
        "examples": experiment.data.num_examples,
        "model": model_key,
        "parameters": parameters,
        "mechanism": experiment.mechanism.name,
        "mechanism_settings": json.dumps(experiment.mechanism.model_dump()),
        "weighting": experiment.mechanism.weighting,
        "unit": privacy.unit,
        "relation": privacy.relation,
        "sampler": experiment.sampler.name,
        "accountant": privacy.accountant if promised.accountant == "none" else promised.accountant,
        "epsilon": privacy.epsilon,
        "delta": privacy.delta if has_delta else None,
        "clip_norm": experiment.mechanism.clip_norm if math.isfinite(experiment.mechanism.clip_norm) else None,
        "clip_quantile": getattr(experiment.mechanism, "quantile", None),
        "rounds": experiment.rounds,
        "local_steps": local.steps,
        "local_epochs": local.epochs,
        "batch_size": local.batch_size,
        "client_optimizer": local.optimizer,
        "learning_rate": local.learning_rate,
        "proximal_strength": local.proximal_strength,
        "client_settings": json.dumps(local.model_dump()),
        "engine": experiment.engine,
        "server_optimizer": server.name,
        "server_learning_rate": server.learning_rate,
        **_compression_columns(experiment.compression),
        "cohort": plan.expected_cohort,
        "deployment_clients": None if deployment is None else deployment.clients,
        "deployment_cohort": None if deployment is None else deployment.cohort,
    }
