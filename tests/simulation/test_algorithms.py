"""FedAvg with and without weights, FedSGD and FedProx in the in-graph engine, against a plain loop over clients."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import dpfl
from dpfl.clients import ClientTraining
from dpfl.clients.schedule import minibatches
from dpfl.data import FederatedData
from dpfl.mechanisms import NoMechanism
from dpfl.models.functional import FunctionalModel
from dpfl.randomness import Purpose, stateless_seed
from dpfl.simulation import engine as engine_module
from dpfl.simulation.clients import OneByOne
from dpfl.simulation.server import ServerOptimizer
from dpfl.study import grid

COHORTS = [np.array(members, np.int32) for members in ([0, 3, 4, 17, 29], [], [5], [1, 2, 6])]
EQUAL, BY_EXAMPLES = NoMechanism(), NoMechanism(weighting="examples")
FED_SGD = ClientTraining(batch_size=None, steps=1, learning_rate=1.0)
PROXIMAL = ClientTraining(learning_rate=0.3, batch_size=3, epochs=3, proximal_strength=0.9)


@functools.cache
def _keras(model: FunctionalModel) -> tf.keras.Model:
    return model.to_keras(model.initial_weights(0))


def _gradient(
    model: FunctionalModel, weights: list[np.ndarray], x: np.ndarray, y: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Of the mean cross-entropy over some examples, by Keras."""
    keras = _keras(model)
    keras.set_weights([weight.astype(np.float32) for weight in weights])
    with tf.GradientTape() as tape:
        losses = tf.keras.losses.sparse_categorical_crossentropy(y, keras(x), from_logits=True)
        loss = tf.reduce_mean(losses)
    return tuple(part.numpy().astype(np.float64) for part in tape.gradient(loss, keras.trainable_variables))


def _update(configured: Any, data: FederatedData, start: list[np.ndarray], round_number: int, client: int) -> Any:
    """A client's update as the papers write it, in float64, and how many examples it processed."""
    local, own = configured.local, slice(*data.offsets[client : client + 2])
    if local.batch_size is None:
        batches = [np.arange(data.num_examples)[own]] * (local.steps or local.epochs)
    else:
        rows, mask = minibatches(
            tf.constant(data.offsets[[client]], tf.int32),
            tf.constant(data.client_sizes[[client]], tf.int32),
            tf.constant([client]),
            steps=tf.constant(local.steps or 0),
            epochs=tf.constant(local.epochs or 0),
            batch_size=local.batch_size,
            seed=tf.constant(stateless_seed(configured.seed, Purpose.SHUFFLING)),
            round_number=tf.constant(round_number),
        )
        batches = [batch[counts > 0] for batch, counts in zip(rows[0].numpy(), mask[0].numpy(), strict=True)]
    weights, velocity = start, [np.zeros_like(weight) for weight in start]
    decay = local.momentum if local.optimizer == "momentum" else 0.0
    for batch in batches:
        gradient = _gradient(configured.model, weights, data.x[batch], data.y[batch])
        # Of the loss plus mu / 2 * ||weights - start||^2.
        proximal = [local.proximal_strength * (weight - first) for weight, first in zip(weights, start, strict=True)]
        velocity = [decay * v + g + p for v, g, p in zip(velocity, gradient, proximal, strict=True)]
        weights = [weight - local.learning_rate * v for weight, v in zip(weights, velocity, strict=True)]
    return [new - old for new, old in zip(weights, start, strict=True)], sum(len(batch) for batch in batches)


def _reference(configured: Any, data: FederatedData) -> list[np.ndarray]:
    weights = [weight.astype(np.float64) for weight in configured.model.initial_weights(configured.seed)]
    by_examples = configured.plan.mechanism.weighting == "examples"
    for round_number, cohort in enumerate(COHORTS):
        updates = [_update(configured, data, weights, round_number, client) for client in cohort]
        total = sum(count for _, count in updates) if by_examples else configured.plan.expected_cohort
        for update, count in updates:
            share = configured.server.optimizer.learning_rate * (count if by_examples else 1) / total
            weights = [weight + share * part for weight, part in zip(weights, update, strict=True)]
    return weights


def _close(one: Any, other: Any, tolerance: float = 1e-5) -> None:
    for left, right in zip(one, other, strict=True):
        np.testing.assert_allclose(np.asarray(left), np.asarray(right), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("model", "mechanism", "local"),
    [
        ("softmax", EQUAL, PROXIMAL),
        ("softmax", BY_EXAMPLES, PROXIMAL.replace(optimizer="momentum", learning_rate=0.1)),
        ("cnn", BY_EXAMPLES, PROXIMAL.replace(learning_rate=0.1)),
        ("mlp", BY_EXAMPLES, ClientTraining(learning_rate=0.2, batch_size=3, steps=5)),
        ("softmax", EQUAL, ClientTraining(learning_rate=0.2, batch_size=None, epochs=3)),
        ("cnn", BY_EXAMPLES, ClientTraining(learning_rate=0.2, batch_size=None, steps=3, proximal_strength=2.0)),
        ("softmax", BY_EXAMPLES, FED_SGD),
    ],
)
def test_rounds_equal_a_plain_loop(
    model: str, mechanism: NoMechanism, local: ClientTraining, setup: Callable, images: FederatedData
) -> None:
    configured = setup(model, mechanism=mechanism, local=local, server=ServerOptimizer(learning_rate=0.7), seed=3)
    assert isinstance(configured.engine._training, OneByOne) == (model == "cnn")
    state, _ = configured.run(COHORTS)
    reference = _reference(configured, images)
    _close(state.weights, reference)
    moved = [new - old for new, old in zip(reference, configured.model.initial_weights(3), strict=True)]
    assert max(np.abs(part).max() for part in moved) > 0.05


