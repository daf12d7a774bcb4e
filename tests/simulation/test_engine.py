"""The in-graph engine against a plain loop over clients, and what it must never do."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import tensorflow as tf

from dpfl.clients import ClientTraining
from dpfl.clients.dp_sgd import ClientSeeds, PrivateUpdate, client_numbers, client_seeds, run_seeds, train_privately
from dpfl.clients.schedule import minibatches
from dpfl.data import FederatedData
from dpfl.randomness import Purpose, stateless_seed
from dpfl.simulation import clients as clients_module
from dpfl.simulation import engine as engine_module
from dpfl.simulation.clients import OneByOne, SideBySide
from dpfl.simulation.server import ServerOptimizer
from dpfl.simulation.state import State

# With a smaller constant Adam makes whole steps of the round-off of tiny gradients.
ADAM = ClientTraining(learning_rate=0.02, batch_size=3, epochs=2, optimizer="adam", adaptivity=1e-2)
COHORTS = [np.array([0, 3, 4, 17, 29], np.int32), np.array([], np.int32), np.array([5], np.int32)]


def _close(one: Sequence, other: Sequence, tolerance: float = 1e-5) -> None:
    for left, right in zip(one, other, strict=True):
        np.testing.assert_allclose(np.asarray(left), np.asarray(right), rtol=tolerance, atol=tolerance)


class _Optimizer:
    """The clients' optimizers as their papers write them, in NumPy."""

    def __init__(self, local: ClientTraining) -> None:
        self.local, self.steps, self.first, self.second = local, 0, 0.0, 0.0

    def moves(self, gradients: list[np.ndarray]) -> list[np.ndarray]:
        local, flat = self.local, np.concatenate([gradient.ravel() for gradient in gradients]).astype(np.float64)
        self.steps += 1
        if local.optimizer == "momentum":
            flat = self.first = local.momentum * self.first + flat
        elif local.optimizer == "adam":
            self.first = local.momentum * self.first + (1 - local.momentum) * flat
            self.second = local.second_momentum * self.second + (1 - local.second_momentum) * flat**2
            mean = self.first / (1 - local.momentum**self.steps)
            correction = np.sqrt(1 - local.second_momentum**self.steps)
            flat = mean * correction / (np.sqrt(self.second) + local.adaptivity)
        parts = np.split(local.learning_rate * flat, np.cumsum([gradient.size for gradient in gradients])[:-1])
        return [part.reshape(gradient.shape) for part, gradient in zip(parts, gradients, strict=True)]


