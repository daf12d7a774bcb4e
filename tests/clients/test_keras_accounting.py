"""What DPModel says its training cost, beside events written by hand."""

import functools

import dp_accounting
import keras_door_helpers as helpers
import numpy as np
import pytest
import tensorflow as tf

import dpfl
from dpfl.clients.keras_door.ledger import TrainingLedger
from dpfl.clients.keras_door.releases import Entry, Release
from dpfl.privacy import accounting
from dpfl.privacy.pld import pld_epsilon

_DELTA = 1e-3


def _poisson(rate, noise, steps):
    event = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise))
    return dp_accounting.SelfComposedDpEvent(event, steps)


def _epsilon(event, **analysis):
    return dpfl.privacy.epsilon(event, _DELTA, **analysis)


def _fitted(noise=1.5, **settings):
    x, y = helpers.data(40)
    wrapped = helpers.private(noise=noise)
    wrapped.fit(x, y, **{"batch_size": 8, "verbose": 0, **settings})
    return wrapped


_fitted_once = functools.cache(_fitted)


@pytest.mark.parametrize("relation", ["add_or_remove_one", "replace_one", "replace_special"])
@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_poisson_steps_cost_what_their_event_costs(relation, accountant):
    guarantee = _fitted_once(epochs=3).guarantee(_DELTA, relation, accountant)
    assert guarantee.privacy_event() == _poisson(0.2, 1.5, 15)
    assert guarantee.epsilon == _epsilon(_poisson(0.2, 1.5, 15), relation=relation, accountant=accountant)
    assert (guarantee.unit, guarantee.relation, guarantee.delta) == ("example", relation, _DELTA)
    assert (guarantee.steps, guarantee.accountant) == (15, accountant)
    assert guarantee.recomputed_epsilon() == guarantee.epsilon
    statement = guarantee.statement()
    for words in ("example level", "noise multiplier 1.5", "L2 norm 1", "15 steps", "40 training examples", "metrics"):
        assert words in statement


def test_truncated_steps_cost_what_their_event_costs():
    guarantee = _fitted(max_batch_size=9).guarantee(_DELTA)
    one = dp_accounting.TruncatedSubsampledGaussianDpEvent(40, 0.2, 9, 1.5)
    assert guarantee.epsilon == _epsilon(dp_accounting.SelfComposedDpEvent(one, 5))
    assert guarantee.epsilon > _fitted_once().guarantee(_DELTA).epsilon
    assert "at most 9" in guarantee.statement()


@pytest.mark.parametrize("relation", ["replace_one", "replace_special"])
def test_shuffled_passes_are_charged_once_each(relation):
    wrapped = _fitted_once(sampling="shuffled", epochs=3, batch_size=9)
    assert wrapped.steps == 15
    event = dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(1.5), 3)
    assert wrapped.guarantee(_DELTA, relation).epsilon == _epsilon(event, relation=relation)
    with pytest.raises(dpfl.InputError, match="shuffled minibatches"):
        wrapped.guarantee(_DELTA)


def test_a_part_of_a_pass_is_charged_and_each_fit_starts_another():
    x, y = helpers.data(40)
    wrapped = helpers.private()
    for steps, epochs in ((7, 1), (2, 1), (5, 2)):
        wrapped.fit(x, y, batch_size=8, steps_per_epoch=steps, epochs=epochs, sampling="shuffled", verbose=0)
    # 7 steps of passes of 5 are 2, 2 steps are 1, and 10 steps are 2.
    event = dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(1.0), 5)
    assert wrapped.guarantee(_DELTA, "replace_one").privacy_event() == event
    assert wrapped.steps == 19


def test_calls_of_fit_compose():
    x, y = helpers.data(40)
    wrapped = helpers.private(noise=1.5)
    wrapped.fit(x, y, batch_size=8, verbose=0)
    wrapped.fit(x, y, batch_size=20, epochs=2, verbose=0)
    wrapped.fit(x, y, batch_size=8, verbose=0)
    wrapped.compile(dpfl.DPKerasAdamOptimizer(1.0, 2.5), helpers.CROSS_ENTROPY)
    wrapped.fit(x[:30], y[:30], batch_size=10, verbose=0)
    event = dp_accounting.ComposedDpEvent([_poisson(0.2, 1.5, 10), _poisson(0.5, 1.5, 4), _poisson(1 / 3, 2.5, 3)])
    guarantee = wrapped.guarantee(_DELTA)
    assert guarantee.epsilon == _epsilon(event)
    assert guarantee.steps == 17
    assert "10 of the Gaussian mechanism with noise multiplier 1.5" in guarantee.statement()
    assert wrapped.epsilon(_DELTA) == guarantee.epsilon


