"""`dpfl.tff.compressed`: dpfl's codec in front of TFF's own aggregators, for private and plain means."""

import importlib.util

import numpy as np
import pytest
import tensorflow as tf

import dpfl
from dpfl.compression.codec import Codec
from dpfl.tff.runtime import tensorflow_federated

pytestmark = [
    pytest.mark.slow,  # Importing TensorFlow Federated alone takes some seconds.
    pytest.mark.skipif(
        importlib.util.find_spec("tensorflow_federated") is None,
        reason="TensorFlow Federated has wheels for Linux on x86_64 alone",
    ),
]
KERNEL, BIAS = (30, 8), (8,)
COORDINATES = 248


@pytest.fixture(scope="module")
def tff():
    return tensorflow_federated()


def updates(clients=3, scale=1.0, seed=0):
    draws = np.random.default_rng(seed)
    return [[draws.normal(0, scale, shape).astype(np.float32) for shape in (KERNEL, BIAS)] for _ in range(clients)]


def flat(update):
    return np.concatenate([np.asarray(part).ravel() for part in update])


def value_type(tff):
    return tff.types.to_type([(np.float32, KERNEL), (np.float32, BIAS)])


def process(tff, inner, seed=None, **settings):
    return dpfl.tff.compressed(inner, dpfl.Compression(**settings), seed=seed).create(value_type(tff))


def summed(tff, rounds=1, values=None, **settings):
    """The sums of updates, which lie open, round by round, and the state after them."""
    chain = process(tff, tff.aggregators.SumFactory(), **settings)
    state, found = chain.initialize(), []
    for _ in range(rounds):
        output = chain.next(state, updates() if values is None else values)
        state = output.state
        found.append(output)
    return found


def test_float32_arrives_as_it_was_sent(tff):
    (output,) = summed(tff)
    np.testing.assert_allclose(flat(output.result), np.sum([flat(each) for each in updates()], axis=0), rtol=1e-6)
    assert [np.shape(part) for part in output.result] == [KERNEL, BIAS]


@pytest.mark.parametrize(
    ("settings", "coordinates"),
    [
        ({}, 248),
        ({"bits": 1}, 248),
        ({"bits": 4}, 248),
        ({"bits": 4, "rotation": True}, 248),
        ({"random_k": 0.25}, 62),
        ({"random_k": 100, "bits": 3}, 100),
        ({"rank": 2}, 2 * 8 + 8),
        ({"rank": 2, "bits": 8, "rotation": True}, 2 * 8 + 8),
    ],
)
def test_bytes_are_those_of_a_message(tff, settings, coordinates):
    """Of a message of other numbers, encoded here."""
    (output,) = summed(tff, **settings)
    codec = Codec(settings.get("bits"), settings.get("rotation", False))
    vector, seed = tf.random.normal([coordinates]), tf.constant([1, 2])
    assert output.measurements.message_bytes == len(codec.encode(vector, seed, seed))


def test_quantised_updates_are_right_on_average_and_clients_round_on_their_own(tff):
    value = updates(1)[0]
    chain = process(tff, tff.aggregators.SumFactory(), bits=2)
    state, found = chain.initialize(), []
    for _ in range(20):
        output = chain.next(state, [value] * 10)
        state = output.state
        found.append(flat(output.result) / 10)
    error = np.std(found, axis=0)
    # 10 clients that shared their roundings would leave sqrt(10) times this.
    scale = max(np.abs(flat(value))) / np.sqrt(10)
    assert np.mean(error) < 0.5 * scale
    assert np.mean(np.abs(np.mean(found, axis=0) - flat(value))) < 0.2 * scale
    assert len({one.tobytes() for one in found}) == 20