def _reference(setup: object, data: FederatedData, cohorts: list[np.ndarray]) -> list[np.ndarray]:
    """Federated averaging as the papers write it: Keras, a loop over clients, NumPy for the server."""
    local, plan, server = setup.local, setup.plan, setup.server.optimizer
    weights = [np.array(weight, np.float64) for weight in setup.model.initial_weights(setup.seed)]
    first = [np.zeros_like(weight) for weight in weights]
    second = [np.full_like(weight, server.adaptivity**2) for weight in weights]
    query = plan.query(setup.seed)
    query_state = query.initial_global_state()
    keras = setup.model.to_keras([weight.astype(np.float32) for weight in weights])
    for round_number, cohort in enumerate(cohorts):
        total = [np.zeros_like(weight) for weight in weights]
        for client in cohort:
            rows, mask = minibatches(
                tf.constant(data.offsets[[client]], tf.int32),
                tf.constant(data.client_sizes[[client]], tf.int32),
                tf.constant([client]),
                steps=tf.constant(local.steps or 0),
                epochs=tf.constant(local.epochs or 0),
                batch_size=local.batch_size,
                seed=tf.constant(stateless_seed(setup.seed, Purpose.SHUFFLING)),
                round_number=tf.constant(round_number),
            )
            keras.set_weights([weight.astype(np.float32) for weight in weights])
            optimizer = _Optimizer(local)
            for batch, counts in zip(rows[0].numpy(), mask[0].numpy(), strict=True):
                chosen = batch[counts > 0]
                with tf.GradientTape() as tape:
                    losses = tf.keras.losses.sparse_categorical_crossentropy(
                        data.y[chosen], keras(data.x[chosen], training=True), from_logits=True
                    )
                    loss = tf.reduce_mean(losses)
                gradients = tape.gradient(loss, keras.trainable_variables)
                moves = optimizer.moves([gradient.numpy() for gradient in gradients])
                for variable, move in zip(keras.trainable_variables, moves, strict=True):
                    variable.assign_sub(move.astype(np.float32))
            update = [after - before for after, before in zip(keras.get_weights(), weights, strict=True)]
            norm = np.sqrt(sum(np.sum(part**2) for part in update))
            scale = min(1, plan.clip_norm / norm) if norm else 1
            total = [t + scale * part for t, part in zip(total, update, strict=True)]
        noised, query_state, _ = query.get_noised_result([tf.constant(t, tf.float32) for t in total], query_state)
        mean = [np.array(part, np.float64) for part in noised]
        if server.name == "sgd":
            direction = mean
        elif server.name == "momentum":
            first = [server.momentum * m + u for m, u in zip(first, mean, strict=True)]
            direction = first
        else:
            beta, beta2 = server.momentum, server.second_momentum
            first = [beta * m + (1 - beta) * u for m, u in zip(first, mean, strict=True)]
            second = [beta2 * v + (1 - beta2) * u**2 for v, u in zip(second, mean, strict=True)]
            direction = [m / (np.sqrt(v) + server.adaptivity) for m, v in zip(first, second, strict=True)]
        weights = [w + server.learning_rate * d for w, d in zip(weights, direction, strict=True)]
    return weights


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("softmax", {}),
        ("softmax", {"clip_norm": None}),
        ("mlp", {"local": ClientTraining(learning_rate=0.1, batch_size=3, steps=5)}),
        ("softmax", {"local": ClientTraining(learning_rate=0.1, batch_size=3, epochs=2, optimizer="momentum")}),
        ("mlp", {"local": ADAM}),
        ("cnn", {"local": ADAM}),
        ("cnn", {"epsilon": 4.0, "server": ServerOptimizer(name="momentum", learning_rate=0.5)}),
        ("softmax", {"epsilon": 4.0, "server": ServerOptimizer(name="adam", learning_rate=0.1)}),
    ],
)
def test_rounds_equal_a_plain_loop(model: str, options: dict, setup: Callable, images: FederatedData) -> None:
    configured = setup(model, seed=3, **options)
    state, _ = configured.run(COHORTS)
    _close(state.weights, _reference(configured, images, COHORTS), 2e-5)


@pytest.mark.parametrize(
    ("model", "optimizer"), [("softmax", "sgd"), ("mlp", "sgd"), ("softmax", "momentum"), ("mlp", "adam")]
)
def test_side_by_side_equals_one_by_one(model: str, optimizer: str, setup: Callable) -> None:
    local = ClientTraining(learning_rate=0.05, batch_size=4, epochs=2, optimizer=optimizer)
    together, alone = setup(model, local=local), setup(model, local=local)
    assert isinstance(together.engine._training, SideBySide)
    way = together.engine._training
    alone.engine._training = OneByOne(way._examples, way._model, way._local, way._query)
    (one, measured), (other, measured_alone) = together.run(COHORTS), alone.run(COHORTS)
    _close(one.weights, other.weights)
    for name in measured:
        np.testing.assert_allclose(measured[name], measured_alone[name], rtol=1e-5)


