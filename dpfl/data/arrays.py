"""Federated data from arrays: who is held out, who owns what, and which assumptions that makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict, Unpack

import numpy as np
import numpy.typing as npt

from dpfl.data import partitions
from dpfl.data.federated_data import FederatedData
from dpfl.errors import InputError
from dpfl.randomness import Purpose, generator

Split = Literal["examples", "clients"]
Examples = tuple[npt.ArrayLike, npt.ArrayLike]
"""Features and labels."""

_MOST_FLOATING_POINT_CLASSES = 100

HELD_OUT = {
    "examples": "Held-out examples belong to clients that train: the guarantee covers the model, "
    "not the accuracies measured on them.",
    "clients": "Held-out clients never train: the guarantee neither protects them "
    "nor covers the accuracies measured on them.",
    "given": "The held-out examples that were given are treated as public: "
    "the guarantee does not cover the accuracies measured on them.",
}


class Options(TypedDict):
    """The options that all sources share; `from_arrays` describes them."""

    name: str
    clients: int | None
    partition: str | None
    test_fraction: float
    validation_fraction: float
    split: Split
    seed: int


def from_arrays(
    x: npt.ArrayLike,
    y: npt.ArrayLike,
    client_ids: npt.ArrayLike | None = None,
    *,
    name: str = "arrays",
    clients: int | None = None,
    partition: str | None = None,
    num_classes: int | None = None,
    test: Examples | None = None,
    validation: Examples | None = None,
    test_fraction: float = 0.2,
    validation_fraction: float = 0.1,
    split: Split = "examples",
    seed: int = 0,
) -> FederatedData:
    """Builds federated data from arrays.

    With `client_ids`, examples are grouped by client; a client whose examples are all held out is left out of
    the population. Without, examples are held out first and the rest is dealt to `clients` by `partition`.
    What is held out depends on the seed and not on the partition, so that partitions are compared on the same
    examples.

    Args:
        x: (examples, *feature shape), finite numbers, used as they are.
        y: (examples,) or (examples, 1). Integers are used as they are, from 0; other labels are mapped to the
            sorted distinct ones.
        client_ids: (examples,) who owns each example; `clients` and `partition` must then be left out.
        name: What charts and records call the dataset.
        clients: Number of clients to deal the examples to.
        partition: "iid" (default), "dirichlet:ALPHA" or "shards:PER_CLIENT".
        num_classes: Number of classes; the largest label + 1 by default.
        test: Test features and labels; then none are set aside.
        validation: Validation features and labels; then none are set aside.
        test_fraction: Share of the examples (or clients, see `split`) set aside for testing, one at least.
        validation_fraction: Share set aside for validation; may be 0.
        split: "examples" holds out examples at random, "clients" all examples of some clients, which never
            train.
        seed: Seed of the split and the partition.

    Raises:
        InputError: The arrays disagree or are not valid, or options contradict each other.
    """
    x, y = _pair(x, y, name)
    given = {
        role: _pair(*pair, f"{name} ({role})")
        for role, pair in (("test", test), ("validation", validation))
        if pair is not None
    }
    labels = [y, *(labels for _, labels in given.values())]
    codes, class_names = encode_labels(np.concatenate(labels), num_classes)
    y, *rest = np.split(codes, np.cumsum([len(piece) for piece in labels])[:-1])
    return assemble(
        x,
        y,
        client_ids,
        class_names=class_names,
        given={role: (given[role][0], piece) for role, piece in zip(given, rest, strict=True)},
        assumptions=() if num_classes else ("The classes are taken from the data and treated as public.",),
        name=name,
        clients=clients,
        partition=partition,
        test_fraction=test_fraction,
        validation_fraction=validation_fraction,
        split=split,
        seed=seed,
    )


def assemble(
    x: np.ndarray,
    labels: np.ndarray,
    client_ids: npt.ArrayLike | None,
    *,
    class_names: Sequence[str],
    given: Mapping[str, tuple[np.ndarray, np.ndarray]],
    standardized: Sequence[int] = (),
    assumptions: tuple[str, ...] = (),
    **options: Unpack[Options],
) -> FederatedData:
    """Holds out, groups by client and standardises: what `from_arrays` and `from_dataframe` share.

    Args:
        x: (examples, *feature shape).
        labels: (examples,) integers.
        client_ids: As in `from_arrays`.
        class_names: Name of each class.
        given: Examples for "test" or "validation" that need not be set aside.
        standardized: Columns of a two-dimensional x to scale by mean and standard deviation of the training
            examples.
        assumptions: Sentences of the caller, put before those that arise here.
        options: As in `from_arrays`.
    """
    name, clients, split, seed = options["name"], options["clients"], options["split"], options["seed"]
    _check(client_ids, options)
    client_of, ids = np.empty(0, np.int64), np.empty(0)
    if client_ids is not None:
        client_of, ids = encode(client_ids, f"the client ids of {name!r}")
        if len(client_of) != len(x):
            raise InputError(f"{name!r} has {len(x)} examples but {len(client_of)} client ids: give one each.")

    units = len(ids) if split == "clients" else len(x)
    tests = 0 if "test" in given else max(1, round(options["test_fraction"] * units))
    validations = 0 if "validation" in given else round(options["validation_fraction"] * units)
    parts = np.split(generator(seed, Purpose.HOLDING_OUT).permutation(units), [tests, tests + validations])
    test, validation, train = (
        np.flatnonzero(np.isin(client_of, part)) if split == "clients" else np.sort(part) for part in parts
    )

    if clients is not None:
        partition = options["partition"] or "iid"
        owner = partitions.parse(partition)(labels[train], clients, seed)
        names = tuple(map(str, range(clients)))
        assumptions += (f"Clients are simulated by the partition {partition!r}: held-out examples belong to none.",)
    else:
        trained, owner = np.unique(client_of[train], return_inverse=True)
        names = tuple(map(str, ids[trained]))
        if tests + validations:
            assumptions += (HELD_OUT[split],)
        if given:
            assumptions += (HELD_OUT["given"],)
    train = train[np.argsort(owner, kind="stable")]

    if len(standardized) and len(train):
        x = x.astype(np.float64)
        columns = x[:, standardized]
        spread = columns[train].std(axis=0)
        x[:, standardized] = (columns - columns[train].mean(axis=0)) / np.where(spread > 0, spread, 1.0)
        assumptions += (
            "Features are standardised by mean and standard deviation of the training examples, "
            "which the guarantee does not cover.",
        )
    held_out = {"test": (x[test], labels[test]), "validation": (x[validation], labels[validation]), **given}
    return FederatedData(
        name=name,
        x=x[train],
        y=labels[train],
        offsets=np.concatenate([[0], np.cumsum(np.bincount(owner))]),
        x_validation=held_out["validation"][0],
        y_validation=held_out["validation"][1],
        x_test=held_out["test"][0],
        y_test=held_out["test"][1],
        num_classes=len(class_names),
        client_ids=names,
        class_names=tuple(class_names),
        assumptions=assumptions,
    )


def encode(values: npt.ArrayLike, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns int64 codes into the sorted distinct values, and those values.

    Args:
        values: (examples,), any type.
        what: What the values are, for the error sentence.

    Raises:
        InputError: A value is missing, or the values are not one row.
    """
    import pandas as pd

    values = np.asarray(values) if not isinstance(values, pd.Series) else values
    if values.ndim != 1:
        raise InputError(f"{what} have shape {values.shape}, but one value per example is needed.")
    codes, distinct = pd.factorize(values, sort=True)
    if missing := int((codes < 0).sum()):
        raise InputError(
            f"{what} are missing in {missing} rows, first in row {int(codes.argmin())}: fill or drop them."
        )
    return codes.astype(np.int64), np.asarray(distinct)


