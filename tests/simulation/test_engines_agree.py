"""The same experiment under genuine TensorFlow Federated and in the in-graph engine, to the same numbers."""

import importlib.util
import pickle
from typing import Any

import numpy as np
import pytest
from own_process import answer_of

pytestmark = [
    pytest.mark.slow,  # Importing TensorFlow Federated alone takes some seconds.
    pytest.mark.skipif(
        importlib.util.find_spec("tensorflow_federated") is None,
        reason="TensorFlow Federated has wheels for Linux on x86_64 alone",
    ),
]
CASES = (
    "no noise",
    "fixed clip, rounds of nobody",
    "adaptive clip",
    "tree",
    "banded",
    "FedProx, momentum on both sides, clipped per layer",
    "FedSGD",
    "weighted by examples",
    "adam on both sides, convolution, dropout, penalty",
    "DP-SGD clients without noise",
    "DP-SGD clients, weighted by examples",
    "both units",
    "diverged clients",
)
TOLERANCE = 1e-5

SCRIPT = """
import pickle
import sys

import numpy as np
import tensorflow as tf

import dpfl
from dpfl.mechanisms import AdaptiveClipping, BandedMatrix, Gaussian, NoMechanism, TreeAggregation
from dpfl.simulation import run as running
from dpfl.tff import aggregation

data = dpfl.data.digits(clients=60)
training = dpfl.ClientTraining(learning_rate=0.5, epochs=2, batch_size=4)
by_steps = dpfl.ClientTraining(learning_rate=0.1, steps=3, batch_size=8, optimizer="momentum")
gradient = dpfl.ClientTraining(learning_rate=1.0, steps=1, batch_size=None)
examples = training.replace(example_clip=1.0, proximal_strength=0.2)
layers = tf.keras.layers


def network():
    return tf.keras.Sequential([
        layers.Input((8, 8, 1)),
        layers.Conv2D(4, 3, activation="relu", kernel_regularizer="l2"),
        layers.Flatten(),
        layers.Dropout(0.3),
        layers.Dense(10),
    ])


private = dpfl.Privacy(epsilon=4, delta=1e-3)
measured = dpfl.Privacy(epsilon=None, delta=1e-3)
of_examples = dpfl.Privacy(unit="example", epsilon=8, delta=1e-4)
cyclic = {"sampler": dpfl.Cyclic(cohort=10), "privacy": private.replace(relation="replace_special", epsilon=8)}
plain = {"privacy": measured, "mechanism": NoMechanism()}
weighted = {"privacy": measured, "mechanism": NoMechanism(weighting="examples")}
base = {"data": data, "model": "softmax", "local": training, "privacy": private, "mechanism": Gaussian(clip_norm=0.5),
        "sampler": dpfl.Poisson(cohort=20), "rounds": 5, "evaluate_every": 5}
cases = {
    "no noise": plain,
    "fixed clip, rounds of nobody": {"evaluate_every": 2, "sampler": dpfl.Poisson(cohort=1)},
    "adaptive clip": {"privacy": measured, "mechanism": AdaptiveClipping(clip_norm=0.5, noise_multiplier=0.8)},
    "tree": {"mechanism": TreeAggregation(clip_norm=0.5), **cyclic},
    "banded": {"mechanism": BandedMatrix(clip_norm=0.5, bands=2), **cyclic},
    "FedProx, momentum on both sides, clipped per layer": {
        "mechanism": Gaussian(clip_norm=0.5, clipping="per_layer"),
        "local": by_steps.replace(proximal_strength=0.3),
        "server": dpfl.ServerOptimizer(name="momentum"),
    },
    "FedSGD": {"local": gradient},
    "weighted by examples": {**weighted, "local": by_steps},
    "adam on both sides, convolution, dropout, penalty": {
        "model": network,
        "local": training.replace(optimizer="adam", learning_rate=0.01),
        "server": dpfl.ServerOptimizer(name="adam", learning_rate=0.1),
    },
    "DP-SGD clients without noise": {**plain, "local": examples.replace(example_noise=0.0)},
    "DP-SGD clients, weighted by examples": {**weighted, "local": examples, "privacy": of_examples},
    "both units": {
        "local": examples,
        "privacy": of_examples,
        "mechanism": Gaussian(clip_norm=1.0, noise_multiplier=2.0),
    },
    "diverged clients": {
        "local": training.replace(learning_rate=1e38),
        "privacy": measured,
        "mechanism": AdaptiveClipping(clip_norm=0.5, noise_multiplier=0.8),
    },
}


def left(result):
    return {
        "weights": result.weights,
        "history": result.history,
        "record": result.record,
        "guarantees": result.guarantees(),
        "client_epsilons": None if result.client_epsilons is None else list(result.client_epsilons.epsilons),
    }


answer = {}
for name, settings in cases.items():
    experiment = dpfl.Experiment(**{**base, **settings})
    answer[name] = {
        engine: left(experiment.replace(engine=engine).run(seed=3, progress=False)) for engine in ("graph", "tff")
    }

# A mechanism whose sign is not turned is a mechanism with other noise.
experiment = dpfl.Experiment(**{**base, **cases["fixed clip, rounds of nobody"]}, engine="tff")
turned = aggregation.BeforeMinusAfter.get_noised_result
aggregation.BeforeMinusAfter.get_noised_result = lambda self, *state: self._query.get_noised_result(*state)
answer["broken"] = {"tff": left(experiment.run(seed=3, progress=False))}
aggregation.BeforeMinusAfter.get_noised_result = turned


# Stopped after two rounds and gone on with in another process.
experiment = dpfl.Experiment(**{**base, **cases["both units"]}, engine="tff")
plan = experiment.plan()
first, second = (running._start(experiment, plan, experiment.client_plan(plan.rounds), 3)[1] for _ in range(2))
cohorts = [plan.sampler.clients(3, number, plan.population) for number in range(5)]
first.run(cohorts[:2])
second.restore(first.state())
second.run(cohorts[2:])
answer["resumed"] = second.weights()

with open(sys.argv[1], "wb") as file:
    pickle.dump(answer, file)
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each case leaves behind, by engine."""
    folder = tmp_path_factory.mktemp("engines")
    return pickle.loads(answer_of(SCRIPT, folder)[0])


