"""The machine's matrix product: float32, 2,048 x 2,048, on TensorFlow."""

import tensorflow as tf
from keras_models import use_threads
from protocol import Work, serve

SIZE = 2_048


def prepare(workload: str, variant: str, threads: int) -> Work:
    """One product; `flops` says how many operations it is."""
    use_threads(threads)
    left, right = tf.random.normal((2, SIZE, SIZE), seed=0)
    product = tf.function(lambda: tf.matmul(left, right))
    return Work(lambda: product()[0, 0].numpy(), {"version": tf.__version__, "flops": 2.0 * SIZE**3})


if __name__ == "__main__":
    serve(prepare)
