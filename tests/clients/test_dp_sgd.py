"""DP-SGD on one client against a loop over examples in NumPy, and the noise and the sampling that it promises."""

import functools
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from scipy import stats

from dpfl.clients import ClientTraining
from dpfl.clients.dp_sgd import (
    ClientSeeds,
    PrivateUpdate,
    client_numbers,
    client_seeds,
    noisy_mean,
    run_seeds,
    train_privately,
)
from dpfl.clients.schedule import minibatches, poisson_minibatch
from dpfl.models.functional import FunctionalModel
from dpfl.noise import normal_like, round_seed

layers = tf.keras.layers
SHAPE, CLASSES, RECORDS = (4, 4, 1), 3, 23
FALSE_ALARM = 1e-6
SEEDS = client_seeds(run_seeds(0), tf.constant(2), tf.constant(5))
_rng = np.random.default_rng(0)
X, Y = _rng.normal(size=(RECORDS, *SHAPE)).astype(np.float32), _rng.integers(0, CLASSES, RECORDS).astype(np.int32)


def _regularised() -> tf.keras.Model:
    return tf.keras.Sequential(
        [
            layers.Input(SHAPE),
            layers.Conv2D(2, 2, activation="tanh"),
            layers.Flatten(),
            layers.Dense(5, activation="relu", kernel_regularizer=tf.keras.regularizers.L2(0.05)),
            layers.Dense(CLASSES),
        ]
    )


def _dropout() -> tf.keras.Model:
    return tf.keras.Sequential([layers.Input(SHAPE), layers.Flatten(), layers.Dropout(0.5), layers.Dense(CLASSES)])


@functools.cache
def _model(kind: str = "softmax") -> FunctionalModel:
    builders: dict[str, Any] = {"regularised": _regularised, "dropout": _dropout}
    return FunctionalModel(builders.get(kind, kind), SHAPE, CLASSES)


def _training(**settings: Any) -> ClientTraining:
    return ClientTraining(**{"learning_rate": 0.3, "batch_size": 6, "steps": 4, "example_clip": 0.5, **settings})


def _trained(
    training: ClientTraining,
    noise: float = 0.7,
    *,
    kind: str = "softmax",
    seeds: ClientSeeds = SEEDS,
    x: np.ndarray = X,
    y: np.ndarray = Y,
) -> PrivateUpdate:
    weights = [tf.constant(weight) for weight in _model(kind).initial_weights(0)]
    result = _compiled(kind, training.structure, training)(
        weights, tf.constant(x), tf.constant(y), client_numbers(training, noise), seeds
    )
    return PrivateUpdate([part.numpy() for part in result.update], float(result.clipped_fraction))


_FUNCTIONS: dict[Any, Any] = {}


def _compiled(kind: str, structure: tuple, training: ClientTraining) -> Any:
    """One graph for all trainings of a structure, and clients of all sizes."""
    if (kind, structure) not in _FUNCTIONS:

        @tf.function(autograph=False, reduce_retracing=True)
        def train(weights: Any, x: tf.Tensor, y: tf.Tensor, numbers: Any, seeds: Any) -> PrivateUpdate:
            return train_privately(_model(kind), weights, x, y, training=training, numbers=numbers, seeds=seeds)

        _FUNCTIONS[kind, structure] = train
    return _FUNCTIONS[kind, structure]


def _minibatch(training: ClientTraining, step: int, seeds: ClientSeeds, records: int) -> np.ndarray:
    """Rows of a local step."""
    if training.example_sampling == "poisson":
        rows, mask = poisson_minibatch(
            tf.constant(records),
            tf.constant(step),
            batch_size=training.batch_size,
            max_batch_size=training.max_batch_size,
            seed=seeds.sampling,
        )
    else:
        rows, mask = (
            part[0, step]
            for part in minibatches(
                tf.constant([0]),
                tf.constant([records]),
                tf.constant([0]),
                steps=tf.constant(training.steps or 0),
                epochs=tf.constant(training.epochs or 0),
                batch_size=training.batch_size,
                seed=seeds.sampling,
                round_number=tf.constant(0),
            )
        )
    return rows.numpy()[mask.numpy() > 0]


