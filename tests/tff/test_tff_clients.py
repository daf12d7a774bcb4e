"""DP-SGD clients under genuine TensorFlow Federated: what the in-graph engine gives, and noise of their own."""

import importlib.util
import json
import math
import re
import subprocess
import sys
import textwrap
from typing import Any

import numpy as np
import pytest
from own_process import answer_of
from scipy import stats

import dpfl
from dpfl.errors import InputError

needs_tff = (
    pytest.mark.slow,  # Importing TensorFlow Federated alone takes some seconds.
    pytest.mark.skipif(
        importlib.util.find_spec("tensorflow_federated") is None,
        reason="TensorFlow Federated has wheels for Linux on x86_64 alone",
    ),
)
FALSE_ALARM = 1e-6
SAME = (
    "full batches, no noise, no index",
    "poisson, noise",
    "capped, adam, epochs",
    "shuffled, automatic",
    "words, dropout, penalty, microbatches",
)
NOISE, CLIP, RECORDS = 1e4, 0.5, 8  # of the clients whose noise is looked at

SCRIPT = """
import collections
import json
import os
import sys

os.environ.update(TF_CPP_MIN_LOG_LEVEL="3", GRPC_VERBOSITY="NONE", GRPC_ENABLE_FORK_SUPPORT="0")
import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

import dpfl
from dpfl.clients.dp_sgd import client_numbers, client_seeds, run_seeds, train_privately
from dpfl.clients.example_privacy import plan_clients
from dpfl.models.functional import FunctionalModel

answer = {}
SHAPE, CLASSES, SIZES = (4, 4, 1), 3, [3, 5, 8, 13]
rng = np.random.default_rng(0)
labels = [rng.integers(0, CLASSES, size).astype(np.int32) for size in SIZES]
images = [(rng.normal(size=(len(y), *SHAPE)).astype(np.float32), y) for y in labels]
texts = [(rng.integers(0, 5, (len(y), 4)).astype(np.float32), y) for y in labels]
softmax = FunctionalModel("softmax", SHAPE, CLASSES)
# Fresh noise must not follow it.
tf.random.set_seed(0)


def words():
    layers = tf.keras.layers
    return tf.keras.Sequential([
        layers.Input((4,)),
        layers.Embedding(5, 3),  # some word comes twice in many a text
        layers.GlobalAveragePooling1D(),
        layers.Dropout(0.2),
        layers.Dense(CLASSES, kernel_regularizer="l2"),
    ])


def planned(records=SIZES, rounds=3, relation="replace_special", **settings):
    settings = {"learning_rate": 0.3, "batch_size": 6, "steps": 2, "example_clip": 0.5, **settings}
    target = dpfl.Privacy(unit="user", epsilon=None, delta=1e-3, relation=relation)
    return plan_clients(dpfl.ClientTraining(**settings), target, dpfl.Everyone(), np.array(records), rounds)


def pairs(client, batch=4):
    return tf.data.Dataset.from_tensor_slices(client).batch(batch)


def named(client, index, batch=4):
    x, y = client
    features = collections.OrderedDict(x=x, y=y, client=np.full(len(y), index, np.int64))
    return tf.data.Dataset.from_tensor_slices(features).batch(batch)


def as_lists(parts):
    return [np.asarray(part).tolist() for part in parts]


def by_tff(work, state, weights, datasets, weight=1):
    weights = tff.learning.models.ModelWeights([np.array(weight) for weight in weights], ())
    output = work.next(state, [weights] * len(datasets), datasets)
    assert all(float(result.update_weight) == weight for result in output.result)
    assert output.measurements == ()
    return [as_lists(result.update) for result in output.result], output.state


def in_graph(model, plan, seed):
    # What a client sends in a round, traced once for clients of all sizes.
    numbers = client_numbers(plan.training, plan.noise_multiplier)

    @tf.function(autograph=False, reduce_retracing=True)
    def train(weights, x, y, number, index):
        seeds = client_seeds(run_seeds(seed), number, index)
        return train_privately(model, weights, x, y, training=plan.training, numbers=numbers, seeds=seeds).update

    def sent(weights, client, number, index):
        weights, (x, y) = [tf.constant(weight) for weight in weights], (tf.constant(part) for part in client)
        return as_lists(-part for part in train(weights, x, y, tf.constant(number), tf.constant(index)))

    return sent


def three_rounds(model, plan, seed, clients=images):
    # Every client's updates, from other weights in each round.
    datasets = [pairs(one) if seed is None else named(one, index) for index, one in enumerate(clients)]
    work = dpfl.tff.client_work(model, plan, input_spec=datasets[0].element_spec, seed=seed)
    sent, state, found, expected = in_graph(model, plan, seed or 0), work.initialize(), [], []
    for number in range(3):
        weights = [rng.normal(0, 0.1, part).astype(np.float32) for part in model.shapes]
        updates, state = by_tff(work, state, weights, datasets)
        found.append(updates)
        expected.append([sent(weights, one, number, index) for index, one in enumerate(clients)])
    return {"found": found, "expected": expected}


answer["same"] = {
    "full batches, no noise, no index": three_rounds(softmax, planned(batch_size=13, example_noise=0.0), None),
    "poisson, noise": three_rounds(softmax, planned(example_noise=0.8), 7),
    "capped, adam, epochs": three_rounds(
        softmax,
        planned(example_noise=0.8, max_batch_size=6, optimizer="adam", epochs=2, steps=None, learning_rate=0.02),
        7,
    ),
    "shuffled, automatic": three_rounds(
        softmax, planned(example_noise=0.8, example_sampling="shuffled", example_clipping="automatic"), 2**64 - 1
    ),
    "words, dropout, penalty, microbatches": three_rounds(
        FunctionalModel(words, (4,), CLASSES), planned(example_noise=0.8, microbatch_size=2), 7, texts
    ),
}

# How records come makes no difference: batch size, integer features, labels as a column.
plan, forms = planned(batch_size=13, example_noise=0.0), {}
for name, batch, x_type, y_type, y_shape in (
    ("small batches", 2, np.float32, np.int32, -1),
    ("one batch", 100, np.int32, np.int64, -1),
    ("alone", 1, np.uint8, np.uint8, (-1, 1)),
):
    datasets = [
        pairs((np.repeat(x, 4, axis=1).reshape(-1, *SHAPE).astype(x_type), y.reshape(y_shape).astype(y_type)), batch)
        for x, y in texts
    ]
    work = dpfl.tff.client_work(softmax, plan, input_spec=datasets[0].element_spec)
    forms[name] = by_tff(work, work.initialize(), softmax.initial_weights(0), datasets)[0]
answer["forms"] = forms

# Four clients with the same records, and noise far above any gradient; the last round is the first, once more.
plan = planned([8] * 4, batch_size=8, steps=1, learning_rate=1.0, example_noise=1e4)
alike = [pairs(images[2])] * 4
work = dpfl.tff.client_work(softmax, plan, input_spec=alike[0].element_spec)
state, noise = work.initialize(), []
for _ in range(3):
    updates, state = by_tff(work, state, softmax.initial_weights(0), alike)
    noise.append(updates)
noise.append(by_tff(work, work.initialize(), softmax.initial_weights(0), alike)[0])
answer["noise"], answer["rounds"] = noise, int(state.round)

# Whole runs: the engine's, and one with a mechanism on top of the clients'.
x, y = (np.concatenate(parts) for parts in zip(*images))
data = dpfl.data.from_arrays(x, y, np.repeat(np.arange(4), SIZES), test=(x, y), validation=(x, y), num_classes=CLASSES)
experiment = dpfl.Experiment(
    data=data,
    model="softmax",
    local=dpfl.ClientTraining(learning_rate=0.3, batch_size=6, steps=2, example_clip=0.5, example_noise=0.8),
    mechanism=dpfl.NoMechanism(),
    privacy=dpfl.Privacy(unit="example", epsilon=None, delta=1e-3),
    sampler=dpfl.Everyone(),
    rounds=3,
)
result = experiment.run(11, progress=False)
datasets = [named(data.client(k), k) for k in range(4)]
spec, plan = datasets[0].element_spec, experiment.client_plan()
process = dpfl.tff.build_dp_sgd_fed_avg("softmax", plan, input_spec=spec, num_classes=CLASSES, seed=11)
initial = process.initialize()
answer["initial"] = as_lists(process.get_model_weights(initial).trainable)
state = initial
for _ in range(3):
    state = process.next(state, datasets).state
weights = process.get_model_weights(state)
answer["run"] = {"found": as_lists(weights.trainable), "expected": as_lists(result.weights)}
evaluation = tff.learning.algorithms.build_fed_eval(
    dpfl.tff.evaluation_model("softmax", input_spec=spec, num_classes=CLASSES)
)
metrics = evaluation.next(evaluation.set_model_weights(evaluation.initialize(), weights), datasets).metrics
metrics = metrics["client_work"]["eval"]["current_round_metrics"]
answer["evaluation"] = {
    "found": [float(metrics["accuracy"]), float(metrics["loss"])], "expected": [result.accuracy, result.loss]
}

server_plan = dpfl.Gaussian(clip_norm=0.2).plan(dpfl.Privacy(epsilon=4, delta=1e-2), dpfl.Everyone(), 4, 3)
query = server_plan.query(11, softmax.initial_weights(11))
process = dpfl.tff.build_dp_sgd_fed_avg(
    softmax, plan, input_spec=spec, seed=11, aggregator=tff.aggregators.DifferentiallyPrivateFactory(query),
    server_optimizer=tff.learning.optimizers.build_sgdm(0.5),
)
state, query_state = process.initialize(), query.initial_global_state()
moved, sent = softmax.initial_weights(11), in_graph(softmax, plan, 11)
for number in range(2):
    state = process.next(state, datasets).state
    total = query.initial_sample_state([tf.constant(weight) for weight in moved])
    for k in range(4):
        update = [tf.constant(part, tf.float32) for part in sent(moved, data.client(k), number, k)]
        total = query.accumulate_record(query.derive_sample_params(query_state), total, update)
    mean, query_state, _ = query.get_noised_result(total, query_state)
    moved = [weight - 0.5 * part for weight, part in zip(moved, mean)]
answer["two levels"] = {
    "found": as_lists(process.get_model_weights(state).trainable), "expected": as_lists(moved)
}

# Clients with nothing, nobody at all, and a client whose training goes beyond all numbers.
nothing = named((data.client(0)[0][:0], data.client(0)[1][:0]), 0)
work = dpfl.tff.client_work(softmax, plan, input_spec=spec, seed=11)
updates, _ = by_tff(work, work.initialize(), softmax.initial_weights(11), [datasets[0], nothing])
answer["with nothing"] = updates
process = dpfl.tff.build_dp_sgd_fed_avg("softmax", plan, input_spec=spec, num_classes=CLASSES, seed=11)
for name, cohort in (("all with nothing", [nothing]), ("nobody", [])):
    answer[name] = as_lists(process.get_model_weights(process.next(initial, cohort).state).trainable)
wild = planned(learning_rate=3e38, example_noise=1e3)
work = dpfl.tff.client_work(softmax, wild, input_spec=spec, seed=11)
answer["wild"] = by_tff(work, work.initialize(), softmax.initial_weights(11), datasets, weight=0)[0]

# What a guarantee would not cover.
plan = planned(rounds=1, example_noise=0.8)
work = dpfl.tff.client_work(softmax, plan, input_spec=spec, seed=11)
weights = softmax.initial_weights(11)
_, later = by_tff(work, work.initialize(), weights, datasets)
pair = tuple(np.concatenate(parts) for parts in zip(images[0], images[1]))
mixed = named(images[1], 0).concatenate(named(images[0], 1))
stopped = {
    "rounds": (later, datasets),
    "records": (work.initialize(), [*datasets, named((pair[0][:6], pair[1][:6]), 4)]),
    "indices": (work.initialize(), [named(images[1], np.array([0, 0, 0, 0, 1]))]),
}
answer["stopped"] = {}
for name, (state, cohort) in stopped.items():
    try:
        by_tff(work, state, weights, cohort)
    except Exception as error:
        answer["stopped"][name] = str(error)

# Bad arguments.
labels_as_vectors = (spec["x"], tf.TensorSpec([None, CLASSES]))
bare = {"model": "softmax", "plan": plan, "input_spec": spec, "num_classes": CLASSES}
noisy = {"learning_rate": 0.1, "steps": 1}
bad = {
    "private training": {"plan": dpfl.ClientTraining(**noisy, example_clip=1.0, example_noise=1.0)},
    "plain training": {"plan": dpfl.ClientTraining(**noisy)},
    "server plan": {"plan": server_plan},
    "no classes": {"num_classes": None},
    "other shape": {"model": FunctionalModel("softmax", (2, 2, 1), CLASSES)},
    "mixed examples": {"model": lambda: tf.keras.Sequential(
        [tf.keras.layers.Input(SHAPE), tf.keras.layers.Flatten(), tf.keras.layers.Activation("tanh"),
         tf.keras.layers.Dense(4, activity_regularizer="l2"), tf.keras.layers.Dense(CLASSES)])},
    "unbatched": {"input_spec": datasets[0].unbatch().element_spec},
    "one-hot": {"input_spec": labels_as_vectors},
    "dict": {"input_spec": dict(spec)},
    "three parts": {"input_spec": (spec["x"], spec["y"], spec["y"])},
    "no index": {"input_spec": pairs(images[0]).element_spec, "seed": 1},
    "text index": {"input_spec": spec | {"client": tf.TensorSpec([None], tf.string)}},
    "seed": {"seed": -1},
    "aggregator": {"aggregator": query},
    "optimizer": {"server_optimizer": tf.keras.optimizers.legacy.SGD(1.0)},
}
answer["refused"] = {}
for name, arguments in bad.items():
    try:
        dpfl.tff.build_dp_sgd_fed_avg(**{**bare, **arguments})
    except dpfl.InputError as error:
        answer["refused"][name] = str(error)

with open(sys.argv[1], "w") as file:
    json.dump(answer, file)
"""

