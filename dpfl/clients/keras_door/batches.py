"""Minibatches as the accounting of DP-SGD assumes them: Poisson samples, or a shuffle anew in every pass.

Every minibatch is a function of (seed, step): NumPy draws its row numbers, TensorFlow gathers the rows in a background
thread. Rows that stand for nobody fill an empty minibatch, and those of a fixed size; they have weight 0.
"""

from __future__ import annotations

import math
import numbers
import secrets
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from typing_extensions import override

from dpfl.errors import InputError
from dpfl.randomness import Purpose, check_seed, generator

_AHEAD = 4  # minibatches that are gathered while a step is computed
_DRAWN_TOGETHER = 32  # steps whose rows Python draws in one call


class Marks(NamedTuple):
    """What a minibatch says about its rows, in place of Keras' sample weights.

    Attributes:
        weights: multiply the examples' losses; 0 for rows that stand for nobody, (rows,), float32.
        count: how many rows, from the first on, are examples; int32 scalar. Private.
        charge: how many noisy sums the step is charged as, 0 or 1; int64 scalar.
    """

    weights: Any
    count: Any
    charge: Any


class Batches:
    """Training data with a way of drawing minibatches; see `PoissonBatches`.

    Attributes:
        examples: how many examples there are.
        batch_size: the number of examples by which sums of gradients are divided.
        max_batch_size: the size to which minibatches are cut and filled up; None where they vary.
        steps_per_epoch: how many minibatches Keras calls an epoch.
        steps_per_charge: how many steps in a row use each example at most once together.
        sampling: "poisson" or "shuffled".
    """

    sampling: str
    max_batch_size: int | None = None
    steps_per_charge: int = 1

    def __init__(
        self, x: Any, y: Any, batch_size: int, seed: int | None, steps_per_epoch: int | None, sample_weight: Any
    ) -> None:
        if y is None:
            raise InputError("labels are missing: give y (the examples themselves for an autoencoder).")
        self._x, self._y = (tf.nest.map_structure(_array, _arrays_in(part)) for part in (x, y))
        lengths = {len(part) for part in tf.nest.flatten((self._x, self._y))}
        if len(lengths) != 1:
            raise InputError(
                "x and y must have the same number of examples along their first axes, but the numbers were "
                f"{', '.join(map(str, sorted(lengths)))}."
            )
        self.examples = lengths.pop()
        if not (isinstance(batch_size, numbers.Integral) and 1 <= batch_size <= self.examples):
            raise InputError(
                f"batch_size must be a whole number from 1 to the number of examples, {self.examples}, but it was "
                f"{batch_size!r}."
            )
        self.batch_size: int = int(batch_size)
        if steps_per_epoch is not None and not (isinstance(steps_per_epoch, numbers.Integral) and steps_per_epoch >= 1):
            raise InputError(f"steps_per_epoch must be a whole number of at least 1, but it was {steps_per_epoch!r}.")
        self.steps_per_epoch: int = int(steps_per_epoch or math.ceil(self.examples / self.batch_size))
        self._weights: np.ndarray | None = (
            None if sample_weight is None else _checked_weights(sample_weight, self.examples)
        )
        self._seed: int = secrets.randbits(64) if seed is None else check_seed(seed)

    def rows(self, step: int) -> np.ndarray:
        """The examples of a step's minibatch: ascending row numbers, int64. Private."""
        raise NotImplementedError

    def charge(self, step: int) -> int:
        """How many noisy sums the step is charged as."""
        raise NotImplementedError

    def begin(self, first_step: int) -> None:
        """Tells the first step of a call of fit, which starts afresh."""

    def dataset(self, first_step: int | Callable[[], int] = 0) -> tf.data.Dataset:
        """An endless dataset of the minibatches from a step on: x, y and `Marks`. Private.

        Args:
            first_step: the number of the first step, or what tells it when the first minibatch is drawn; the same
                number and seed give the same minibatches.
        """
        began = 0

        def rows_from(steps_before: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            nonlocal began
            if not steps_before:
                began = first_step() if callable(first_step) else first_step
                self.begin(began)
            return self._some_rows(began + int(steps_before))

        with tf.device("/CPU:0"):
            arrays = tf.nest.map_structure(
                lambda part: tf.convert_to_tensor(part.astype(_dtype(part), copy=False)), (self._x, self._y)
            )
            weights = tf.ones([self.examples]) if self._weights is None else tf.constant(self._weights)

        def some_steps(steps_before: tf.Tensor) -> tf.data.Dataset:
            drawn = tf.numpy_function(rows_from, [steps_before], [tf.int64, tf.int32, tf.int64])
            for part, rank in zip(drawn, (2, 1, 1), strict=True):
                part.set_shape([_DRAWN_TOGETHER] + [None] * (rank - 1))
            return tf.data.Dataset.from_tensor_slices(tuple(drawn))

        def gathered(rows: tf.Tensor, count: tf.Tensor, charge: tf.Tensor) -> tuple[Any, Any, Marks]:
            if self.max_batch_size is None:
                rows = rows[: tf.maximum(count, 1)]
            # The first example stands in where nobody does, with weight 0.
            present = tf.sequence_mask(count, tf.size(rows), tf.float32)
            x, y, example_weights = tf.nest.map_structure(lambda part: tf.gather(part, rows), (*arrays, weights))
            return x, y, Marks(example_weights * present, count, charge)

        starts = tf.data.Dataset.counter(0, _DRAWN_TOGETHER)
        return starts.flat_map(some_steps).map(gathered).prefetch(_AHEAD)

    def _some_rows(self, start: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The rows of `_DRAWN_TOGETHER` steps side by side, filled up with 0; how many count; the steps' charges."""
        steps = range(start, start + _DRAWN_TOGETHER)
        drawn = [self.rows(step) for step in steps]
        counts = np.array([len(rows) for rows in drawn], np.int32)
        filled = np.zeros((len(drawn), self.max_batch_size or max(int(counts.max()), 1)), np.int64)
        for target, rows in zip(filled, drawn, strict=True):
            target[: len(rows)] = rows
        return filled, counts, np.array([self.charge(step) for step in steps], np.int64)

    def specs(self, rows: int | None) -> tuple[Any, Any]:
        """What x and y of a minibatch of so many rows look like: nests of `tf.TensorSpec`."""
        return tf.nest.map_structure(
            lambda part: tf.TensorSpec([rows, *part.shape[1:]], _dtype(part)), (self._x, self._y)
        )


class PoissonBatches(Batches):
    """Poisson minibatches of a training set: in each step, each example is drawn on its own with the same probability.

    This is the sampling whose amplification `dpfl.privacy.poisson_gaussian` accounts for. The probability
    is batch_size / examples; how many are drawn varies and is private. `DPModel.fit` makes one of these from arrays,
    and takes one in place of x and y.

    Args:
        x: the examples, arrays or tensors or a nest of them, with the examples along their first axis. Keras'
            conventions hold: floats become float32.
        y: the labels, likewise.
        batch_size: the expected number of examples in a minibatch, by which sums of gradients are divided.
        seed: a whole number below 2 ** 64 on which the minibatches depend; None draws a secret one. Who knows the seed
            knows who was drawn, and the guarantee does not hold towards them. Models that train on the same batches
            draw the same examples, so that their guarantees do not add up: give each batches of its own.
        max_batch_size: the largest minibatch; where more are drawn, a random part of them is used, which is
            accounted. All minibatches are filled up to this size with rows that stand for nobody. None lets it vary.
        steps_per_epoch: how many minibatches Keras calls an epoch; None for ceil(examples / batch_size).
        sample_weight: multiplies each example's loss before clipping, (examples,).

    Raises:
        InputError: arrays that do not fit together, or a number that is out of range.
    """

    sampling = "poisson"

    def __init__(
        self,
        x: Any,
        y: Any,
        batch_size: int,
        seed: int | None = None,
        max_batch_size: int | None = None,
        steps_per_epoch: int | None = None,
        sample_weight: Any = None,
    ) -> None:
        super().__init__(x, y, batch_size, seed, steps_per_epoch, sample_weight)
        if max_batch_size is not None and not (
            isinstance(max_batch_size, numbers.Integral) and max_batch_size >= self.batch_size
        ):
            raise InputError(
                f"max_batch_size must be a whole number of at least batch_size, {self.batch_size}, but it was "
                f"{max_batch_size!r}."
            )
        self.max_batch_size = None if max_batch_size is None else min(int(max_batch_size), self.examples)

    @property
    def sampling_rate(self) -> float:
        """The probability with which each example is drawn in a step."""
        return self.batch_size / self.examples

    @override
    def rows(self, step: int) -> np.ndarray:
        draws = generator(self._seed, Purpose.SAMPLING, step)
        size = int(draws.binomial(self.examples, self.sampling_rate))
        # All sets of a size are equally likely in a Poisson sample, and in a random part of one as well.
        size = size if self.max_batch_size is None else min(size, self.max_batch_size)
        return np.sort(draws.choice(self.examples, size=size, replace=False, shuffle=False))

    @override
    def charge(self, step: int) -> int:
        return 1


class ShuffledBatches(Batches):
    """The examples one after the other in an order that is drawn anew in every pass; the last minibatch may be smaller.

    No amplification is known to be right for this under a training set whose size may change, nor claimed otherwise:
    each pass is charged as one noisy sum. Each call of fit starts a pass of its own.

    Args:
        x: as in `PoissonBatches`.
        y: as in `PoissonBatches`.
        batch_size: the number of examples in a minibatch, by which sums of gradients are divided.
        seed: as in `PoissonBatches`.
        steps_per_epoch: how many minibatches Keras calls an epoch; None for a pass.
        sample_weight: multiplies each example's loss before clipping, (examples,).

    Raises:
        InputError: arrays that do not fit together, or a number that is out of range.
    """

    sampling = "shuffled"

    def __init__(
        self,
        x: Any,
        y: Any,
        batch_size: int,
        seed: int | None = None,
        steps_per_epoch: int | None = None,
        sample_weight: Any = None,
    ) -> None:
        super().__init__(x, y, batch_size, seed, steps_per_epoch, sample_weight)
        self.steps_per_charge = math.ceil(self.examples / self.batch_size)
        self._first_step = 0
        self._order: tuple[int, np.ndarray] = (-1, np.arange(0))

    @override
    def begin(self, first_step: int) -> None:
        self._first_step = first_step
        self._order = (-1, np.arange(0))

    @override
    def rows(self, step: int) -> np.ndarray:
        in_pass = (step - self._first_step) % self.steps_per_charge
        started = step - in_pass
        if self._order[0] != started:
            order = generator(self._seed, Purpose.SHUFFLING, started).permutation(self.examples)
            self._order = (started, order)
        start = in_pass * self.batch_size
        return np.sort(self._order[1][start : start + self.batch_size])

    @override
    def charge(self, step: int) -> int:
        return int((step - self._first_step) % self.steps_per_charge == 0)


def with_class_weights(y: Any, class_weight: dict[int, float], sample_weight: Any) -> np.ndarray:
    """Sample weights times the weight of each example's class, (examples,), float32.

    Args:
        y: class numbers, (examples,) or (examples, 1), or one-hot, (examples, classes).
        class_weight: the weight of each class.
        sample_weight: (examples,), or None for 1.

    Raises:
        InputError: the labels are several arrays, or of a class without a weight.
    """
    if tf.nest.is_nested(_arrays_in(y)):
        raise InputError("class_weight needs labels that are one array: give sample_weight instead.")
    labels = _array(y)
    labels = labels.argmax(-1) if labels.ndim > 1 and labels.shape[-1] > 1 else labels.reshape(len(labels), -1)[:, 0]
    classes, positions = np.unique(np.rint(labels).astype(np.int64), return_inverse=True)
    missing = [str(label) for label in classes if label not in class_weight]
    if missing:
        raise InputError(f"class_weight lacks the classes {', '.join(missing)}: give each class a weight.")
    weights = np.array([class_weight[label] for label in classes], np.float32)[positions.reshape(-1)]
    return weights if sample_weight is None else weights * _checked_weights(sample_weight, len(weights))


def _arrays_in(value: Any) -> Any:
    """A nest whose leaves are arrays: lists become tuples, or arrays where they are lists of numbers."""
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        if all(isinstance(leaf, numbers.Number) for leaf in tf.nest.flatten(value)):
            return np.asarray(value)
        return tuple(_arrays_in(part) for part in value)
    if isinstance(value, Mapping):
        return {name: _arrays_in(part) for name, part in value.items()}
    return value


def _array(value: Any) -> np.ndarray:
    """One array of a nest, without a copy where it is one already."""
    if isinstance(value, tf.data.Dataset | tf.RaggedTensor | tf.SparseTensor) or not hasattr(value, "shape"):
        raise InputError(
            f"x and y must be arrays or tensors, or nests of them, with the examples along their first axis, but there "
            f"was a {type(value).__name__}."
        )
    array = np.asarray(value)
    if not array.ndim or array.dtype.kind not in "biuf":
        raise InputError(
            "x and y must be arrays of numbers with the examples along their first axis, but there was one of shape "
            f"{array.shape} and type {array.dtype}."
        )
    return array


def _dtype(array: np.ndarray) -> Any:
    """The type of an array's minibatches: as Keras does, floats become what Keras computes in."""
    return np.dtype(tf.keras.backend.floatx()) if array.dtype.kind == "f" else array.dtype


def _checked_weights(sample_weight: Any, examples: int) -> np.ndarray:
    weights = np.asarray(sample_weight, np.float32)
    if weights.shape not in ((examples,), (examples, 1)):
        raise InputError(
            f"sample_weight must be one number for each of the {examples} examples, but its shape was {weights.shape}."
        )
    if not np.isfinite(weights).all():
        raise InputError("sample_weight and class_weight must be finite numbers, but some were not.")
    return weights.reshape(-1)