@pytest.mark.parametrize("model", ["softmax", "cnn"])
def test_fed_sgd_is_a_step_along_the_mean_gradient(model: str, setup: Callable, images: FederatedData) -> None:
    """Weighted by examples, along the gradient on all examples of the cohort together."""
    assert FED_SGD.is_fed_sgd
    cohort, server = COHORTS[0], ServerOptimizer(learning_rate=0.4)
    own = [np.arange(images.num_examples)[slice(*images.offsets[k : k + 2])] for k in cohort]
    for mechanism in (EQUAL, BY_EXAMPLES):
        configured = setup(model, mechanism=mechanism, local=FED_SGD, server=server, cohort=len(cohort))
        start = configured.model.initial_weights(0)
        pooled = [np.concatenate(own)] if mechanism == BY_EXAMPLES else own
        gradients = [_gradient(configured.model, start, images.x[rows], images.y[rows]) for rows in pooled]
        means = [np.mean(parts, axis=0) for parts in zip(*gradients, strict=True)]
        expected = [weight - 0.4 * mean for weight, mean in zip(start, means, strict=True)]
        _close(configured.run([cohort])[0].weights, expected)


@pytest.mark.parametrize("model", ["softmax", "cnn"])
def test_a_client_that_diverged_has_neither_update_nor_weight(
    model: str, setup: Callable, images: FederatedData
) -> None:
    configured = setup(model, mechanism=BY_EXAMPLES, local=PROXIMAL.replace(learning_rate=0.1))
    x = images.x.copy()
    x[images.offsets[4]] = np.inf
    way = configured.engine._training
    way._examples = way._examples._replace(x=tf.constant(x))
    others, _ = configured.run([np.array([3, 17], np.int32)])
    with_it, measured = configured.run([np.array([3, 4, 17], np.int32)])
    _close(with_it.weights, others.weights, 1e-6)
    assert measured["non_finite_updates"] == 1
    for cohort in ([4], []):
        alone, measured = configured.run([np.array(cohort, np.int32)])
        _close(alone.weights, configured.state.weights, 0)
        assert measured["non_finite_updates"] == len(cohort)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"steps": 3}, lambda n: 3 * np.minimum(4, n)),
        ({"epochs": 2}, lambda n: 2 * -(-n // 4) * np.minimum(4, n)),
        ({"epochs": 2, "example_sampling": "shuffled"}, lambda n: 2 * n),
    ],
)
def test_private_clients_are_weighted_by_what_they_are_expected_to_process(
    settings: dict, expected: Callable, setup: Callable, images: FederatedData
) -> None:
    local = ClientTraining(learning_rate=0.3, batch_size=4, example_clip=0.5, example_noise=0.5, **settings)
    alone = setup(mechanism=BY_EXAMPLES, local=local, relation="replace_one")
    start, cohort = alone.model.initial_weights(0), COHORTS[0]
    updates = []
    for client in cohort:
        state, _ = alone.run([np.array([client])])  # the mean of one
        updates.append([new - old for new, old in zip(state.weights, start, strict=True)])
    weights = expected(images.client_sizes[cohort])
    assert len(set(weights)) > 1
    means = [np.average(parts, axis=0, weights=weights) for parts in zip(*updates, strict=True)]
    _close(alone.run([cohort])[0].weights, [old + mean for old, mean in zip(start, means, strict=True)])


def test_private_clients_are_proximal_too(setup: Callable) -> None:
    """Without noise, with a clip that nothing reaches and all examples in every step, they are plain clients."""
    plain = ClientTraining(learning_rate=0.3, batch_size=None, steps=4, proximal_strength=1.5)
    private = plain.replace(batch_size=1000, example_clip=1e6, example_noise=0.0)
    states = [setup("mlp", mechanism=EQUAL, local=local).run(COHORTS)[0] for local in (plain, private)]
    _close(states[0].weights, states[1].weights)


@pytest.mark.parametrize("private", [{}, {"example_clip": 0.5, "example_noise": 0.5}])
def test_proximal_strengths_share_one_graph(private: dict, setup: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    compile_once = engine_module._compile
    monkeypatch.setattr(
        engine_module, "_compile", lambda function, *rest: compiled.append(function) or compile_once(function, *rest)
    )
    local = PROXIMAL.replace(**private)
    one, other = (setup(local=local.replace(proximal_strength=strength)) for strength in (0.5, 2.0))
    one.run(COHORTS)
    own, _ = other.run(COHORTS)
    other.engine = one.engine
    shared, _ = other.run(COHORTS)
    _close(own.weights, shared.weights)
    assert len(compiled) == 2  # one each, and none for the second run of the first engine
    assert one.local.structure == other.local.structure != local.replace(proximal_strength=0.0).structure


def test_studies_vary_the_algorithm_and_records_name_it(images: FederatedData) -> None:
    base = dpfl.Experiment(
        data=images,
        local=FED_SGD,
        mechanism=EQUAL,
        privacy=dpfl.Privacy(epsilon=None),
        sampler=dpfl.Poisson(cohort=10),
        rounds=2,
    )
    axes = {
        "mechanism.weighting": ["equal", "examples"],
        ("local.proximal_strength", "local.steps"): [(0.0, 1), (0.5, 3)],
    }
    results = [experiment.run(0, progress=False) for experiment in grid(base, axes)]
    records = [result.record for result in results]
    assert [record["weighting"] for record in records] == ["equal", "equal", "examples", "examples"]
    assert [record["proximal_strength"] for record in records] == [0, 0.5, 0, 0.5]
    assert {record["batch_size"] for record in records} == {None}
    assert len({record["run_id"] for record in records}) == len({record["loss"] for record in records}) == 4
    assert "weighted by examples" in results[2].guarantee.statement()