READ_ME = """
import json
import os
import sys

os.environ.update(TF_CPP_MIN_LOG_LEVEL="3", GRPC_VERBOSITY="NONE", GRPC_ENABLE_FORK_SUPPORT="0")
{code}
from dpfl.models.functional import FunctionalModel

model = FunctionalModel("softmax", data.example_shape, data.num_classes)
keras = model.to_keras(process.get_model_weights(state).trainable)
hits = tf.argmax(keras(data.x_test), axis=1, output_type=tf.int32) == data.y_test
with open(sys.argv[1], "w") as file:
    json.dump({{"accuracy": float(tf.reduce_mean(tf.cast(hits, tf.float32))), "epsilon": plan.guarantee.epsilon}}, file)
"""


def run(script: str, folder: Any) -> tuple[Any, str]:
    """What a program with TFF answers, and what it prints."""
    answer, printed = answer_of(script, folder)
    return json.loads(answer), printed


@pytest.fixture(scope="module")
def answer(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(SCRIPT, tmp_path_factory.mktemp("tff_clients"))[0]


def flat(update: list[Any]) -> np.ndarray:
    """An update as one vector."""
    return np.concatenate([np.ravel(part) for part in update])


def assert_same(found: list[Any], expected: list[Any]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.array(one), np.array(other), rtol=1e-5, atol=1e-5)


# Functions, not classes: so pytest-xdist runs them in one process, with one fixture.
def in_tff(test: Any) -> Any:
    for mark in needs_tff:
        test = mark(test)
    return test


@in_tff
@pytest.mark.parametrize("name", SAME)
def test_clients_send_what_the_in_graph_engine_computes(answer, name) -> None:
    found, expected = answer["same"][name]["found"], answer["same"][name]["expected"]
    for of_round, of_round_expected in zip(found, expected, strict=True):
        for update, other in zip(of_round, of_round_expected, strict=True):
            assert_same(update, other)
            assert np.abs(flat(update)).max() > 1e-3
    # Nothing repeats, so that a swap of clients or rounds would be seen.
    vectors = [flat(update) for of_round in found for update in of_round]
    assert len({vector.tobytes() for vector in vectors}) == 12


@in_tff
def test_how_records_are_batched_and_typed_makes_no_difference(answer) -> None:
    first, *others = answer["forms"].values()
    for other in others:
        for update, same in zip(other, first, strict=True):
            assert_same(update, same)
    assert np.abs(flat(first[0])).max() > 1e-3


@pytest.fixture(scope="module")
def noise(answer) -> np.ndarray:
    """Standardised noise of four rounds of four clients, (16, coordinates); gradients add at most 1e-3 to it."""
    vectors = [flat(update) for of_round in answer["noise"] for update in of_round]
    return np.array(vectors) * RECORDS / (NOISE * CLIP)


@in_tff
def test_noise_has_the_planned_scale(answer, noise) -> None:
    assert answer["rounds"] == 3
    values = noise.ravel()
    # 1e-6 by Kolmogorov and Smirnov; by the chi-square's quantiles, with 1 % for the gradients.
    assert stats.kstest(values, "norm").pvalue > FALSE_ALARM
    low, high = stats.chi2(values.size).ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2]) / values.size
    assert low * 0.99 < np.mean(values**2) < high * 1.01


