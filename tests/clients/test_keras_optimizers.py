"""The optimizers' arguments, and code written for TensorFlow Privacy."""

import keras_door_helpers as helpers
import numpy as np
import pytest
import tensorflow as tf

import dpfl

OPTIMIZERS = [dpfl.DPKerasSGDOptimizer, dpfl.DPKerasAdamOptimizer, dpfl.DPKerasAdagradOptimizer]


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_code_written_for_tensorflow_privacy_runs(optimizer_class):
    """The tutorial of TensorFlow Privacy 0.9, with the import changed and the model wrapped."""
    x, y = helpers.data(200)
    train_labels = tf.keras.utils.to_categorical(y, 2)
    batch_size = num_microbatches = 50
    model = dpfl.DPModel(tf.keras.Sequential([tf.keras.layers.Dense(4, "relu"), tf.keras.layers.Dense(2)]))
    optimizer = optimizer_class(
        l2_norm_clip=1.5, noise_multiplier=1.3, num_microbatches=num_microbatches, learning_rate=0.25
    )
    loss = tf.keras.losses.CategoricalCrossentropy(from_logits=True, reduction=tf.losses.Reduction.NONE)
    model.compile(optimizer=optimizer, loss=loss, metrics=["accuracy"])
    history = model.fit(
        x, train_labels, epochs=2, validation_data=(x, train_labels), batch_size=batch_size, verbose=0
    ).history
    assert set(history) == {"loss", "accuracy", "val_loss", "val_accuracy"}
    assert np.isfinite(history["val_loss"]).all()
    event = dpfl.privacy.poisson_gaussian(1.3, 0.25, 8)
    assert model.guarantee(1e-3).epsilon == dpfl.privacy.epsilon(event, 1e-3)


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_plain_keras_is_told_to_wrap_the_model(optimizer_class):
    x, y = helpers.data()
    model = helpers.sequential()
    model.compile(optimizer_class(1.0, 1.0), helpers.CROSS_ENTROPY)
    with pytest.raises(dpfl.InputError, match=r"model = dpfl\.DPModel\(model\)"):
        model.fit(x, y, verbose=0)
    weight = tf.Variable(1.0)
    optimizer = optimizer_class(1.0, 1.0)
    with pytest.raises(dpfl.InputError, match=r"dpfl\.DPModel"):
        optimizer.minimize(lambda: weight**2, [weight])
    with pytest.raises(dpfl.InputError, match=r"dpfl\.DPModel"):
        optimizer.apply_gradients([(tf.constant(1.0), weight)])
    assert weight.numpy() == 1


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"l2_norm_clip": 0}, "l2_norm_clip"),
        ({"l2_norm_clip": np.inf}, "l2_norm_clip"),
        ({"l2_norm_clip": None}, "l2_norm_clip"),
        ({"noise_multiplier": -1}, "noise_multiplier"),
        ({"noise_multiplier": 0.001}, "noise_multiplier"),
        ({"noise_multiplier": np.nan}, "noise_multiplier"),
        ({"num_microbatches": 0}, "num_microbatches"),
        ({"microbatch_size": 1.5}, "microbatch_size"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps"),
        ({"clipping": "soft"}, "no clipping"),
    ],
)
def test_settings_out_of_range_are_refused(settings, complaint):
    with pytest.raises(dpfl.InputError, match=complaint):
        dpfl.DPKerasSGDOptimizer(**{"l2_norm_clip": 1.0, "noise_multiplier": 1.0, **settings})


def test_groups_of_examples_are_refused():
    x, y = helpers.data()
    wrapped = helpers.private(num_microbatches=4)
    with pytest.raises(dpfl.InputError, match="num_microbatches must be None or the batch size, 8"):
        wrapped.fit(x, y, batch_size=8, verbose=0)


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_an_optimizer_is_made_again_from_its_config(optimizer_class):
    optimizer = optimizer_class(0.7, 1.1, 5, learning_rate=0.3, clipping="automatic", microbatch_size=3)
    again = tf.keras.optimizers.deserialize(tf.keras.optimizers.serialize(optimizer))
    assert type(again) is optimizer_class
    assert again.get_config() == optimizer.get_config()
    assert (again.l2_norm_clip, again.noise_multiplier, again.num_microbatches) == (0.7, 1.1, 5)
    assert (again.clipping, again.microbatch_size, float(again.learning_rate)) == (
        "automatic",
        3,
        float(np.float32(0.3)),
    )


def test_what_is_accounted_cannot_be_changed():
    optimizer = dpfl.DPKerasSGDOptimizer(1.0, 1.0)
    with pytest.raises(AttributeError):
        optimizer.noise_multiplier = 0.1


@pytest.mark.parametrize("clipping", ["flat", "per_layer", "automatic"])
def test_all_clippings_bound_what_one_example_does(clipping):
    x, y = helpers.data()
    model = helpers.functional()
    before = helpers.flat(model)
    weights = np.zeros(len(x))
    weights[3] = 1e4
    wrapped = helpers.private(model, clip=0.1, noise=0, clipping=clipping)
    wrapped.fit(x, y, batch_size=len(x), sample_weight=weights, verbose=0)
    moved = np.linalg.norm(helpers.flat(model) - before) * len(x)
    assert 0.09 < moved < 0.1 * (1 + 1e-5)
