"""Accuracy, communication and privacy at once: the settings that no other one beats."""

import math
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dpfl.charts import canvas, words
from dpfl.charts.runs import finished, plain, prepare
from dpfl.charts.tradeoffs import caption, legend
from dpfl.charts.words import number
from dpfl.errors import InputError
from dpfl.statistics import summarise

_SETTING = [
    "mechanism",
    "epsilon",
    "delta",
    "clip_norm",
    "rounds",
    "cohort",
    "local_steps",
    "local_epochs",
    "compression",
]
_ALIKE = 1.01
_VARYING = ("cohort", "local_steps", "local_epochs", "compression")


def pareto_front(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the Pareto-efficient settings: high accuracy for few bytes and little epsilon.

    A setting is efficient if no other one has a mean validation accuracy at least as high, sends at most as
    many bytes, and has at most its epsilon, one of the three being better. Runs without noise count as an
    infinite epsilon. A diverged run counts as accuracy 0.

    Args:
        frame: The tidy frame of a study, one row per run, with bytes_up (bytes from all clients to the server in
            all rounds).

    Returns:
        One row per efficient setting, by epsilon and bytes ascending: the columns of the setting, bytes_up and
        validation_accuracy (means over the seeds), and of the test accuracy mean, low, high (95 % Student-t
        interval) and seeds.

    Raises:
        InputError: If the frame lacks columns, mixes runs that one table cannot tell apart, or has a finished
            run without validation accuracy.
    """
    table = _settings(_prepared(frame))
    return table[table["efficient"]].drop(columns=["plain", "level", "efficient"]).reset_index(drop=True)


@canvas.style
def pareto(frame: pd.DataFrame) -> Figure:
    """Draw test accuracy against the bytes that clients send, with the Pareto-efficient settings joined.

    Args:
        frame: As of `pareto_front`, which says what is efficient.

    Raises:
        InputError: As of `pareto_front`.
    """
    runs = _prepared(frame)
    table = _settings(runs)
    if table["bytes_up"].max() < _ALIKE * table["bytes_up"].min():
        raise InputError(
            f"All settings send about as much ({words.size(table['bytes_up'].mean())}), so there is nothing to draw: "
            "vary the number of rounds, the cohort or the compression."
        )

    figure, axes = canvas.start("Bytes from clients to the server, all clients and rounds")
    above, below = table[table["plain"]], table[~table["plain"]]
    if len(above):
        _draw(axes, above, canvas.PLAIN._replace(marker="h"), canvas.NON_PRIVATE)
    looks = canvas.looks(sorted(below["level"].unique()))
    for level in sorted(looks, reverse=True):
        label = number(level) if math.isfinite(level) else "no noise"
        _draw(axes, below[below["level"] == level], looks[level], label)
    canvas.decades(axes.xaxis, words.size)
    efficient = table[table["efficient"]]
    sentences = (
        f"Filled and joined: the {len(efficient)} Pareto-efficient of {len(table)} settings, which means that no other "
        "one has at least the mean validation accuracy, at most the bytes and at most the ε, one of them better; "
        "faint: the others. That choice is not charged to ε.",
        "Runs without noise count as an infinite ε." if (table["level"] == math.inf).any() else "",
        "Dashed: federated averaging without clip and noise." if len(above) else "",
    )
    none = pd.DataFrame({"rounds": [], "seeds": pd.Series([], dtype=int)})
    return canvas.finish(figure, axes, legend(runs), caption(runs, efficient, none, *sentences))


def _prepared(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the prepared runs, after a look at what efficiency needs beside accuracy."""
    if "bytes_up" not in frame:
        raise InputError("The frame lacks bytes_up: pass the frame of runs that a study of this version returns.")
    runs = prepare(frame, varying=[column for column in _VARYING if column in frame])
    done = finished(runs)
    if done["bytes_up"].isna().all():
        raise InputError("No finished run has bytes_up, so accuracy cannot be drawn against communication.")
    if done["validation_accuracy"].isna().any():
        raise InputError(
            "Pareto-efficient settings are chosen by validation_accuracy, which some finished runs lack: hold out "
            "validation data."
        )
    return runs.astype({"bytes_up": float})


def _settings(runs: pd.DataFrame) -> pd.DataFrame:
    """Return one row per setting that has a finished run: accuracies, bytes, and whether it is efficient.

    `level` is the epsilon, infinite without noise; `plain` says what is federated averaging without clip and noise.
    """
    runs = runs.assign(plain=runs.index.isin(plain(runs).index), level=_level(runs))
    keys = ["plain", "level", *(column for column in _SETTING if column in runs)]
    score = runs["validation_accuracy"].where(runs["status"] == "finished", 0.0)
    means = runs.assign(validation_accuracy=score).groupby(keys, dropna=False)[["validation_accuracy", "bytes_up"]]
    table = summarise(finished(runs), keys).merge(means.mean().reset_index(), on=keys)
    table = table[table["bytes_up"].notna()].sort_values(["plain", "level", "bytes_up"], kind="stable")
    costs = np.column_stack([-table["validation_accuracy"], table["bytes_up"], table["level"]])
    table["efficient"] = [not _beaten(cost, costs) for cost in costs]
    return table[[*keys, "bytes_up", "validation_accuracy", "mean", "low", "high", "seeds", "efficient"]]


def _level(runs: pd.DataFrame) -> pd.Series:
    """Return the target epsilon of each run; what it spent where its noise was given, infinity where it has none."""
    spent = runs["epsilon_spent"].astype(float).round(4) if "epsilon_spent" in runs else math.inf
    return runs["epsilon"].fillna(spent).fillna(math.inf)


def _beaten(cost: np.ndarray, costs: np.ndarray) -> bool:
    """Return whether any of the costs is nowhere above this one and somewhere below it."""
    return bool(((costs <= cost).all(axis=1) & (costs < cost).any(axis=1)).any())


def _draw(axes: Axes, settings: pd.DataFrame, look: canvas.Look, label: str) -> None:
    """Draw the settings of one epsilon: the efficient ones joined, with their intervals, the others faint."""
    good, others = (settings[settings["efficient"] == efficient] for efficient in (True, False))
    axes.plot(others["bytes_up"], others["mean"], look.marker, color=look.color, alpha=0.25, markersize=3.5)
    edge: dict[str, Any] = {"markeredgecolor": "white", "markeredgewidth": 0.4}
    axes.plot(good["bytes_up"], good["mean"], label=label, **edge, **look._asdict())
    axes.vlines(good["bytes_up"], good["low"], good["high"], color=look.color, linewidth=0.8)