def test_steps_ahead():
    wrapped = _fitted_once()
    assert wrapped.guarantee(_DELTA, steps=25).privacy_event() == _poisson(0.2, 1.5, 25)
    assert wrapped.guarantee(_DELTA, steps=5) == wrapped.guarantee(_DELTA)
    with pytest.raises(dpfl.InputError, match="no fewer than"):
        wrapped.guarantee(_DELTA, steps=4)


def test_without_noise_nothing_is_guaranteed():
    wrapped = _fitted(noise=0)
    guarantee = wrapped.guarantee(_DELTA)
    assert (guarantee.epsilon, guarantee.accountant) == (np.inf, "none")
    assert guarantee.statement().startswith("No differential privacy is guaranteed")
    assert wrapped.epsilon(_DELTA) == np.inf


def test_no_step_no_guarantee_and_no_weak_delta():
    wrapped = helpers.private()
    assert wrapped.epsilon(_DELTA) == 0
    with pytest.raises(dpfl.InputError, match="nothing was trained"):
        wrapped.guarantee(_DELTA)
    wrapped = _fitted_once()
    with pytest.raises(dpfl.InputError, match="1 / examples"):
        wrapped.guarantee(1 / 40)
    assert wrapped.guarantee(1 / 40, allow_weak_delta=True).epsilon > 0
    with pytest.raises(dpfl.InputError, match="relation"):
        wrapped.guarantee(_DELTA, "swap")


def test_an_interrupted_step_is_charged():
    class Interrupt(tf.keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 2:
                raise KeyboardInterrupt

    x, y = helpers.data(40)
    wrapped = helpers.private()
    with pytest.raises(KeyboardInterrupt):
        wrapped.fit(x, y, batch_size=8, callbacks=[Interrupt()], verbose=0)
    assert wrapped.steps == 3


def test_the_callback_shows_epsilon(capsys):
    x, y = helpers.data(40)
    wrapped = helpers.private(noise=1.5)
    history = wrapped.fit(x, y, batch_size=8, epochs=3, callbacks=[dpfl.EpsilonCallback(_DELTA)], verbose=2).history
    assert history["epsilon"] == [_epsilon(_poisson(0.2, 1.5, steps)) for steps in (5, 10, 15)]
    shown = capsys.readouterr().out
    assert all(f"epsilon: {epsilon:.4f}" in shown for epsilon in history["epsilon"])
    assert shown.rstrip().splitlines()[-1] == (
        f"epsilon {history['epsilon'][-1]:.4g} at delta 0.001: 15 steps in all, relation add_or_remove_one, accountant "
        "pld"
    )
    wrapped.fit(x, y, batch_size=8, callbacks=[dpfl.EpsilonCallback(_DELTA)], verbose=0)
    assert not capsys.readouterr().out


def test_a_budget_ends_training_before_the_step_that_exceeds_it():
    x, y = helpers.data(40)
    wrapped = helpers.private(noise=1.5)
    budget = _epsilon(_poisson(0.2, 1.5, 12)) + 1e-3
    assert _epsilon(_poisson(0.2, 1.5, 13)) > budget
    callback = dpfl.EpsilonCallback(_DELTA, epsilon_budget=budget)
    history = wrapped.fit(x, y, batch_size=8, epochs=9, callbacks=[callback], verbose=0)
    assert wrapped.steps == 12
    assert history.history["epsilon"][-1] <= budget
    with pytest.raises(dpfl.InputError, match="does not pay for another step"):
        wrapped.fit(x, y, batch_size=8, callbacks=[dpfl.EpsilonCallback(_DELTA, epsilon_budget=budget)], verbose=0)
    assert wrapped.steps == 12
    # What was trained before counts, and what is paid for is not cut short.
    larger = _epsilon(_poisson(0.2, 1.5, 22))
    callback = dpfl.EpsilonCallback(_DELTA, epsilon_budget=larger)
    wrapped.fit(x, y, batch_size=8, epochs=2, callbacks=[callback], verbose=0)
    assert wrapped.steps == 22


def test_a_budget_of_passes_ends_after_a_pass():
    x, y = helpers.data(40)
    wrapped = helpers.private(noise=1.5)
    event = dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(1.5), 2)
    budget = _epsilon(event, relation="replace_one") + 1e-3
    callback = dpfl.EpsilonCallback(_DELTA, "replace_one", epsilon_budget=budget)
    wrapped.fit(x, y, batch_size=8, steps_per_epoch=4, epochs=9, sampling="shuffled", callbacks=[callback], verbose=0)
    assert wrapped.steps == 10
    assert wrapped.epsilon(_DELTA, "replace_one") <= budget


