"""The noise of DPModel's steps."""

import itertools

import keras_door_helpers as helpers
import numpy as np
import pytest
import tensorflow as tf
from scipy import stats

import dpfl
from dpfl.noise import normal_like, round_seed
from dpfl.randomness import Purpose, stateless_seed

_CLIP, _NOISE, _BATCH = 0.5, 1.5, 4


def _wide():
    model = tf.keras.Sequential([tf.keras.layers.Dense(3000)])
    model(np.zeros((1, 6), np.float32))
    return model


def _updates(seed, steps, examples=40, weight=0.0, epochs=1):
    x, y = helpers.data(examples)
    wrapped = helpers.private(_wide(), clip=_CLIP, noise=_NOISE, seed=seed)
    kept = helpers.Weights()
    wrapped.fit(
        x,
        y,
        batch_size=_BATCH,
        steps_per_epoch=steps,
        epochs=epochs,
        sample_weight=np.full(examples, weight),
        callbacks=[kept],
        verbose=0,
    )
    return kept.updates


def test_noise_is_normal_of_the_stated_size():
    # Examples of weight 0 leave the noise alone: 4 x 21,000 draws, divided by the expected minibatch.
    updates = _updates(seed=11, steps=4)
    draws = updates.ravel() * _BATCH / (_CLIP * _NOISE)
    # Fails with a probability below 1e-7 by chance, each.
    bound = stats.norm.isf(5e-8) / np.sqrt(len(draws))
    assert abs(draws.mean()) < bound
    assert abs(draws.var() - 1) < bound * np.sqrt(2)
    assert abs(np.mean(draws**4) / draws.var() ** 2 - 3) < bound * np.sqrt(24)
    for one, other in itertools.pairwise(updates):
        assert abs(np.corrcoef(one, other)[0, 1]) < stats.norm.isf(5e-8) / np.sqrt(len(one))


def test_an_empty_minibatch_gets_its_noise():
    x, y = helpers.data(40)
    steps = 12
    empty = [step for step in range(steps) if not len(dpfl.PoissonBatches(x, y, 1, seed=21).rows(step))]
    assert 0 < len(empty) < steps
    model = _wide()
    kept = helpers.Weights()
    wrapped = helpers.private(model, clip=_CLIP, noise=_NOISE, seed=3)
    batches = dpfl.PoissonBatches(x, y, 1, seed=21, steps_per_epoch=steps)
    history = wrapped.fit(batches, callbacks=[kept], verbose=0)
    assert np.isfinite(history.history["loss"]).all()
    key = tf.constant(stateless_seed(3, Purpose.NOISE))
    for step in range(steps):
        noise = normal_like([weight.value() for weight in model.trainable_weights], round_seed(key, step))
        noise = -_CLIP * _NOISE * np.concatenate([part.numpy().ravel() for part in noise])
        # Differences of float32 weights of size 1.
        same = np.allclose(kept.updates[step], noise, atol=1e-5)
        assert same == (step in empty)


def test_noise_is_repeated_under_the_same_seed_only():
    first, again, other = _updates(5, 2), _updates(5, 2), _updates(6, 2)
    np.testing.assert_allclose(first, again, atol=1e-6)
    secret, secret_too = _updates(None, 2), _updates(None, 2)
    for one, two in ((first, other), (secret, secret_too), (first[:1], first[1:])):
        assert abs(np.corrcoef(one.ravel(), two.ravel())[0, 1]) < 6 / np.sqrt(one.size)


@pytest.mark.parametrize(("how", "seed"), [("weights.h5", None), ("checkpoint", 9), ("weights", 9)])
def test_a_restored_model_never_repeats_noise_and_keeps_its_ledger(how, seed, tmp_path):
    x, y = helpers.data(40)
    weights = np.zeros(40)
    wrapped = helpers.private(_wide(), seed=seed)
    kept = helpers.Weights()
    wrapped.fit(x, y, batch_size=4, steps_per_epoch=2, sample_weight=weights, callbacks=[kept], verbose=0)
    restored = helpers.private(_wide(), seed=seed)
    if how == "weights":
        restored.set_weights(wrapped.get_weights())
    else:
        wrapped.save_weights(tmp_path / how)
        restored.load_weights(tmp_path / how)
    np.testing.assert_array_equal(helpers.flat(restored.model), helpers.flat(wrapped.model))
    assert restored.steps == 2
    assert restored.guarantee(1e-3) == wrapped.guarantee(1e-3)
    more = helpers.Weights()
    restored.fit(x, y, batch_size=4, steps_per_epoch=2, sample_weight=weights, callbacks=[more], verbose=0)
    assert restored.steps == 4
    updates = np.concatenate([kept.updates, more.updates])
    correlations = np.corrcoef(updates)[~np.eye(4, dtype=bool)]
    assert (abs(correlations) < 6 / np.sqrt(updates.shape[1])).all()


@pytest.mark.parametrize("seed", [None, 9])
def test_going_back_to_earlier_weights_forgets_nothing(seed):
    x, y = helpers.data(40)
    wrapped = helpers.private(_wide(), seed=seed)
    kept = helpers.Weights()
    settings = {"batch_size": 4, "steps_per_epoch": 2, "sample_weight": np.zeros(40), "verbose": 0}
    wrapped.fit(x, y, **settings)
    earlier = wrapped.get_weights()
    wrapped.fit(x, y, callbacks=[kept], **settings)
    spent = wrapped.epsilon(1e-3)
    wrapped.set_weights(earlier)
    assert wrapped.steps == 4
    assert wrapped.epsilon(1e-3) == spent
    again = helpers.Weights()
    wrapped.fit(x, y, callbacks=[again], **settings)
    assert abs(np.corrcoef(kept.updates.ravel(), again.updates.ravel())[0, 1]) < 6 / np.sqrt(kept.updates.size)


def test_early_stopping_that_restores_weights_keeps_the_ledger():
    x, y = helpers.data(40)
    wrapped = helpers.private(noise=5.0, learning_rate=5.0)
    stopping = tf.keras.callbacks.EarlyStopping("val_loss", patience=2, restore_best_weights=True)
    history = wrapped.fit(x, y, batch_size=8, epochs=40, validation_data=(x, y), callbacks=[stopping], verbose=0)
    assert len(history.epoch) < 40
    assert wrapped.steps == 5 * len(history.epoch)


def test_the_seed_of_the_noise_is_not_among_the_weights():
    x, y = helpers.data(40)
    wrapped = helpers.private(seed=12)
    wrapped.fit(x, y, batch_size=8, verbose=0)
    key = stateless_seed(12, Purpose.NOISE)
    assert not any(np.isin(key, weight).any() for weight in wrapped.get_weights())
