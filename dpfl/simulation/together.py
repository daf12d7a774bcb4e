"""Which runs share a compiled graph, and which go through it side by side."""

from __future__ import annotations

from typing import Any

from dpfl.mechanisms import Plan
from dpfl.models.named import dense_parameters
from dpfl.simulation.experiment import Experiment
from dpfl.simulation.server import ServerStep

# Side by side pays while the cost of an operation is its dispatch: see experiments/benchmarks/README.md.
_MOST_PARAMETERS = 20_000


def graph_key(experiment: Experiment, plan: Plan) -> tuple[Any, ...]:
    """What runs must agree in to share the in-graph engine's compiled graphs: they then differ in numbers alone.

    Args:
        experiment: one of them.
        plan: its plan.
    """
    model = experiment.model
    return (
        experiment.data.fingerprint,
        model if isinstance(model, str) else model.key,
        experiment.local.structure,
        ServerStep(experiment.server, plan.compression, (), plan.rounds).structure,
        plan.structure,
    )


def together_key(experiment: Experiment, plan: Plan) -> tuple[Any, ...] | None:
    """What runs with the same seed must agree in to train side by side: they then differ in numbers alone.

    Args:
        experiment: one of them.
        plan: its plan.

    Returns:
        The key; None where the run trains faster, or can only train, by itself.
    """
    data, local = experiment.data, experiment.local
    if isinstance(experiment.model, str):
        parameters = dense_parameters(experiment.model, data.example_shape, data.num_classes)
    else:
        parameters = experiment.model.parameters if experiment.model.vectorizes else None
    if (
        parameters is None
        or parameters > _MOST_PARAMETERS
        or experiment.engine != "graph"
        or local.is_private
        or not experiment.mechanism.works_side_by_side
        or experiment.compression.of_updates
        or experiment.compression.of_models
    ):
        return None
    return (
        graph_key(experiment, plan),
        local.steps,
        local.epochs,
        plan.sampler,
        plan.rounds,
        experiment.evaluate_every,
    )