def test_what_the_accountant_cannot_answer_at_the_end_is_refused_at_the_start(monkeypatch):
    def answers_one_step(event, *arguments, **settings):
        if event.count > 1:
            raise MemoryError
        return pld_epsilon(event, *arguments, **settings)

    monkeypatch.setattr(accounting, "pld_epsilon", answers_one_step)
    x, y = helpers.data(40)
    wrapped = helpers.private()
    callbacks = [dpfl.EpsilonCallback(_DELTA)]
    with pytest.raises(dpfl.InputError, match="needs more memory"):
        wrapped.fit(x, y, batch_size=8, callbacks=callbacks, verbose=0)
    assert wrapped.steps == 0


@pytest.mark.parametrize(
    ("callback", "settings", "complaint"),
    [
        ({}, {"sampling": "shuffled"}, "shuffled minibatches"),
        ({"delta": 0.1}, {}, "1 / examples"),
        ({"epsilon_budget": 0.01}, {}, "does not pay"),
        ({"accountant": "rdp"}, {"max_batch_size": 9}, "no known analysis"),
    ],
)
def test_the_callback_refuses_before_training(callback, settings, complaint):
    x, y = helpers.data(40)
    wrapped = helpers.private()
    callbacks = [dpfl.EpsilonCallback(**{"delta": _DELTA, **callback})]
    with pytest.raises(dpfl.InputError, match=complaint):
        wrapped.fit(x, y, batch_size=8, callbacks=callbacks, verbose=0, **settings)
    assert wrapped.steps == 0


def test_other_refusals_of_the_callback():
    x, y = helpers.data(40)
    for settings in ({"delta": 0.0}, {"delta": _DELTA, "relation": "swap"}, {"delta": _DELTA, "epsilon_budget": -1}):
        with pytest.raises(dpfl.InputError):
            dpfl.EpsilonCallback(**settings)
    several = helpers.private(compiled={"steps_per_execution": 2})
    with pytest.raises(dpfl.InputError, match="steps_per_execution"):
        several.fit(x, y, callbacks=[dpfl.EpsilonCallback(_DELTA, epsilon_budget=50.0)], verbose=0)
    plain = helpers.sequential()
    plain.compile("sgd", helpers.CROSS_ENTROPY)
    with pytest.raises(dpfl.InputError, match=r"dpfl\.DPModel"):
        plain.fit(x, y, callbacks=[dpfl.EpsilonCallback(_DELTA)], verbose=0)


def _ledger():
    return TrainingLedger(helpers.sequential(), lambda name, shape, dtype: tf.Variable(tf.zeros(shape, dtype)))


def _note(ledger, release):
    ledger.note(tf.constant(release.row()), tf.constant(1, tf.int64))


def _release(examples=50, **changes):
    values = {
        "sampling": "poisson",
        "examples": examples,
        "batch_size": 5,
        "max_batch_size": None,
        "noise_multiplier": 1.1,
        "clip_norm": 0.3,
        "clipping": "automatic",
    }
    return Release(**{**values, **changes})


def test_a_release_survives_the_ledger():
    for release in (_release(), _release(sampling="shuffled", max_batch_size=None), _release(max_batch_size=8)):
        assert Release.from_row(release.row()) == release


def test_a_full_ledger_refuses_further_settings():
    ledger = _ledger()
    for number in range(64):
        _note(ledger, _release(50 + number))
    ledger.check_room(_release(57))
    with pytest.raises(dpfl.InputError, match="64 different settings"):
        ledger.check_room(_release(500))
    with pytest.raises(tf.errors.InvalidArgumentError, match="full"):
        _note(ledger, _release(500))


def test_a_restored_ledger_keeps_the_larger_counts():
    ledger, restored = _ledger(), _ledger()
    for release, steps in ((_release(1), 3), (_release(2), 1)):
        for _ in range(steps):
            _note(ledger, release)
    for release, steps in ((_release(3), 4), (_release(2), 2), (_release(1), 1)):
        for _ in range(steps):
            _note(restored, release)
    for ours, theirs in zip(ledger._saved, restored._saved, strict=True):
        ours.assign(theirs)
    for _ in range(2):
        expected = [Entry(_release(1), 3, 3), Entry(_release(2), 2, 2), Entry(_release(3), 4, 4)]
        assert ledger.entries() == expected
        ledger.reconcile()
    assert int(ledger.steps()) == 9