def test_chunks_of_a_cohort_give_the_same_sum(setup: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = setup().run(COHORTS)
    monkeypatch.setattr(clients_module, "_CHUNK_NUMBERS", 1)
    chunked, _ = setup().run(COHORTS)
    _close(whole.weights, chunked.weights)


def test_rounds_in_one_call_equal_rounds_in_several_bit_for_bit(setup: Callable) -> None:
    configured = setup(epsilon=2.0, server=ServerOptimizer(name="adam", learning_rate=0.1))
    at_once, _ = configured.run(COHORTS)
    state = configured.state
    for cohort in COHORTS:
        state, _ = configured.run([cohort], state)
    for one, other in zip(tf.nest.flatten(at_once), tf.nest.flatten(state), strict=True):
        np.testing.assert_array_equal(one, other)


def test_an_empty_cohort_releases_noise_divided_by_the_expected_cohort(setup: Callable) -> None:
    configured = setup(epsilon=2.0)
    state, measured = configured.run([np.array([], np.int32)])
    moved = np.concatenate(
        [(new - old).numpy().ravel() for new, old in zip(state.weights, configured.state.weights, strict=True)]
    )
    scale = configured.plan.noise_multiplier * configured.plan.clip_norm / 10
    # 111 normal values: their mean square lies within a factor of 2 of the variance but for 1e-6.
    assert 0.5 < np.mean((moved / scale) ** 2) < 2
    assert measured["update_norm"] == 0
    assert measured["clipped_fraction"] == 0


@pytest.mark.parametrize("model", ["softmax", "cnn"])
def test_one_client_more_moves_the_model_by_at_most_clip_over_cohort(model: str, setup: Callable) -> None:
    configured = setup(model, clip_norm=0.05, local=ClientTraining(learning_rate=2.0, batch_size=2, epochs=3))
    base, _ = configured.run([np.arange(8, dtype=np.int32)])
    for client in range(8, 14):
        more, _ = configured.run([np.append(np.arange(8), client).astype(np.int32)])
        distance = np.sqrt(sum(np.sum((a - b) ** 2) for a, b in zip(more.weights, base.weights, strict=True)))
        assert distance == pytest.approx(0.05 / 10, rel=1e-3)


def test_diverging_clients_count_as_zero(setup: Callable) -> None:
    configured = setup("mlp", local=ClientTraining(learning_rate=1e30, batch_size=2, epochs=3))
    state, measured = configured.run([np.arange(6, dtype=np.int32)])
    assert measured["non_finite_updates"] == 6
    _close(state.weights, configured.state.weights, 0)


def test_a_client_trains_alike_whoever_else_takes_part(setup: Callable) -> None:
    configured = setup(clip_norm=None)
    start = configured.state.weights

    def moved(clients: list[int]) -> list[np.ndarray]:
        state, _ = configured.run([np.array(clients, np.int32)])
        return [(new - old).numpy() for new, old in zip(state.weights, start, strict=True)]

    parts = zip(moved([2]), moved([21]), strict=True)
    _close([one + other for one, other in parts], moved([2, 21]))


def test_configurations_share_one_graph(setup: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    compile_once = engine_module._compile
    monkeypatch.setattr(
        engine_module, "_compile", lambda function, *rest: compiled.append(function) or compile_once(function, *rest)
    )
    shared = setup().engine
    results = []
    for clip_norm, rate, epsilon in ((0.1, 0.1, None), (0.4, 0.2, 3.0), (None, 0.3, None)):
        other = setup(
            clip_norm=clip_norm, epsilon=epsilon, local=ClientTraining(learning_rate=rate, batch_size=4, steps=3)
        )
        own, _ = other.run(COHORTS)
        other.engine = shared
        state, _ = other.run(COHORTS[:2])
        state, _ = other.run(COHORTS[2:], state)
        _close(own.weights, state.weights)
        results.append(state)
    assert len(compiled) == 4  # three engines of their own, and the shared one once


def test_measurements_are_those_of_the_unclipped_updates(setup: Callable) -> None:
    free = setup(clip_norm=None)
    start = free.state.weights
    norms = []
    for client in range(5):
        state, _ = free.run([np.array([client], np.int32)])
        norms.append(10 * np.sqrt(sum(np.sum((a - b) ** 2) for a, b in zip(state.weights, start, strict=True))))
    clip = float(np.median(norms)) * 1.0001
    _, measured = setup(clip_norm=clip).run([np.arange(5, dtype=np.int32)])
    assert measured["update_norm"][0] == pytest.approx(np.mean(norms), rel=1e-4)
    assert measured["clipped_fraction"][0] == pytest.approx(0.4)


def test_evaluation_equals_keras_on_more_examples_than_a_batch(
    setup: Callable, images: FederatedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "_EVALUATION_BATCH", 7)
    configured = setup("mlp")
    state: State = configured.run(COHORTS)[0]
    keras = configured.model.to_keras([weight.numpy() for weight in state.weights])
    keras.compile(loss=tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    loss, accuracy = keras.evaluate(images.x_test, images.y_test, verbose=0)
    assert configured.engine.evaluate(state, "test") == pytest.approx((accuracy, loss), rel=1e-5)


PRIVATE = ClientTraining(learning_rate=0.3, batch_size=3, steps=3, example_clip=0.4, example_noise=0.8)


@pytest.mark.parametrize(
    "local", [PRIVATE, PRIVATE.replace(epochs=2, steps=None, optimizer="adam", learning_rate=0.02)]
)
@pytest.mark.parametrize("epsilon", [None, 4.0])
def test_private_clients_train_one_by_one_and_are_aggregated_alike(
    local: ClientTraining, epsilon: float | None, setup: Callable, images: FederatedData
) -> None:
    configured = setup("mlp", local=local, epsilon=epsilon, clip_norm=0.3, seed=3)
    state, measured = configured.run(COHORTS)
    numbers = client_numbers(local, configured.client_plan.noise_multiplier)

    @tf.function(autograph=False, reduce_retracing=True)
    def train(weights: list, x: tf.Tensor, y: tf.Tensor, seeds: ClientSeeds) -> PrivateUpdate:
        return train_privately(configured.model, weights, x, y, training=local, numbers=numbers, seeds=seeds)

    weights = [tf.constant(weight) for weight in configured.model.initial_weights(3)]
    query = configured.plan.query(3)
    query_state = query.initial_global_state()
    for number, cohort in enumerate(COHORTS):
        total, fractions = query.initial_sample_state(weights), []
        for client in cohort:
            rows = slice(*images.offsets[client : client + 2])
            seeds = client_seeds(run_seeds(3), tf.constant(number), tf.constant(client))
            update, fraction = train(weights, tf.constant(images.x[rows]), tf.constant(images.y[rows]), seeds)
            record = query.preprocess_record(query.derive_sample_params(query_state), update)
            total = query.accumulate_preprocessed_record(total, record)
            fractions.append(float(fraction))
        mean, query_state, _ = query.get_noised_result(total, query_state)
        weights = [weight + part for weight, part in zip(weights, mean, strict=True)]
        expected = np.mean(fractions) if fractions else 0
        assert measured["example_clipped_fraction"][number] == pytest.approx(expected, abs=1e-6)
    _close(state.weights, weights, 2e-5)


def test_private_configurations_share_one_graph(setup: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    compile_once = engine_module._compile
    monkeypatch.setattr(
        engine_module, "_compile", lambda function, *rest: compiled.append(function) or compile_once(function, *rest)
    )
    first = setup(local=PRIVATE)
    first.run(COHORTS)
    for change in ({"example_clip": 0.1}, {"example_noise": 3.0}, {"learning_rate": 0.1}, {"steps": None, "epochs": 2}):
        other = setup(local=PRIVATE.replace(**change))
        own, _ = other.run(COHORTS)
        other.engine = first.engine
        shared, _ = other.run(COHORTS)
        _close(own.weights, shared.weights)
    assert len(compiled) == 5


def test_plain_clients_have_no_measurements_of_private_ones(setup: Callable) -> None:
    _, measured = setup().run(COHORTS)
    assert "example_clipped_fraction" not in measured
