"""dpfl's models as TensorFlow Federated's functional models."""

from __future__ import annotations

import collections
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from dpfl.compression.subspace import Projection
from dpfl.models.functional import FunctionalModel, ModelBuilder, cross_entropies
from dpfl.tff.batches import BatchSpec, class_labels, functional_model
from dpfl.tff.runtime import tensorflow_federated

if TYPE_CHECKING:
    import tensorflow_federated as tff


def evaluation_model(
    model: str | ModelBuilder | tf.keras.Model | FunctionalModel,
    *,
    input_spec: Any,
    num_classes: int | None = None,
) -> tff.learning.models.FunctionalModel:
    """Returns the model in TFF's form, for `tff.learning.algorithms.build_fed_eval`.

    `evaluation.set_model_weights(evaluation.initialize(), weights)` gives it trained weights: those of a process that
    `build_dp_sgd_fed_avg` built, `process.get_model_weights(state)`, or a run's as
    `tff.learning.models.ModelWeights(result.weights, ())`. Random layers and weight penalties are left out: not for
    training.

    Args:
        model: what `FunctionalModel` takes, or a `FunctionalModel`.
        input_spec: `element_spec` of the datasets to evaluate on, as in `client_work`.
        num_classes: number of classes; may be left out where a `FunctionalModel` is given.

    Returns:
        A `tff.learning.models.FunctionalModel` with the metrics `accuracy`, a fraction, and `loss`, the mean
        cross-entropy in nats, which nothing protects. An example whose loss is not finite counts as wrong.

    Raises:
        InputError: there is no TensorFlow Federated on this machine, or the model does not fit the datasets.
    """
    tff = tensorflow_federated()
    spec = BatchSpec.of(input_spec)
    functional = functional_model(model, spec, num_classes)
    forward = _traced(functional, training=False)

    @tf.function(autograph=False)
    def logits(weights: Any, x: tf.Tensor, training: bool) -> tf.Tensor:
        return forward(list(weights[0]), tf.cast(x, tf.float32), tf.zeros(2, tf.int32))[0]

    return tff.learning.models.FunctionalModel(
        initial_weights=(tuple(functional.initial_weights(0)), ()),
        predict_on_batch_fn=logits,
        loss_fn=lambda output, label, sample_weight=None: tf.reduce_mean(cross_entropies(output, class_labels(label))),
        metrics_fns=_metrics(lambda output, labels: (output, class_labels(labels))),
        input_spec=input_spec,
    )


def training_model(
    model: FunctionalModel, weights: Any, projection: Projection | None = None
) -> tff.learning.models.FunctionalModel:
    """Returns the model in TFF's form for training without example-level privacy.

    Its minibatches are OrderedDict(x=OrderedDict(examples=, mask=, seed=), y=): examples float32
    (batch, *example shape); a mask float32 (batch,) that is 1.0 where an example counts, as minibatches of one size are
    several times faster in TFF than a dataset that cuts them; the seed of random layers in this very step, int32 (2,);
    labels int32 (batch,).

    Args:
        model: the model as a function of its weights.
        weights: initial ones, a list of arrays as `model.shapes` says.
        projection: onto the weights that are trained; minibatches then have the number of the round too, x["round"],
            an int32 scalar. None trains all.
    """
    tff = tensorflow_federated()
    forward = _traced(model, training=True, projection=projection)
    of_round = {} if projection is None else {"round": tf.TensorSpec([], tf.int32)}

    @tf.function(autograph=False)
    def predict(weights: Any, x: Any, training: bool) -> Any:
        # TFF takes the first of the outputs for the predictions, and their number for that of the examples.
        counts = x["mask"] > 0
        rounds = () if projection is None else (x["round"],)
        logits, penalty = forward(list(weights[0]), tf.boolean_mask(x["examples"], counts), x["seed"], *rounds)
        return logits, penalty, counts

    def mean_loss(output: Any, label: tf.Tensor, sample_weight: Any = None) -> tf.Tensor:
        logits, penalty, counts = output
        return tf.reduce_mean(cross_entropies(logits, tf.boolean_mask(label, counts))) + penalty

    return tff.learning.models.FunctionalModel(
        initial_weights=(tuple(np.asarray(weight) for weight in weights), ()),
        predict_on_batch_fn=predict,
        loss_fn=mean_loss,
        metrics_fns=_metrics(lambda output, labels: (output[0], tf.boolean_mask(labels, output[2]))),
        input_spec=collections.OrderedDict(
            x=collections.OrderedDict(
                examples=tf.TensorSpec([None, *model.example_shape]),
                mask=tf.TensorSpec([None]),
                seed=tf.TensorSpec([2], tf.int32),
                **of_round,
            ),
            y=tf.TensorSpec([None], tf.int32),
        ),
    )


def _traced(model: FunctionalModel, *, training: bool, projection: Projection | None = None) -> Any:
    """The model's logits and weight penalty, traced outside of TFF.

    In TFF's graphs `==` on tensors compares objects, not values, and Keras falls back to TensorFlow 1.
    """

    def forward(
        weights: list[tf.Tensor], x: tf.Tensor, seed: tf.Tensor, *rounds: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        if projection is not None:
            weights = projection.gated(weights, *rounds)
        labels = tf.zeros(tf.shape(x)[:1], tf.int32)
        _, logits, penalty = model.losses_and_logits(weights, x, labels, training_seed=seed if training else None)
        return logits, penalty

    return tf.function(forward, autograph=False).get_concrete_function(
        [tf.TensorSpec(shape) for shape in model.shapes],
        tf.TensorSpec([None, *model.example_shape]),
        tf.TensorSpec([2], tf.int32),
        *([] if projection is None else [tf.TensorSpec([], tf.int32)]),
    )


def _metrics(counted: Any) -> tuple[Any, Any, Any]:
    """Accuracy and mean loss over examples, as `FunctionalModel` takes them.

    Args:
        counted: takes a model's outputs and labels, gives logits and labels of the examples that count.
    """

    def initialize() -> Any:
        nothing = (tf.constant(0.0, tf.float64), tf.constant(0.0, tf.float64))
        return collections.OrderedDict(accuracy=nothing, loss=nothing)

    def update(state: Any, labels: Any, batch_output: Any, sample_weight: Any = None) -> Any:
        logits, y = counted(batch_output.predictions, labels)
        losses = cross_entropies(logits, y)
        hits = tf.equal(tf.argmax(logits, axis=1, output_type=tf.int32), y) & tf.math.is_finite(losses)
        sums = [tf.reduce_sum(tf.cast(values, tf.float64)) for values in (hits, losses)]
        count = tf.cast(tf.size(y), tf.float64)
        return collections.OrderedDict(
            (name, (old[0] + more, old[1] + count)) for (name, old), more in zip(state.items(), sums, strict=True)
        )

    def finalize(state: Any) -> Any:
        return collections.OrderedDict((name, total / count) for name, (total, count) in state.items())

    return tf.function(initialize), tf.function(update), tf.function(finalize)
