"""Keras models as pure functions of their weights.

Simulating many clients wants a model without variables: the same graph then serves every client's
weights. A Keras model becomes one by being rebuilt inside the graph while `tf.variable_creator_scope`
hands out tensors where Keras asks for variables (as `tff.learning.models.functional_model_from_keras`
does). Random layers such as Dropout draw from a seed that is passed in.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from keras.src.backend import _SEED_GENERATOR

from dpfl.errors import InputError
from dpfl.models.named import NAMED, check_named
from dpfl.models.recurrent import run_faster
from dpfl.randomness import Purpose, generator

ModelBuilder = Callable[[], tf.keras.Model]


class FunctionalModel:
    """A Keras classifier as a pure function of its trainable weights.

    Args:
        model: the name of a model ("softmax", "mlp", "cnn"), a function without arguments that
            returns a new Keras model, or a Keras model, whose weights are then the initial ones.
            The model maps a batch of examples to logits, one per class.
        example_shape: shape of one example.
        num_classes: number of classes in the data.

    Attributes:
        example_shape: shape of one example.
        num_classes: number of classes in the data.
        shapes: shapes of the trainable weights, in the order in which Keras creates them.
        parameters: number of trainable parameters.
        vectorizes: whether clients may be trained side by side by `tf.vectorized_map`: all layers
            are plain matrix products and element-wise functions.
        first_kernel: index among `shapes` of the kernel by which examples are multiplied before anything else happens
            to them, that of a first dense layer; None where there is no such layer.
        key: a short text that two models share only if they compute the same from the same seed.

    Raises:
        InputError: dpfl cannot train the model; the sentence says why.
    """

    def __init__(
        self, model: str | ModelBuilder | tf.keras.Model, example_shape: Sequence[int], num_classes: int
    ) -> None:
        self.example_shape = tuple(example_shape)
        self.num_classes = num_classes
        try:
            self._take(model, num_classes)
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"the model cannot be trained on examples of shape {self.example_shape}: "
                f"{str(error).strip().splitlines()[0].rstrip('.')}."
            ) from error

    def _take(self, model: str | ModelBuilder | tf.keras.Model, num_classes: int) -> None:
        self._given_weights: list[np.ndarray] | None = None
        self._builder = self._make_builder(model, num_classes)
        template, created = self._build_template(seed=0)
        self._check_output(template, num_classes)
        trainable = {id(variable) for variable in template.trainable_variables}
        self._is_trainable = [id(variable) in trainable for variable in created]
        if not any(self._is_trainable):
            raise InputError(
                "the model has no trainable weights of its own: a function must make a new model at each call, with at "
                "least one layer that trains."
            )
        if isinstance(model, tf.keras.Model):
            # A rebuilt model creates its weights in the same order as it lists them.
            position = {id(variable): index for index, variable in enumerate(template.weights)}
            given = model.get_weights()
            self._given_weights = [given[position[id(variable)]] for variable in created]
        self.shapes = [
            tuple(variable.shape) for variable, trains in zip(created, self._is_trainable, strict=True) if trains
        ]
        self.parameters = sum(int(np.prod(shape)) for shape in self.shapes)
        self.vectorizes = _only_products(template)
        self.first_kernel = self._first_kernel(template, created)
        self._frozen = [
            value for value, trains in zip(self._created_values(seed=0), self._is_trainable, strict=True) if not trains
        ]
        graph = self._forward_graph()
        self.key = model if isinstance(model, str) else f"{type(template).__name__.lower()}-{self._digest(graph)}"

    def fitted_to(self, example_shape: Sequence[int], num_classes: int) -> FunctionalModel:
        """Returns this model, which was made for such examples and classes.

        Raises:
            InputError: it was made for others.
        """
        if self.example_shape != tuple(example_shape) or self.num_classes != num_classes:
            raise InputError(
                f"the model was made for examples of shape {self.example_shape} and {self.num_classes} classes, but "
                f"the data has shape {tuple(example_shape)} and {num_classes} classes: give the Keras model anew."
            )
        return self

    def initial_weights(self, seed: int) -> list[np.ndarray]:
        """Trainable weights before training: a function of the seed, or the given model's own."""
        values = self._created_values(seed)
        return [value for value, trains in zip(values, self._is_trainable, strict=True) if trains]

    def to_keras(self, weights: Sequence[np.ndarray]) -> tf.keras.Model:
        """Returns an ordinary Keras model with these trainable weights, as `shapes` says."""
        model, created = self._build_template(seed=0)
        trainable, frozen = iter(weights), iter(self._frozen)
        for variable, trains in zip(created, self._is_trainable, strict=True):
            variable.assign(next(trainable if trains else frozen))
        return model

    def losses_and_logits(
        self,
        weights: Sequence[tf.Tensor],
        x: tf.Tensor,
        y: tf.Tensor,
        *,
        training_seed: tf.Tensor | None = None,
        first_products: tf.Tensor | None = None,
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Evaluates the model. Only inside a `tf.function`.

        Args:
            weights: trainable weights, as `shapes` says.
            x: examples, (batch, *example_shape).
            y: labels, (batch,), int32.
            training_seed: int32 of shape (2,), the seed of random layers; None evaluates without them.
            first_products: the examples times the first kernel, (batch, units), of a model that has a
                `first_kernel`; that kernel and the values of `x` are then not looked at. None multiplies.

        Returns:
            Cross-entropy per example (batch,), in nats; logits (batch, classes); the sum of the
            model's regularisation losses, a scalar.
        """
        model = self.bind(weights, training_seed)
        for layer in _layers(model):
            run_faster(layer)
        if first_products is not None:
            _give_products(_first_dense(model), first_products)
        logits = model(x, training=training_seed is not None)
        losses = cross_entropies(logits, y)
        penalty = tf.add_n([tf.cast(loss, tf.float32) for loss in model.losses] or [tf.constant(0.0)])
        return losses, logits, penalty

    def _first_kernel(self, template: tf.keras.Model, created: Sequence[tf.Variable]) -> int | None:
        dense = _first_dense(template)
        if dense is None:
            return None
        variables = [variable for variable, trains in zip(created, self._is_trainable, strict=True) if trains]
        return next((index for index, variable in enumerate(variables) if variable is dense.kernel), None)

    def _make_builder(self, model: Any, num_classes: int) -> ModelBuilder:
        if isinstance(model, str):
            check_named(model, self.example_shape)
            return lambda: NAMED[model](self.example_shape, num_classes)
        if isinstance(model, tf.keras.Model):
            if not model.built:
                model(tf.zeros((1, *self.example_shape)))
            try:
                config = model.get_config()
            except NotImplementedError:
                raise InputError(
                    f"the model {model.name} cannot be rebuilt because its class has no get_config: "
                    "give a function that returns a new model instead."
                ) from None
            keras_class = type(model)
            return lambda: keras_class.from_config(config)
        if callable(model):
            return model
        raise InputError(
            f"a model is a name ({', '.join(NAMED)}), a function that returns a Keras model, or a Keras model, "
            f"but it was {model!r}."
        )

    def _build(self) -> tf.keras.Model:
        model = self._builder()
        if not isinstance(model, tf.keras.Model):
            raise InputError(f"the model function must return a Keras model, but it returned {type(model).__name__}.")
        if not model.built:
            model(tf.zeros((1, *self.example_shape)))
        return model

    def _build_template(self, seed: int) -> tuple[tf.keras.Model, list[tf.Variable]]:
        """Builds the model with real variables and the order in which it creates them."""
        created: list[tf.Variable] = []

        def record(make: Callable[..., tf.Variable], **arguments: Any) -> tf.Variable:
            variable = make(**arguments)
            created.append(variable)
            return variable

        with _keras_seed(seed), tf.variable_creator_scope(record):
            model = self._build()
            output = model(tf.zeros((1, *self.example_shape)))
        if not tf.is_tensor(output):
            raise InputError(f"the model must have one output, logits, but it gives a {type(output).__name__}.")
        self._output_shape = tuple(output.shape)
        for layer in _layers(model):
            if isinstance(layer, tf.keras.layers.BatchNormalization):
                raise InputError(
                    f"the layer {layer.name} (BatchNormalization) mixes a client's examples and keeps statistics "
                    "outside the weights: use GroupNormalization or LayerNormalization instead."
                )
            if getattr(layer, "activity_regularizer", None) is not None:
                raise InputError(
                    f"the layer {layer.name} has an activity regularizer, which adds up over a minibatch, padding and "
                    "all: leave it out, or regularise the weights (kernel_regularizer)."
                )
        listed = {id(variable) for variable in model.weights}
        return model, [variable for variable in created if id(variable) in listed]

    def _check_output(self, template: tf.keras.Model, num_classes: int) -> None:
        shape = self._output_shape
        if len(shape) != 2:
            raise InputError(
                f"the model must map a batch of examples to logits of shape (batch, classes), but one example gives "
                f"shape {shape}."
            )
        if shape[1] < num_classes:
            raise InputError(
                f"a label lies outside the model's classes: the data has {num_classes} classes and the model only "
                f"{shape[1]} outputs; give the last layer {num_classes} units."
            )
        last = _layers(template)[-1]
        activation = getattr(last, "activation", None)
        if isinstance(last, tf.keras.layers.Softmax) or getattr(activation, "__name__", "") in (
            "softmax",
            "sigmoid",
        ):
            raise InputError(
                f"the last layer {last.name} turns logits into probabilities, and dpfl trains on logits: remove its "
                "activation."
            )

    def _forward_graph(self) -> tf.Graph:
        """The graph of one training pass; refuses randomness that would not be a function of the seed."""

        def forward() -> tf.Tensor:
            weights = [tf.zeros(shape) for shape in self.shapes]
            x = tf.zeros((1, *self.example_shape))
            return self.losses_and_logits(weights, x, tf.zeros(1, tf.int32), training_seed=tf.zeros(2, tf.int32))[0]

        graph = tf.function(forward, autograph=False).get_concrete_function().graph
        for operation in graph.get_operations():
            if "Random" in operation.type and not operation.type.startswith("Stateless"):
                raise InputError(
                    f"the model draws random numbers that do not follow the run's seed (operation {operation.type}): "
                    "use Keras' own random layers, such as Dropout."
                )
        return graph

    def _created_values(self, seed: int) -> list[np.ndarray]:
        if self._given_weights is not None:
            return self._given_weights
        _, created = self._build_template(seed)
        return [variable.numpy() for variable in created]

    def bind(self, weights: Sequence[tf.Tensor], training_seed: tf.Tensor | None = None) -> tf.keras.Model:
        """Rebuilds the Keras model with tensors in the place of its variables. Only inside a `tf.function`.

        The layers hold the very tensors that are handed out, not copies of them: `layer.kernel is weights[0]`.

        Args:
            weights: trainable weights, as `shapes` says.
            training_seed: int32 of shape (2,), the seed of random layers; None leaves them to Keras, for calls with
                `training=False`.
        """
        trainable, frozen = iter(weights), iter(self._frozen)
        hand_out = iter([next(trainable) if trains else tf.constant(next(frozen)) for trains in self._is_trainable])
        with tf.variable_creator_scope(lambda make, **arguments: next(hand_out)):
            model = self._build()
        if training_seed is not None:
            for index, layer in enumerate(_layers(model)):
                if hasattr(layer, "_random_generator"):
                    of_layer = tf.random.experimental.stateless_fold_in(training_seed, index)
                    layer._random_generator = _SeededGenerator(of_layer)
        return model

    def _digest(self, graph: tf.Graph) -> str:
        """A digest of what the model computes, free of the names that Keras and TensorFlow count up."""

        def in_order(nodes: Iterable[Any]) -> bytes:
            digest = hashlib.sha256()
            for node in nodes:
                digest.update(node.op.encode())
                for name in sorted(node.attr):
                    if not name.startswith("_") and node.attr[name].WhichOneof("value") != "func":
                        digest.update(name.encode() + node.attr[name].SerializeToString(deterministic=True))
            return digest.digest()

        definition = graph.as_graph_def()
        whole = hashlib.sha256(in_order(definition.node))
        for inner in sorted(in_order(function.node_def) for function in definition.library.function):
            whole.update(inner)
        for value in self._created_values(seed=0):
            whole.update(value.tobytes())
        return whole.hexdigest()[:12]


def cross_entropies(logits: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
    """The loss of each example, (batch,), in nats, from logits (batch, classes) and labels (batch,)."""
    return tf.nn.sparse_softmax_cross_entropy_with_logits(labels=y, logits=logits)


class _SeededGenerator:
    """What Keras' random layers ask for, drawn from a seed (the interface of `keras.backend.RandomGenerator`)."""

    def __init__(self, seed: tf.Tensor) -> None:
        self._seed = seed

    def dropout(self, inputs: tf.Tensor, rate: float, noise_shape: Any = None) -> tf.Tensor:
        return tf.nn.experimental.stateless_dropout(inputs, rate, seed=self._seed, noise_shape=noise_shape)

    def random_normal(self, shape: Any, mean: float = 0.0, stddev: float = 1.0, dtype: Any = None) -> tf.Tensor:
        return tf.random.stateless_normal(shape, self._seed, mean, stddev, dtype or tf.float32)

    def random_uniform(
        self, shape: Any, minval: float = 0.0, maxval: float | None = None, dtype: Any = None
    ) -> tf.Tensor:
        return tf.random.stateless_uniform(shape, self._seed, minval, maxval, dtype or tf.float32)

    def truncated_normal(self, shape: Any, mean: float = 0.0, stddev: float = 1.0, dtype: Any = None) -> tf.Tensor:
        return tf.random.stateless_truncated_normal(shape, self._seed, mean, stddev, dtype or tf.float32)


@contextlib.contextmanager
def _keras_seed(seed: int) -> Iterator[None]:
    """Seeds what Keras' initialisers draw their seeds from, and restores it after.

    That is Python's `random`, or a generator of Keras' own once somebody has called `tf.keras.utils.set_random_seed`.
    """
    drawn = int(generator(seed, Purpose.INITIAL_WEIGHTS).integers(2**31))
    state, keras_generator = random.getstate(), getattr(_SEED_GENERATOR, "generator", None)
    random.seed(drawn)
    if keras_generator is not None:
        _SEED_GENERATOR.generator = random.Random(drawn)
    try:
        yield
    finally:
        random.setstate(state)
        _SEED_GENERATOR.generator = keras_generator


def _layers(model: tf.keras.Model) -> list[tf.keras.layers.Layer]:
    """All layers, those of nested models included, in a fixed order, without the models themselves."""
    return [
        layer
        for layer in model._flatten_layers(include_self=False)
        if not isinstance(layer, tf.keras.Model | tf.keras.layers.InputLayer)
    ]


def _first_dense(model: tf.keras.Model) -> tf.keras.layers.Dense | None:
    """The dense layer that sees the examples as they are, flattened at most, if the model begins with one.

    Its kernel has no penalty, which would have to see the kernel itself.
    """
    if type(model) is not tf.keras.Sequential:  # A subclass may call its layers otherwise.
        return None
    flattened = False
    for layer in model.layers:
        if type(layer) is tf.keras.layers.Flatten:
            flattened = True
        elif type(layer) is tf.keras.layers.Dense and layer.kernel_regularizer is None:
            return layer if flattened or len(model.input_shape) == 2 else None
        else:
            return None
    return None


def _give_products(layer: tf.keras.layers.Dense, products: tf.Tensor) -> None:
    """Lets a dense layer take its products with the inputs as given."""

    def call(inputs: tf.Tensor) -> tf.Tensor:
        outputs = products if layer.bias is None else products + layer.bias
        return outputs if layer.activation is None else layer.activation(outputs)

    layer.call = call


def _only_products(model: tf.keras.Model) -> bool:
    plain = (
        tf.keras.layers.Dense,
        tf.keras.layers.Flatten,
        tf.keras.layers.Reshape,
        tf.keras.layers.Activation,
        tf.keras.layers.ReLU,
        tf.keras.layers.Add,
        tf.keras.layers.Concatenate,
    )
    return all(isinstance(layer, plain) and _is_elementwise(layer) for layer in _layers(model))


def _is_elementwise(layer: tf.keras.layers.Layer) -> bool:
    """Whether the layer's activation is Keras' or TensorFlow's own: another may mix examples, padding and all."""
    activation = getattr(layer, "activation", None)
    return activation is None or getattr(activation, "__module__", "").split(".")[0] in ("keras", "tensorflow")
