"""One run: what it records, what it repeats, and what it refuses."""

import json

import numpy as np
import pytest

import dpfl
from dpfl.data import FederatedData


def _experiment(federated: FederatedData, **changes: object) -> dpfl.Experiment:
    experiment = dpfl.Experiment(
        data=federated,
        local=dpfl.ClientTraining(learning_rate=0.3, batch_size=4, epochs=1),
        mechanism=dpfl.Gaussian(clip_norm=0.5),
        privacy=dpfl.Privacy(epsilon=4, delta=1e-2),
        sampler=dpfl.Poisson(cohort=10),
        rounds=7,
        evaluate_every=3,
    )
    return experiment.replace(**changes)


def test_record_history_and_guarantee(images: FederatedData) -> None:
    experiment = _experiment(images)
    result = experiment.run(seed=2, progress=False)
    record = result.record
    plan = experiment.plan()
    assert record["status"] == "finished"
    assert record["rounds"] == 7
    assert record["epsilon"] == 4
    assert 3.99 < record["epsilon_spent"] == plan.guarantee.epsilon <= 4
    assert record["noise_multiplier"] == plan.noise_multiplier
    assert record["sampling_rate"] == pytest.approx(10 / 30)
    assert record["run_id"] == experiment.run_id(2) != experiment.run_id(1)
    assert json.loads(json.dumps(record)) == record
    assert [row["round"] for row in result.history] == list(range(1, 8))
    assert [row["round"] for row in result.history if "accuracy" in row] == [3, 6, 7]
    assert result.history[-1]["accuracy"] == record["accuracy"] == result.accuracy
    assert [row["cohort"] for row in result.history] == [
        len(plan.sampler.clients(2, number, 30)) for number in range(7)
    ]
    assert set(images.assumptions) <= set(result.guarantee.assumptions)
    predicted = result.keras_model()(images.x_test).numpy().argmax(axis=1)
    assert np.mean(predicted == images.y_test) == result.accuracy


def test_same_seed_same_numbers_other_seed_others(images: FederatedData) -> None:
    experiment = _experiment(images)
    one, same, other = (experiment.run(seed, progress=False) for seed in (5, 5, 6))
    for left, right in zip(one.weights, same.weights, strict=True):
        np.testing.assert_array_equal(left, right)
    assert one.history == same.history
    assert np.abs(one.weights[0] - other.weights[0]).max() > 1e-3


def test_how_often_it_evaluates_does_not_change_the_model(images: FederatedData) -> None:
    results = [_experiment(images, evaluate_every=every).run(0, progress=False) for every in (1, 3, 100)]
    for result in results[1:]:
        np.testing.assert_array_equal(result.weights[0], results[0].weights[0])
        assert "accuracy" in result.history[-1]


def test_divergence_is_a_result(images: FederatedData) -> None:
    experiment = _experiment(
        images, model="mlp", mechanism=dpfl.NoMechanism(), **{"privacy.epsilon": None, "local.learning_rate": 1e25}
    )
    result = experiment.run(0, progress=False)
    assert result.record["status"] == "diverged"
    # It does not stop early: when it stops would be a private measurement.
    assert len(result.history) == 7
    assert result.record["epsilon_spent"] is None
    assert "No differential privacy" in result.guarantee.statement()


def test_training_learns(images: FederatedData) -> None:
    plain = _experiment(images, mechanism=dpfl.NoMechanism(), rounds=20, **{"privacy.epsilon": None})
    assert plain.run(0, progress=False).accuracy > 0.9


