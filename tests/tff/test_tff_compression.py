"""Compression under genuine TensorFlow Federated: the in-graph engine's numbers, and why dpfl clips last."""

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
    "random k, clients with momentum and a proximal term",
    "rank, adam on both sides",
    "pruning",
    "pruning, DP-SGD clients, server with momentum",
    "top k with feedback",
    "random k, FedSGD",
)
TOLERANCE = 1e-5

SCRIPT = """
import pickle
import sys

import numpy as np
import tensorflow as tf
import tensorflow_privacy

import dpfl
from dpfl.compression import Compression
from dpfl.compression.codec import Codec
from dpfl.errors import InputError
from dpfl.mechanisms import Gaussian, NoMechanism
from dpfl.tff.runtime import tensorflow_federated

data = dpfl.data.digits(clients=60)
training = dpfl.ClientTraining(learning_rate=0.5, epochs=1, batch_size=4)
base = {
    "data": data, "model": "softmax", "local": training, "privacy": dpfl.Privacy(epsilon=4, delta=1e-3),
    "mechanism": Gaussian(clip_norm=0.5), "sampler": dpfl.Poisson(cohort=10), "rounds": 5, "evaluate_every": 5,
}
pruning = Compression(sparsity=0.8, pruning_begins=0.2, pruning_ends=0.6)
cases = {
    "random k, clients with momentum and a proximal term": {
        "compression": Compression(random_k=0.3),
        "local": dpfl.ClientTraining(
            learning_rate=0.1, steps=3, batch_size=8, optimizer="momentum", proximal_strength=0.3
        ),
    },
    "rank, adam on both sides": {
        "compression": Compression(rank=3),
        "local": training.replace(optimizer="adam", learning_rate=0.01, adaptivity=1e-2),
        "server": dpfl.ServerOptimizer(name="adam", learning_rate=0.1),
    },
    "pruning": {"compression": pruning},
    "pruning, DP-SGD clients, server with momentum": {
        "compression": pruning,
        "local": training.replace(example_clip=1.0, steps=None),
        "privacy": dpfl.Privacy(unit="example", epsilon=8, delta=1e-4),
        "mechanism": NoMechanism(),
        "server": dpfl.ServerOptimizer(name="momentum"),
    },
    "top k with feedback": {"compression": Compression(top_k=50, error_feedback=True)},
    "random k, FedSGD": {
        "compression": Compression(random_k=40),
        "local": dpfl.ClientTraining(learning_rate=1.0, steps=1, batch_size=None),
    },
}


def both(settings):
    experiment = dpfl.Experiment(**{**base, **settings})
    runs = {engine: experiment.replace(engine=engine).run(seed=3, progress=False) for engine in ("graph", "tff")}
    return {engine: {"weights": run.weights, "history": run.history} for engine, run in runs.items()}


answer = {name: both(settings) for name, settings in cases.items()}
answer["bits"] = {
    bits: both({
        "compression": Compression(bits=bits), "rounds": 1, "privacy": dpfl.Privacy(epsilon=None),
        "mechanism": NoMechanism(), "server": dpfl.ServerOptimizer(),
    })
    for bits in (4, 8)
}
answer["uncompressed"] = both({
    "rounds": 1, "privacy": dpfl.Privacy(epsilon=None), "mechanism": NoMechanism(),
})["graph"]

tff = tensorflow_federated()
vector = np.random.default_rng(0).normal(size=300).astype(np.float32)
signs, rounding = np.int32([1, 2]), np.int32([3, 4])
answer["codec"] = {}
for bits, rotation in ((1, False), (3, True), (8, False), (8, True), (None, False)):
    codec = Codec(bits, rotation)

    def through(vector, signs, rounding):
        message = codec.encode(vector, signs, rounding)
        return message, codec.decode(message, tf.size(vector), signs)

    in_tff = tff.tensorflow.computation(through, (np.float32, [300]), (np.int32, [2]), (np.int32, [2]))
    answer["codec"][bits, rotation] = [
        [np.asarray(part) for part in compiled(vector, signs, rounding)] for compiled in (in_tff, tf.function(through))
    ]

# TFF's own quantiser as TFF's documentation stacks it: under the clip, as what sums the clipped records.
clip, value = 1.0, np.random.default_rng(1).normal(size=64).astype(np.float32)
value_type = tff.TensorType(np.float32, [64])
answer["own quantiser"] = {}
for bits in (None, 1, 2):
    query = tensorflow_privacy.GaussianSumQuery(clip, 0.0)
    under = () if bits is None else (
        tff.aggregators.EncodedSumFactory.quantize_above_threshold(quantization_bits=bits, threshold=0),
    )
    process = tff.aggregators.DifferentiallyPrivateFactory(query, *under).create(value_type)
    answer["own quantiser"][bits] = np.asarray(process.next(process.initialize(), [value]).result)

# dpfl's, in TFF's aggregator.
answer["aggregator"] = {}
for bits in (1, 2):
    plan = Gaussian(clip_norm=clip).plan(
        dpfl.Privacy(epsilon=None), dpfl.Poisson(cohort=1), 60, 5, compression=Compression(bits=bits)
    )
    process = dpfl.tff.aggregator(plan, seed=1).create(value_type, tff.TensorType(np.float32))
    answer["aggregator"][bits] = np.asarray(process.next(process.initialize(), [value], [1.0]).result)

try:
    dpfl.tff.aggregator(Gaussian(clip_norm=1.0).plan(
        dpfl.Privacy(epsilon=None), dpfl.Poisson(cohort=1), 60, 5, compression=pruning
    ))
except InputError as error:
    answer["refused"] = str(error)

with open(sys.argv[1], "wb") as file:
    pickle.dump(answer, file)
"""


