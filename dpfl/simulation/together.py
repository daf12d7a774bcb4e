"""Which runs of a study go through one graph side by side."""

from __future__ import annotations

from typing import Any

from dpfl.mechanisms import Plan
from dpfl.models.named import dense_parameters
from dpfl.simulation.experiment import Experiment

# Side by side pays while the cost of an operation is its dispatch: see experiments/benchmarks/README.md.
_MOST_PARAMETERS = 20_000


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
        model, parameters = experiment.model, dense_parameters(experiment.model, data.example_shape, data.num_classes)
    else:
        model, parameters = experiment.model.key, experiment.model.parameters if experiment.model.vectorizes else None
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
        data.fingerprint,
        model,
        local.structure,
        local.steps,
        local.epochs,
        experiment.server.name,
        plan.structure,
        plan.sampler,
        plan.rounds,
        experiment.evaluate_every,
    )
