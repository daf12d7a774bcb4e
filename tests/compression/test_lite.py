"""Files of TensorFlow Lite: what they weigh, what they compute, and that no guarantee depends on them."""

import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

import dpfl
from dpfl.compression import compressed_size, lite_accuracy, lite_logits, to_lite
from dpfl.compression.config import LITE_COLUMNS
from dpfl.compression.lite import FORMATS, check_convertible, measured_columns
from dpfl.models.functional import FunctionalModel

FORMATS_OF = {"softmax": FORMATS, "mlp": FORMATS, "cnn": ("float32", "int8")}


@pytest.fixture(scope="module")
def digits():
    return dpfl.data.digits(clients=30)


def experiment(data, *, model="softmax", lite=(), epsilon=8.0, rounds=2, mechanism=None, **settings):
    return dpfl.Experiment(
        data=data,
        model=model,
        local=dpfl.ClientTraining(learning_rate=0.3, epochs=1, batch_size=10),
        privacy=dpfl.Privacy(epsilon=epsilon, delta=1e-2),
        mechanism=mechanism or dpfl.Gaussian(clip_norm=0.5),
        sampler=dpfl.Poisson(cohort=15),
        rounds=rounds,
        compression=dpfl.Compression(lite=lite, **settings),
    )


def run(*arguments, **settings):
    return experiment(*arguments, **settings).run(seed=0, progress=False)


@pytest.fixture(scope="module")
def results(digits):
    return {name: run(digits, model=name, lite=FORMATS_OF[name]) for name in FORMATS_OF}


@pytest.mark.parametrize("name", ["softmax", "mlp", "cnn"])
def test_float32_classifies_every_image_as_keras_does(results, digits, name):
    result = results[name]
    logits = result.keras_model()(digits.x_test).numpy()
    np.testing.assert_array_equal(lite_logits(result.lite_model(), digits.x_test).argmax(axis=1), logits.argmax(axis=1))
    assert result.record["lite_float32_accuracy"] == pytest.approx(result.accuracy, abs=1e-6)


@pytest.mark.parametrize("name", ["softmax", "mlp", "cnn"])
def test_the_record_says_what_the_files_weigh_and_do(results, digits, name):
    result = results[name]
    for form in FORMATS_OF[name]:
        content = result.lite_model(form)
        assert result.record[f"lite_{form}_bytes"] == len(content)
        assert result.record[f"lite_{form}_gzip_bytes"] == compressed_size(content) < len(content)
        assert result.record[f"lite_{form}_accuracy"] == lite_accuracy(content, digits.x_test, digits.y_test)
        assert abs(result.record[f"lite_{form}_accuracy"] - result.accuracy) < 0.02


def test_fewer_bits_are_fewer_bytes(results):
    record, parameters = results["mlp"].record, results["mlp"].record["parameters"]
    # Of the weights: what else is in a file does not shrink.
    assert record["lite_float32_bytes"] - record["lite_float16_bytes"] == pytest.approx(2 * parameters, rel=0.05)
    assert record["lite_int8_bytes"] < record["lite_float16_bytes"] < record["lite_float32_bytes"]
    kernel = 64 * 100  # the other one has fewer weights than TensorFlow Lite quantises
    assert record["lite_float32_bytes"] - record["lite_int8_bytes"] == pytest.approx(3 * kernel, rel=0.05)


