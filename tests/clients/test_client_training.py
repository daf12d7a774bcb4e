"""What clients are told to do, and their optimizers against Keras."""

import numpy as np
import pytest
import tensorflow as tf

from dpfl.clients import ClientTraining, optimizers
from dpfl.clients.optimizers import optimizer_numbers
from dpfl.errors import InputError


def refusal(**settings: object) -> str:
    with pytest.raises(InputError) as caught:
        ClientTraining(**{"epochs": 1, **settings})
    message = str(caught.value)
    assert message.endswith(".")
    assert ". " not in message
    assert "\n" not in message
    return message


class TestSettings:
    def test_plain_training_is_the_default(self) -> None:
        training = ClientTraining(epochs=1)
        assert not training.is_private
        assert training.optimizer == "sgd"

    @pytest.mark.parametrize(
        ("settings", "word"),
        [
            ({"example_noise": 1.0}, "give an example_clip"),
            ({"example_clipping": "automatic"}, "give an example_clip"),
            ({"example_sampling": "shuffled"}, "give an example_clip"),
            ({"max_batch_size": 30}, "give an example_clip"),
            ({"microbatch_size": 5}, "give an example_clip"),
            ({"example_clip": 0.0}, "example_clip must be a positive number"),
            ({"example_clip": float("nan")}, "example_clip must be a positive number"),
            ({"example_clip": float("inf")}, "example_clip must be a positive number"),
            ({"example_clip": 1.0, "example_noise": -1.0}, "example_noise must be 0"),
            ({"example_clip": 1.0, "example_noise": 1e-3}, "example_noise must be 0"),
            ({"example_clip": 1.0, "example_noise": float("nan")}, "example_noise must be 0"),
            ({"example_clip": 1.0, "batch_size": 10, "max_batch_size": 9}, "at least batch_size"),
            ({"example_clip": 1.0, "max_batch_size": 30, "example_sampling": "shuffled"}, "Poisson minibatches"),
            ({"example_clip": 1.0, "example_clipping": "global"}, "example_clipping"),
            ({"example_clip": 1.0, "microbatch_size": 0}, "microbatch_size"),
            ({"optimizer": "adagrad"}, "optimizer"),
            ({"optimizer": "adam", "adaptivity": 0.0}, "adaptivity"),
            ({"optimizer": "momentum", "momentum": 1.0}, "momentum"),
            ({"proximal_strength": -0.1}, "proximal_strength"),
            ({"proximal_strength": float("nan")}, "proximal_strength"),
            ({"proximal_strength": float("inf")}, "proximal_strength"),
            ({"batch_size": 0}, "batch_size"),
            ({"batch_size": None, "example_clip": 1.0}, "say how many are to be expected (batch_size=20)"),
            ({"batch_size": None, "example_clip": 1.0, "max_batch_size": 9}, "batch_size=None"),
        ],
    )
    def test_contradictions_are_refused(self, settings: dict, word: str) -> None:
        assert word in refusal(**settings)

    def test_structure_is_what_a_graph_depends_on(self) -> None:
        base = ClientTraining(epochs=1, example_clip=1.0, proximal_strength=0.1)
        for change in (
            {"learning_rate": 0.2},
            {"epochs": 3},
            {"epochs": None, "steps": 4},
            {"example_clip": 2.0},
            {"example_noise": 1.0},
            {"momentum": 0.5},
            {"proximal_strength": 2.0},
        ):
            assert base.replace(**change).structure == base.structure
        others = [
            base.replace(**change)
            for change in (
                {"batch_size": 7},
                {"optimizer": "adam"},
                {"example_clip": None},
                {"example_clipping": "per_layer"},
                {"example_sampling": "shuffled"},
                {"max_batch_size": 30},
                {"microbatch_size": 3},
                {"proximal_strength": 0.0},
                {"example_clip": None, "batch_size": None},
                {"example_clip": None, "proximal_strength": 0.0},
            )
        ]
        assert len({training.structure for training in [base, *others]}) == 11

    def test_local_steps_of_a_client(self) -> None:
        by_epochs, by_steps = ClientTraining(epochs=3, batch_size=4), ClientTraining(steps=5, batch_size=4)
        assert [by_epochs.local_steps(records) for records in (1, 4, 5, 8, 9)] == [3, 3, 6, 6, 9]
        assert [by_steps.local_steps(records) for records in (1, 9)] == [5, 5]
        assert [ClientTraining(epochs=3, batch_size=None).local_steps(records) for records in (1, 9)] == [3, 3]
        assert ClientTraining(steps=5, batch_size=None).local_steps(9) == 5

    def test_fed_sgd_is_one_step_of_sgd_on_all_examples(self) -> None:
        for stops in ({"steps": 1}, {"epochs": 1}):
            fed_sgd = ClientTraining(batch_size=None, learning_rate=1.0, **stops)
            assert fed_sgd.is_fed_sgd
            for change in (
                {"batch_size": 1000},
                {"learning_rate": 0.5},
                {"optimizer": "momentum"},
                {"proximal_strength": 0.1},
                dict.fromkeys(stops, 2),
            ):
                assert not fed_sgd.replace(**change).is_fed_sgd


