"""Accuracy against bytes, for each way of compression and each epsilon."""

import math
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dpfl.charts import canvas, words
from dpfl.charts.runs import clipped, deltas, finished, prepare, private
from dpfl.charts.words import number
from dpfl.errors import InputError
from dpfl.statistics import best, summarise

_MEASURED = {"up": "update_bytes", "down": "model_bytes"}
_AXIS = {"up": "Bytes that a client sends", "down": "Bytes that a client receives"}
_COLUMNS = ("bits", "rotation", "random_k", "rank", "sparsity", "top_k", "error_feedback")
_ROW_OF_PANELS = 2
_NONE = "not compressed"
_ALIKE = 1.01


class _Way(NamedTuple):
    """A way of compression, and how far it goes, in the words of a legend and of a point's label."""

    kind: str
    level: str


@canvas.style
def compression(frame: pd.DataFrame, traffic: Literal["up", "down"] = "up") -> Figure:
    """Draw test accuracy against the bytes of a client's round, one panel for each epsilon, one line for each way.

    Ways that save no such bytes are left out. Each point has the clip norm and the number of rounds
    that are best by mean validation accuracy. What is not compressed is a dashed line with its interval; a point is
    full if nothing else in its panel has at least its mean validation accuracy for fewer bytes.

    Args:
        frame: The tidy frame of a study, one row per run, with the columns of its compression, and update_bytes and
            model_bytes, the mean bytes that a client sends and receives in a round.
        traffic: "up" for the bytes that a client sends in a round, "down" for those that it receives.

    Raises:
        InputError: If there is no such traffic, or the frame lacks columns, mixes runs that one chart cannot tell
            apart, or has no finished run that saves such bytes.
    """
    if traffic not in _MEASURED:
        raise InputError(f"There is no traffic {traffic!r}: choose {words.several(_MEASURED)}.")
    missing = [column for column in (*_MEASURED.values(), *_COLUMNS, "compression") if column not in frame]
    if missing:
        raise InputError(f"The frame lacks {words.several(missing)}: pass the frame of runs that a study returns.")
    runs = prepare(frame, varying=("compression",))
    runs["traffic"] = runs[_MEASURED[traffic]].astype(float)
    shown = clipped(runs) if len(finished(clipped(runs))) else runs
    table = _saving(_points(shown))
    levels = sorted(table["level"].unique())
    kinds = [kind for kind in dict.fromkeys(table["kind"]) if kind != _NONE]
    if not kinds:
        raise InputError(
            "No finished run saves bytes by compression, so there is nothing to draw: vary a setting of compression."
        )

    columns = min(len(levels), _ROW_OF_PANELS)
    rows = math.ceil(len(levels) / columns)
    figure, grid = canvas.panels(rows, columns, (7.2, 2.6 * rows + 1.2))
    looks = canvas.kinds(kinds)
    places = list(grid.flat)
    for axes, level in zip(places, levels, strict=False):
        _draw(axes, table[table["level"] == level], looks, _title(level, runs), _AXIS[traffic])
    for axes in places[len(levels) :]:
        axes.remove()
    for axes in grid[:, 0]:
        axes.set_ylabel("Test accuracy")
    corner = grid[0, -1]
    _legend(corner, looks, table)
    return canvas.finish(figure, corner, "Compression", _caption(shown, table, _AXIS[traffic]))


def _title(level: float, runs: pd.DataFrame) -> str:
    if math.isfinite(level):
        return f"ε = {number(level)}"
    return "no noise" if len(private(runs)) else ""


def _saving(table: pd.DataFrame) -> pd.DataFrame:
    """Return the points of what is not compressed, and of the ways that have less traffic than all others."""
    most = table["traffic"].max() / _ALIKE
    saves = table.groupby("kind")["traffic"].transform("min") < most
    return table[saves | (table["kind"] == _NONE)]


def _points(runs: pd.DataFrame) -> pd.DataFrame:
    """Return a row per epsilon and compression: accuracy, traffic, its way, and whether it is efficient."""
    keys = ["epsilon", "delta", "compression"]
    chosen = best(runs, per=keys, over=["rounds", "clip_norm"])
    table = summarise(finished(chosen), keys)
    means = finished(chosen).groupby(keys, dropna=False)[["traffic", "validation_accuracy"]].mean().reset_index()
    table = table.merge(means, on=keys)
    ways = {row["compression"]: _way(row) for _, row in runs.drop_duplicates("compression").iterrows()}
    table["kind"] = [ways[name].kind for name in table["compression"]]
    table["text"] = [ways[name].level for name in table["compression"]]
    table["level"] = table["epsilon"].fillna(math.inf)
    table["efficient"] = False
    for _, part in table.groupby("level"):
        costs = np.column_stack([-part["validation_accuracy"], part["traffic"]])
        beaten = [bool(((costs <= cost).all(axis=1) & (costs < cost).any(axis=1)).any()) for cost in costs]
        table.loc[part.index, "efficient"] = ~np.array(beaten)
    return table.sort_values(["level", "kind", "traffic"], kind="stable")


