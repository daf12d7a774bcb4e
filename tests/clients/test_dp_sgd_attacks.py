"""Ways in which the ledger of a private training could be fooled."""

import copy
import pickle

import keras_door_helpers as helpers
import numpy as np
import pytest
import tensorflow as tf

import dpfl
from dpfl.clients.example_privacy import plan_clients

_DELTA = 1e-3
_SETTINGS = {"batch_size": 8, "steps_per_epoch": 2, "verbose": 0}


def _compile(wrapped, noise):
    wrapped.compile(dpfl.DPKerasSGDOptimizer(1.0, noise, learning_rate=1.0), helpers.CROSS_ENTROPY)


def _charged(wrapped):
    return {entry.release.noise_multiplier: entry.steps for entry in wrapped._ledger.entries()}


class _OnBegin(tf.keras.callbacks.Callback):
    def __init__(self, action):
        super().__init__()
        self._action = action

    def on_train_begin(self, logs=None):
        self._action(self.model)


def test_what_is_exchanged_after_compile_is_refused():
    x, y = helpers.data(40)
    wrapped = helpers.private(noise=1.0)
    wrapped.fit(x, y, **_SETTINGS)
    compiled, model = wrapped.optimizer, wrapped.model
    wrapped.optimizer = dpfl.DPKerasSGDOptimizer(1.0, 1e6)
    with pytest.raises(dpfl.InputError, match="compile again"):
        wrapped.fit(x, y, **_SETTINGS)
    wrapped.optimizer, wrapped.model = compiled, helpers.sequential()
    with pytest.raises(dpfl.InputError, match="compile again"):
        wrapped.fit(x, y, **_SETTINGS)
    wrapped.model = model
    wrapped.fit(x, y, **_SETTINGS)
    assert _charged(wrapped) == {1.0: 4}


@pytest.mark.parametrize("seed", [None, 9])
def test_a_restored_checkpoint_forgets_nothing_and_repeats_no_noise(seed, tmp_path):
    x, y = helpers.data(40)
    tf.keras.utils.set_random_seed(1)
    wrapped = helpers.private(tf.keras.Sequential([tf.keras.layers.Dense(400), tf.keras.layers.Dense(2)]), seed=seed)
    settings = {**_SETTINGS, "sample_weight": np.zeros(40)}
    wrapped.fit(x, y, **settings)
    checkpoint = tf.train.Checkpoint(model=wrapped)
    path = checkpoint.save(str(tmp_path / "saved"))
    first, again, within = (helpers.Weights() for _ in range(3))
    wrapped.fit(x, y, callbacks=[first], **settings)
    checkpoint.restore(path)
    assert wrapped.steps == 4
    wrapped.fit(x, y, callbacks=[again], **settings)
    assert _charged(wrapped) == {1.0: 6}
    restoring = _OnBegin(lambda _: checkpoint.restore(path))
    wrapped.fit(x, y, callbacks=[restoring, within], **settings)
    assert _charged(wrapped) == {1.0: 8}
    updates = np.concatenate([first.updates, again.updates, within.updates[-1:]])
    correlations = np.corrcoef(updates)[~np.eye(len(updates), dtype=bool)]
    assert (abs(correlations) < 6 / np.sqrt(updates.shape[1])).all()


@pytest.mark.parametrize("how", ["weights", "checkpoint"])
def test_steps_after_a_restore_within_fit_are_charged_with_their_own_noise(how, tmp_path):
    x, y = helpers.data(40)
    earlier = helpers.private(noise=2.0)
    earlier.fit(x, y, **_SETTINGS)
    _compile(earlier, 1.0)
    earlier.fit(x, y, **_SETTINGS)
    path = str(tmp_path / "saved")
    if how == "weights":
        earlier.save_weights(path)
    else:
        path = tf.train.Checkpoint(model=earlier).save(path)

    def restore(model):
        if how == "weights":
            model.load_weights(path)
        else:
            tf.train.Checkpoint(model=model).restore(path)

    wrapped = helpers.private(noise=1.0)
    wrapped.fit(x, y, callbacks=[_OnBegin(restore)], **_SETTINGS)
    assert _charged(wrapped) == {2.0: 2, 1.0: 4}


def test_a_budget_counts_what_another_callback_restores(tmp_path):
    x, y = helpers.data(40)
    earlier = helpers.private(noise=1.0)
    earlier.fit(x, y, **_SETTINGS)
    earlier.save_weights(tmp_path / "saved")
    budget = dpfl.EpsilonCallback(_DELTA, epsilon_budget=1.001 * earlier.guarantee(_DELTA, steps=5).epsilon)
    wrapped = helpers.private(noise=1.0)
    restoring = _OnBegin(lambda model: model.load_weights(tmp_path / "saved"))
    wrapped.fit(x, y, epochs=4, callbacks=[budget, restoring], **_SETTINGS)
    assert wrapped.steps == 5


def test_minibatches_go_on_where_a_restored_ledger_stopped():
    x, y = helpers.data(40)
    batches = dpfl.PoissonBatches(x, y, 8, seed=3)
    seen = [x_batch.numpy() for x_batch, *_ in batches.dataset().take(4)]
    told = [x_batch.numpy() for x_batch, *_ in batches.dataset(lambda: 2).take(2)]
    for expected, found in zip(seen[2:], told, strict=True):
        np.testing.assert_array_equal(expected, found)


