"""Runs side by side against the same runs one at a time."""

from typing import Any

import numpy as np
import pytest

from dpfl import AdaptiveClipping, Experiment, Gaussian, Privacy
from dpfl.clients import ClientTraining
from dpfl.data import FederatedData
from dpfl.mechanisms import NoMechanism
from dpfl.sampling import Poisson
from dpfl.simulation.run import run, run_together
from dpfl.simulation.server import ServerOptimizer
from dpfl.simulation.together import together_key


def _base(data: FederatedData, **settings: Any) -> Experiment:
    defaults = {
        "local": ClientTraining(learning_rate=0.3, batch_size=3, steps=3),
        "mechanism": Gaussian(clip_norm=0.4),
        "privacy": Privacy(epsilon=5.0, delta=1e-2),
        "sampler": Poisson(cohort=8),
        "rounds": 5,
        "evaluate_every": 2,
    }
    return Experiment(data=data, **defaults | settings)


MOMENTUM = ClientTraining(learning_rate=0.1, batch_size=4, epochs=2, optimizer="momentum", proximal_strength=0.3)
ADAM = ClientTraining(learning_rate=0.05, batch_size=4, epochs=2, optimizer="adam", adaptivity=1e-2)
NUMBERS: dict[str, list[Any]] = {
    "local.learning_rate": [0.3, 0.05, 0.7],
    "mechanism.clip_norm": [0.4, 0.05, 2.0],
    "server.learning_rate": [1.0, 0.5, 0.7],
}


@pytest.mark.parametrize(
    ("settings", "numbers"),
    [
        ({}, NUMBERS | {"privacy.epsilon": [5.0, None, 20.0]}),
        ({"model": "mlp", "server": ServerOptimizer(name="momentum", learning_rate=0.5)}, NUMBERS),
        ({"local": MOMENTUM, "server": ServerOptimizer(name="adam")}, NUMBERS | {"local.momentum": [0.9, 0.1, 0.5]}),
        ({"model": "mlp", "local": ADAM}, NUMBERS),
        (
            {"mechanism": AdaptiveClipping(clip_norm=0.1, count_noise=0.3)},
            NUMBERS | {"mechanism.quantile": [0.5, 0.3, 0.9]},
        ),
        (
            {"mechanism": NoMechanism(), "privacy": Privacy(epsilon=None, delta=1e-2)},
            {"local.learning_rate": [0.3, 0.05, 1e30]},
        ),
    ],
    ids=["softmax", "mlp", "momentum", "adam", "adaptive", "none with a run that diverges"],
)
def test_runs_side_by_side_equal_runs_alone(
    settings: dict[str, Any], numbers: dict[str, list[Any]], images: FederatedData
) -> None:
    base = _base(images, **settings)
    experiments = [
        base.replace(**dict(zip(numbers, values, strict=True))) for values in zip(*numbers.values(), strict=True)
    ]
    planned = [(experiment, experiment.plan()) for experiment in experiments]
    assert len({together_key(*each) for each in planned}) == 1
    counted: list[int] = []
    together = run_together(planned, 3, counted.append)
    assert sum(counted) == 15
    for (experiment, plan), one in zip(planned, together, strict=True):
        alone = run(experiment, plan, None, 3)
        for left, right in zip(one.weights, alone.weights, strict=True):
            np.testing.assert_allclose(left, right, rtol=2e-5, atol=2e-6)
        assert [row.keys() for row in one.history] == [row.keys() for row in alone.history]
        for row, expected in zip(one.history, alone.history, strict=True):
            for name, value in expected.items():
                if value is None:
                    assert row[name] is None
                else:
                    assert row[name] == pytest.approx(value, rel=1e-4, abs=1e-5, nan_ok=True), name
        assert one.record["run_id"] == alone.record["run_id"]
        assert one.record["status"] == alone.record["status"]
        assert one.record["noise_multiplier"] == alone.record["noise_multiplier"]
        assert one.guarantee == alone.guarantee


@pytest.mark.parametrize(
    "change",
    [
        {"rounds": 6},
        {"local.steps": 2},
        {"local.batch_size": 2},
        {"sampler": Poisson(cohort=9)},
        {"server": ServerOptimizer(name="adam")},
        {"mechanism": AdaptiveClipping(clip_norm=0.4, count_noise=0.3)},
        {"model": "mlp"},
        {"evaluate_every": 3},
    ],
)
def test_runs_that_do_more_than_differ_in_numbers_stay_apart(change: dict[str, Any], images: FederatedData) -> None:
    base = _base(images)
    other = base.replace(**change)
    assert together_key(base, base.plan()) != together_key(other, other.plan())


@pytest.mark.parametrize(
    "change",
    [
        {"model": "cnn"},
        {"mechanism": Gaussian(clip_norm=0.4, clipping="per_layer")},
        {"engine": "tff"},
        {
            "local": ClientTraining(batch_size=3, steps=3, example_clip=1.0, example_noise=1.0),
            "mechanism": Gaussian(clip_norm=1.0, noise_multiplier=1.0),
            "privacy": Privacy(unit="example", epsilon=None, delta=1e-3),
        },
    ],
)
def test_what_cannot_train_side_by_side_trains_alone(change: dict[str, Any], images: FederatedData) -> None:
    experiment = _base(images).replace(**change)
    assert together_key(experiment, experiment.plan()) is None
