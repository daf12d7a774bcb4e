"""Deployment: a trained model as a file of TensorFlow Lite, smaller by post-training quantisation.

A conversion looks at the weights and at nothing else. No format here is calibrated on examples, so that a file is
post-processing of the weights: it may be released under their guarantee, which stays what it was. The accuracy of a
file is measured on examples, and is no more private than any other accuracy.
"""

from __future__ import annotations

import contextlib
import gzip
import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from dpfl.compression.config import LITE_COLUMNS, LiteFormat
from dpfl.errors import InputError

if TYPE_CHECKING:
    import tensorflow as tf

    from dpfl.models.functional import FunctionalModel

FORMATS: tuple[LiteFormat, ...] = get_args(LiteFormat)
_BATCH = 500
# Models that were converted, by what they compute, and the formats of which this is known.
_CONVERTIBLE: set[tuple[Any, ...]] = set()


def to_lite(model: tf.keras.Model, form: LiteFormat = "float32") -> bytes:
    """Converts a Keras model to the bytes of a `.tflite` file.

    It takes batches of any size, or where TensorFlow Lite can run layers for one size alone, one example at a time.

    Args:
        model: one that was called or built, with one input and one output and finite weights.
        form: "float32"; "float16", which halves the weights; or "int8", dynamic-range quantisation: weights of 8 bits
            with a scale for each output channel (TensorFlow Lite leaves tensors of fewer than 1,024 weights in
            float32), activations stored in float32, whose ranges are found as the model runs. None looks at data.

    Returns:
        The file. What holds of the model's weights holds of it: it may be released where they may.

    Raises:
        InputError: the format is none of these, the model was never built or has weights that are not finite, or
            TensorFlow Lite cannot convert it.
    """
    import tensorflow as tf

    if form not in FORMATS:
        raise InputError(f"there is no TensorFlow Lite format {form!r}: choose {', '.join(FORMATS)}.")
    spec = model.save_spec(dynamic_batch=True) if model.built else None
    if spec is None or len(spec[0]) != 1 or tf.nest.is_nested(spec[0][0]):
        raise InputError(
            f"the model {model.name} has no known input, or several: give a Keras model of one input that was called "
            "on examples before."
        )
    # The converter would end the process on NaN weights in 8 bits, by a segmentation fault (TensorFlow 2.14).
    if not all(np.isfinite(weight).all() for weight in model.get_weights()):
        raise InputError(
            "the model has weights that are not finite numbers, of which there is no TensorFlow Lite file: train it "
            "with a smaller learning rate or more clipping."
        )
    of_any_batch = tf.TensorSpec(spec[0][0].shape, spec[0][0].dtype, "x")
    content = _converted(model, of_any_batch, form)
    trial = np.zeros([2, *(side or 1 for side in of_any_batch.shape[1:])])
    try:
        lite_logits(content, trial)
    except RuntimeError:
        # Some layers (GroupNormalization) are converted, but run for the batch size alone that they were converted for.
        content = _converted(model, tf.TensorSpec([1, *of_any_batch.shape[1:]], of_any_batch.dtype, "x"), form)
        try:
            lite_logits(content, trial)
        except RuntimeError as error:
            raise _refusal(model, form, error) from error
    return content


def _converted(model: tf.keras.Model, spec: tf.TensorSpec, form: LiteFormat) -> bytes:
    """The file of a model that takes such examples, without the names that Keras and TensorFlow count up."""
    import tensorflow as tf
    from tensorflow.lite.tools import flatbuffer_utils

    function = tf.function(lambda x: model(x, training=False), autograph=False)
    try:
        with _quiet():
            converter = tf.lite.TFLiteConverter.from_concrete_functions([function.get_concrete_function(spec)], model)
            if form != "float32":
                converter.optimizations = [tf.lite.Optimize.DEFAULT]
            if form == "float16":
                converter.target_spec.supported_types = [tf.float16]
            content = converter.convert()
    except Exception as error:
        raise _refusal(model, form, error) from error
    file = flatbuffer_utils.convert_bytearray_to_object(bytearray(content))
    for graph in file.subgraphs:
        for tensor in graph.tensors:
            tensor.name = None
    return bytes(flatbuffer_utils.convert_object_to_bytearray(file))


def _refusal(model: tf.keras.Model, form: LiteFormat, error: Exception) -> InputError:
    return InputError(
        f"TensorFlow Lite cannot convert the model {model.name} to {form} ({_reason(error)}): leave compression.lite "
        "out, or use layers that it knows (recurrent ones with unroll=True)."
    )