@in_tff
def test_clients_rounds_and_runs_share_no_noise(noise) -> None:
    # Also under tf.random.set_seed. Of independent normals a correlation r has sqrt(n) r near the standard normal:
    # by Fisher's transform, 1e-6 over all 120 pairs.
    pairs = np.triu_indices(len(noise), k=1)
    transformed = np.arctanh(np.corrcoef(noise)[pairs]) * math.sqrt(noise.shape[1] - 3)
    assert np.abs(transformed).max() <= stats.norm.isf(FALSE_ALARM / 2 / len(pairs[0]))


@in_tff
@pytest.mark.parametrize("name", ["run", "two levels", "evaluation"])
def test_whole_runs_equal_those_in_graph(answer, name) -> None:
    assert_same(answer[name]["found"], answer[name]["expected"])
    if name != "evaluation":
        assert np.abs(flat(answer[name]["found"]) - flat(answer["initial"])).max() > 1e-2


@in_tff
def test_clients_with_nothing_send_zeros_and_count(answer) -> None:
    something, nothing = answer["with nothing"]
    assert not flat(nothing).any()
    assert flat(something).all()


@in_tff
@pytest.mark.parametrize("cohort", ["all with nothing", "nobody"])
def test_cohorts_with_nothing_leave_the_model_as_it_is(answer, cohort) -> None:
    assert answer[cohort] == answer["initial"]


