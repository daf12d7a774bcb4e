"""Notes how a model uses its weights while it runs.

Each layer that holds weights gets, for the time of one call of the model, a rule (`rules.py`) in the place of its
`call`: the rule computes the same, watches what comes out of the weights, and says afterwards what that means for
each weight's gradient. A layer without a rule of its own is run again, example by example.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf

from dpfl.clients.per_example.contributions import Contribution, Direct
from dpfl.clients.per_example.recurrent import RECURRENT_RULES, starts_masked
from dpfl.clients.per_example.rules import LAYER_RULES, Noted, Rule, again_by_example, replaced
from dpfl.errors import InputError


class Capture(contextlib.AbstractContextManager["Capture"]):
    """A model's layers with their rules in place; leaving restores the model.

    Args:
        model: a Keras model that has been built.
        weights: its trainable weights, the very objects that its layers hold.
        tape: records the forward pass.
        batch: the number of examples, an int32 scalar.

    Attributes:
        layers: for each weight a number that weights of the same layer share.
        watched: the tensors with respect to which the loss's gradients are needed.
    """

    def __init__(
        self,
        model: tf.keras.Model,
        weights: Sequence[tf.Tensor | tf.Variable],
        tape: tf.GradientTape,
        batch: tf.Tensor,
    ) -> None:
        self._index = {id(weight): index for index, weight in enumerate(weights)}
        self._tape, self._batch = tape, batch
        self._owners = list(owners(model, weights))
        self.layers = [-1 - index for index in range(len(weights))]
        for number, (_, held) in reversed(list(enumerate(self._owners))):
            for weight in held:  # A weight that lies in several layers belongs to the first.
                self.layers[self._index[id(weight)]] = number
        self._noted: list[tuple[Noted, int | None]] = []
        self._restore = contextlib.ExitStack()
        self._running_again = False
        self._model = model
        self._graph = _graph()
        self._refusal: InputError | None = None
        # How many rows of the first axis belong to one example: more than one inside of TimeDistributed.
        self._rows_per_example: int | None = 1

    def __enter__(self) -> Capture:
        for layer, held in self._owners:
            self._put_in_place(layer, held)
        for layer in self._model._flatten_layers():
            if isinstance(layer, tf.keras.layers.TimeDistributed):
                self._restore.enter_context(replaced(layer, call=self._steps_as_rows(layer), _always_use_reshape=True))
        return self

    def __exit__(self, kind: object, failure: BaseException | None, *_: object) -> None:
        self._restore.close()
        if self._refusal is not None:  # AutoGraph puts others around what is raised inside of a model.
            raise self._refusal from failure

    @property
    def watched(self) -> list[tf.Tensor]:
        """All watched tensors, in the order in which `contributions` takes their gradients."""
        return [tensor for noted, _ in self._noted for tensor in noted.watched]

    def contributions(self, gradients: Sequence[tf.Tensor]) -> list[list[Contribution]]:
        """For each weight its uses, from the gradients with respect to `watched`. Private."""
        uses: list[list[Contribution]] = [[] for _ in self._index]
        remaining = iter(gradients)
        for noted, rows_per_example in self._noted:
            self._rows_per_example = rows_per_example
            for weight, contribution in noted.contributions(*(next(remaining) for _ in noted.watched)):
                if id(weight) in self._index:
                    uses[self._index[id(weight)]].append(contribution)
        return uses

    def _put_in_place(self, layer: tf.keras.layers.Layer, held: list[Any]) -> None:
        # As Keras would call it, with its Python control flow translated where the model runs in a graph.
        original, its_rule = layer._autographed_call(), rule_for(layer)

        def call(*arguments: Any, **options: Any) -> Any:
            if self._running_again or self._is_keras_building():
                return original(*arguments, **options)
            if _graph() is not self._graph:
                self._refusal = InputError(
                    f"the layer {layer.name} is called inside of a TensorFlow loop, branch or function, where its "
                    "gradients cannot be seen: call it from Python itself, or write one layer that holds the weights "
                    "and does the whole."
                )
                raise self._refusal
            rule = again_by_example if starts_masked(layer, *arguments, **options) else its_rule
            more = {"trained": held} if rule is again_by_example else {}
            noted = rule(layer, original, self, *arguments, **more, **options)
            self._noted.append((noted, self._rows_per_example))
            return noted.outputs

        self._restore.enter_context(replaced(layer, call=tf.autograph.experimental.do_not_convert(call)))

    def _is_keras_building(self) -> bool:
        """Whether Keras only infers shapes, as a `Sequential` without inputs does at a new batch size."""
        graph = _graph()
        while graph is not None and graph is not self._graph:
            if getattr(graph, "name", "").endswith("_scratch_graph"):
                return True
            graph = getattr(graph, "outer_graph", None)
        return False

    def _steps_as_rows(self, layer: tf.keras.layers.TimeDistributed) -> Callable[..., Any]:
        original = layer.call

        def call(inputs: Any, **options: Any) -> Any:
            before, steps = self._rows_per_example, tf.nest.flatten(inputs)[0].shape[1]
            self._rows_per_example = None if before is None or steps is None else before * steps
            try:
                return original(inputs, **options)
            finally:
                self._rows_per_example = before

        return tf.autograph.experimental.do_not_convert(call)

    # What the rules use.

    def watch(self, tensor: tf.Tensor) -> tf.Tensor:
        """Records everything that is computed from a tensor."""
        self._tape.watch(tensor)
        return tensor

    def rows(self, tensor: tf.Tensor, axes: int = 1) -> tf.Tensor:
        """A tensor of (batch, ..., *last axes) as (batch, positions, product of the last axes).

        Inside of `TimeDistributed` the first axis counts examples times steps, the examples first.
        """
        leading = tensor.shape.rank - axes
        width = math.prod(tensor.shape[leading:])
        count = self._rows_per_example
        for size in tensor.shape[1:leading]:
            count = None if size is None or count is None else count * size
        if count is None:
            return tf.reshape(tensor, [self._batch, -1, width])
        return tf.reshape(tensor, [-1, count, width])

    def summed(self, tensor: tf.Tensor, shape: Sequence[int]) -> Direct:
        """Gradients at every position, (batch, ..., *shape), as those of a weight of this shape that is added there."""
        by_position = self.rows(tensor, len(shape))
        if by_position.shape[1] != 1:
            by_position = tf.reduce_sum(by_position, axis=1)
        return Direct(tf.reshape(by_position, [-1, *shape]))

    @contextlib.contextmanager
    def running_again(self) -> Iterator[None]:
        """While a layer is run again, nothing is noted."""
        self._running_again = True
        try:
            yield
        finally:
            self._running_again = False


def rule_for(layer: tf.keras.layers.Layer) -> Rule:
    """The layer's rule; the general one for layers that have none, or that change what Keras' own computes."""
    for kind, (fits, rule) in (LAYER_RULES | RECURRENT_RULES).items():
        if isinstance(layer, kind) and _computes_as(type(layer), kind) and fits(layer):
            return rule
    return again_by_example


def _computes_as(one: type, other: type) -> bool:
    methods = ("call", "convolution_op")  # Keras documents the second as one to override.
    return all(getattr(one, method, None) is getattr(other, method, None) for method in methods)


def _graph() -> Any:
    """The graph that operations are added to; None where they are run at once."""
    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()


def owners(
    model: tf.keras.Model, weights: Sequence[tf.Tensor | tf.Variable]
) -> Iterator[tuple[tf.keras.layers.Layer, list[Any]]]:
    """All layers that hold some of the weights themselves, with these, each once.

    A recurrent layer's weights lie in its cell, which runs inside of a loop: the layer counts as their owner.
    """
    trained = {id(weight) for weight in weights}
    seen: set[int] = set()
    waiting = [model]
    while waiting:
        layer = waiting.pop(0)
        if id(layer) in seen:
            continue
        seen.add(id(layer))
        is_recurrent = isinstance(layer, tf.keras.layers.RNN)
        parts = layer._flatten_layers() if is_recurrent else [layer]
        held = {id(weight): weight for part in parts for weight in [*part._trainable_weights, *vars(part).values()]}
        own = [weight for key, weight in held.items() if key in trained]
        if own:
            yield layer, own
        if not is_recurrent:
            waiting.extend(layer._flatten_layers(include_self=False, recursive=False))
