"""Pruning in Keras, by `tensorflow_model_optimization`: its schedules, its masks, its wrappers.

The schedule is `Compression`'s, step by step of a training instead of round by round of a federated one. What is pruned
is tfmot's choice: kernels, recurrent kernels and embeddings, no biases. Wrapped and stripped models share their layers,
and with them their weights, with the model that was given.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from dpfl.clients.keras_door.model import DPModel
from dpfl.compression.config import Compression
from dpfl.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def tfmot_keras() -> Any:
    """`tensorflow_model_optimization.sparsity.keras`, imported when it is asked for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import tensorflow_model_optimization as tfmot
    return tfmot.sparsity.keras


def pruning_schedule(compression: Compression, steps: int) -> Any:
    """A schedule of tfmot that gives after each step the sparsity of `Compression.sparsity_after`.

    Args:
        compression: with a `sparsity`; its `pruning_begins` and `pruning_ends` are fractions of all steps, and
            `pruning_every` is a number of steps.
        steps: of the whole training, at least 1.

    Returns:
        A `tfmot.sparsity.keras.PolynomialDecay` of power 3 from sparsity 0. Where `pruning_every` does not divide the
        steps from its begin to its end, one that prunes at the end as well; where both are the same step, a
        `tfmot.sparsity.keras.ConstantSparsity` from that step on.

    Raises:
        InputError: nothing is to be pruned, or the number of steps is below 1.
    """
    if not compression.sparsity:
        raise InputError("nothing is to be pruned, as sparsity is 0: give a Compression with a sparsity, such as 0.9.")
    if steps < 1:
        raise InputError(f"a schedule is for a training of one step or more, but steps was {steps}.")
    begin, end = compression.pruning_steps(steps)
    every, keras = compression.pruning_every, tfmot_keras()
    if begin == end:
        return keras.ConstantSparsity(compression.sparsity, begin, frequency=every)
    settings = (0.0, compression.sparsity, begin, end, 3, every)
    if (end - begin) % every == 0:
        return keras.PolynomialDecay(*settings)

    class PolynomialDecay(keras.PolynomialDecay):  # type: ignore[name-defined]
        """Prunes in the last step too; it is saved as tfmot's own, which would not."""

        def __call__(self, step: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            prunes, sparsity = super().__call__(step)
            return tf.logical_or(prunes, tf.equal(tf.cast(step, tf.int64), self.end_step)), sparsity

    return PolynomialDecay(*settings)


def as_prunable(model: tf.keras.Model, schedule: Any = None) -> tf.keras.Model:
    """Wraps the layers of a Keras model that have kernels by tfmot's `prune_low_magnitude`.

    What comes out trains by Keras with tfmot's `UpdatePruningStep`, and `strip_pruning` gives the model back. A
    `DPModel` does not train it: there, `PruningCallback` does the wrapper's work.

    Args:
        model: a sequential or functional model that was called or built. The wrapped model shares its layers.
        schedule: of tfmot, such as `pruning_schedule`; None for one that keeps the weights that are zero now, such as
            those of a model that was pruned in federated training (`Result.keras_model`), at zero.

    Raises:
        InputError: the model is neither sequential nor functional, or was never built, or tfmot cannot prune a layer
            that has kernels.
    """
    if isinstance(model, DPModel):
        raise InputError("a DPModel is not wrapped: wrap the Keras model in it (model.model), after training.")
    is_known = isinstance(model, tf.keras.Sequential) or (
        isinstance(model, tf.keras.Model) and getattr(model, "_is_graph_network", False)
    )
    if not is_known or not model.built:
        raise InputError(
            f"tensorflow_model_optimization prunes sequential and functional models that are built, and "
            f"{getattr(model, 'name', model)!r} is none: build it, or write it in one of these forms."
        )
    keras = tfmot_keras()

    def wrap(layer: tf.keras.layers.Layer) -> tf.keras.layers.Layer:
        if isinstance(layer, tf.keras.Model):
            return as_prunable(layer, schedule)
        kernels = [weight for weight in layer.trainable_weights if len(weight.shape) > 1]
        if not kernels or hasattr(layer, "pruning_vars"):  # wrapped already
            return layer
        try:
            return keras.prune_low_magnitude(layer, pruning_schedule=schedule or _keeping(kernels))
        except ValueError as error:
            raise InputError(
                f"tensorflow_model_optimization cannot prune the layer {layer.name} ({type(layer).__name__}): use "
                "layers that it knows, or prune in federated training, where every kernel can be."
            ) from error

    def _keeping(kernels: Sequence[tf.Variable]) -> Any:
        sparsity = max(float(np.mean(kernel.numpy() == 0)) for kernel in kernels)
        return keras.ConstantSparsity(min(sparsity, 1 - 1e-6), 0, frequency=1)

    wrapped = tf.keras.models.clone_model(model, clone_function=wrap)
    if schedule is None:
        for layer in prunable_layers(wrapped):
            for weight, mask, _ in layer.pruning_vars:
                # Of a kernel of zeros, such as one that was never trained, nothing was pruned.
                mask.assign(tf.cast((weight != 0) | tf.reduce_all(weight == 0), mask.dtype))
    return wrapped


def prunable_layers(wrapped: tf.keras.Model) -> list[Any]:
    """The wrappers in a model, those of nested models included, each with `pruning_vars`: weights, masks, thresholds.

    Args:
        wrapped: from `as_prunable` or tfmot's `prune_low_magnitude`.
    """
    return [layer for layer in wrapped._flatten_layers(include_self=False) if hasattr(layer, "pruning_vars")]


class PruningCallback(tf.keras.callbacks.Callback):
    """Prunes the model that a `DPModel` trains by DP-SGD, on the schedule of a `Compression`.

    After every step the smallest weights of each kernel, as many as the schedule says, become zero, and those that were
    pruned before are set to zero again; it is tfmot that computes the masks, of the weights as they are released, noise
    and all. Whatever is computed from these alone is post-processing: each step's noise is that of the training
    without pruning, and so are its ledger and epsilon. Clipping, too, is that of all weights: an example's gradient
    is clipped as a whole, with the part that pruning then drops.

    ::

        pruning = dpfl.PruningCallback(dpfl.Compression(sparsity=0.9))
        model.fit(x, y, batch_size=256, epochs=15, callbacks=[pruning, dpfl.EpsilonCallback(delta=1e-5)])
        smaller = dpfl.compression.to_lite(model.model, "int8")

    Give it before callbacks that look at the weights. A training that ends before the schedule does, for an epsilon
    budget say, ends with fewer zeros.

    Args:
        compression: its `sparsity`, `pruning_begins`, `pruning_ends` (fractions of all steps) and `pruning_every`
            (steps); nothing else of it is used.
        steps: of the whole training, in all calls of fit together; None where there is one call.

    Attributes:
        wrapped: the model wrapped by tfmot's `prune_low_magnitude` with these masks, from the first step on;
            `strip_pruning` of it is the trained model. It shares the weights, and may be released as they may.

    Raises:
        InputError: there is nothing to prune; and from fit, before any training, if the model is no `DPModel` of a
            model that tfmot can prune, it was trained before and `steps` does not say of how many, or several steps
            are executed at once.
    """

    def __init__(self, compression: Compression, steps: int | None = None) -> None:
        super().__init__()
        pruning_schedule(compression, 1 if steps is None else steps)
        self._supports_tf_logs = True  # else Keras copies all metrics to NumPy after every step
        self._compression, self._steps = compression, steps
        self._steps_done = -1  # not known: masks are to be found
        self._prune: Callable[[tf.Tensor], None] = lambda step: None
        self._total = 1
        self.wrapped: tf.keras.Model | None = None

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Wraps the model; see the class."""
        model = self.model
        if not isinstance(model, DPModel):
            raise InputError(
                "PruningCallback is for models that train privately: wrap yours in dpfl.DPModel, or train what "
                "dpfl.clients.keras_door.as_prunable gives by Keras alone."
            )
        if int(model._steps_per_execution) > 1:
            raise InputError("pruning follows every step: compile with steps_per_execution=1.")
        if self._steps is None and model.steps:
            raise InputError(
                f"the model was trained for {model.steps} steps before: give PruningCallback the number of steps of "
                "all calls of fit together."
            )
        self._total = self._steps or (self.params.get("epochs") or 1) * (self.params.get("steps") or 1)
        self._steps_done = -1
        self.wrapped = as_prunable(model.model, pruning_schedule(self._compression, self._total))
        layers = prunable_layers(self.wrapped)

        def prune(step: tf.Tensor) -> None:
            for layer in layers:
                layer.pruning_step.assign(step)
                layer.pruning_obj.conditional_mask_update()
                layer.pruning_obj.weight_mask_op()

        self._prune = tf.function(prune, autograph=False)

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Finds the masks of a model that has been trained or restored."""
        steps_done = self.model.steps
        if steps_done != self._steps_done:
            self._steps_done = steps_done
            last = self._compression.last_pruning(steps_done, self._total)
            if last is not None:
                self._prune(tf.constant(last, tf.int64))

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Prunes the weights that a step released."""
        self._steps_done += 1
        self._prune(tf.constant(self._steps_done, tf.int64))