@pytest.mark.parametrize("settings", [{"random_k": 0.25}, {"rank": 2}])
def test_updates_are_projected_onto_a_subspace_of_the_round(tff, settings):
    outputs = summed(tff, rounds=2, values=updates(1), seed=4, **settings)
    whole = flat(updates(1)[0])
    for output in outputs:
        arrived = flat(output.result)
        # Orthogonal: what is dropped is perpendicular to what is kept.
        assert np.dot(arrived, whole - arrived) == pytest.approx(0, abs=1e-3)
        assert 0 < np.linalg.norm(arrived) < np.linalg.norm(whole)
        if "random_k" in settings:
            assert np.count_nonzero(arrived) == 62
            np.testing.assert_array_equal(arrived[arrived != 0], whole[arrived != 0])
    assert not np.allclose(flat(outputs[0].result), flat(outputs[1].result))
    again = summed(tff, rounds=2, values=updates(1), seed=4, **settings)
    np.testing.assert_array_equal(flat(again[1].result), flat(outputs[1].result))


def test_without_a_seed_each_process_draws_its_own(tff):
    chain = process(tff, tff.aggregators.SumFactory(), random_k=0.25)
    states = [chain.initialize() for _ in range(2)]
    for name in ("subspace_seed", "rotation_seed", "rounding_seed"):
        assert len({getattr(state, name).tobytes() for state in states}) == 2
    seeded = process(tff, tff.aggregators.SumFactory(), random_k=0.25, seed=3)
    states = [seeded.initialize() for _ in range(2)]
    assert len({state.subspace_seed.tobytes() for state in states}) == 1
    first, second = (chain.next(chain.initialize(), updates(1)).result for _ in range(2))
    assert not np.array_equal(flat(first), flat(second))
    after = chain.next(chain.next(states[0], updates(1)).state, updates(1)).state
    assert after.round == 2
    assert after.subspace_seed.tobytes() == states[0].subspace_seed.tobytes()


@pytest.mark.parametrize("bits", [1, 4])
def test_the_clip_holds_behind_the_codec_and_not_before_it(tff, bits):
    """Compress first, clip after; TFF's quantiser beneath the clip lets through more than the clip."""
    private = tff.aggregators.DifferentiallyPrivateFactory
    update = updates(1, scale=10.0)
    chain = process(tff, private.gaussian_fixed(0.0, clients_per_round=1.0, clip=1.0), bits=bits, rotation=True)
    assert np.linalg.norm(flat(chain.next(chain.initialize(), update).result)) <= 1 + 1e-5
    query = private.gaussian_fixed(0.0, clients_per_round=1.0, clip=1.0)._query
    quantised = tff.aggregators.EncodedSumFactory.quantize_above_threshold(quantization_bits=bits, threshold=0)
    stacked = private(query, record_aggregation_factory=quantised).create(value_type(tff))
    assert np.linalg.norm(flat(stacked.next(stacked.initialize(), update).result)) > 1 + 1e-3


def test_noise_is_the_inner_factorys(tff):
    """Its events too: the codec adds no noise, and takes none away."""
    inner = tff.aggregators.DifferentiallyPrivateFactory.gaussian_fixed(2.0, clients_per_round=4.0, clip=0.5)
    chain = process(tff, inner, bits=4)
    result = flat(chain.next(chain.initialize(), updates(0)).result)
    assert np.std(result) == pytest.approx(2.0 * 0.5 / 4, rel=0.2)
    plain = inner.create(value_type(tff)).initialize()
    assert str(chain.initialize().inner.dp_event) == str(plain.dp_event)


@pytest.mark.parametrize("settings", [{}, {"bits": 4}, {"random_k": 1}, {"rank": 1, "bits": 2}])
def test_what_is_not_finite_stays_so(tff, settings):
    for bad in (np.nan, np.inf):
        update = updates(1)
        update[0][0][3, 2] = bad
        (output,) = summed(tff, values=update, **settings)
        assert np.isnan(flat(output.result)).all()
    (output,) = summed(tff, values=[[np.zeros(KERNEL, np.float32), np.zeros(BIAS, np.float32)]], **settings)
    assert not flat(output.result).any()


def test_weights_pass(tff):
    chain = dpfl.tff.compressed(tff.aggregators.MeanFactory(), dpfl.Compression()).create(
        value_type(tff), tff.types.to_type(np.float32)
    )
    assert chain.is_weighted
    found = chain.next(chain.initialize(), updates(2), [1.0, 3.0]).result
    expected = np.average([flat(each) for each in updates(2)], axis=0, weights=[1, 3])
    np.testing.assert_allclose(flat(found), expected, rtol=1e-5, atol=1e-6)


