"""The figure of a run: a panel for each workload, a bar for each system and variant, on a logarithmic axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from measuring import Row

# Okabe and Ito's colours, which survive colour blindness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
PLAIN_COLOUR = "0.65"
BAR, HEADING = 0.165, 0.42


def draw(rows: Sequence[Row], titles: dict[str, str], private: Sequence[str], note: str, file: Path) -> None:
    """Saves the figure.

    Args:
        rows: the measured rows; those without a median are left out.
        titles: the workloads' headings, in the order of the panels.
        private: the systems that train with privacy; each has its colour, the others are grey.
        note: what stands under the panels: machine and versions.
        file: where; its ending chooses the format.
    """
    rows = [row for row in rows if "median_ms" in row]
    panels = {
        name: sorted((row for row in rows if row["workload"] == name), key=lambda row: row["median_ms"], reverse=True)
        for name in titles
    }
    panels = {name: some for name, some in panels.items() if some}
    if not panels:
        return
    colour = {system: COLOURS[number % len(COLOURS)] for number, system in enumerate(private)}
    heights = [HEADING + BAR * len(some) for some in panels.values()]
    with mpl.rc_context({"font.family": "DejaVu Sans", "font.size": 7.5, "axes.titlesize": 8.5}):
        figure = Figure(figsize=(6.3, sum(heights) + 0.75), layout="constrained")
        shares = {"height_ratios": [len(some) for some in panels.values()]}
        axes = figure.subplots(len(panels), squeeze=False, sharex=True, gridspec_kw=shares)[:, 0]
        low = min(row["median_ms"] for row in rows)
        high = max(row["median_ms"] for row in rows)
        for axis, (name, some) in zip(axes, panels.items(), strict=True):
            axis.set_title(titles[name], loc="left")
            for place, row in enumerate(some):
                median = row["median_ms"]
                ours = row["system"] == "dpfl"
                axis.barh(
                    place,
                    median,
                    left=0,
                    height=0.78,
                    color=colour.get(row["system"], PLAIN_COLOUR),
                    alpha=1.0 if row["best"] else 0.45,
                )
                axis.plot(row["range"], (place, place), color="black", linewidth=0.8, solid_capstyle="butt")
                ratio = row["ratio_to_plain"]
                text = _milliseconds(median) + (f"  ({ratio:.3g} x)" if ratio is not None and ratio != 1 else "")
                axis.text(
                    max(row["range"][1], median) * 1.06,
                    place,
                    text,
                    va="center",
                    fontsize=6.8,
                    fontweight="bold" if ours else "normal",
                )
            axis.set_yticks(range(len(some)), [_label(row) for row in some], fontsize=6.8)
            for tick, row in zip(axis.get_yticklabels(), some, strict=True):
                tick.set_fontweight("bold" if row["system"] == "dpfl" else "normal")
            axis.set_xscale("log")
            axis.set_ylim(-0.6, len(some) - 0.4)
            axis.grid(axis="x", color="0.9", linewidth=0.6)
            axis.set_axisbelow(True)
            axis.spines[["top", "right"]].set_visible(False)
        axes[0].set_xlim(10 ** (math.log10(low) - 0.35), 10 ** (math.log10(high) + 0.95))
        axes[-1].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes[-1].set_xlabel("milliseconds a step (median; line: lowest to highest round; in brackets: ratio to plain)")
        figure.supxlabel(note, fontsize=6.3, color="0.3", x=0.01, ha="left")
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=200)


def _label(row: Row) -> str:
    return f"{row['system']} · {row['variant']}" if row["variant"] else str(row["system"])


def _milliseconds(value: float) -> str:
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"