def test_a_second_wrapper_goes_on_with_the_ledger_of_its_model():
    x, y = helpers.data(40)
    model = helpers.sequential()
    first, second = helpers.private(model), helpers.private(model)
    first.fit(x, y, **_SETTINGS)
    second.fit(x, y, **_SETTINGS)
    assert first.steps == second.steps == 4
    assert helpers.private(model).guarantee(_DELTA) == first.guarantee(_DELTA) == second.guarantee(_DELTA)
    assert helpers.private().steps == 0


@pytest.mark.parametrize(
    "duplicate",
    [
        copy.deepcopy,
        pickle.dumps,
        tf.keras.models.clone_model,
        lambda model: tf.keras.models.save_model(model, "saved.keras"),
        lambda model: tf.keras.models.save_model(model, "saved"),
    ],
    ids=["deepcopy", "pickle", "clone", "keras", "tf"],
)
def test_copies_are_refused(duplicate, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x, y = helpers.data(40)
    wrapped = helpers.private()
    wrapped.fit(x, y, **_SETTINGS)
    wrapped.evaluate(x, y, verbose=0)
    with pytest.raises(dpfl.InputError, match=r"model\.save_weights"):
        duplicate(wrapped)


@pytest.mark.parametrize("eagerly", [True, False])
def test_an_interrupted_epoch_is_charged_for_the_steps_that_were_done(eagerly):
    x, y = helpers.data(40)
    wrapped = helpers.private(compiled={"run_eagerly": eagerly})

    class Interrupting(tf.keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        wrapped.fit(x, y, batch_size=8, callbacks=[Interrupting()], verbose=0)
    assert _charged(wrapped) == {1.0: 3}


def test_a_step_outside_of_fit_is_refused():
    x, y = helpers.data(40)
    wrapped = helpers.private()
    minibatch = next(iter(dpfl.PoissonBatches(x, y, 8).dataset()))
    with pytest.raises(dpfl.InputError, match="call fit"):
        wrapped.train_step(minibatch)
    assert wrapped.steps == 0


@pytest.mark.parametrize("name", ["saved", "saved.h5", "saved.weights.h5"])
def test_neither_weights_nor_files_hold_what_metrics_counted(name, tmp_path):
    x, y = helpers.data(40)
    wrapped = helpers.private(metrics=["accuracy"])
    wrapped.fit(x, y, **_SETTINGS)
    shown = {metric.name: float(metric.result()) for metric in wrapped.metrics}
    assert len(wrapped.weights) == len(wrapped.model.weights) + 2  # the ledger's
    wrapped.save_weights(tmp_path / name)
    assert {metric.name: float(metric.result()) for metric in wrapped.metrics} == shown
    found = helpers.private(metrics=["accuracy"])
    found.fit(x, y, **_SETTINGS)
    found.load_weights(tmp_path / name)
    np.testing.assert_array_equal(helpers.flat(found.model), helpers.flat(wrapped.model))
    if name == "saved":
        stored = [key for key, _ in tf.train.list_variables(str(tmp_path / name))]
        assert not any("loss" in key or "metric" in key for key in stored)
    if name == "saved.weights.h5":
        assert all(float(variable) == 0 for metric in found.metrics for variable in metric.variables)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_of_examples_that_are_not_finite_are_refused(value):
    x, y = helpers.data(40)
    wrapped = helpers.private()
    with pytest.raises(dpfl.InputError, match="finite"):
        wrapped.fit(x, y, class_weight={0: 1.0, 1: value}, **_SETTINGS)
    with pytest.raises(dpfl.InputError, match="finite"):
        wrapped.fit(x, y, sample_weight=np.full(40, value), **_SETTINGS)


@pytest.mark.parametrize(
    "settings", [{"example_sampling": "shuffled"}, {"max_batch_size": 24}], ids=["shuffled", "truncated"]
)
def test_what_no_noise_costs_needs_no_analysis(settings):
    training = dpfl.ClientTraining(batch_size=16, steps=2, example_clip=1.0, **settings)
    target = dpfl.Privacy(unit="example", epsilon=None, delta=_DELTA, accountant="rdp")
    plan = plan_clients(training, target, dpfl.Everyone(), np.array([40, 60]), 3)
    realised = plan.realised(np.array([3, 0]))
    np.testing.assert_array_equal(realised.epsilons, [np.inf, 0])
    assert "1 of the 2 clients" in realised.statement()
    assert "accountant" not in realised.statement()


def test_one_client_is_not_called_the_worst():
    training = dpfl.ClientTraining(batch_size=16, steps=2, example_clip=1.0, example_noise=2.0)
    target = dpfl.Privacy(unit="example", epsilon=None, delta=_DELTA)
    statement = plan_clients(training, target, dpfl.Everyone(), np.array([40]), 3).guarantee.statement()
    assert "the one client, which has 40 records: stated is its guarantee, charged for 3 of the 3 rounds" in statement
