"""`dpfl.tff.aggregator` in the builders of TensorFlow Federated, with models and data that know nothing of dpfl."""

import importlib.util
import itertools
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
BUILDERS = (
    "unweighted averaging",
    "weighted averaging",
    "stochastic gradients",
    "unweighted, proximal",
    "weighted, proximal",
    "scheduled",
)
EXPECTED_COHORT, CLIENTS, CLIP = 4, 3, 0.5

SCRIPT = """
import collections
import pickle
import sys

import numpy as np
import tensorflow as tf

import dpfl
from dpfl.errors import InputError
from dpfl.mechanisms import AdaptiveClipping, Gaussian, NoMechanism, TreeAggregation
from dpfl.tff.runtime import tensorflow_federated

tff = tensorflow_federated()
algorithms, sgd = tff.learning.algorithms, tff.learning.optimizers.build_sgdm
target = dpfl.Privacy(epsilon=None, delta=1e-3)
rng = np.random.default_rng(0)
clients = [
    tf.data.Dataset.from_tensor_slices((rng.normal(size=(size, 5)).astype(np.float32), rng.integers(0, 3, size)))
    .batch(2)
    for size in (2, 4, 8)
]


def planned(mechanism, sampler=None, **more):
    return mechanism.plan(target.replace(**more), sampler or dpfl.Poisson(cohort=4), 100, 5)


def model():
    keras = tf.keras.Sequential([tf.keras.layers.Input((5,)), tf.keras.layers.Dense(3, kernel_initializer="zeros")])
    loss = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return tff.learning.models.from_keras_model(keras, loss, input_spec=clients[0].element_spec)


def built(name, factory):
    optimizers = {"client_optimizer_fn": sgd(5.0), "server_optimizer_fn": sgd(1.0)}
    common = {"model_aggregator": factory}
    if name == "unweighted averaging":
        return algorithms.build_unweighted_fed_avg(model, **optimizers, **common)
    if name == "weighted averaging":
        return algorithms.build_weighted_fed_avg(model, **optimizers, **common)
    if name == "stochastic gradients":
        return algorithms.build_fed_sgd(model, server_optimizer_fn=sgd(1.0), **common)
    if name == "unweighted, proximal":
        return algorithms.build_unweighted_fed_prox(model, 0.1, **optimizers, **common)
    if name == "weighted, proximal":
        return algorithms.build_weighted_fed_prox(model, 0.1, **optimizers, **common)
    return algorithms.build_weighted_fed_avg_with_optimizer_schedule(
        model, lambda number: 5.0, sgd, server_optimizer_fn=sgd(1.0), **common
    )


def after(process, rounds=1, cohort=clients):
    state = process.initialize()
    for _ in range(rounds):
        state = process.next(state, cohort).state
    return [np.asarray(part) for part in process.get_model_weights(state).trainable]


def noise(plan, seed):
    # What the query adds to nobody's updates.
    query, template = plan.query(seed, [tf.zeros((5, 3)), tf.zeros(3)]), [tf.zeros((5, 3)), tf.zeros(3)]
    state = query.initial_global_state()
    return [part.numpy() for part in query.get_noised_result(query.initial_sample_state(template), state)[0]]


names = %r
quiet, noisy = planned(Gaussian(clip_norm=0.5)), planned(Gaussian(clip_norm=0.5, noise_multiplier=1.5))
answer = {"moved": {}, "noise": noise(noisy, 7)}
for name in names:
    answer["moved"][name] = {
        "quiet": after(built(name, dpfl.tff.aggregator(quiet))),
        "noisy": after(built(name, dpfl.tff.aggregator(noisy, seed=7))),
    }
first = "unweighted averaging"
# One factory, in one process twice and in another one.
unseeded = dpfl.tff.aggregator(noisy)
process = built(first, unseeded)
answer["unseeded"] = [after(one, cohort=[]) for one in (process, process, built("weighted averaging", unseeded))]
mechanisms = {
    "adaptive": planned(AdaptiveClipping(clip_norm=0.5, noise_multiplier=0.2)),
    "tree": planned(
        TreeAggregation(clip_norm=0.5, noise_multiplier=1.5), dpfl.Cyclic(cohort=4), relation="replace_special"
    ),
}
answer["mechanisms"] = {
    name: [after(built(first, dpfl.tff.aggregator(plan, seed=7)), rounds=rounds) for rounds in (1, 2)]
    for name, plan in mechanisms.items()
}
mean = tff.aggregators.UnweightedMeanFactory()
answer["own"] = {
    "averaging": after(algorithms.build_unweighted_fed_avg(model, sgd(0.5), sgd(1.0), model_aggregator=mean)),
    "proximal": after(algorithms.build_unweighted_fed_prox(model, 1.0, sgd(0.5), sgd(1.0), model_aggregator=mean)),
}


five_rounds = built(first, dpfl.tff.aggregator(planned(Gaussian(clip_norm=0.5), epsilon=8)))
after(five_rounds, rounds=5)
try:
    after(five_rounds, rounds=6)
except Exception as error:
    answer["sixth round"] = str(error)


def refused(*arguments, **more):
    try:
        dpfl.tff.aggregator(*arguments, **more)
    except InputError as error:
        return str(error)


answer["refused"] = {
    "no plan": refused(Gaussian(clip_norm=0.5)),
    "weighted": refused(planned(NoMechanism(weighting="examples"))),
    "seed": refused(quiet, seed=-1),
}
with open(sys.argv[1], "wb") as file:
    pickle.dump(answer, file)
"""


