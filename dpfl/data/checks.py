"""Checks of examples, block by block, so that arrays larger than memory are never held as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import numpy.typing as npt

from dpfl.data.alignment import aligned
from dpfl.errors import InputError

Role = Literal["training", "validation", "test"]

_BLOCK = 16 * 2**20


def checked_examples(
    features: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    num_classes: int,
    role: Role,
    owner: str,
    shape: tuple[int, ...] | None = None,
    known: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns features and labels as float32 and int32, without a copy where they are so and aligned.

    Args:
        features: (examples, *feature shape), numbers.
        labels: (examples,), integers from 0.
        num_classes: how many classes there are.
        role: what the examples are for; there may be none but of "training".
        owner: whose they are, for the error sentences.
        shape: the feature shape that is needed; None takes any.
        known: whether the values were checked before, and only types and shapes are to be.

    Raises:
        InputError: shapes disagree, a label is no class, or a feature is not a finite number.
    """
    labels = np.asarray(labels)
    try:
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite and is named below
            x = aligned(features, np.float32)
    except (TypeError, ValueError) as error:
        raise InputError(f"{role} features of {owner} are not all numbers: {error}.") from None
    if not x.size and role != "training" and shape is not None and x.shape[1:] != shape:
        x = np.empty((0, *shape), np.float32)
    if x.ndim < 2 or (x.size == 0 and role == "training"):
        raise InputError(
            f"{role} features of {owner} have shape {x.shape}, but (examples, *feature shape) with at least one "
            "example and one feature axis is needed."
        )
    if shape is not None and x.shape[1:] != shape:
        raise InputError(
            f"{role} examples of {owner} have shape {x.shape[1:]}, but {shape} is needed: the features of all examples "
            "must agree."
        )
    if labels.shape != (len(x),):
        raise InputError(
            f"{role} labels of {owner} have shape {labels.shape}, but ({len(x)},) is needed: one class per example."
        )
    if len(labels) and labels.dtype.kind not in "iu":
        raise InputError(
            f"{role} labels of {owner} have type {labels.dtype}, but integers from 0 to {num_classes - 1} are needed."
        )
    if not known:
        _check_values(x, labels, num_classes, role, owner)
    return x, aligned(labels, np.int32)


def _check_values(x: np.ndarray, labels: np.ndarray, num_classes: int, role: Role, owner: str) -> None:
    for start, block in _blocks(labels):
        wrong = np.flatnonzero((block < 0) | (block >= num_classes))
        if len(wrong):
            raise InputError(
                f"{role} label {block[wrong[0]]} at row {start + wrong[0]} of {owner} is not a class: labels must be "
                f"integers from 0 to {num_classes - 1}."
            )
    for start, block in _blocks(x):
        finite = np.isfinite(block)
        if not finite.all():
            row, *feature = np.argwhere(~finite)[0].tolist()
            raise InputError(
                f"{role} example {start + row} of {owner} has the value {block[(row, *feature)]} at feature "
                f"{', '.join(map(str, feature))}: every feature must be finite, so fill or drop it."
            )


def _blocks(array: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yields the number of the first row, and a view, of consecutive rows that take about 16 MB."""
    rows = max(1, _BLOCK // max(1, array[:1].nbytes))
    for start in range(0, len(array), rows):
        yield start, array[start : start + rows]