@in_tff
def test_updates_that_are_not_finite_are_sent_as_zeros(answer) -> None:
    assert not any(flat(update).any() for update in answer["wild"])


@in_tff
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("rounds", "the plan's 1 rounds are done"),
        ("records", "a client's number of records is none of those in the plan"),
        ("indices", "the feature client must be the same"),
    ],
)
def test_what_the_guarantee_does_not_cover_is_stopped(answer, name, words) -> None:
    assert words in answer["stopped"][name].replace("\\'", "'")


@in_tff
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("private training", "plan_clients"),
        ("plain training", "example_clip"),
        ("server plan", "ClientPlan"),
        ("no classes", "num_classes is missing"),
        ("other shape", "examples of shape"),
        ("mixed examples", "activity regularizer"),
        ("unbatched", "batch the dataset"),
        ("one-hot", "integer labels"),
        ("dict", "collections.OrderedDict"),
        ("three parts", "element_spec"),
        ("no index", "client="),
        ("text index", "client's index"),
        ("seed", "seed"),
        ("aggregator", "dpfl.tff.aggregator(plan)"),
        ("optimizer", "build_sgdm"),
    ],
)
def test_bad_arguments_are_refused_in_a_sentence(answer, name, words) -> None:
    sentence = answer["refused"][name]
    assert words in sentence
    assert sentence.endswith(".")
    assert "\n" not in sentence


