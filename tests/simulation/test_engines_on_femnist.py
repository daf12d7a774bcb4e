"""Real writers on both engines: 100 rounds to the same accuracies, and the same weights whatever the mechanism."""

import importlib.util
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from own_process import answer_of

FEMNIST = Path(__file__).resolve().parents[3] / "shared" / "data" / "femnist_leaf_writers.npz"
pytestmark = [
    pytest.mark.slow,  # A hundred rounds of TensorFlow Federated.
    pytest.mark.skipif(
        importlib.util.find_spec("tensorflow_federated") is None,
        reason="TensorFlow Federated has wheels for Linux on x86_64 alone",
    ),
    pytest.mark.skipif(not FEMNIST.is_file(), reason=f"the real data file {FEMNIST} is not there"),
]
CASES = tuple(
    f"{name}, {noise}" for name in ("fixed clip", "adaptive clip", "tree", "DP-SGD") for noise in ("noise", "no noise")
)
TOLERANCE = 1e-5

SCRIPT = """
import dataclasses
import pickle
import sys

import tensorflow as tf

import dpfl

femnist = dpfl.data.femnist(sys.argv[2])
WRITERS = 40
rows = femnist.offsets[WRITERS]
data = dataclasses.replace(
    femnist,
    x=femnist.x[:rows], y=femnist.y[:rows],
    offsets=femnist.offsets[: WRITERS + 1], client_ids=femnist.client_ids[:WRITERS],
    x_test=femnist.x_test[:1000], y_test=femnist.y_test[:1000],
)
layers = tf.keras.layers


def network():
    # Not ReLU: an input that rounding takes across its kink changes a gradient by more than the tolerance.
    return tf.keras.Sequential(
        [layers.Input((28, 28, 1)), layers.Flatten(), layers.Dense(100, "tanh"), layers.Dense(62)]
    )


training = dpfl.ClientTraining(learning_rate=0.3, epochs=1, batch_size=20)
of_examples = training.replace(example_clip=1.0)
without_noise = dpfl.Privacy(epsilon=None, delta=1e-2)
base = {"data": data, "model": network, "local": training, "privacy": without_noise,
        "sampler": dpfl.Poisson(cohort=8), "rounds": 5, "evaluate_every": 5}
private = dpfl.Privacy(epsilon=8, delta=1e-2)
in_turns = {"mechanism": dpfl.TreeAggregation(clip_norm=0.5), "sampler": dpfl.Cyclic(cohort=8)}
adaptive = dpfl.AdaptiveClipping(clip_norm=0.5, count_noise=0.5)
cases = {
    "fixed clip, noise": {"mechanism": dpfl.Gaussian(clip_norm=0.5), "privacy": private},
    "fixed clip, no noise": {"mechanism": dpfl.Gaussian(clip_norm=0.5)},
    "adaptive clip, noise": {"mechanism": adaptive, "privacy": private},
    "adaptive clip, no noise": {"mechanism": adaptive},
    "tree, noise": {**in_turns, "privacy": private.replace(relation="replace_special")},
    "tree, no noise": {**in_turns, "privacy": without_noise.replace(relation="replace_special")},
    "DP-SGD, noise": {
        "mechanism": dpfl.NoMechanism(), "local": of_examples,
        "privacy": dpfl.Privacy(unit="example", epsilon=8, delta=1e-5),
    },
    "DP-SGD, no noise": {"mechanism": dpfl.NoMechanism(), "local": of_examples.replace(example_noise=0.0)},
    "100 rounds": {"mechanism": dpfl.NoMechanism(), "rounds": 100, "evaluate_every": 10},
}
answer = {"test examples": len(data.y_test)}
for name, settings in cases.items():
    experiment = dpfl.Experiment(**{**base, **settings})
    results = {engine: experiment.replace(engine=engine).run(1, progress=False) for engine in ("graph", "tff")}
    answer[name] = {engine: (result.weights, result.history) for engine, result in results.items()}
    answer[name]["start"] = results["graph"].functional_model.initial_weights(1)

with open(sys.argv[1], "wb") as file:
    pickle.dump(answer, file)
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each case leaves behind: weights and history of each engine, and the weights at the start."""
    folder = tmp_path_factory.mktemp("femnist")
    return pickle.loads(answer_of(SCRIPT, folder, str(FEMNIST))[0])


def apart(one: list[np.ndarray], other: list[np.ndarray]) -> float:
    """The largest difference between two models' weights."""
    return max(float(np.abs(a - b).max()) for a, b in zip(one, other, strict=True))


# Functions, not classes: so pytest-xdist runs them in one process, with one fixture.
@pytest.mark.parametrize("name", CASES)
def test_weights_of_the_engines_agree_after_five_rounds(runs: dict[str, Any], name: str) -> None:
    (graph, _), (tff, history) = runs[name]["graph"], runs[name]["tff"]
    assert len(history) == 5
    assert apart(graph, tff) <= TOLERANCE
    assert apart(tff, runs[name]["start"]) > 0.01


@pytest.mark.parametrize("mechanism", sorted({name.split(",")[0] for name in CASES}))
def test_noise_is_part_of_what_agrees(runs: dict[str, Any], mechanism: str) -> None:
    (noisy, _), (exact, _) = (runs[f"{mechanism}, {noise}"]["tff"] for noise in ("noise", "no noise"))
    assert apart(noisy, exact) > 0.01


@pytest.mark.parametrize("noise", ["noise", "no noise"])
def test_clip_norms_that_adapt_agree(runs: dict[str, Any], noise: str) -> None:
    graph, tff = (
        [row["clip_norm"] for row in runs[f"adaptive clip, {noise}"][engine][1]] for engine in ("graph", "tff")
    )
    np.testing.assert_allclose(tff, graph, rtol=1e-5)
    assert abs(tff[-1] - tff[0]) > 0.1


def test_a_hundred_rounds_have_the_same_accuracies(runs: dict[str, Any]) -> None:
    (graph, history), (tff, other) = (runs["100 rounds"][engine] for engine in ("graph", "tff"))
    assert (len(history), len(other)) == (100, 100)
    assert apart(graph, tff) <= TOLERANCE
    accuracies = np.array([[row["accuracy"] for row in rows if "accuracy" in row] for rows in (history, other)])
    assert accuracies.shape == (2, 10)
    # At most one test image may lie so close to the border of two classes that rounding decides.
    assert np.abs(accuracies[0] - accuracies[1]).max() * runs["test examples"] < 1.5
    assert accuracies[:, -1].min() > 0.5  # guessing gives 0.08
