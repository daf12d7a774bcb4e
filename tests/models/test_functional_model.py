"""Keras models as pure functions of their weights."""

import itertools
import random

import numpy as np
import pytest
import tensorflow as tf
from keras.src.backend import _SEED_GENERATOR

from dpfl.errors import InputError
from dpfl.models.functional import FunctionalModel

layers = tf.keras.layers
SHAPE, CLASSES = (8, 8, 1), 10


def _shared() -> tf.keras.Model:
    inputs = layers.Input(SHAPE)
    shared = layers.Dense(64, activation="tanh")
    return tf.keras.Model(inputs, layers.Dense(CLASSES)(shared(shared(layers.Flatten()(inputs)))))


def _lazy() -> tf.keras.Model:
    return tf.keras.Sequential([layers.Flatten(), layers.Dense(5, kernel_regularizer="l2"), layers.Dense(CLASSES)])


def _normalised() -> tf.keras.Model:
    return tf.keras.Sequential(
        [
            layers.Input(SHAPE),
            layers.Conv2D(4, 3, activation="relu"),
            layers.GroupNormalization(groups=2),
            layers.Flatten(),
            layers.LayerNormalization(),
            layers.Dense(CLASSES),
        ]
    )


def _dropout(rate: float = 0.5) -> tf.keras.Model:
    return tf.keras.Sequential([layers.Input(SHAPE), layers.Flatten(), layers.Dropout(rate), layers.Dense(CLASSES)])