@pytest.mark.parametrize(
    ("settings", "keras"),
    [
        ({"optimizer": "sgd"}, tf.keras.optimizers.SGD(0.3)),
        ({"optimizer": "momentum", "momentum": 0.8}, tf.keras.optimizers.SGD(0.3, momentum=0.8)),
        (
            {"optimizer": "adam", "momentum": 0.8, "second_momentum": 0.95, "adaptivity": 0.1},
            tf.keras.optimizers.Adam(0.3, 0.8, 0.95, 0.1),
        ),
    ],
    ids=lambda value: value["optimizer"] if isinstance(value, dict) else "",
)
def test_optimizers_equal_keras(settings: dict, keras: tf.keras.optimizers.Optimizer) -> None:
    training = ClientTraining(learning_rate=0.3, epochs=1, **settings)
    rng = np.random.default_rng(0)
    weights = [tf.constant(rng.normal(size=shape), tf.float32) for shape in ((3, 2), (4,))]
    variables = [tf.Variable(weight) for weight in weights]
    moments = optimizers.initial_moments(training.optimizer, weights)
    for step in range(5):
        gradients = [tf.constant(rng.normal(size=weight.shape), tf.float32) for weight in weights]
        keras.apply_gradients(zip(gradients, variables, strict=True))
        weights, moments = optimizers.step(
            training.optimizer, weights, gradients, moments, optimizer_numbers(training), tf.constant(step)
        )
        for weight, variable in zip(weights, variables, strict=True):
            np.testing.assert_allclose(weight, variable, rtol=2e-5, atol=1e-6)


def test_adams_first_step_is_the_learning_rate() -> None:
    training = ClientTraining(learning_rate=0.3, epochs=1, optimizer="adam")
    weights, gradients = [tf.constant([1.0, 2.0, 3.0])], [tf.constant([0.5, -20.0, 0.0])]
    moments = optimizers.initial_moments("adam", weights)
    after, _ = optimizers.step("adam", weights, gradients, moments, optimizer_numbers(training), tf.constant(0))
    np.testing.assert_allclose(after[0], [0.7, 2.3, 3.0], rtol=1e-5)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_weights_that_a_loss_does_not_reach_stay(optimizer: str) -> None:
    training = ClientTraining(epochs=1, optimizer=optimizer)
    weights = [tf.constant([1.0]), tf.constant([[1.0, 2.0], [3.0, 4.0]])]
    sparse = tf.IndexedSlices(tf.constant([[1.0, 1.0]]), tf.constant([1]), tf.constant([2, 2]))
    moments = optimizers.initial_moments(optimizer, weights)
    after, _ = optimizers.step(optimizer, weights, [None, sparse], moments, optimizer_numbers(training), tf.constant(0))
    np.testing.assert_array_equal(after[0], weights[0])
    np.testing.assert_array_equal(after[1][0], weights[1][0])
    assert (after[1][1].numpy() < weights[1][1].numpy()).all()


def test_the_proximal_term_is_the_gradient_of_half_mu_times_the_squared_distance() -> None:
    rng = np.random.default_rng(0)
    weights, start = ([tf.constant(rng.normal(size=shape), tf.float32) for shape in ((3, 2), (4,))] for _ in range(2))
    sparse = tf.IndexedSlices(tf.constant([[1.0, 2.0]]), tf.constant([1]), tf.constant([3, 2]))
    strength = optimizer_numbers(ClientTraining(epochs=1, proximal_strength=0.7)).proximal_strength
    with tf.GradientTape() as tape:
        tape.watch(weights)
        parts = zip(weights, start, strict=True)
        penalty = 0.35 * tf.add_n([tf.reduce_sum((weight - first) ** 2) for weight, first in parts])
    expected = tape.gradient(penalty, weights)
    with_term = optimizers.with_proximal_term([sparse, tf.ones(4)], weights, start, strength)
    np.testing.assert_allclose(with_term[0], expected[0] + [[0, 0], [1, 2], [0, 0]], rtol=1e-5)
    np.testing.assert_allclose(with_term[1], expected[1] + 1, rtol=1e-5)
    assert optimizers.with_proximal_term([None, None], weights, start, strength) == [None, None]
