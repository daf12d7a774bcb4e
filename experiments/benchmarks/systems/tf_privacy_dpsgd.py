"""TF Privacy's DP-SGD steps of the Keras model: its optimizers, and its `DPModel`.

The optimizers' steps are not checked against the plain step: they can take many seconds each.
"""

import tensorflow as tf
import tensorflow_privacy as tfp
from checks import check_step
from keras_models import Step, change, new_model, plain_model, step_of, use_threads
from protocol import Work, serve
from tensorflow_privacy.privacy.fast_gradient_clipping import layer_registry
from workloads import CLIP_NORM, LEARNING_RATE, NOISE_MULTIPLIER, WORKLOADS, Examples

OPTIMIZERS = {"loop": tfp.DPKerasSGDOptimizer, "vectorized": tfp.VectorizedDPKerasSGDOptimizer}


def private_step(
    workload: str,
    variant: str,
    data: Examples,
    noise_multiplier: float = NOISE_MULTIPLIER,
    clip_norm: float = CLIP_NORM,
) -> tuple[tf.keras.Model, Step]:
    """Returns the workload's model with its first weights, and a function that does a private step with it.

    Keras' own `train_step` with TF Privacy's optimizers, or TF Privacy's `DPModel`, without or with XLA. `DPModel`
    takes norms layer by layer where all layers are in its registry (Dense, Embedding, LayerNormalization,
    MultiHeadAttention), and maps over examples where they are not.
    """
    settings = {"l2_norm_clip": clip_norm, "noise_multiplier": noise_multiplier}
    model = new_model(workload)
    if variant in OPTIMIZERS:
        optimizer = OPTIMIZERS[variant](**settings, num_microbatches=len(data[0]), learning_rate=LEARNING_RATE)
        reduction = tf.keras.losses.Reduction.NONE
    else:
        optimizer = tf.keras.optimizers.SGD(LEARNING_RATE)
        reduction = tf.keras.losses.Reduction.SUM_OVER_BATCH_SIZE
        registry = layer_registry.make_default_layer_registry()
        xla = variant == "DPModel-xla"
        model = tfp.DPModel(
            **settings, use_xla=xla, layer_registry=registry, inputs=model.inputs, outputs=model.outputs
        )
    model.compile(optimizer, tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction))
    return model, step_of(model, data)


def prepare(workload: str, variant: str, threads: int) -> Work:
    """The private step; `DPModel`'s is checked against the plain step."""
    use_threads(threads)
    work = WORKLOADS[workload]

    def plain(alike: bool) -> tuple[tf.keras.Model, Step]:
        model = plain_model(workload)
        return model, step_of(model, work.examples(alike))

    if variant not in OPTIMIZERS:
        check_step(
            lambda noise, clip, alike: change(*private_step(workload, variant, work.examples(alike), noise, clip)),
            lambda alike: change(*plain(alike)),
            work.facts["batch"],
        )
    _, step = private_step(workload, variant, work.examples())
    return Work(step, {"version": tfp.__version__, "parameters": work.parameters})


if __name__ == "__main__":
    serve(prepare, warm_up=1)