# Functions, not classes: so pytest-xdist runs them in one process, with one fixture.
every_case = pytest.mark.parametrize("name", CASES)


def largest_difference(one: list[np.ndarray], other: list[np.ndarray]) -> float:
    assert [part.shape for part in one] == [part.shape for part in other]
    return max(float(np.max(np.abs(a - b))) for a, b in zip(one, other, strict=True))


@every_case
def test_weights_agree_after_all_rounds(runs, name):
    graph, tff = runs[name]["graph"], runs[name]["tff"]
    assert largest_difference(graph["weights"], tff["weights"]) <= TOLERANCE
    assert tff["record"]["rounds_done"] == graph["record"]["rounds_done"] >= 3


@every_case
def test_training_moved_the_model(runs, name):
    """Or else two engines that do nothing would agree."""
    first, *_, last = runs[name]["graph"]["history"]
    assert first["round"] == 1
    assert "accuracy" in last
    assert max(row["update_norm"] for row in runs[name]["tff"]["history"]) > 0.01 or name == "diverged clients"


# Of these TensorFlow Federated gives what is needed to nobody.
NOT_IN_TFF = ("signal_to_noise", "update_norm_p10", "update_norm_p50", "update_norm_p90")


@every_case
def test_histories_have_the_same_columns_and_measurements(runs, name):
    graph, tff = runs[name]["graph"]["history"], runs[name]["tff"]["history"]
    assert [list(row) for row in graph] == [list(row) for row in tff]
    for one, other in zip(graph, tff, strict=True):
        for column, value in one.items():
            if value is None:
                assert other[column] is None
            elif column in NOT_IN_TFF:
                assert np.isnan(other[column])
            else:
                np.testing.assert_allclose(other[column], value, rtol=1e-4, atol=1e-6, err_msg=column)


@every_case
def test_records_and_guarantees_are_the_same(runs, name):
    graph, tff = runs[name]["graph"], runs[name]["tff"]
    assert tff["guarantees"] == graph["guarantees"]
    assert tff["client_epsilons"] == graph["client_epsilons"]
    assert list(tff["record"]) == list(graph["record"])
    assert (graph["record"]["engine"], tff["record"]["engine"]) == ("graph", "tff")
    measured = {"accuracy", "loss", "validation_accuracy", "validation_loss", "final_clip_norm"}
    for column, value in graph["record"].items():
        if column in NOT_IN_TFF:
            assert tff["record"][column] is None
        elif column in measured and value is not None:
            np.testing.assert_allclose(tff["record"][column], value, rtol=1e-4, err_msg=column)
        elif column not in ("engine", "run_id", "configuration", "seconds"):
            assert tff["record"][column] == value, column


def test_diverged_clients_are_counted_and_recorded(runs):
    for engine in ("graph", "tff"):
        run = runs["diverged clients"][engine]
        assert run["record"]["status"] == "diverged"
        assert all(row["non_finite_updates"] > 0 for row in run["history"])


def test_rounds_without_clients_release_noise(runs):
    history = runs["fixed clip, rounds of nobody"]["tff"]["history"]
    assert min(row["cohort"] for row in history) == 0


def test_noise_of_the_other_sign_is_seen(runs):
    assert (
        largest_difference(runs["fixed clip, rounds of nobody"]["graph"]["weights"], runs["broken"]["tff"]["weights"])
        > 0.01
    )


def test_state_is_all_that_later_rounds_need(runs):
    assert largest_difference(runs["resumed"], runs["both units"]["tff"]["weights"]) == 0