def test_kinds_are_those_of_the_inner_factory(tff):
    kinds = (tff.aggregators.UnweightedAggregationFactory, tff.aggregators.WeightedAggregationFactory)
    plan = dpfl.Gaussian(clip_norm=0.5).plan(dpfl.Privacy(epsilon=8, delta=1e-2), dpfl.Poisson(cohort=5), 30, 3)
    for inner in (
        tff.aggregators.SumFactory(),
        tff.aggregators.MeanFactory(),
        tff.learning.compression_aggregator(),
        tff.learning.dp_aggregator(0.5, 10.0, zeroing=False),
        dpfl.tff.aggregator(plan),
    ):
        factory = dpfl.tff.compressed(inner, dpfl.Compression(bits=4))
        assert [isinstance(factory, kind) for kind in kinds] == [isinstance(inner, kind) for kind in kinds]


@pytest.fixture(scope="module")
def clients():
    data = dpfl.data.digits(clients=20)
    federated = data.to_tff()
    return data, [federated.create_tf_dataset_for_client(name).batch(8) for name in federated.client_ids]


@pytest.mark.parametrize("name", ["private", "private, weighted", "plain", "quantised by TFF as well"])
def test_learning(tff, clients, name):
    data, datasets = clients
    algorithms, sgd = tff.learning.algorithms, tff.learning.optimizers.build_sgdm
    private = tff.aggregators.DifferentiallyPrivateFactory.gaussian_fixed(0.1, clients_per_round=20.0, clip=1.0)
    inner = {
        "private": private,
        "private, weighted": private,
        "plain": tff.aggregators.MeanFactory(),
        "quantised by TFF as well": tff.learning.compression_aggregator(),
    }[name]
    factory = dpfl.tff.compressed(inner, dpfl.Compression(bits=4, rotation=True))

    def model():
        keras = tf.keras.Sequential([tf.keras.layers.Flatten(input_shape=(8, 8, 1)), tf.keras.layers.Dense(10)])
        loss = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        return tff.learning.models.from_keras_model(keras, loss, input_spec=datasets[0].element_spec)

    if name == "private":
        learning = algorithms.build_unweighted_fed_avg(model, sgd(0.5), model_aggregator=factory)
    else:
        if name == "private, weighted":
            factory = tff.aggregators.as_weighted_aggregator(factory)
        learning = algorithms.build_weighted_fed_avg(model, sgd(0.5), model_aggregator=factory)
    state = learning.initialize()
    for _ in range(4):
        output = learning.next(state, datasets)
        state = output.state
    kernel, bias = learning.get_model_weights(state).trainable
    assert np.mean((data.x_test.reshape(-1, 64) @ kernel + bias).argmax(axis=1) == data.y_test) > 0.7
    # 650 weights in 6 buckets of 128 codes of half a byte, each with its scale.
    assert output.metrics["aggregator"].message_bytes == 6 * (64 + 4)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda tff: dpfl.tff.compressed(None, dpfl.Compression()), "must be an aggregation factory"),
        (lambda tff: dpfl.tff.compressed(tff.aggregators.SumFactory(), 4), "must be a dpfl.Compression"),
        (lambda tff: process(tff, tff.aggregators.SumFactory(), sparsity=0.5), "pruning follows the released"),
        (lambda tff: process(tff, tff.aggregators.SumFactory(), top_k=5), "a choice of the server"),
        (lambda tff: process(tff, tff.aggregators.SumFactory(), random_k=300), "the model has 248 weights"),
        (lambda tff: process(tff, tff.aggregators.SumFactory(), seed=-1), "seed"),
        (
            lambda tff: dpfl.tff.compressed(tff.aggregators.SumFactory(), dpfl.Compression(bits=4)).create(
                tff.types.to_type((np.int32, (4,)))
            ),
            "must be float32 tensors",
        ),
    ],
)
def test_sentences(tff, call, words):
    with pytest.raises(dpfl.InputError, match=words) as caught:
        call(tff)
    assert "\n" not in str(caught.value)
