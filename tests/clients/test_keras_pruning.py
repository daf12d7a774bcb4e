"""Pruning in Keras: tfmot's schedules and wrappers beside dpfl's, and DP-SGD that prunes as it trains."""

import itertools

import numpy as np
import pytest
import tensorflow as tf

import dpfl
from dpfl.clients.keras_door import as_prunable, pruning_schedule
from dpfl.clients.keras_door.pruning import prunable_layers, tfmot_keras
from dpfl.compression import compressed_size, lite_logits, to_lite
from dpfl.compression.subspace import Subspaces

LOSS = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
X = np.random.default_rng(0).normal(size=(120, 8)).astype(np.float32)
Y = (X[:, 0] + X[:, 1] > 0).astype(np.int64)
STEPS = 24  # of `fit`


def plain():
    tf.keras.utils.set_random_seed(3)
    layers = tf.keras.layers
    return tf.keras.Sequential([layers.Input((8,)), layers.Dense(40, "relu"), layers.Dense(2)])


def fit(model, callbacks=(), *, noise=1.0, seed=5, epochs=4, optimizer=dpfl.DPKerasSGDOptimizer, **compiled):
    wrapped = model if isinstance(model, dpfl.DPModel) else dpfl.DPModel(model, seed=seed)
    if not wrapped._is_compiled:
        wrapped.compile(optimizer(1.0, noise, learning_rate=0.3), loss=LOSS, **compiled)
    wrapped.fit(X, Y, batch_size=20, epochs=epochs, verbose=0, callbacks=list(callbacks))
    return wrapped


class Seen(tf.keras.callbacks.Callback):
    """The weights after every step."""

    def __init__(self):
        super().__init__()
        self.kernels = []

    def on_train_batch_end(self, batch, logs=None):
        self.kernels.append([weight.numpy() for weight in self.model.model.trainable_weights])


@pytest.mark.parametrize("every", [1, 4, 7])
@pytest.mark.parametrize(("begins", "ends"), [(0.1, 0.6), (0.0, 1.0), (0.5, 0.5), (0.13, 0.87)])
@pytest.mark.parametrize("steps", [1, 10, 41])
def test_tfmots_schedule_is_dpfls(every, begins, ends, steps):
    compression = dpfl.Compression(sparsity=0.9, pruning_begins=begins, pruning_ends=ends, pruning_every=every)
    schedule, current = pruning_schedule(compression, steps), 0.0
    assert isinstance(schedule, (tfmot_keras().PolynomialDecay, tfmot_keras().ConstantSparsity))
    for step in range(1, steps + 1):
        prunes, sparsity = schedule(tf.constant(step, tf.int64))
        current = float(sparsity) if bool(prunes) else current
        assert current == pytest.approx(compression.sparsity_after(step, steps), abs=1e-6), step


def test_where_tfmot_has_the_schedule_it_is_tfmots_own():
    schedule = pruning_schedule(dpfl.Compression(sparsity=0.8, pruning_every=5), 100)
    assert type(schedule) is tfmot_keras().PolynomialDecay
    assert schedule.get_config()["config"] == {
        "initial_sparsity": 0.0,
        "final_sparsity": 0.8,
        "power": 3,
        "begin_step": 10,
        "end_step": 60,
        "frequency": 5,
    }


@pytest.fixture(scope="module")
def trained():
    """A model that was pruned as it was trained: the callback, the weights after every step and the DPModel."""
    pruning, seen = dpfl.PruningCallback(dpfl.Compression(sparsity=0.9, pruning_every=2)), Seen()
    return pruning, seen, fit(plain(), [pruning, seen])


def test_the_sparsity_is_the_schedules_after_every_step(trained):
    compression = dpfl.Compression(sparsity=0.9, pruning_every=2)
    assert len(trained[1].kernels) == STEPS
    for step, weights in enumerate(trained[1].kernels, start=1):
        expected = compression.sparsity_after(step, STEPS)
        for weight in weights:
            zeros = round(expected * weight.size) if weight.ndim > 1 else 0
            assert abs(np.sum(weight == 0) - zeros) <= 1  # tfmot rounds in float32


