"""How a chart looks: size, fonts, colours, axes, legend and caption."""

import io
import textwrap
from collections.abc import Callable, Iterable, Sequence
from itertools import cycle
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedFormatter, FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import ScaledTranslation

DPI = 200
_NOTEBOOK_DPI = 100
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
_WIDE = 60


class Chart(Figure):
    """A figure that notebooks show by themselves, pyplot or not."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=_NOTEBOOK_DPI)
        return buffer.getvalue()


class Look(NamedTuple):
    """The colour, marker and line style of one line."""

    color: Any
    marker: str
    linestyle: str = "-"


# Okabe and Ito's colours, for kinds that have no order.
_KINDS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
NON_PRIVATE = "non-private"
PLAIN = Look(color="0.25", marker="", linestyle="--")
style = mpl.rc_context(_STYLE)
"""Decorates each function that makes a figure, so that a user's own style cannot break its layout."""


def looks(values: Sequence[float]) -> dict[float, Look]:
    """Return a look for each value: ordered colours that survive colour blindness, each with its marker."""
    colors = mpl.colormaps["viridis"](np.linspace(0, 0.8, len(values)))[::-1]
    return {v: Look(c, m) for v, c, m in zip(values, colors, cycle(_MARKERS), strict=False)}


def kinds(values: Sequence[str]) -> dict[str, Look]:
    """Return a look for each of several kinds without an order, each with its marker."""
    return {v: Look(c, m) for v, c, m in zip(values, cycle(_KINDS), cycle(_MARKERS), strict=False)}


def start(xlabel: str) -> tuple[Figure, Axes]:
    """Return an empty figure and its axes, accuracy over a logarithmic x."""
    figure = Chart(figsize=(5.5, 3.8), dpi=DPI, layout="constrained")
    axes = figure.add_subplot(xscale="log", xlabel=xlabel, ylabel="Test accuracy")
    axes.margins(x=0.06)
    percent(axes.yaxis)
    return figure, axes


def map_axes(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    """Return an empty figure and its axes for a map of cells."""
    figure = Chart(figsize=(5.5, 3.8), dpi=DPI, layout="constrained")
    axes = figure.add_subplot(xlabel=xlabel, ylabel=ylabel)
    axes.grid(visible=False)
    return figure, axes


def cells(
    figure: Figure,
    axes: Axes,
    accuracy: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    framed: Iterable[tuple[int, int]],
) -> None:
    """Draw a map of accuracies (rows, columns), the first row below, with a frame around some cells."""
    colors = mpl.colormaps["viridis"].with_extremes(bad="0.92")
    image = axes.imshow(accuracy, origin="lower", aspect="auto", cmap=colors)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    for (row, column), value in np.ndenumerate(accuracy):
        dark = not np.isnan(value) and sum(image.to_rgba(value)[:3]) < 1.5
        text = "×" if np.isnan(value) else f"{100 * value:.1f}"
        axes.text(column, row, text, ha="center", va="center", color="white" if dark else "black", fontsize=7.5)
    for row, column in framed:
        for width, color in ((3.2, "white"), (1.6, "black")):
            axes.add_patch(Rectangle((column - 0.48, row - 0.48), 0.96, 0.96, fill=False, lw=width, ec=color))
    bar = figure.colorbar(image, ax=axes, label="Test accuracy")
    percent(bar.ax.yaxis)


def frequency_axes(target: bool, noise: bool) -> tuple[Figure, dict[str, Axes]]:
    """Return a figure with axes of accuracy over rounds: "target", "noise" with "spent" below it, or all of these."""
    if target and not noise:
        figure, axes = start("Rounds")
        return figure, {"target": axes}
    figure = Chart(figsize=(7.2 if target else 5.5, 4.2), dpi=DPI, layout="constrained")
    layout: Any = [["target", "noise"], ["target", "spent"]] if target else [["noise"], ["spent"]]
    panels = figure.subplot_mosaic(layout, height_ratios=[2.2, 1])
    for name, axes in panels.items():
        axes.set(xscale="log", xlabel="Rounds")
        axes.margins(x=0.06)
        if name != "spent":
            percent(axes.yaxis)
    panels["spent"].set(yscale="log", ylabel="ε spent")
    decades(panels["spent"].yaxis, lambda value: f"{value:g}")
    panels["spent"].tick_params(axis="y", labelsize=6)
    if target:
        panels["target"].set_ylabel("Test accuracy")
    else:
        panels["noise"].set_ylabel("Test accuracy")
    return figure, panels


def legend_beside(axes: Axes, of: Axes, title: str) -> None:
    """Put the legend of some axes' lines to the right of others."""
    handles, labels = of.get_legend_handles_labels()
    place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.02, 1), "borderaxespad": 0, "alignment": "left"}
    axes.legend(handles, labels, title=title, **place)


def panels(rows: int, columns: int, size: tuple[float, float], **shared: Any) -> tuple[Figure, np.ndarray]:
    """Return an empty figure of a size in inches, and its axes in rows and columns; `shared` as `Figure.subplots`."""
    figure = Chart(figsize=size, dpi=DPI, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **shared)


def percent(axis: Axis) -> None:
    """Label an axis of fractions in percent."""
    axis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.6g}%"))


class _Decades(LogLocator):
    """Ticks at powers of ten, and at 2 and 5 times these where there is room for them."""

    def tick_values(self, vmin: float, vmax: float) -> Any:
        self.set_params(subs=(1, 2, 5) if 0 < vmax < _WIDE * vmin else (1,))
        return super().tick_values(vmin, vmax)


def decades(axis: Axis, text: Callable[[float], str]) -> None:
    """Put ticks of a logarithmic axis at powers of ten, or closer, labelled by a function of their value."""
    axis.set_major_locator(_Decades())
    axis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
    axis.set_minor_locator(NullLocator())


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


def ticks(axis: Axis, values: Sequence[float], labels: Sequence[str], room: float = _TICK_ROOM) -> None:
    """Put a tick at each value and label as many as have room, which is a fraction of the axis."""
    span = np.log(values[-1] / values[0])
    shown: list[str] = []
    last = -np.inf
    for value, label in zip(values, labels, strict=True):
        fits = span == 0 or np.log(value) - last >= room * span
        shown.append(label if fits else "")
        last = np.log(value) if fits else last
    axis.set_major_locator(FixedLocator(values))
    axis.set_major_formatter(FixedFormatter(shown))
    axis.set_minor_locator(NullLocator())


def within(axes: Axes) -> None:
    """Keep an axis of fractions between 0 and 1."""
    if axes.get_yscale() == "linear":
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, -0.02), min(high, 1.02))


def finish(figure: Figure, axes: Axes | None, legend: str, paragraphs: Iterable[Iterable[str]]) -> Figure:
    """Add the legend beside the axes (None for no legend) and the caption below them, and lay the figure out."""
    if axes is not None:
        within(axes)
        axes.legend(title=legend, loc="upper left", bbox_to_anchor=(1.02, 1), borderaxespad=0, alignment="left")
    texts = (" ".join(filter(None, sentences)) for sentences in paragraphs)
    unbroken = (text.replace("δ = ", "δ\u00a0=\u00a0") for text in texts)
    caption = "\n".join(textwrap.fill(text, _CAPTION_LETTERS) for text in unbroken)
    figure.supxlabel(caption, x=0.015, ha="left", **_CAPTION)
    figure.draw_without_rendering()  # makes the ticks, which take their style when they are made
    figure.set_layout_engine("none")  # a layout that is computed anew at each draw drifts by a hair
    return figure
