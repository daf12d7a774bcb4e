"""Federated data from a pandas DataFrame."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from dpfl.data.arrays import Split, assemble, distinct_labels
from dpfl.data.federated_data import FederatedData
from dpfl.data.wording import instead
from dpfl.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

Missing = Literal["refuse", "drop", "fill"]

_MOST_CATEGORIES = 2_000  # one-hot memory is examples x categories


def from_dataframe(
    frame: pd.DataFrame,
    client: str | None,
    label: str,
    features: Sequence[str] | None = None,
    *,
    standardize: bool = False,
    label_bins: int | None = None,
    missing: Missing = "refuse",
    name: str = "dataframe",
    clients: int | None = None,
    partition: str | None = None,
    test_fraction: float = 0.2,
    validation_fraction: float = 0.1,
    split: Split = "examples",
    seed: int = 0,
) -> FederatedData:
    """Builds federated data from a table with one row per example.

    Numbers and booleans become one feature each; strings and categories become one feature per category,
    after all others. The label column may have any type: its sorted distinct values are the classes.

    Args:
        frame: One row per example.
        client: Column that says who owns each row; None deals the rows to `clients` by `partition`.
        label: Column with the class.
        features: Columns to learn from; by default all but the client and the label.
        standardize: Scale numeric columns (neither booleans nor categories) to mean 0 and standard deviation
            1 over the training examples. The guarantee does not cover these statistics, and says so.
        label_bins: Cut a numeric label, such as a score, into so many classes at its quantiles over all rows, held-out
            ones included. The guarantee does not cover these boundaries, and says so.
        missing: What becomes of rows in which a value is missing: they are refused, left out ("drop"), or have their
            features filled ("fill"), numbers with the column's mean over all rows, which the guarantee does not cover,
            and says so, all else with a category "missing"; rows without client or label are then left out.
        name: What charts and records call the dataset.
        clients: See `from_arrays`, as for all that follow.
        partition: See `from_arrays`.
        test_fraction: See `from_arrays`.
        validation_fraction: See `from_arrays`.
        split: See `from_arrays`.
        seed: See `from_arrays`.

    Raises:
        InputError: A column is not there, is used twice, has infinite or (unless `missing` says otherwise) missing
            values or a type that is no feature, or an option is not valid.
    """
    if not frame.columns.is_unique:
        twice = frame.columns[frame.columns.duplicated()][0]
        raise InputError(f"the column {twice!r} is there more than once: rename or drop it.")
    roles = [label] if client is None else [client, label]
    if features is None:
        features = [column for column in frame.columns if column not in roles]
    features = [features] if isinstance(features, str) else list(features)
    for column in [*roles, *features]:
        if column not in frame.columns:
            raise InputError(f"there is no column {column!r}: {instead(column, frame.columns)}")
    if not features or len({*roles, *features}) < len(roles) + len(features):
        raise InputError(
            f"the client is {client!r}, the label {label!r} and the features {features}, but at least one "
            "feature is needed and no column may be used twice."
        )
    filled: list[str] = []
    if missing not in get_args(Missing):
        raise InputError(f"missing is {missing!r}, but 'refuse', 'drop' or 'fill' is needed.")
    if missing != "refuse":
        frame = frame.dropna(subset=[*roles, *features] if missing == "drop" else roles)
    if missing == "fill":
        frame, filled = _filled(frame, features)
    x, scalable, categorical = _features(frame[features])
    if label_bins is None:
        labels, class_names = distinct_labels(frame[label], f"the labels in column {label!r}")
        assumptions = [f"The classes in column {label!r} are treated as public."]
    else:
        labels, class_names = _binned(frame[label], label, label_bins)
        assumptions = [
            f"The boundaries of the classes in column {label!r} are quantiles of its values, which are not covered."
        ]
    if categorical:
        assumptions.append(f"The categories in {', '.join(map(repr, categorical))} are treated as public.")
    if filled:
        assumptions.append(f"Missing values in {', '.join(map(repr, filled))} become the mean, which is not covered.")
    return assemble(
        x,
        labels,
        None if client is None else frame[client],
        class_names=class_names,
        given={},
        standardized=scalable if standardize else (),
        assumptions=tuple(assumptions),
        name=name,
        clients=clients,
        partition=partition,
        test_fraction=test_fraction,
        validation_fraction=validation_fraction,
        split=split,
        seed=seed,
    )


def _filled(frame: pd.DataFrame, features: Sequence[str]) -> tuple[pd.DataFrame, list[str]]:
    """Returns a table without holes in its features, and the columns whose mean was put there."""
    from pandas.api import types

    changed, averaged = {}, []
    for column in features:
        values = frame[column]
        known = values.dropna()
        if len(known) in (0, len(values)):
            continue
        if types.is_numeric_dtype(values.dtype) and not types.is_bool_dtype(values.dtype):
            numbers = values.to_numpy(np.float64, na_value=np.nan)
            changed[column] = np.where(np.isnan(numbers), known.mean(), numbers)
            averaged.append(str(column))
        else:
            changed[column] = values.astype(object).map(str, na_action="ignore").fillna("missing").to_numpy()
    frame = frame.copy()
    for column, filled in changed.items():  # not by assign, since names of columns need not be text
        frame[column] = filled
    return frame, averaged


def _binned(values: pd.Series, column: str, bins: int) -> tuple[np.ndarray, tuple[str, ...]]:
    """Returns classes with about as many examples each, and their names."""
    import pandas as pd

    if not pd.api.types.is_numeric_dtype(values) or not np.isfinite(values.to_numpy(np.float64)).all():
        raise InputError(f"label_bins cuts numbers into classes, but column {column!r} has others: leave it out.")
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 2:
        raise InputError(f"label_bins is {bins!r}, but a number of classes, at least 2, is needed.")
    codes, edges = pd.qcut(values, bins, labels=False, retbins=True, duplicates="drop")
    inner = [f"{edge:.6g}" for edge in edges[1:-1]]
    if not inner:
        raise InputError(f"column {column!r} has too few different values for {bins} classes: leave label_bins out.")
    between = [f"above {low} to {high}" for low, high in itertools.pairwise(inner)]
    return codes.to_numpy(np.int64), (f"up to {inner[0]}", *between, f"above {inner[-1]}")


def _features(frame: pd.DataFrame) -> tuple[np.ndarray, list[int], list[str]]:
    """Returns float64 (examples, features), the features that can be scaled, and the one-hot columns."""
    import pandas as pd
    from pandas.api import types

    scalable, plain, categorical = [], [], []
    for column, values in frame.items():
        dtype = values.dtype
        if missing := int(values.isna().sum()):
            raise InputError(
                f"column {column!r} has missing values in {missing} of {len(values)} rows: set missing to 'fill' or "
                "'drop', or leave the column out of the features."
            )
        if isinstance(dtype, pd.CategoricalDtype) or types.is_object_dtype(dtype) or types.is_string_dtype(dtype):
            categorical.append(column)
            if (count := values.nunique()) > _MOST_CATEGORIES:
                raise InputError(
                    f"column {column!r} has {count} categories, but at most {_MOST_CATEGORIES} become "
                    "features: group them or leave the column out of the features."
                )
        elif types.is_bool_dtype(dtype):
            plain.append(column)
        elif types.is_numeric_dtype(dtype) and not types.is_complex_dtype(dtype):
            if infinite := int(np.isinf(values.to_numpy(np.float64)).sum()):
                raise InputError(
                    f"column {column!r} has infinite values in {infinite} of {len(values)} rows: replace or drop them."
                )
            scalable.append(column)
        else:
            raise InputError(
                f"column {column!r} has type {dtype}, but numbers, booleans, strings or categories are "
                "needed: convert it or leave it out of the features."
            )
    columns = pd.get_dummies(frame[[*scalable, *plain, *categorical]], columns=categorical, dtype=np.float64)
    return columns.to_numpy(np.float64), list(range(len(scalable))), [str(column) for column in categorical]