def _by_hand(
    training: ClientTraining, noise: float, kind: str = "softmax", seeds: ClientSeeds = SEEDS
) -> PrivateUpdate:
    """DP-SGD as algorithm 1 of Abadi et al. writes it: one example after the other, the rest in NumPy in float64."""
    model = _model(kind)
    before = [np.array(weight, np.float64) for weight in model.initial_weights(0)]
    weights = before
    first, second = ([np.zeros_like(weight) for weight in before] for _ in range(2))
    clip, fractions = training.example_clip, []
    for step in range(training.local_steps(RECORDS)):
        keras = model.to_keras([weight.astype(np.float32) for weight in weights])
        order = [id(variable) for variable in keras.trainable_variables]
        assert len(order) == len(weights)
        total, longer = [np.zeros_like(weight) for weight in weights], []
        rows = _minibatch(training, step, seeds, RECORDS)
        for row in rows:
            with tf.GradientTape() as tape:
                loss = tf.keras.losses.sparse_categorical_crossentropy(
                    Y[row : row + 1], keras(X[row : row + 1]), from_logits=True
                )[0]
            gradient = [np.array(part, np.float64) for part in tape.gradient(loss, keras.trainable_variables)]
            norm = np.sqrt(sum(np.sum(part**2) for part in gradient))
            longer.append(norm > clip)
            if training.example_clipping == "automatic":
                scale = clip / (norm + 0.01)
            else:
                scale = min(1, clip / norm)
            total = [t + scale * part for t, part in zip(total, gradient, strict=True)]
        fractions.append(np.mean(longer) if longer else 0)
        draws = normal_like([tf.zeros(weight.shape) for weight in weights], round_seed(seeds.noise, tf.constant(step)))
        with tf.GradientTape() as tape:
            penalty = tf.add_n(keras.losses or [tf.constant(0.0)])
        penalties = tape.gradient(penalty, keras.trainable_variables, unconnected_gradients="zero")
        gradient = [
            (t + noise * clip * draw.numpy()) / min(training.batch_size, RECORDS) + penalty.numpy()
            for t, draw, penalty in zip(total, draws, penalties, strict=True)
        ]
        drifts = [weight - old for weight, old in zip(weights, before, strict=True)]
        gradient = [g + training.proximal_strength * drift for g, drift in zip(gradient, drifts, strict=True)]
        beta, beta2 = training.momentum, training.second_momentum
        if training.optimizer == "sgd":
            direction = gradient
        elif training.optimizer == "momentum":
            first = [beta * m + g for m, g in zip(first, gradient, strict=True)]
            direction = first
        else:
            first = [beta * m + (1 - beta) * g for m, g in zip(first, gradient, strict=True)]
            second = [beta2 * v + (1 - beta2) * g**2 for v, g in zip(second, gradient, strict=True)]
            direction = [
                m / (1 - beta ** (step + 1)) * np.sqrt(1 - beta2 ** (step + 1)) / (np.sqrt(v) + training.adaptivity)
                for m, v in zip(first, second, strict=True)
            ]
        weights = [w - training.learning_rate * d for w, d in zip(weights, direction, strict=True)]
    return PrivateUpdate([new - old for new, old in zip(weights, before, strict=True)], float(np.mean(fractions)))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("softmax", {}),
        ("softmax", {"batch_size": 1, "steps": 6}),  # most minibatches are empty or have one example
        ("softmax", {"batch_size": 40}),  # everybody in every step
        ("softmax", {"max_batch_size": 6, "epochs": 1, "steps": None}),
        ("softmax", {"microbatch_size": 2}),
        ("softmax", {"example_clipping": "automatic"}),
        ("softmax", {"example_sampling": "shuffled", "epochs": 2, "steps": None}),
        ("softmax", {"example_sampling": "shuffled", "steps": 7, "batch_size": 40}),
        ("softmax", {"optimizer": "momentum", "momentum": 0.7}),
        ("softmax", {"proximal_strength": 0.8}),
        ("regularised", {"optimizer": "adam", "learning_rate": 0.02, "proximal_strength": 0.5}),
        ("regularised", {"microbatch_size": 4, "example_sampling": "shuffled"}),
    ],
)
def test_equals_a_loop_over_examples(kind: str, settings: dict) -> None:
    training = _training(**settings)
    found, expected = _trained(training, kind=kind), _by_hand(training, 0.7, kind)
    for one, other in zip(found.update, expected.update, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    assert found.clipped_fraction == pytest.approx(expected.clipped_fraction, abs=1e-6)
    assert max(np.abs(part).max() for part in found.update) > 1e-2


def test_one_example_more_moves_a_step_by_at_most_the_clip_norm() -> None:
    training = _training(batch_size=RECORDS, steps=1, learning_rate=1.0, example_clip=0.1)
    whole = _trained(training, 0.0)
    for left_out in range(3):
        others = np.delete(np.arange(RECORDS), left_out)
        # The denominator, min(batch_size, n), counts as public: here it is put right by hand.
        fewer = _trained(training, 0.0, x=X[others], y=Y[others])
        moved = [RECORDS * a - (RECORDS - 1) * b for a, b in zip(whole.update, fewer.update, strict=True)]
        distance = np.sqrt(sum(np.sum(part**2) for part in moved))
        assert distance == pytest.approx(0.1, rel=1e-3)


def test_examples_that_are_not_finite_count_as_zero() -> None:
    training = _training(batch_size=RECORDS, steps=2)
    broken = X.copy()
    broken[3], broken[8] = np.nan, np.inf
    assert all(np.isfinite(part).all() for part in _trained(training, x=broken).update)
    kept = np.delete(np.arange(RECORDS), [3, 8])
    # Without noise the sum is that of the others, divided by the same fixed number.
    one_step = _training(batch_size=RECORDS, steps=1)
    zeroed, fewer = _trained(one_step, 0.0, x=broken).update, _trained(one_step, 0.0, x=X[kept], y=Y[kept]).update
    for one, other in zip(zeroed, fewer, strict=True):
        np.testing.assert_allclose(one * RECORDS, other * (RECORDS - 2), rtol=1e-4, atol=1e-5)


class TestNoise:
    def test_has_the_promised_scale_and_shape(self) -> None:
        sums = [tf.zeros([200, 50]), tf.zeros([30])]
        found = noisy_mean(sums, clip_norm=0.5, noise_multiplier=1.2, expected_batch_size=8, seed=tf.constant([3, 4]))
        values = np.concatenate([part.numpy().ravel() for part in found]) * 8 / 0.5 / 1.2
        # 1e-6 by Kolmogorov and Smirnov.
        assert stats.kstest(values, "norm").pvalue > FALSE_ALARM

    def test_is_added_to_the_sum_before_the_division(self) -> None:
        seed = tf.constant([3, 4])
        sums = [tf.constant([[1.0, 2.0]]), tf.constant([3.0])]
        noise = noisy_mean(
            [tf.zeros([1, 2]), tf.zeros([1])], clip_norm=2, noise_multiplier=1, expected_batch_size=5, seed=seed
        )
        found = noisy_mean(sums, clip_norm=2, noise_multiplier=1, expected_batch_size=5, seed=seed)
        for part, draw, total in zip(found, noise, sums, strict=True):
            np.testing.assert_allclose(part, draw + total / 5, rtol=1e-6)

    def test_empty_minibatches_get_all_of_it(self) -> None:
        x, y = np.ones((1, *SHAPE), np.float32), np.zeros(1, np.int32)
        x, y = np.repeat(x, 200, axis=0), np.repeat(y, 200)
        steps, clip, noise = 400, 0.5, 2.0
        training = _training(batch_size=1, max_batch_size=1, steps=steps, learning_rate=1.0, example_clip=clip)

        @tf.function(autograph=False)
        def drawn(step: tf.Tensor) -> tf.Tensor:
            _, mask = poisson_minibatch(tf.constant(200), step, batch_size=1, max_batch_size=1, seed=SEEDS.sampling)
            return tf.reduce_sum(mask)

        counts = np.array([drawn(tf.constant(step)).numpy() for step in range(steps)])
        # A third of the steps is empty; what is left after the drawn examples' part is noise of all the steps.
        assert 0.2 < np.mean(counts == 0) < 0.55
        with_noise = _trained(training, noise, x=x, y=y).update
        values = np.concatenate([part.ravel() for part in with_noise])
        # 51 values of variance steps * (noise * clip)^2; the examples move the weights by less than 3 in all.
        assert len(values) == 51
        assert 0.35 < np.mean(values**2) / (steps * (noise * clip) ** 2) < 2.2

    @pytest.mark.parametrize("changed", ["client", "round", "run"])
    def test_is_nobody_elses(self, changed: str) -> None:
        numbers = {"run": 0, "round": 2, "client": 5}
        others = {**numbers, changed: numbers[changed] + 1}
        found = [
            client_seeds(run_seeds(one["run"]), tf.constant(one["round"]), tf.constant(one["client"]))
            for one in (numbers, others, numbers)
        ]
        for own, other, again in zip(*found, strict=True):
            np.testing.assert_array_equal(own, again)
            assert (own.numpy() != other.numpy()).all()
        assert len({tuple(seed.numpy()) for seeds in found[:2] for seed in seeds}) == 6
        training = _training(batch_size=1, steps=1)
        x, y = X[:1], Y[:1]  # one example, so that only the noise differs
        first, second, third = (
            np.concatenate([part.ravel() for part in _trained(training, 5.0, x=x, y=y, seeds=seeds).update])
            for seeds in found
        )
        np.testing.assert_array_equal(first, third)
        # 51 pairs of independent normals: a correlation beyond 0.7 has a probability below 1e-8.
        assert abs(np.corrcoef(first, second)[0, 1]) < 0.7

    def test_differs_from_step_to_step(self) -> None:
        x, y = np.zeros((1, *SHAPE), np.float32), Y[:1]
        taken = [
            np.concatenate([p.ravel() for p in _trained(_training(batch_size=1, steps=steps), 50.0, x=x, y=y).update])
            for steps in (1, 2, 3)
        ]
        second, third = taken[1] - taken[0], taken[2] - taken[1]
        for one, other in ((taken[0], second), (second, third), (taken[0], third)):
            assert abs(np.corrcoef(one, other)[0, 1]) < 0.7


def test_random_layers_follow_the_clients_seed_and_the_step() -> None:
    training = _training(batch_size=RECORDS, steps=1, example_clip=100.0)
    other_seeds = SEEDS._replace(model=SEEDS.model + 1)
    one, again, other = (_trained(training, 0.0, kind="dropout", seeds=seeds) for seeds in (SEEDS, SEEDS, other_seeds))
    np.testing.assert_array_equal(one.update[0], again.update[0])
    assert np.abs(one.update[0] - other.update[0]).max() > 1e-3


def test_clients_of_all_sizes_share_a_graph() -> None:
    model, training = _model(), _training(epochs=2, steps=None)
    weights = [tf.constant(weight) for weight in model.initial_weights(0)]
    traces = []

    @tf.function(
        autograph=False,
        input_signature=[tf.TensorSpec([None, *SHAPE]), tf.TensorSpec([None], tf.int32), tf.TensorSpec([])],
    )
    def train(x: tf.Tensor, y: tf.Tensor, noise: tf.Tensor) -> PrivateUpdate:
        traces.append(1)
        numbers = client_numbers(training, 0.0)._replace(noise_multiplier=noise)
        return train_privately(model, weights, x, y, training=training, numbers=numbers, seeds=SEEDS)

    for records in (1, 2, 7, RECORDS):
        found = train(X[:records], Y[:records], 0.3)
        alone = _trained(training, 0.3, x=X[:records], y=Y[:records])
        for one, other in zip(found.update, alone.update, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    assert len(traces) == 1
