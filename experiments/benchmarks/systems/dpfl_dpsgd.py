"""dpfl's DP-SGD step of the Keras model."""

import tensorflow as tf
from checks import check_step
from keras_models import Step, change, new_model, plain_model, step_of, use_threads
from protocol import Work, serve
from workloads import CLIP_NORM, LEARNING_RATE, NOISE_MULTIPLIER, SEED, WORKLOADS, Examples

import dpfl


def private_step(
    workload: str,
    data: Examples,
    noise_multiplier: float = NOISE_MULTIPLIER,
    clip_norm: float = CLIP_NORM,
    microbatch_size: int | None = None,
) -> tuple[tf.keras.Model, Step]:
    """Returns the workload's model with its first weights, and a function that does `DPModel.train_step` with it.

    `DPModel` trains on minibatches that it drew itself. Here each holds all the data, and `fit` does a first step,
    after which the model gets its first weights back.
    """
    keras_model = new_model(workload)
    first_weights = keras_model.get_weights()
    model = dpfl.DPModel(keras_model, seed=SEED)
    optimizer = dpfl.DPKerasSGDOptimizer(
        clip_norm, noise_multiplier, learning_rate=LEARNING_RATE, microbatch_size=microbatch_size
    )
    model.compile(optimizer, tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    batches = dpfl.PoissonBatches(*data, batch_size=len(data[0]), max_batch_size=len(data[0]), seed=SEED)
    model.fit(batches, verbose=0)
    keras_model.set_weights(first_weights)
    (minibatch,) = batches.dataset(1).take(1)
    return keras_model, step_of(model, minibatch)


def prepare(workload: str, variant: str, threads: int) -> Work:
    """`DPModel` with `DPKerasSGDOptimizer`, checked against the plain step."""
    use_threads(threads)
    work = WORKLOADS[workload]

    def plain(alike: bool) -> tuple[tf.keras.Model, Step]:
        model = plain_model(workload)
        return model, step_of(model, work.examples(alike))

    check_step(
        lambda noise, clip, alike: change(*private_step(workload, work.examples(alike), noise, clip)),
        lambda alike: change(*plain(alike)),
        work.facts["batch"],
    )
    _, step = private_step(workload, work.examples())
    return Work(step, {"version": dpfl.__version__, "parameters": work.parameters})


if __name__ == "__main__":
    serve(prepare)