def test_run_id_follows_everything_that_matters(images: FederatedData) -> None:
    base = _experiment(images)
    variants = [
        base.replace(**change)
        for change in (
            {"rounds": 8},
            {"model": "mlp"},
            {"local.learning_rate": 0.2},
            {"mechanism.clip_norm": 0.4},
            {"privacy.epsilon": 3},
            {"privacy.delta": 1e-3},
            {"sampler.cohort": 9},
            {"server.name": "adam"},
            {"data": dpfl.data.from_arrays(images.x * 2, images.y, np.repeat(np.arange(30), images.client_sizes))},
        )
    ]
    assert len({experiment.run_id(0) for experiment in [base, *variants]}) == len(variants) + 1
    assert base.run_id(0) == _experiment(images).run_id(0)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"rounds": 0}, "rounds should be greater than 0"),
        ({"privacy.epsilon": -1}, "epsilon must be a positive number"),
        ({"privacy.epsilon": 101}, "epsilon must be a positive number up to 100"),
        ({"privacy.epsilon": float("inf")}, "epsilon must be a positive number"),
        ({"privacy.delta": 0.05}, "no privacy for 30 clients"),
        ({"mechanism.clip_norm": 0}, "clip norm"),
        ({"sampler.cohort": 31}, "exceeds the 30 clients"),
        ({"mechanism": dpfl.NoMechanism()}, "cannot keep epsilon 4"),
        ({"model": "resnet"}, "there is no model"),
        ({"local": dpfl.ClientTraining(epochs=1), "loacl": 1}, "did you mean 'local'"),
        ({"local.steps": 3}, "exactly one"),
        ({"data": "digist"}, "digits"),
        ({"privacy.unit": "example"}, "give the client training an example_clip"),
        ({"privacy.unit": "example", "local.example_clip": 1.0, "privacy.delta": 1e-3}, "no noise of its own"),
        ({"local.example_clip": 1.0, "privacy.delta": 1e-3}, "example_noise=None"),
        ({"local.example_clip": 1.0, "local.example_noise": 1.0}, "examples"),
    ],
)
def test_wrong_settings_are_refused_in_one_sentence(images: FederatedData, change: dict, word: str) -> None:
    with pytest.raises(dpfl.InputError) as refused:
        _experiment(images, **change)
    assert word in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_weak_delta_can_be_allowed_knowingly(images: FederatedData) -> None:
    plan = _experiment(images, **{"privacy.delta": 0.05, "privacy.allow_weak_delta": True}).plan()
    assert plan.guarantee.delta == 0.05


def test_a_model_for_other_data_is_refused(images: FederatedData) -> None:
    import tensorflow as tf

    def build() -> tf.keras.Model:
        return tf.keras.Sequential([tf.keras.layers.Flatten(), tf.keras.layers.Dense(3)])

    experiment = _experiment(images, model=build)
    with pytest.raises(dpfl.InputError, match="give the Keras model anew"):
        experiment.replace(data="digits")
    with pytest.raises(dpfl.InputError, match="outside the model's classes"):
        _experiment(dpfl.data.digits(30), model=build)


def _private(federated: FederatedData, **changes: object) -> dpfl.Experiment:
    experiment = dpfl.Experiment(
        data=federated,
        local=dpfl.ClientTraining(learning_rate=0.3, batch_size=4, epochs=1, example_clip=1.0),
        privacy=dpfl.Privacy(unit="example", epsilon=8, delta=1e-3),
        sampler=dpfl.Poisson(cohort=10),
        rounds=7,
        evaluate_every=3,
    )
    return experiment.replace(**changes)


