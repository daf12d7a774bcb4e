"""How a chart looks: size, fonts, colours, axes, legend and caption."""

import textwrap
from collections.abc import Iterable, Sequence
from itertools import cycle
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from matplotlib.transforms import ScaledTranslation

DPI = 200
_STYLE: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 8,
    "axes.labelsize": 8.5,
    "axes.titlesize": 9,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "0.9",
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.3,
    "lines.markersize": 5.5,
    "legend.fontsize": 8,
    "legend.title_fontsize": 8,
    "legend.frameon": False,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "text.parse_math": False,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
}
_CAPTION = {"fontsize": 6.8, "color": "0.25", "linespacing": 1.25}
_CAPTION_LETTERS = 107
_MARKERS = "os^DvPX*<>"
LINES = ("-", ":", "-.")
_TICK_ROOM = 0.08


class Look(NamedTuple):
    """The colour, marker and line style of one line."""

    color: Any
    marker: str
    linestyle: str = "-"


NON_PRIVATE = "non-private"
PLAIN = Look(color="0.25", marker="", linestyle="--")
style = mpl.rc_context(_STYLE)
"""Decorates each function that makes a figure, so that a user's own style cannot break its layout."""


def looks(values: Sequence[float]) -> dict[float, Look]:
    """Return a look for each value: ordered colours that survive colour blindness, each with its marker."""
    colors = mpl.colormaps["viridis"](np.linspace(0, 0.8, len(values)))[::-1]
    return {v: Look(c, m) for v, c, m in zip(values, colors, cycle(_MARKERS), strict=False)}


def start(xlabel: str) -> tuple[Figure, Axes]:
    """Return an empty figure and its axes, accuracy over a logarithmic x."""
    figure = Figure(figsize=(5.5, 3.8), dpi=DPI, layout="constrained")
    axes = figure.add_subplot(xscale="log", xlabel=xlabel, ylabel="Test accuracy")
    axes.margins(x=0.06)
    axes.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.6g}%"))
    return figure, axes


def line(axes: Axes, points: pd.DataFrame, x: str, look: Look, label: str, shift: float = 0) -> None:
    """Draw the means over x with their intervals: a band, or a bar where there is one point alone.

    Args:
        axes: Where to draw.
        points: One row per point, in the order of x: `x`, `mean`, `low` and `high`.
        x: The column that goes to the right.
        look: Colour, marker and line style.
        label: The entry in the legend; empty for none.
        shift: How far to the right a point that is alone is moved, in points of type, so that others show.
    """
    edge: dict[str, Any] = {"markeredgecolor": "white", "markeredgewidth": 0.4}
    (drawn,) = axes.plot(points[x], points["mean"], label=label, **edge, **look._asdict())
    if len(points) > 1:
        band = axes.fill_between(points[x], points["low"], points["high"], linewidth=0.5)
        band.set(facecolor=(look.color, 0.1), edgecolor=(look.color, 0.4))
    else:
        bar = axes.vlines(points[x], points["low"], points["high"], color=look.color, linewidth=0.8)
        place = axes.transData + ScaledTranslation(shift / 72, 0, axes.figure.dpi_scale_trans)
        drawn.set_transform(place)  # only now: the limits of the axes come from the data as it is added
        bar.set_transform(place)


def ceiling(axes: Axes, points: pd.DataFrame) -> None:
    """Draw the non-private accuracy as a dashed line across the axes, with its interval."""
    for mean, low, high in points[["mean", "low", "high"]].to_numpy():
        axes.axhline(mean, color=PLAIN.color, linestyle=PLAIN.linestyle, label=NON_PRIVATE)
        axes.axhspan(low, high, color=PLAIN.color, alpha=0.1, linewidth=0)


def ticks(axis: Axis, values: Sequence[float], labels: Sequence[str]) -> None:
    """Put a tick at each value and label as many as have room."""
    span = np.log(values[-1] / values[0])
    shown: list[str] = []
    last = -np.inf
    for value, label in zip(values, labels, strict=True):
        room = span == 0 or np.log(value) - last >= _TICK_ROOM * span
        shown.append(label if room else "")
        last = np.log(value) if room else last
    axis.set_major_locator(FixedLocator(values))
    axis.set_major_formatter(FixedFormatter(shown))
    axis.set_minor_locator(NullLocator())


def finish(figure: Figure, axes: Axes, legend: str, paragraphs: Iterable[Iterable[str]]) -> Figure:
    """Add the legend beside the axes and the caption below them, and lay the figure out."""
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, -0.02), min(high, 1.02))
    axes.legend(title=legend, loc="upper left", bbox_to_anchor=(1.02, 1), borderaxespad=0, alignment="left")
    texts = (" ".join(filter(None, sentences)) for sentences in paragraphs)
    unbroken = (text.replace("δ = ", "δ\u00a0=\u00a0") for text in texts)
    caption = "\n".join(textwrap.fill(text, _CAPTION_LETTERS) for text in unbroken)
    figure.supxlabel(caption, x=0.015, ha="left", **_CAPTION)
    figure.draw_without_rendering()  # makes the ticks, which take their style when they are made
    figure.set_layout_engine("none")  # a layout that is computed anew at each draw drifts by a hair
    return figure