def lite_logits(content: bytes, x: np.ndarray) -> np.ndarray:
    """What a file's model gives for examples, float32 (n, classes), by TensorFlow Lite's interpreter on one thread.

    Args:
        content: from `to_lite`.
        x: the examples, (n, *example shape), at least one.

    Raises:
        InputError: there is no example, or examples have another shape than the model takes.
    """
    import tensorflow as tf

    interpreter = tf.lite.Interpreter(
        model_content=content,
        num_threads=1,
        # Without the default delegate, which prints a line, and takes no batch of another size than before.
        experimental_op_resolver_type=tf.lite.experimental.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
    )
    taken = interpreter.get_input_details()[0]
    expected = tuple(int(side) for side in taken["shape_signature"][1:])
    if (
        not len(x)
        or len(expected) != x.ndim - 1
        or any(side not in (-1, given) for side, given in zip(expected, x.shape[1:], strict=True))
    ):
        raise InputError(
            f"the file's model takes one or more examples of shape {expected}, but it was given an array of shape "
            f"{tuple(x.shape)}: give examples as the model was trained on."
        )
    found, size = [], -1
    most = _BATCH if taken["shape_signature"][0] == -1 else 1
    for start in range(0, len(x), most):
        batch = np.ascontiguousarray(x[start : start + most], taken["dtype"])
        if len(batch) != size:
            size = len(batch)
            interpreter.resize_tensor_input(taken["index"], batch.shape)
            interpreter.allocate_tensors()
        interpreter.set_tensor(taken["index"], batch)
        interpreter.invoke()
        found.append(interpreter.get_tensor(interpreter.get_output_details()[0]["index"]))
    return np.concatenate(found)


def lite_accuracy(content: bytes, x: np.ndarray, y: np.ndarray) -> float:
    """The fraction of examples that a file's model classifies correctly. Not private.

    Args:
        content: from `to_lite`.
        x: the examples, (n, *example shape).
        y: their labels, (n,).

    Returns:
        The fraction; NaN if there is no example.

    Raises:
        InputError: examples have another shape than the model takes.
    """
    if not len(y):
        return float("nan")
    return float(np.mean(lite_logits(content, x).argmax(axis=1) == y))


def compressed_size(content: bytes) -> int:
    """The length of a file after gzip (level 9), in bytes: how zeros that pruning left in it can be counted.

    A `.tflite` file writes every zero out, and a pruned model has the length of any other; what is downloaded, or
    stored in an app's package, is compressed.

    Args:
        content: from `to_lite`.
    """
    return len(gzip.compress(content, compresslevel=9, mtime=0))


def check_convertible(model: FunctionalModel, formats: Sequence[LiteFormat]) -> None:
    """Converts a model before it is trained, so that what cannot be converted is refused before anything is lost.

    Args:
        model: with its initial weights.
        formats: into which the trained model will be turned.

    Raises:
        InputError: TensorFlow Lite cannot convert it.
    """
    key = (model.key, model.example_shape, model.num_classes)
    missing = [form for form in formats if (*key, form) not in _CONVERTIBLE]
    keras = model.to_keras(model.initial_weights(0)) if missing else None
    for form in missing:
        to_lite(keras, form)
        _CONVERTIBLE.add((*key, form))


def measured_columns(
    model: FunctionalModel, weights: Sequence[np.ndarray], formats: Sequence[LiteFormat], x: np.ndarray, y: np.ndarray
) -> dict[str, Any]:
    """Sizes and test accuracy of a trained model's files, as columns of `runs.csv`.

    Args:
        model: the model.
        weights: its trainable weights after the last round.
        formats: that were asked for.
        x: test examples.
        y: their labels.

    Returns:
        For each format of all `lite_<format>_bytes`, `lite_<format>_gzip_bytes` and `lite_<format>_accuracy`; None
        where it was not asked for, or weights are not finite, and the accuracy NaN without test examples.
    """
    columns: dict[str, Any] = dict.fromkeys(LITE_COLUMNS)
    if not formats or not all(np.isfinite(weight).all() for weight in weights):
        return columns
    keras = model.to_keras(weights)
    for form in formats:
        content = to_lite(keras, form)
        columns[f"lite_{form}_bytes"] = len(content)
        columns[f"lite_{form}_gzip_bytes"] = compressed_size(content)
        columns[f"lite_{form}_accuracy"] = lite_accuracy(content, x, y)
    return columns


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Takes what the converter writes to the standard error, beneath Python, out of sight."""
    try:
        kept = os.dup(2)
    except OSError:  # closed, in a daemon say: nobody sees it
        yield
        return
    try:
        with tempfile.TemporaryFile() as nowhere:
            os.dup2(nowhere.fileno(), 2)
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _reason(error: Exception) -> str:
    """The converter's own words, as far as they are one sentence."""
    lines = [line for line in str(error).splitlines() if "error:" in line] or str(error).strip().splitlines() or [""]
    return lines[0].split("error:")[-1].strip().rstrip(".")[:200] or type(error).__name__