def test_columns_are_always_there_and_the_guarantee_does_not_know_of_them(digits, results):
    plain, lite = run(digits), results["softmax"]
    assert set(LITE_COLUMNS) <= plain.record.keys()
    assert all(plain.record[column] is None for column in LITE_COLUMNS)
    assert all(lite.record[column] is not None for column in LITE_COLUMNS)
    assert lite.guarantee == plain.guarantee
    assert {name: lite.record[name] for name in ("epsilon_spent", "user_epsilon", "noise_multiplier")} == {
        name: plain.record[name] for name in ("epsilon_spent", "user_epsilon", "noise_multiplier")
    }
    for ours, theirs in zip(lite.weights, plain.weights, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    some = run(digits, lite=("int8",)).record
    assert {column for column in LITE_COLUMNS if some[column] is not None} == {
        column for column in LITE_COLUMNS if column.startswith("lite_int8")
    }


def test_a_file_is_a_function_of_the_weights_alone(results):
    """Byte for byte, though there is no data, and whatever models were made before."""
    model = FunctionalModel("mlp", (8, 8, 1), 10)
    for form in FORMATS:
        assert to_lite(model.to_keras(results["mlp"].weights), form) == results["mlp"].lite_model(form)


@pytest.mark.parametrize("form", FORMATS_OF["cnn"])
def test_logits_do_not_depend_on_the_size_of_batches(results, digits, form, monkeypatch):
    content = results["cnn"].lite_model(form)
    together = lite_logits(content, digits.x_test[:10])
    monkeypatch.setattr("dpfl.compression.lite._BATCH", 3)
    np.testing.assert_allclose(lite_logits(content, digits.x_test[:10]), together, rtol=1e-5, atol=1e-5)


class Subclassed(tf.keras.Model):
    def __init__(self):
        super().__init__()
        self.flatten, self.dense = tf.keras.layers.Flatten(), tf.keras.layers.Dense(10)

    def call(self, inputs, training=None):
        return self.dense(self.flatten(inputs))


def _functional():
    inputs = tf.keras.Input([8, 8, 1])
    hidden = tf.keras.layers.GroupNormalization(2)(tf.keras.layers.Conv2D(4, 3)(inputs))
    hidden = tf.keras.layers.Dropout(0.2)(tf.keras.layers.Flatten()(hidden))
    return tf.keras.Model(inputs, tf.keras.layers.Dense(10)(hidden))


def _dense():
    return tf.keras.Sequential([tf.keras.layers.Input((8,)), tf.keras.layers.Dense(2)])


@pytest.mark.slow
@pytest.mark.parametrize("model", [Subclassed, _functional])
def test_models_of_users(digits, model):
    result = run(digits, model=model, lite=("float32",))
    assert result.record["lite_float32_accuracy"] == pytest.approx(result.accuracy, abs=1e-6)


@pytest.mark.slow
def test_pruning_makes_a_file_smaller_once_it_is_compressed(digits):
    """Zeros are written out, so that the file stays as long as it was: gzip is what finds them."""
    dense, pruned = (
        run(digits, model="mlp", lite=("float32", "int8"), sparsity=sparsity, rounds=4) for sparsity in (0.0, 0.9)
    )
    assert np.mean(pruned.weights[0] == 0) == pytest.approx(0.9, abs=1e-3)
    assert pruned.record["lite_float32_accuracy"] == pytest.approx(pruned.accuracy, abs=1e-6)
    assert pruned.record["lite_float32_bytes"] == pytest.approx(dense.record["lite_float32_bytes"], rel=0.01)
    for form in ("float32", "int8"):
        assert pruned.record[f"lite_{form}_gzip_bytes"] < 0.5 * dense.record[f"lite_{form}_gzip_bytes"]


def test_no_test_examples(results, digits):
    result = results["softmax"]
    columns = measured_columns(
        result.functional_model, result.weights, ("float32",), digits.x_test[:0], digits.y_test[:0]
    )
    assert np.isnan(columns["lite_float32_accuracy"])
    assert columns["lite_float32_bytes"] == result.record["lite_float32_bytes"]


@pytest.mark.slow
def test_a_diverged_run_is_a_result(digits):
    local = dpfl.ClientTraining(learning_rate=1e30, epochs=2, batch_size=5)
    settings = experiment(digits, model="mlp", lite=("float32",), epsilon=None, mechanism=dpfl.NoMechanism())
    result = settings.replace(local=local, server=dpfl.ServerOptimizer(learning_rate=1e30)).run(progress=False)
    assert result.record["status"] == "diverged"
    columns = measured_columns(
        result.functional_model, [weight * np.nan for weight in result.weights], FORMATS, digits.x_test, digits.y_test
    )
    assert columns == dict.fromkeys(LITE_COLUMNS)
    broken = result.functional_model.to_keras([weight * np.nan for weight in result.weights])
    for form in FORMATS:
        with pytest.raises(dpfl.InputError, match="not finite"):
            to_lite(broken, form)


def test_what_cannot_be_converted_is_refused_before_training(digits, monkeypatch):
    def model():
        layers = tf.keras.layers
        shape = [layers.Input((8, 8, 1)), layers.Flatten()]
        return tf.keras.Sequential(
            [*shape, layers.Lambda(lambda x: tf.math.lbeta(tf.abs(x)[..., None] + 1)), layers.Dense(10)]
        )

    monkeypatch.setattr("dpfl.simulation.run._train", lambda *arguments: pytest.fail("it was trained"))
    with pytest.raises(dpfl.InputError, match="TensorFlow Lite cannot convert the model") as caught:
        run(digits, model=model, lite=("float32",))
    assert "\n" not in str(caught.value)


def test_a_model_is_converted_before_training_just_once(monkeypatch):
    model = FunctionalModel("softmax", (3, 5), 2)
    check_convertible(model, ("float32",))
    monkeypatch.setattr("dpfl.compression.lite.to_lite", lambda *arguments: pytest.fail("it was converted again"))
    check_convertible(FunctionalModel("softmax", (3, 5), 2), ("float32",))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: to_lite(tf.keras.Sequential([tf.keras.layers.Dense(2)])), "was called on examples before"),
        (lambda: to_lite(tf.keras.Sequential([tf.keras.layers.Dense(2)]), "int4"), "no TensorFlow Lite format 'int4'"),
        (lambda: lite_logits(to_lite(_dense()), np.zeros((3, 7))), "takes one or more examples of shape"),
        (lambda: lite_logits(to_lite(_dense()), np.zeros((0, 8))), "takes one or more examples of shape"),
    ],
)
def test_sentences(call, words):
    with pytest.raises(dpfl.InputError, match=words):
        call()


@pytest.mark.slow
def test_conversions_say_nothing():
    script = (
        "import dpfl, numpy as np, tensorflow as tf\n"
        "from dpfl.compression import lite_logits, to_lite\n"
        "model = tf.keras.Sequential([tf.keras.layers.Input((4,)), tf.keras.layers.Dense(3)])\n"
        "for form in ('float32', 'float16', 'int8'): lite_logits(to_lite(model, form), np.zeros((2, 4)))\n"
        "layers = [tf.keras.layers.Input((4, 2)), tf.keras.layers.LSTM(3)]\n"
        "try: to_lite(tf.keras.Sequential(layers))\n"
        "except dpfl.InputError as error: print(error)\n"
    )
    command, quiet = [sys.executable, "-c", script], {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=quiet, check=True)
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1
    assert "recurrent ones with unroll=True" in done.stdout
