"""Means over seeds and how far they can be trusted."""

from collections.abc import Sequence

import pandas as pd
from scipy import stats

LEVEL = 0.95


def summarise(frame: pd.DataFrame, by: Sequence[str], value: str = "accuracy") -> pd.DataFrame:
    """Return the mean of each group and its 95 % Student-t interval.

    Args:
        frame: One row per run; the runs of a group differ in their seed alone.
        by: The columns that make up a group; NaN is a value like any other.
        value: The column to average.

    Returns:
        One row per group, sorted by group: the columns of `by`, then `mean`, `low`, `high` and
        `seeds` (how many runs the group has). A group of one run has no interval: NaN.
    """
    table = frame.groupby(list(by), dropna=False)[value].agg(mean="mean", error="sem", seeds="count")
    half = stats.t.ppf((1 + LEVEL) / 2, table["seeds"] - 1) * table["error"]
    table = table.assign(low=table["mean"] - half, high=table["mean"] + half)
    return table[["mean", "low", "high", "seeds"]].reset_index()