def test_pruned_weights_stay_zero_and_the_others_move(trained):
    kernels = trained[1].kernels
    for before, after in itertools.pairwise(kernels):
        for old, new in zip(before[::2], after[::2], strict=True):
            assert not np.any(new[old == 0])
            assert np.all(new[new != 0] != old[new != 0])


def test_the_masks_are_those_of_a_federated_run(trained):
    """tfmot's masks and dpfl's leave the same weights of the same model."""
    compression, weights = dpfl.Compression(sparsity=0.9), trained[2].model.get_weights()
    masks = Subspaces(compression, [weight.shape for weight in weights], 10).masks(
        [tf.constant(weight) for weight in weights], tf.constant(10)
    )
    for weight, mask in zip(weights, masks, strict=True):
        np.testing.assert_array_equal(weight * mask, weight)


def test_pruning_costs_no_privacy(trained):
    without = fit(plain())
    assert trained[2].steps == without.steps == STEPS
    assert trained[2].epsilon(1e-3) == without.epsilon(1e-3) > 0
    assert trained[2].guarantee(1e-3) == without.guarantee(1e-3)


def test_before_it_begins_training_is_the_same():
    compression, seen, without = dpfl.Compression(sparsity=0.5, pruning_begins=0.5), Seen(), Seen()
    fit(plain(), [dpfl.PruningCallback(compression), seen])
    fit(plain(), [without])
    for ours, theirs in zip(seen.kernels[:12], without.kernels[:12], strict=True):
        for our, their in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(our, their)


def test_wrapped_and_stripped_it_is_the_same_model(trained):
    pruning, _, model = trained
    stripped = tfmot_keras().strip_pruning(pruning.wrapped)
    assert [type(layer) for layer in stripped.layers] == [tf.keras.layers.Dense] * 2
    for predicting in (pruning.wrapped, stripped):
        np.testing.assert_array_equal(predicting(X, training=False), model.model(X))
    for layer in prunable_layers(pruning.wrapped):
        for weight, mask, _ in layer.pruning_vars:
            np.testing.assert_array_equal(mask.numpy(), weight.numpy() != 0)


def test_it_is_exported(trained, tmp_path):
    stripped = tfmot_keras().strip_pruning(trained[0].wrapped)
    stripped.save(tmp_path / "pruned.keras")
    loaded = tf.keras.models.load_model(tmp_path / "pruned.keras")
    np.testing.assert_array_equal(loaded(X), trained[2].model(X))
    content = to_lite(stripped)
    np.testing.assert_allclose(lite_logits(content, X), stripped(X), rtol=1e-4, atol=1e-5)
    assert compressed_size(content) < 0.7 * compressed_size(to_lite(plain()))


def test_further_calls_of_fit_go_on_with_the_schedule():
    compression = dpfl.Compression(sparsity=0.9)
    model, seen, whole = dpfl.DPModel(plain(), seed=5), Seen(), Seen()
    fit(plain(), [dpfl.PruningCallback(compression), whole])
    pruning = dpfl.PruningCallback(compression, steps=STEPS)
    for epochs, again in ((2, pruning), (1, pruning), (1, dpfl.PruningCallback(compression, steps=STEPS))):
        fit(model, [again, seen], epochs=epochs)
    for ours, theirs in zip(seen.kernels, whole.kernels, strict=True):
        for our, their in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(our, their)


def test_momentum_does_not_bring_weights_back():
    seen = Seen()
    optimizer = lambda *arguments, **settings: dpfl.DPKerasSGDOptimizer(*arguments, momentum=0.9, **settings)  # noqa: E731
    fit(plain(), [dpfl.PruningCallback(dpfl.Compression(sparsity=0.9)), seen], optimizer=optimizer)
    for before, after in itertools.pairwise(seen.kernels):
        for old, new in zip(before[::2], after[::2], strict=True):
            assert not np.any(new[old == 0])


@pytest.fixture(scope="module")
def federated():
    data = dpfl.data.from_arrays(X, Y, np.arange(120) % 30)
    return dpfl.Experiment(
        data=data,
        model="mlp",
        local=dpfl.ClientTraining(learning_rate=0.3, epochs=1, batch_size=5),
        privacy=dpfl.Privacy(epsilon=8, delta=1e-2),
        mechanism=dpfl.Gaussian(clip_norm=0.5),
        sampler=dpfl.Poisson(cohort=10),
        rounds=4,
        compression=dpfl.Compression(sparsity=0.8, pruning_begins=0.0, pruning_ends=0.5),
    ).run(progress=False)


