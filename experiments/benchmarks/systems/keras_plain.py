"""The non-private step of the Keras model, on TensorFlow."""

import tensorflow as tf
from keras_models import plain_model, use_threads, work
from protocol import Work, serve


def prepare(workload: str, variant: str, threads: int) -> Work:
    """Keras' own `train_step`, SGD."""
    use_threads(threads)
    return work(plain_model(workload), workload, tf.__version__)


if __name__ == "__main__":
    serve(prepare)