@in_tff
def test_code_in_the_docstring_runs_as_it_stands(tmp_path) -> None:
    assert dpfl.tff.__doc__ is not None
    code = "\n".join(re.findall(r"\n\n((?:    .*\n|\n)+)", dpfl.tff.__doc__))
    found, printed = run(READ_ME.format(code=textwrap.dedent(code)), tmp_path)
    of_clients, of_examples, message_bytes = printed.strip().splitlines()
    assert re.match(r"\((7\.\d+|8), 0.01\)-differential privacy at user level", of_clients)
    assert re.match(r"\((7\.\d+|8), 1e-05\)-differential privacy at example level", of_examples)
    assert 7.5 < found["epsilon"] <= 8
    assert message_bytes == "408"  # 650 weights in 6 buckets of 128 coordinates of 4 bits, with 6 scales
    # About 0.7 with any noise; guessing gives 0.1.
    assert found["accuracy"] > 0.4


@pytest.mark.parametrize("name", ["build_dp_sgd_fed_avg", "client_work", "evaluation_model"])
def test_a_machine_without_tff_gets_a_sentence_when_it_asks(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, "tensorflow_federated", None)
    arguments = {} if name == "evaluation_model" else {"plan": None}
    with pytest.raises(InputError, match=r"^TensorFlow Federated has no package for this machine [^.]*in-graph engine"):
        getattr(dpfl.tff, name)("softmax", input_spec=None, **arguments)


def test_importing_the_module_imports_no_tff() -> None:
    code = "import sys, dpfl.tff; assert 'tensorflow_federated' not in sys.modules; print('ready')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "ready\n"