def encode_labels(labels: npt.ArrayLike, num_classes: int | None = None) -> tuple[np.ndarray, tuple[str, ...]]:
    """Returns integer labels and class names: integers as they are, others mapped to sorted distinct ones.

    Raises:
        InputError: A label is missing, labels look like measurements, or their number is not `num_classes`.
    """
    labels = np.asarray(labels)
    if labels.dtype.kind in "iu":
        count = num_classes if num_classes is not None else int(labels.max()) + 1
        return labels, tuple(map(str, range(count)))
    return distinct_labels(labels, "the labels", num_classes)


def distinct_labels(
    labels: npt.ArrayLike, what: str, num_classes: int | None = None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Returns labels of any type mapped to the sorted distinct ones, and the names of these."""
    codes, distinct = encode(labels, what)
    if distinct.dtype.kind == "f" and len(distinct) > _MOST_FLOATING_POINT_CLASSES:
        raise InputError(
            f"{what} have {len(distinct)} different floating-point values, but classes are needed: label_bins=3 "
            "makes three of a table's."
        )
    if num_classes not in (None, len(distinct)):
        raise InputError(f"{what} have {len(distinct)} different values, but num_classes is {num_classes}.")
    return codes, tuple(map(str, distinct))


def _pair(x: npt.ArrayLike, y: npt.ArrayLike, name: str) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(x), np.asarray(y)
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 1 or x.ndim < 2 or len(x) != len(y) or not len(x):
        raise InputError(
            f"{name} has features of shape {x.shape} and labels of shape {y.shape}, but "
            "(examples, *feature shape) and (examples,) with at least one example are needed."
        )
    return x, y.astype(np.int64) if y.dtype.kind in "iu" else y


def _check(client_ids: npt.ArrayLike | None, options: Options) -> None:
    """Refuses shares that are none, and anything but exactly one way to say who owns the examples."""
    test, validation = options["test_fraction"], options["validation_fraction"]
    if options["split"] not in ("examples", "clients"):
        raise InputError(f"split is {options['split']!r}, but 'examples' or 'clients' is needed.")
    if not (0 < test < 1 and 0 <= validation < 1 and test + validation < 1):
        raise InputError(
            f"test_fraction is {test} and validation_fraction {validation}, but the first must be above 0, "
            "the second at least 0 and their sum below 1."
        )
    if client_ids is not None and (options["clients"] is not None or options["partition"] is not None):
        raise InputError("clients and partition are for data without client ids: leave out these or the ids.")
    if client_ids is None and options["clients"] is None:
        raise InputError("nothing says who owns the examples: give client ids or the number of clients.")
    if client_ids is None and options["split"] == "clients":
        raise InputError("split='clients' needs client ids: simulated clients can only hold out examples.")