def _way(run: pd.Series) -> _Way:
    """Return the way of a run's compression."""
    parts = []
    if pd.notna(run["random_k"]):
        parts.append(_Way("random k", _share(run["random_k"])))
    if pd.notna(run["rank"]):
        parts.append(_Way("low rank", f"rank {number(run['rank'])}"))
    if run["sparsity"]:
        parts.append(_Way("pruned", _share(run["sparsity"])))
    if pd.notna(run["bits"]):
        kind = "quantised, rotated" if run["rotation"] else "quantised"
        parts.append(_Way(kind, f"{number(run['bits'])} bit{'s' * (run['bits'] > 1)}"))
    if pd.notna(run["top_k"]):
        parts.append(_Way("top k with feedback" if run["error_feedback"] else "top k", _share(run["top_k"])))
    if not parts:
        return _Way(_NONE, "")
    return _Way(" + ".join(part.kind for part in parts), ", ".join(part.level for part in parts))


def _share(value: float) -> str:
    return f"{100 * value:.3g}%" if value < 1 else number(value)


def _draw(axes: Axes, table: pd.DataFrame, looks: dict[Any, canvas.Look], title: str, xlabel: str) -> None:
    """Draw the panel of one epsilon."""
    axes.set(xscale="log", xlabel=xlabel, title=title)
    axes.margins(x=0.08, y=0.1)
    canvas.percent(axes.yaxis)
    for _, whole in table[table["kind"] == _NONE].iterrows():
        axes.axhline(whole["mean"], color="black", linestyle="--", linewidth=0.8)
        axes.axhspan(whole["low"], whole["high"], color="black", alpha=0.07, linewidth=0)
        axes.plot(whole["traffic"], whole["mean"], "h", color="black", markersize=6)
    for kind, points in table[table["kind"] != _NONE].groupby("kind", sort=False):
        look, side = looks[kind], 1 - 2 * (list(looks).index(kind) % 2)  # labels above the marks, or below
        axes.plot(points["traffic"], points["mean"], color=look.color, linewidth=0.7, alpha=0.6)
        axes.vlines(points["traffic"], points["low"], points["high"], color=look.color, linewidth=0.7, alpha=0.6)
        for _, point in points.iterrows():
            face = look.color if point["efficient"] else "white"
            axes.plot(
                point["traffic"], point["mean"], look.marker, color=look.color, markerfacecolor=face, markersize=4.5
            )
            place: dict[str, Any] = {"xytext": (0, 6.5 * side), "textcoords": "offset points", "fontsize": 5}
            place |= {"ha": "center", "va": "center"}
            axes.annotate(point["text"], (point["traffic"], point["mean"]), color=look.color, **place)
    canvas.decades(axes.xaxis, words.size)
    canvas.within(axes)


def _legend(axes: Axes, looks: dict[Any, canvas.Look], table: pd.DataFrame) -> None:
    """Name in one panel the lines of all of them."""
    if (table["kind"] == _NONE).any():
        axes.plot([], [], marker="h", color="black", linestyle="--", linewidth=0.8, label=_NONE)
    for kind, look in looks.items():
        axes.plot([], [], label=kind, color=look.color, marker=look.marker, linewidth=0.7)


def _caption(runs: pd.DataFrame, table: pd.DataFrame, what: str) -> list[list[str]]:
    """Return the paragraphs of the caption: what is drawn, and under which guarantee."""
    drawn = [
        f"{what}: in a round, on average.",
        "Full marks: nothing else in the panel has at least the mean validation accuracy for fewer bytes.",
        words.choice(runs, per=["epsilon", "compression"]),
        words.noise_free(finished(clipped(runs))),
        words.statistics(table["seeds"]),
        words.diverged(runs),
        words.left_out(runs),
    ]
    return [drawn, [words.guarantee(private(runs), deltas(runs)), words.setting(runs)]]