class _Subclassed(tf.keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.flatten, self.first, self.second = layers.Flatten(), layers.Dense(4), layers.Dense(CLASSES)

    def call(self, x: tf.Tensor) -> tf.Tensor:
        return self.second(self.first(self.flatten(x)))


def _examples(count: int = 7) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.random((count, *SHAPE), dtype=np.float32), rng.integers(0, CLASSES, count).astype(np.int32)


def _evaluate(model: FunctionalModel, weights: list, x: np.ndarray, y: np.ndarray, seed: object = None) -> list:
    call = tf.function(lambda *values: model.losses_and_logits(values, x, y, training_seed=seed), autograph=False)
    return [output.numpy() for output in call(*[tf.constant(weight) for weight in weights])]


@pytest.mark.parametrize("model", ["softmax", "mlp", "cnn", _shared, _lazy, _normalised, _Subclassed])
def test_function_equals_keras_model(model: object) -> None:
    functional = FunctionalModel(model, SHAPE, CLASSES)
    rng = np.random.default_rng(1)
    weights = [rng.normal(size=shape).astype(np.float32) for shape in functional.shapes]
    x, y = _examples()
    losses, logits, penalty = _evaluate(functional, weights, x, y)
    keras = functional.to_keras(weights)
    np.testing.assert_allclose(logits, keras(x).numpy(), rtol=1e-5, atol=1e-5)
    reference = tf.keras.losses.sparse_categorical_crossentropy(y, keras(x), from_logits=True)
    np.testing.assert_allclose(losses, reference, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(penalty, sum(keras.losses), rtol=1e-5, atol=1e-6)
    assert functional.parameters == keras.count_params()


def test_given_model_starts_from_its_own_weights_and_is_a_snapshot() -> None:
    keras = _normalised()
    functional = FunctionalModel(keras, SHAPE, CLASSES)
    before = [weight.copy() for weight in keras.get_weights()]
    keras.set_weights([weight + 1 for weight in before])
    for seed in (0, 1):
        weights = functional.initial_weights(seed)
        assert sorted(weight.shape for weight in weights) == sorted(weight.shape for weight in before)
        x, y = _examples()
        keras.set_weights(before)
        np.testing.assert_allclose(_evaluate(functional, weights, x, y)[1], keras(x).numpy(), rtol=1e-5, atol=1e-6)


def test_a_function_must_make_a_new_model_each_time() -> None:
    same = _dropout()
    with pytest.raises(InputError, match="must make a new model at each call"):
        FunctionalModel(lambda: same, SHAPE, CLASSES)


def test_an_instance_that_is_not_built_yet_is_built() -> None:
    keras = tf.keras.Sequential([layers.Flatten(), layers.Dense(CLASSES)])
    assert FunctionalModel(keras, SHAPE, CLASSES).parameters == 650


def test_frozen_layers_stay_out_of_the_weights_but_count_in_the_logits() -> None:
    keras = tf.keras.Sequential([layers.Input(SHAPE), layers.Flatten(), layers.Dense(6), layers.Dense(CLASSES)])
    keras.layers[1].trainable = False
    functional = FunctionalModel(keras, SHAPE, CLASSES)
    assert functional.shapes == [(6, CLASSES), (CLASSES,)]
    x, y = _examples()
    np.testing.assert_allclose(
        _evaluate(functional, functional.initial_weights(0), x, y)[1], keras(x).numpy(), rtol=1e-5, atol=1e-6
    )


def test_initial_weights_follow_the_seed_and_leave_other_randomness_alone() -> None:
    functional = FunctionalModel("mlp", SHAPE, CLASSES)
    random.seed(5)
    expected = random.random()
    random.seed(5)
    one, same, other = (functional.initial_weights(seed)[0] for seed in (3, 3, 4))
    assert random.random() == expected
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 0.01


def test_dropout_follows_its_seed_and_is_off_in_evaluation() -> None:
    functional = FunctionalModel(_dropout, SHAPE, CLASSES)
    weights = functional.initial_weights(0)
    x, y = _examples()
    one, same, other = (_evaluate(functional, weights, x, y, tf.constant([seed, 0]))[1] for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 1e-3
    plain = _evaluate(functional, weights, x, y)[1]
    np.testing.assert_allclose(plain, functional.to_keras(weights)(x).numpy(), rtol=1e-5, atol=1e-6)
    assert np.abs(one - plain).max() > 1e-3


def test_key_tells_models_apart_and_not_their_names() -> None:
    def key(model: object) -> str:
        return FunctionalModel(model, SHAPE, CLASSES).key

    assert key(_dropout) == key(_dropout)
    assert key(_dropout) != key(lambda: _dropout(0.4))
    assert key(_shared) != key(_normalised)
    assert key(_Subclassed) == key(_Subclassed)
    keras = _lazy()
    keras.build((None, *SHAPE))
    first = key(keras)
    assert key(keras) == first
    keras.set_weights([weight + 0.1 for weight in keras.get_weights()])
    assert key(keras) != first


@pytest.mark.parametrize(
    ("model", "word"),
    [
        ("resnet", "there is no model 'resnet'"),
        (7, "it was 7"),
        (lambda: 3, "returned int"),
        (lambda: tf.keras.Sequential([layers.Flatten()]), "no trainable weights"),
        (lambda: tf.keras.Sequential([layers.Flatten(), layers.Dense(10, dtype="float64")]), "cannot be trained"),
        (
            lambda: tf.keras.Model(i := layers.Input(SHAPE), [layers.Flatten()(i), layers.Flatten()(i)]),
            "must have one output",
        ),
        (lambda: tf.keras.Sequential([layers.Flatten(), layers.Dense(3)]), "outside the model's classes"),
        (lambda: tf.keras.Sequential([layers.Flatten(), layers.Dense(10, activation="softmax")]), "logits"),
        (lambda: tf.keras.Sequential([layers.Flatten(), layers.Dense(10), layers.Softmax()]), "logits"),
        (
            lambda: tf.keras.Sequential([layers.Flatten(), layers.BatchNormalization(), layers.Dense(10)]),
            "BatchNormalization",
        ),
        (
            lambda: tf.keras.Sequential([layers.Flatten(), layers.Dense(10, activity_regularizer="l2")]),
            "activity regularizer",
        ),
        (
            lambda: tf.keras.Sequential(
                [layers.Flatten(), layers.Lambda(lambda x: x + tf.random.normal(tf.shape(x))), layers.Dense(10)]
            ),
            "do not follow the run's seed",
        ),
        (lambda: tf.keras.Sequential([layers.Dense(10)]), "shape (1, 8, 8, 10)"),
        (lambda: tf.keras.Sequential([layers.Input((3,)), layers.Dense(10)]), "cannot be trained on examples of shape"),
    ],
)
def test_models_that_cannot_be_trained_are_refused_in_one_sentence(model: object, word: str) -> None:
    with pytest.raises(InputError) as refused:
        FunctionalModel(model, SHAPE, CLASSES)
    assert word in str(refused.value)
    assert "\n" not in str(refused.value)


def test_cnn_needs_images() -> None:
    with pytest.raises(InputError, match="needs images"):
        FunctionalModel("cnn", (20,), CLASSES)


def test_only_plain_products_are_vectorised() -> None:
    assert FunctionalModel("mlp", SHAPE, CLASSES).vectorizes
    assert not FunctionalModel("cnn", SHAPE, CLASSES).vectorizes
    assert not FunctionalModel(_dropout, SHAPE, CLASSES).vectorizes


@pytest.mark.parametrize(
    ("activation", "expected"),
    [("relu", True), (tf.nn.relu, True), (lambda x: x - tf.reduce_mean(x, axis=0), False)],
    ids=["name", "TensorFlow's", "one that mixes the batch"],
)
def test_only_known_activations_train_side_by_side(activation, expected):
    def made():
        return tf.keras.Sequential([layers.Flatten(), layers.Dense(4, activation), layers.Dense(10)])

    assert FunctionalModel(made, SHAPE, CLASSES).vectorizes is expected


def _held(layer: tf.keras.layers.Layer) -> list:
    """Everything that a layer holds: attributes, and members of its lists of weights."""
    values = list(vars(layer).values()) + layer.trainable_weights + layer.weights
    return values + [value for cell in getattr(layer, "_flatten_layers", list)() for value in vars(cell).values()]


@pytest.mark.parametrize(
    "build",
    [
        _shared,
        _lazy,
        _normalised,
        _dropout,
        _Subclassed,
        lambda: tf.keras.Sequential(
            [layers.Input(SHAPE), layers.Reshape((8, 8)), layers.LSTM(3), layers.Dense(CLASSES)]
        ),
        lambda: tf.keras.Sequential(
            [layers.Input(SHAPE), layers.Reshape((8, 8)), layers.GRU(3), layers.Dense(CLASSES)]
        ),
    ],
    ids=["shared", "lazy", "normalised", "dropout", "subclassed", "lstm", "gru"],
)
@pytest.mark.parametrize("in_a_loop", [False, True])
def test_bound_layers_hold_the_very_tensors_that_they_are_given(build: object, in_a_loop: bool) -> None:
    # Per-example clipping tells weights apart by identity.
    model = FunctionalModel(build, SHAPE, CLASSES)
    seen = []

    def look(weights: list) -> None:
        bound = model.bind(weights, tf.constant([1, 2]))
        held = {id(value) for layer in bound._flatten_layers() for value in _held(layer)}
        listed = {id(weight) for weight in bound.trainable_weights}
        seen.append([id(weight) in held and id(weight) in listed for weight in weights])
        named = [getattr(layer, "kernel", None) for layer in bound._flatten_layers()]
        seen.append([any(kernel is weight for weight in weights) for kernel in named if kernel is not None])

    @tf.function(autograph=False)
    def train(*weights: tf.Tensor) -> None:
        if not in_a_loop:
            look(list(weights))
            return

        def body(step: tf.Tensor, weights: list) -> tuple:
            look(weights)
            return step + 1, [weight + 1 for weight in weights]

        tf.while_loop(lambda step, _: step < 2, body, (tf.constant(0), list(weights)))

    train(*[tf.constant(weight) for weight in model.initial_weights(0)])
    assert len(seen) == 2
    assert all(itertools.chain(*seen))
    assert len(seen[0]) == len(model.shapes)


def test_initial_weights_do_not_depend_on_the_seed_that_somebody_gave_keras() -> None:
    model = FunctionalModel("mlp", SHAPE, CLASSES)
    before = model.initial_weights(3)
    state = random.getstate()
    try:
        for seed in (1, 2):
            tf.keras.utils.set_random_seed(seed)
            expected = random.Random(seed).randint(1, 10**9)
            for one, other in zip(before, model.initial_weights(3), strict=True):
                np.testing.assert_array_equal(one, other)
            assert _SEED_GENERATOR.generator.randint(1, 10**9) == expected  # left as it was
    finally:
        _SEED_GENERATOR.generator = None
        random.setstate(state)
