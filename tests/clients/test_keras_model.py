"""DPModel's steps beside plain Keras' and beside a loop over the examples."""

import keras_door_helpers as helpers
import numpy as np
import pytest
import tensorflow as tf

import dpfl

MODELS = {"sequential": helpers.sequential, "functional": helpers.functional, "subclassed": helpers.subclassed}
BUILT = {name: lambda build=build: _built(build()) for name, build in MODELS.items()}


def _built(model):
    model(helpers.data()[0])
    return model


def _clipped_mean(model, x, y, clip, weights):
    """The naive loop: each example's gradient on its own, clipped, summed and divided by the batch size."""
    total = 0.0
    for row in range(len(x)):
        with tf.GradientTape() as tape:
            loss = weights[row] * helpers.CROSS_ENTROPY(y[row : row + 1], model(x[row : row + 1], training=True))
        gradient = np.concatenate([part.numpy().ravel() for part in tape.gradient(loss, model.trainable_weights)])
        total = total + gradient * min(1.0, clip / max(np.linalg.norm(gradient), 1e-30))
    return total / len(x)


@pytest.mark.parametrize(
    ("name", "optimizer"), [*((name, "sgd") for name in MODELS), ("functional", "adam"), ("sequential", "adagrad")]
)
def test_without_noise_and_clipping_a_step_is_keras_own(name, optimizer):
    x, y = helpers.data()
    plain, wrapped = BUILT[name](), dpfl.DPModel(MODELS[name]())
    wrapped.model(x)
    keras, ours = {
        "sgd": (tf.keras.optimizers.SGD(0.3, momentum=0.9), dpfl.DPKerasSGDOptimizer(1e6, 0, momentum=0.9)),
        "adam": (tf.keras.optimizers.Adam(0.3), dpfl.DPKerasAdamOptimizer(1e6, 0)),
        "adagrad": (tf.keras.optimizers.Adagrad(0.3), dpfl.DPKerasAdagradOptimizer(1e6, 0)),
    }[optimizer]
    ours.learning_rate = 0.3
    plain.compile(keras, helpers.CROSS_ENTROPY, metrics=["accuracy"])
    wrapped.compile(ours, helpers.CROSS_ENTROPY, metrics=["accuracy"])
    theirs = plain.fit(x, y, batch_size=len(x), epochs=3, shuffle=False, verbose=0).history
    # At rate 1 everybody is drawn.
    history = wrapped.fit(x, y, batch_size=len(x), epochs=3, verbose=0).history
    np.testing.assert_allclose(helpers.flat(wrapped.model), helpers.flat(plain), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(history["loss"], theirs["loss"], rtol=1e-4)
    np.testing.assert_allclose(history["accuracy"], theirs["accuracy"], rtol=1e-6)
    np.testing.assert_allclose(wrapped.evaluate(x, y, verbose=0), plain.evaluate(x, y, verbose=0), rtol=1e-4)
    np.testing.assert_allclose(wrapped.predict(x, verbose=0), plain.predict(x, verbose=0), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("name", "microbatch_size"), [*((name, None) for name in MODELS), ("functional", 7)])
def test_a_clipped_step_is_that_of_a_loop(name, microbatch_size):
    x, y = helpers.data()
    weights = np.random.default_rng(3).uniform(0, 2, len(x)).astype(np.float32)
    model = BUILT[name]()
    before, expected = helpers.flat(model), _clipped_mean(model, x, y, 0.2, weights)
    wrapped = helpers.private(model, clip=0.2, noise=0, learning_rate=0.5, microbatch_size=microbatch_size)
    wrapped.fit(x, y, batch_size=len(x), sample_weight=weights, verbose=0)
    np.testing.assert_allclose(helpers.flat(model) - before, -0.5 * expected, rtol=1e-4, atol=1e-7)


def test_sums_are_divided_by_the_expected_batch_size():
    x, y = helpers.data(40)
    model = BUILT["sequential"]()
    batches = dpfl.PoissonBatches(x, y, 10, seed=2)
    rows = batches.rows(0)
    assert len(rows) != 10
    before = helpers.flat(model)
    expected = _clipped_mean(model, x[rows], y[rows], 0.2, np.ones(len(rows))) * len(rows) / 10
    helpers.private(model, clip=0.2, noise=0).fit(dpfl.PoissonBatches(x, y, 10, seed=2, steps_per_epoch=1), verbose=0)
    np.testing.assert_allclose(helpers.flat(model) - before, -expected, rtol=1e-4, atol=1e-7)


def test_padding_changes_nothing():
    x, y = helpers.data(40)
    models = [BUILT["sequential"](), BUILT["sequential"]()]
    histories = [
        helpers.private(model, clip=0.2, metrics=["accuracy"])
        .fit(x, y, batch_size=5, epochs=2, max_batch_size=limit, verbose=0)
        .history
        for model, limit in zip(models, (None, 20), strict=True)
    ]
    np.testing.assert_allclose(helpers.flat(models[0]), helpers.flat(models[1]), rtol=1e-4, atol=1e-6)
    for name, values in histories[0].items():
        np.testing.assert_allclose(values, histories[1][name], rtol=1e-5)


def test_class_weights_are_sample_weights():
    x, y = helpers.data()
    models = [BUILT["sequential"](), BUILT["sequential"]()]
    helpers.private(models[0], noise=0).fit(x, y, batch_size=len(x), class_weight={0: 0.3, 1: 1.7}, verbose=0)
    weights = np.where(y == 1, 1.7, 0.3)
    helpers.private(models[1], noise=0).fit(x, y, batch_size=len(x), sample_weight=weights, verbose=0)
    np.testing.assert_array_equal(helpers.flat(models[0]), helpers.flat(models[1]))


def test_penalties_are_neither_clipped_nor_noised():
    x, y = helpers.data()
    model = _built(helpers.sequential(regularizer=tf.keras.regularizers.L2(0.5)))
    kernel = model.layers[0].kernel
    before = kernel.numpy()
    helpers.private(model, clip=1e-9, noise=1.0, learning_rate=0.1).fit(x, y, batch_size=len(x), verbose=0)
    np.testing.assert_allclose(kernel.numpy(), before * (1 - 0.1), rtol=1e-5)


@pytest.mark.parametrize(
    ("loss", "labels", "outputs"),
    [
        ("mse", "vector", 1),
        ("mean_absolute_error", "column", 1),
        (tf.keras.losses.BinaryCrossentropy(from_logits=True), "vector", 1),
        (tf.keras.losses.CategoricalCrossentropy(True, reduction=tf.keras.losses.Reduction.NONE), "one-hot", 2),
        (tf.keras.losses.Huber(reduction="sum"), "one-hot", 2),
        (lambda y, outputs: tf.reduce_mean(tf.abs(tf.cast(y, tf.float32) - outputs), axis=-1), "one-hot", 2),
    ],
)
def test_losses(loss, labels, outputs):
    x, y = helpers.data()
    y = {"vector": y.astype(np.float64), "column": y[:, None], "one-hot": np.eye(2, dtype=np.float32)[y]}[labels]
    builds = [tf.keras.Sequential([tf.keras.layers.Dense(outputs, kernel_initializer="ones")]) for _ in range(2)]
    for model in builds:
        model(x)
    # Keras' own step needs a reduction to the mean.
    mean = loss
    if isinstance(loss, tf.keras.losses.Loss):
        mean = type(loss).from_config({**loss.get_config(), "reduction": "sum_over_batch_size"})
    builds[0].compile(tf.keras.optimizers.SGD(1.0), mean)
    theirs = builds[0].fit(x, y, batch_size=len(x), verbose=0).history["loss"]
    wrapped = helpers.private(builds[1], clip=1e6, noise=0, loss=loss)
    ours = wrapped.fit(x, y, batch_size=len(x), verbose=0).history["loss"]
    np.testing.assert_allclose(helpers.flat(builds[1]), helpers.flat(builds[0]), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_losses_of_sequences_are_means_over_positions():
    x = np.random.default_rng(0).normal(size=(12, 4, 3))
    y = np.random.default_rng(1).integers(5, size=(12, 4))
    builds = [tf.keras.Sequential([tf.keras.layers.Dense(5, kernel_initializer="ones")]) for _ in range(2)]
    builds[0].compile(tf.keras.optimizers.SGD(1.0), helpers.CROSS_ENTROPY)
    builds[0].fit(x, y, batch_size=12, verbose=0)
    helpers.private(builds[1], clip=1e6, noise=0).fit(x, y, batch_size=12, verbose=0)
    np.testing.assert_allclose(helpers.flat(builds[1]), helpers.flat(builds[0]), rtol=1e-4, atol=1e-6)


def test_nests_of_inputs():
    draws = np.random.default_rng(0)
    x = {"words": draws.integers(9, size=(20, 4)), "age": draws.normal(size=(20, 1))}
    inputs = {"words": tf.keras.Input([4], dtype=tf.int64, name="words"), "age": tf.keras.Input([1], name="age")}
    embedded = tf.keras.layers.GlobalAveragePooling1D()(tf.keras.layers.Embedding(9, 3)(inputs["words"]))
    outputs = tf.keras.layers.Dense(2)(tf.keras.layers.Concatenate()([embedded, inputs["age"]]))
    model = tf.keras.Model(inputs, outputs)
    before = helpers.flat(model)
    helpers.private(model).fit(x, draws.integers(2, size=20), batch_size=5, verbose=0)
    assert np.isfinite(helpers.flat(model)).all()
    assert (helpers.flat(model) != before).all()


def test_fit_learns_privately():
    x, y = helpers.data(2000)
    wrapped = helpers.private(noise=1.0, learning_rate=1.0, metrics=["accuracy"])
    history = wrapped.fit(x[:1600], y[:1600], batch_size=160, epochs=4, validation_data=(x[1600:], y[1600:]), verbose=0)
    assert history.history["val_accuracy"][-1] > 0.9
    assert wrapped.guarantee(1e-4).epsilon < 5


@pytest.mark.parametrize("compiled", [{"run_eagerly": True}, {"steps_per_execution": 3}])
def test_other_ways_to_run(compiled):
    x, y = helpers.data()
    models = [BUILT["sequential"](), BUILT["sequential"]()]
    for model, settings in zip(models, ({}, compiled), strict=True):
        wrapped = helpers.private(model, compiled=settings)
        wrapped.fit(x, y, batch_size=4, epochs=2, verbose=0)
        assert wrapped.steps == 12
    np.testing.assert_allclose(helpers.flat(models[0]), helpers.flat(models[1]), rtol=1e-5, atol=1e-6)


def test_a_learning_rate_schedule_and_a_validation_split():
    x, y = helpers.data(50)
    schedule = tf.keras.optimizers.schedules.ExponentialDecay(0.5, 3, 0.5)
    wrapped = helpers.private(learning_rate=schedule)
    history = wrapped.fit(x, y, batch_size=8, epochs=2, validation_split=0.2, verbose=0).history
    assert len(history["val_loss"]) == 2
    assert wrapped.guarantee(1e-3).privacy_event().event.sampling_probability == 8 / 40


def test_the_trained_model_is_saved(tmp_path):
    x, y = helpers.data()
    wrapped = helpers.private()
    wrapped.fit(x, y, batch_size=8, verbose=0)
    wrapped.save(tmp_path / "model.keras")
    loaded = tf.keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(loaded.predict(x, verbose=0), wrapped.predict(x, verbose=0), rtol=1e-5)


def test_summary_is_that_of_the_model(capsys):
    model = BUILT["sequential"]()
    helpers.private(model).summary()
    assert f"Total params: {model.count_params()}" in capsys.readouterr().out


def _mixed():
    return tf.keras.Sequential([tf.keras.layers.Dense(2, dtype="mixed_bfloat16")])


def _two_outputs():
    inputs = tf.keras.Input([6])
    return tf.keras.Model(inputs, [tf.keras.layers.Dense(2)(inputs), tf.keras.layers.Dense(2)(inputs)])


@pytest.mark.parametrize(
    ("model", "complaint"),
    [
        (_two_outputs, "one output"),
        (_mixed, "float32 throughout"),
        (lambda: tf.keras.Sequential([tf.keras.layers.Flatten()]), "no trainable weights"),
        (lambda: tf.keras.Sequential([tf.keras.layers.BatchNormalization(), tf.keras.layers.Dense(2)]), "Batch"),
        (lambda: tf.keras.Sequential([tf.keras.layers.Conv2D(3, 2)]), "cannot be applied"),
    ],
)
def test_models_that_cannot_be_private_are_refused_before_training(model, complaint):
    x, y = helpers.data()
    wrapped = helpers.private(model())
    with pytest.raises(dpfl.InputError, match=complaint):
        wrapped.fit(x, y, batch_size=8, verbose=0)
    assert wrapped.steps == 0


@pytest.mark.parametrize(
    ("loss", "complaint"),
    [
        (None, "loss must be one"),
        ({"a": "mse"}, "loss must be one"),
        ("no such loss", "no Keras loss"),
        (lambda y, outputs: tf.reduce_mean(outputs), "a value for each example"),
        (lambda y, outputs: tf.nn.softmax(outputs[:, 0], axis=0), "depends on the other examples"),
        (lambda y, outputs: tf.matmul(outputs, outputs), "cannot be applied"),
    ],
)
def test_losses_that_cannot_be_private_are_refused(loss, complaint):
    x, y = helpers.data()
    with pytest.raises(dpfl.InputError, match=complaint):
        helpers.private(loss=loss).fit(x, y, batch_size=8, verbose=0)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"optimizer": "sgd"}, "one of dpfl's"),
        ({"optimizer": tf.keras.optimizers.Adam()}, "one of dpfl's"),
        ({"jit_compile": True}, "jit_compile"),
        ({"loss_weights": [1.0]}, "loss_weights"),
        ({"steps_per_execution": "auto"}, "steps_per_execution"),
    ],
)
def test_compile_refuses_what_cannot_be_private(settings, complaint):
    wrapped = dpfl.DPModel(helpers.sequential())
    with pytest.raises(dpfl.InputError, match=complaint):
        wrapped.compile(**{"optimizer": dpfl.DPKerasSGDOptimizer(1.0, 1.0), "loss": "mse", **settings})


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"x": tf.data.Dataset.from_tensor_slices(helpers.data()).batch(8), "y": None}, "how it samples"),
        ({"x": iter([helpers.data()]), "y": None}, "how it samples"),
        ({"x": dpfl.PoissonBatches(*helpers.data(), 8)}, "a second time"),
        ({"y": None}, "labels are missing"),
        ({"y": np.zeros(3)}, "same number of examples"),
        ({"y": [np.zeros(24), np.zeros(24)]}, "one array"),
        ({"shuffle": False}, "shuffle=False"),
        ({"batch_size": 25}, "from 1 to the number of examples"),
        ({"batch_size": 2.5}, "from 1 to the number of examples"),
        ({"max_batch_size": 7}, "at least batch_size"),
        ({"sampling": "uniform"}, "no sampling"),
        ({"sampling": "shuffled", "max_batch_size": 9}, "Poisson minibatches"),
        ({"sample_weight": np.full(24, np.nan)}, "sample_weight"),
        ({"sample_weight": np.ones(3)}, "sample_weight"),
        ({"class_weight": {0: 1.0}}, "class_weight lacks"),
        ({"steps_per_epoch": 0}, "steps_per_epoch"),
        ({"x": np.array(["a"] * 24)}, "arrays of numbers"),
        ({"x": "text"}, "must be arrays"),
        ({"validation_split": 1.5}, "validation_split"),
    ],
)
def test_fit_refuses_what_cannot_be_private(changes, complaint):
    x, y = helpers.data()
    wrapped = helpers.private()
    with pytest.raises(dpfl.InputError, match=complaint):
        wrapped.fit(**{"x": x, "y": y, "batch_size": 8, "verbose": 0, **changes})
    assert wrapped.steps == 0


def test_other_refusals():
    x, y = helpers.data()
    wrapped = helpers.private()
    with pytest.raises(dpfl.InputError, match="train_on_batch"):
        wrapped.train_on_batch(x, y)
    with pytest.raises(dpfl.InputError, match="compiled before"):
        dpfl.DPModel(helpers.sequential()).fit(x, y)
    for model in ("softmax", wrapped):
        with pytest.raises(dpfl.InputError, match="wraps a Keras model"):
            dpfl.DPModel(model)
    with pytest.raises(dpfl.InputError, match="seed"):
        dpfl.DPModel(helpers.sequential(), seed=-1)


def test_minibatches_of_all_sizes_share_one_trace():
    x, y = helpers.data(40)
    wrapped = helpers.private(metrics=["accuracy"])
    wrapped.fit(x, y, batch_size=4, epochs=3, verbose=0)
    wrapped.fit(x, y, batch_size=8, verbose=0)
    assert wrapped.train_function.experimental_get_tracing_count() == 1
