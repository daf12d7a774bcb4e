"""The tidy frame of runs: what a chart needs of it, and the choices made on validation.

A run is *private* if it has a target epsilon, *clipped* if it has a mechanism at all (so that the
clipped runs are the private ones and those without noise), and *plain* if it is federated averaging
without clip and noise.
"""

from collections.abc import Sequence

import pandas as pd

from dpfl.charts.words import number, several
from dpfl.errors import InputError

_PER_CHART = ("dataset", "model", "clients", "cohort")
_PER_GUARANTEE = ("mechanism", "unit", "relation", "sampler", "accountant")
_DEPLOYMENT = ("deployment_clients", "deployment_cohort")  # of runs that stand for a larger population
_SETTING = ("epsilon", "delta", "clip_norm", "rounds")
_MEASURED = ("status", "seed", "noise_multiplier", "accuracy", "validation_accuracy")


def prepare(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a copy of the runs, checked: whatever one chart averages over differs in its seed alone.

    Raises:
        InputError: If a column is missing, no run is finished, or runs are mixed that no chart can
            tell apart.
    """
    missing = [c for c in (*_PER_CHART, *_PER_GUARANTEE, *_SETTING, *_MEASURED) if c not in frame]
    if missing:
        raise InputError(f"The frame lacks {several(missing)}: pass the frame of runs that a study returns.")
    frame = frame.assign(**{column: float("nan") for column in _DEPLOYMENT if column not in frame})
    floats = [*_DEPLOYMENT, "epsilon", "delta", "clip_norm", "noise_multiplier", "accuracy", "validation_accuracy"]
    runs = frame.astype(dict.fromkeys(floats, float)).reset_index(drop=True)
    if finished(runs).empty:
        raise InputError(f"None of the {len(runs)} runs is finished, so there is nothing to draw.")
    if (runs["unit"] == "example").any() or ("example_clip_norm" in runs and runs["example_clip_norm"].notna().any()):
        raise InputError(
            "Some runs clip and noise examples' gradients, while charts and tables of the trade-off know clients' "
            "updates alone: leave these runs out, and draw them from the frame's columns."
        )
    alike = ((runs, _PER_CHART), (clipped(runs), ("mechanism",)), (private(runs), (*_PER_GUARANTEE, *_DEPLOYMENT)))
    for rows, columns in alike:
        for column in columns:
            values = sorted(map(str, rows[column].dropna().unique()))
            if column in _DEPLOYMENT and values and rows[column].isna().any():
                values.append("none")
            if len(values) > 1:
                raise InputError(f"The runs differ in {column} ({several(values)}): chart one value at a time.")
    if (runs.loc[runs["epsilon"].isna(), "noise_multiplier"] > 0).any():
        raise InputError(
            "Some runs carry noise but have no target epsilon, so a chart can show them "
            "neither as private nor as free of noise: leave them out."
        )
    twice = runs[runs.duplicated(["mechanism", *_SETTING, "seed"])]
    if len(twice):
        run = twice.iloc[0]
        raise InputError(
            f"Several runs share seed {run['seed']}, epsilon {number(run['epsilon'])}, clip norm "
            f"{number(run['clip_norm'])} and {number(run['rounds'])} rounds, so they differ in something "
            "that the chart cannot show: keep one value of it."
        )
    return runs


def finished(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs that ended with a model."""
    return runs[runs["status"] == "finished"]


def clipped(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs whose updates were clipped, with and without noise."""
    return runs[runs["mechanism"] != "none"]


def private(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs with a target epsilon."""
    return runs[runs["epsilon"].notna()]


def plain(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs of federated averaging without clip and noise."""
    return runs[runs["mechanism"] == "none"]


def deltas(runs: pd.DataFrame) -> list[float]:
    """Return the values of delta that the private runs were given, ascending."""
    return sorted(private(runs)["delta"].unique())


def local_work(runs: pd.DataFrame) -> list[float]:
    """Return the values that rounds x local steps takes, ascending; none if the steps are not known."""
    if "local_steps" not in runs or runs["local_steps"].isna().any():
        return []
    return sorted((runs["rounds"] * runs["local_steps"]).unique())


def best(
    runs: pd.DataFrame, per: Sequence[str], over: Sequence[str], keep: Sequence[str] | None = None
) -> pd.DataFrame:
    """Return the runs at the best setting, chosen by mean validation accuracy over the seeds.

    A diverged run counts as accuracy 0 in the choice, so that a setting at which one lucky seed
    survived does not win. The smallest setting wins a tie.

    Args:
        runs: The runs to choose from, diverged ones included.
        per: One choice is made for each value of these columns.
        over: The columns that are chosen.
        keep: Which of the chosen columns bind the runs that are returned; all unless given.

    Returns:
        The runs that have a chosen setting.

    Raises:
        InputError: If there is a choice and a finished run has no validation accuracy.
    """
    score = runs["validation_accuracy"].where(runs["status"] == "finished", 0.0)
    means = runs.assign(score=score).groupby([*per, *over], dropna=False)["score"].agg(["mean", "count", "size"])
    table = means.reset_index()
    if (table.duplicated(list(per), keep=False) & (table["count"] < table["size"])).any():
        raise InputError(
            f"Choosing the best {several(over)} needs validation_accuracy, which some finished runs lack: "
            "hold out validation data or keep one value."
        )
    winners = table.sort_values("mean", ascending=False, kind="stable").drop_duplicates(list(per))
    columns = [*per, *(over if keep is None else keep)]
    return runs.merge(winners[columns], on=columns)