@pytest.fixture(scope="module")
def answer(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("aggregator")
    return pickle.loads(answer_of(SCRIPT % (BUILDERS,), folder)[0])


# Functions, not classes: so pytest-xdist runs them in one process, with one fixture.
in_every_builder = pytest.mark.parametrize("name", BUILDERS)


def norm(weights: list[np.ndarray]) -> float:
    return float(np.sqrt(sum(np.sum(np.square(part)) for part in weights)))


@in_every_builder
def test_clients_move_the_model_by_a_clip_norm_each_of_the_expected_cohort(answer, name):
    moved = norm(answer["moved"][name]["quiet"])  # from weights of zero
    assert 0.01 < moved <= CLIENTS * CLIP / EXPECTED_COHORT + 1e-6


@in_every_builder
def test_noise_is_that_of_the_in_graph_engine(answer, name):
    moved = answer["moved"][name]
    assert norm(answer["noise"]) > 0.1
    for noisy, quiet, noise in zip(moved["noisy"], moved["quiet"], answer["noise"], strict=True):
        np.testing.assert_allclose(noisy - quiet, noise, atol=1e-6)


def test_without_a_seed_noise_is_fresh_at_every_start(answer):
    for one, other in itertools.combinations(answer["unseeded"], 2):
        assert norm(one) > 0.1
        assert norm([a - b for a, b in zip(one, other, strict=True)]) > 0.1


def test_no_round_beyond_the_plan(answer):
    assert "5 rounds are done and its guarantee covers no more" in answer["sixth round"]


@pytest.mark.parametrize("name", ["adaptive", "tree"])
def test_mechanisms_with_a_memory(answer, name):
    first, second = answer["mechanisms"][name]
    assert norm([b - a for a, b in zip(first, second, strict=True)]) > 0.01


def test_own_proximal_term_has_the_wrong_sign(answer):
    """Why dpfl's FedProx does not use TFF's builders: should this fail, they can be used."""
    assert norm(answer["own"]["proximal"]) > 1.05 * norm(answer["own"]["averaging"])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [("no plan", "must be the plan"), ("weighted", "MeanFactory"), ("seed", "whole number of at least 0")],
)
def test_refusals_are_one_sentence(answer, wrong, words):
    sentence = answer["refused"][wrong]
    assert sentence is not None
    assert words in sentence
    assert sentence.endswith(".")
    assert "\n" not in sentence