def test_a_federated_model_keeps_its_masks_in_tfmot(federated):
    model = federated.keras_model()
    wrapped = as_prunable(model)
    np.testing.assert_array_equal(wrapped(X, training=False), federated.keras_model()(X))
    for layer in prunable_layers(wrapped):
        for weight, mask, _ in layer.pruning_vars:
            assert np.mean(mask.numpy() == 0) == pytest.approx(0.8, abs=0.01)
            np.testing.assert_array_equal(mask.numpy(), weight.numpy() != 0)
    stripped = tfmot_keras().strip_pruning(wrapped)
    for ours, theirs in zip(stripped.get_weights(), federated.weights, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert lite_logits(to_lite(stripped, "int8"), X).shape == (120, 2)


def test_a_federated_model_is_trained_further_by_tfmot(federated):
    """Without privacy, on public data say: its zeros stay."""
    wrapped = as_prunable(federated.keras_model())
    wrapped.compile("sgd", loss=LOSS)
    wrapped.fit(X, Y, batch_size=40, epochs=2, verbose=0, callbacks=[tfmot_keras().UpdatePruningStep()])
    stripped = tfmot_keras().strip_pruning(wrapped)
    for after, before in zip(stripped.get_weights()[::2], federated.weights[::2], strict=True):
        assert not np.any(after[before == 0])
        assert np.any(after != before)


def _functional():
    inputs = tf.keras.Input([8])
    hidden = tf.keras.layers.Dense(8, "tanh")(inputs)
    hidden = tf.keras.layers.LayerNormalization()(tf.keras.layers.Add()([hidden, inputs]))
    return tf.keras.Model(inputs, tf.keras.layers.Dense(2)(hidden))


def _recurrent():
    layers = tf.keras.layers
    return tf.keras.Sequential([layers.Input((8,)), layers.Reshape((4, 2)), layers.SimpleRNN(6), layers.Dense(2)])


@pytest.mark.parametrize("build", [_functional, _recurrent])
def test_other_models(build):
    pruning = dpfl.PruningCallback(dpfl.Compression(sparsity=0.75))
    model = fit(build(), [pruning], epochs=1)
    pruned = [weight for layer in prunable_layers(pruning.wrapped) for weight, _, _ in layer.pruning_vars]
    assert len(pruned) == (2 if build is _functional else 3)
    for weight in pruned:
        assert np.mean(weight.numpy() == 0) == pytest.approx(0.75, abs=0.03)
    again = as_prunable(model.model)
    np.testing.assert_allclose(tfmot_keras().strip_pruning(again)(X), model.model(X), rtol=1e-5, atol=1e-6)


class _Subclassed(tf.keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = tf.keras.layers.Dense(2)

    def call(self, inputs, training=None):
        return self.dense(inputs)


COMPRESSION = dpfl.Compression(sparsity=0.5)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: dpfl.PruningCallback(dpfl.Compression()), "sparsity is 0"),
        (lambda: pruning_schedule(COMPRESSION, 0), "one step or more"),
        (lambda: as_prunable(_Subclassed()), "sequential and functional"),
        (lambda: as_prunable(dpfl.DPModel(plain())), "wrap the Keras model in it"),
        (lambda: fit(_Subclassed(), [dpfl.PruningCallback(COMPRESSION)]), "sequential and functional"),
        (lambda: fit(plain(), [dpfl.PruningCallback(COMPRESSION)], steps_per_execution=2), "steps_per_execution=1"),
        (lambda: fit(fit(plain(), epochs=1), [dpfl.PruningCallback(COMPRESSION)]), "number of steps of all calls"),
        (lambda: fit(as_prunable(plain())), "fit dpfl.PruningCallback"),
    ],
)
def test_sentences(call, words):
    with pytest.raises(dpfl.InputError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_plain_keras_is_refused_by_the_callback():
    model = plain()
    model.compile("sgd", loss=LOSS)
    with pytest.raises(dpfl.InputError, match="wrap yours in dpfl"):
        model.fit(X, Y, verbose=0, callbacks=[dpfl.PruningCallback(COMPRESSION)])