def test_example_level_run(images: FederatedData) -> None:
    experiment = _private(images)
    assert experiment.mechanism.name == "none"
    result = experiment.run(seed=2, progress=False)
    record, clients = result.record, result.client_epsilons
    plan = experiment.client_plan()
    assert result.guarantee == result.example_guarantee == plan.guarantee
    assert result.user_guarantee is None
    assert result.guarantee.unit == record["unit"] == "example"
    assert 7.98 < record["epsilon_spent"] == record["example_epsilon"] == result.guarantee.epsilon <= 8
    assert record["example_noise_multiplier"] == plan.noise_multiplier > 0
    assert (record["noise_multiplier"], record["clip_norm"]) == (0, None)
    assert (record["example_clip_norm"], record["delta"], record["client_optimizer"]) == (1, 1e-3, "sgd")
    assert record["accountant"] == "pld"
    assert json.loads(json.dumps(record)) == record
    assert set(images.assumptions) <= set(result.guarantee.assumptions)

    # What each client really took part in, of the rounds that it was charged for.
    taken = np.zeros(30, int)
    for number in range(7):
        taken[dpfl.Poisson(cohort=10).clients(2, number, 30)] += 1
    np.testing.assert_array_equal(clients.steps, taken * -(-images.client_sizes // 4))
    assert record["example_epsilon_worst"] == clients.worst < result.guarantee.epsilon
    assert record["example_epsilon_median"] == clients.quantiles(0.5)[0] < clients.worst
    assert (clients.epsilons[taken == 0] == 0).all()

    spent = [row["epsilon_spent"] for row in result.history]
    assert (np.diff(spent) > 0).all()
    assert spent[-1] == pytest.approx(result.guarantee.epsilon, rel=5e-3)
    assert all(0 <= row["example_clipped_fraction"] <= 1 for row in result.history)
    again = experiment.run(seed=2, progress=False)
    np.testing.assert_array_equal(result.weights[0], again.weights[0])
    assert np.abs(result.weights[0] - experiment.run(seed=3, progress=False).weights[0]).max() > 1e-3


def test_both_guarantees_are_kept(images: FederatedData) -> None:
    experiment = _experiment(
        images,
        **{"local.example_clip": 1.0, "local.example_noise": 1.5, "privacy.delta": 1e-3},
    )
    result = experiment.run(seed=0, progress=False)
    assert result.guarantee == result.user_guarantee == experiment.plan().guarantee
    assert (result.guarantee.unit, result.example_guarantee.unit) == ("user", "example")
    assert result.record["epsilon_spent"] == result.record["user_epsilon"] == result.guarantee.epsilon <= 4
    worst = max(
        dpfl.privacy.epsilon(dpfl.privacy.poisson_gaussian(1.5, min(1, 4 / size), 7 * -(-size // 4)), 1e-3)
        for size in set(images.client_sizes.tolist())
    )
    assert result.record["example_epsilon"] == result.example_guarantee.epsilon == worst
    kept = result.guarantees()
    assert [kept[name]["unit"] for name in ("guarantee", "user_guarantee", "example_guarantee")] == [
        "user",
        "user",
        "example",
    ]
    assert "at user level" in result.guarantee.statement()
    assert "at example level" in result.example_guarantee.statement()


def test_a_server_may_add_noise_of_its_own_to_the_clients(images: FederatedData) -> None:
    experiment = _private(images, mechanism=dpfl.Gaussian(clip_norm=1.0, noise_multiplier=2.0))
    result = experiment.run(seed=0, progress=False)
    assert result.guarantee.unit == "example"
    assert result.guarantee.epsilon <= 8
    assert result.user_guarantee.unit == "user"
    alone = _experiment(images, mechanism=experiment.mechanism, **{"privacy.epsilon": None, "privacy.delta": 1e-3})
    assert result.record["user_epsilon"] == result.user_guarantee.epsilon == alone.plan().guarantee.epsilon
    assert result.record["epsilon_spent"] == result.record["example_epsilon"] == result.guarantee.epsilon
    assert result.record["noise_multiplier"] == 2


def test_a_budget_of_examples_is_refused_before_training(images: FederatedData) -> None:
    experiment = _private(images, **{"local.example_noise": 0.5})
    with pytest.raises(dpfl.InputError, match=r"would spend epsilon .* more than the budget of 8"):
        experiment.run(0, progress=False)


def test_clipping_examples_without_noise_is_the_ceiling(images: FederatedData) -> None:
    experiment = _private(images, rounds=20, **{"privacy.epsilon": None})
    result = experiment.run(0, progress=False)
    assert result.record["epsilon_spent"] is None
    assert result.record["example_epsilon"] is None
    assert result.record["user_epsilon"] is None
    assert result.record["delta"] is None
    assert "No differential privacy" in result.guarantee.statement()
    assert result.accuracy > 0.9


def test_models_that_mix_examples_are_refused_for_private_clients(images: FederatedData) -> None:
    import tensorflow as tf

    class Centred(tf.keras.layers.Layer):
        def call(self, x: tf.Tensor) -> tf.Tensor:
            return x - tf.reduce_mean(x, axis=0)

    def build() -> tf.keras.Model:
        return tf.keras.Sequential([tf.keras.layers.Flatten(), Centred(), tf.keras.layers.Dense(3)])

    with pytest.raises(dpfl.InputError):
        _private(images, model=build).run(0, progress=False)


def test_deployments_are_for_clients(images: FederatedData) -> None:
    with pytest.raises(dpfl.InputError, match="example-level guarantee does not depend"):
        _private(images, deployment=dpfl.Deployment(clients=1000, cohort=100))


def test_the_servers_mechanisms_do_not_calibrate_for_examples() -> None:
    with pytest.raises(dpfl.InputError, match="protects clients, not examples"):
        dpfl.Gaussian(clip_norm=1.0).plan(dpfl.Privacy(unit="example", epsilon=1), dpfl.Poisson(cohort=3), 10, 5)


@pytest.mark.parametrize(
    ("training", "least"),
    [
        ({"learning_rate": 1.0}, 0.8),
        ({"learning_rate": 0.05, "optimizer": "adam"}, 0.7),
    ],
)
def test_private_clients_learn_digits(training: dict, least: float) -> None:
    experiment = dpfl.Experiment(
        data=dpfl.data.digits(clients=5),
        local=dpfl.ClientTraining(**{"batch_size": 60, "epochs": 1, "example_clip": 1.0, **training}),
        privacy=dpfl.Privacy(unit="example", epsilon=8, delta=1e-4),
        sampler=dpfl.Everyone(),
        rounds=10,
    )
    result = experiment.run(0, progress=False)
    assert 7.9 < result.guarantee.epsilon <= 8
    assert result.accuracy > least