@pytest.fixture(scope="module")
def answer(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("compression")
    return pickle.loads(answer_of(SCRIPT, folder)[0])


# Functions, not classes: so pytest-xdist runs them in one process, with one fixture.
every_case = pytest.mark.parametrize("name", CASES)


def largest_difference(one: list[np.ndarray], other: list[np.ndarray]) -> float:
    return max(float(np.max(np.abs(a - b))) for a, b in zip(one, other, strict=True))


@every_case
def test_weights_agree_after_all_rounds(answer, name):
    runs = answer[name]
    assert largest_difference(runs["graph"]["weights"], runs["tff"]["weights"]) <= TOLERANCE
    assert len(runs["tff"]["history"]) == 5
    assert max(row["update_norm"] for row in runs["tff"]["history"]) > 0.01


@every_case
def test_measurements_agree(answer, name):
    for one, other in zip(answer[name]["graph"]["history"], answer[name]["tff"]["history"], strict=True):
        for column in ("bytes_up", "bytes_down", "cohort", "clip_norm", "epsilon_spent"):
            assert other[column] == one[column], column
        np.testing.assert_allclose(other["update_norm"], one["update_norm"], rtol=1e-4)


@pytest.mark.parametrize("name", ["pruning", "pruning, DP-SGD clients, server with momentum"])
def test_pruned_weights_are_zero_in_both(answer, name):
    for engine in ("graph", "tff"):
        kernel, bias = answer[name][engine]["weights"]
        assert np.count_nonzero(kernel == 0) == round(0.8 * kernel.size)
        assert np.count_nonzero(bias)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_updates_differ_by_no_more_than_a_step(answer, bits):
    """TFF has no index to tell clients apart: each rounds afresh, to levels that neighbour those of the other engine.

    So a client's coordinates differ by at most a step, the largest of them over 2 ** (bits - 1) - 1, and this by no
    more than its norm over that; the mean over ten expected clients by a tenth of the sum.
    """
    runs = answer["bits"][bits]
    norms = sum(row["update_norm"] * row["cohort"] for row in runs["graph"]["history"])
    bound = norms / (2 ** (bits - 1) - 1) / 10
    difference = largest_difference(runs["graph"]["weights"], runs["tff"]["weights"])
    assert 0 < difference <= bound
    for engine in ("graph", "tff"):
        off = largest_difference(runs[engine]["weights"], answer["uncompressed"]["weights"])
        assert 0 < off <= bound


def test_the_codec_gives_the_same_bytes_to_the_bit(answer):
    assert len(answer["codec"]) == 5
    for (in_tff, in_graph), (bits, _) in zip(answer["codec"].values(), answer["codec"], strict=True):
        for one, other in zip(in_tff, in_graph, strict=True):
            np.testing.assert_array_equal(one, other)
        assert len(in_tff[0]) == (1200 if bits is None else len(in_graph[0])) <= 1200


def test_own_quantiser_under_the_clip_exceeds_it(answer):
    """Why dpfl decodes before the clip: should this fail, TFF's could be used."""
    own = {bits: float(np.linalg.norm(value)) for bits, value in answer["own quantiser"].items()}
    assert own[None] == pytest.approx(1, rel=1e-5)
    assert own[1] > 1.5
    assert own[2] > 1.05


@pytest.mark.parametrize("bits", [1, 2])
def test_dpfls_codec_in_an_aggregator_keeps_the_clip(answer, bits):
    assert np.linalg.norm(answer["aggregator"][bits]) == pytest.approx(1, rel=1e-5)
    if bits == 1:  # and is quantised: one size for all coordinates of the bucket
        sizes = np.abs(answer["aggregator"][bits])
        np.testing.assert_allclose(sizes, sizes.max(), rtol=1e-6)


def test_pruning_is_not_for_an_aggregator(answer):
    assert answer["refused"].startswith("pruning follows the released weights, which an aggregator does not see")
    assert answer["refused"].endswith(".")
    assert "\n" not in answer["refused"]
