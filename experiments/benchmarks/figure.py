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
BAR, HEADING, FOOT = 0.165, 0.42, 0.75  # inches
PAGE = 9.0


def draw(
    rows: Sequence[Row],
    titles: dict[str, str],
    coloured: Sequence[str],
    file: Path,
    *,
    note: str,
    step: str = "step",
    reference: str = "plain",
) -> None:
    """Saves the figure; where that would be higher than a page, with each system's best variant alone.

    Args:
        rows: the measured rows; those without a median are left out.
        titles: the workloads' headings, in the order of the panels.
        coloured: the systems that have a colour each, such as those that train with privacy; the others are grey.
        file: where; its ending chooses the format.
        note: what stands under the panels: machine and versions.
        step: what takes the time.
        reference: the system to which the ratios beside the bars are.
    """
    panels = _panels([row for row in rows if "median_ms" in row], titles)
    variants = "Pale: not the system's best variant."
    if sum(map(_height, panels.values())) + FOOT > PAGE:
        panels = {name: [row for row in some if row["best"]] for name, some in panels.items()}
        variants = "Each system in its best variant."
    if not panels:
        return
    rows = [row for some in panels.values() for row in some]
    colour = {system: COLOURS[number % len(COLOURS)] for number, system in enumerate(coloured)}
    with mpl.rc_context({"font.family": "DejaVu Sans", "font.size": 7.5, "axes.titlesize": 8.5}):
        figure = Figure(figsize=(6.3, sum(map(_height, panels.values())) + FOOT), layout="constrained")
        shares = {"height_ratios": [len(some) for some in panels.values()]}
        axes = figure.subplots(len(panels), squeeze=False, sharex=True, gridspec_kw=shares)[:, 0]
        low = min(min(row["median_ms"], row["bound_ms"]) for row in rows)
        high = max(row["range"][1] for row in rows)
        for axis, (name, some) in zip(axes, panels.items(), strict=True):
            axis.set_title(titles[name], loc="left")
            for place, row in enumerate(some):
                median = row["median_ms"]
                axis.barh(
                    place,
                    median,
                    left=0,
                    height=0.78,
                    color=colour.get(row["system"], PLAIN_COLOUR),
                    alpha=1.0 if row["best"] else 0.45,
                )
                axis.plot(row["range"], (place, place), color="black", linewidth=0.8, solid_capstyle="butt")
                ratio = row[f"ratio_to_{reference}"]
                text = _milliseconds(median) + (f"  ({_number(ratio)} x)" if ratio is not None and ratio != 1 else "")
                axis.text(
                    max(row["range"][1], median) * 1.06,
                    place,
                    text,
                    va="center",
                    fontsize=6.8,
                    fontweight="bold" if row["system"] == "dpfl" else "normal",
                )
            axis.axvline(some[0]["bound_ms"], color="black", linewidth=0.9, linestyle=(0, (3, 2)))
            axis.set_yticks(range(len(some)), [_label(row) for row in some], fontsize=6.8)
            for tick, row in zip(axis.get_yticklabels(), some, strict=True):
                tick.set_fontweight("bold" if row["system"] == "dpfl" else "normal")
            axis.set_xscale("log")
            axis.set_ylim(-0.6, len(some) - 0.4)
            axis.grid(axis="x", color="0.9", linewidth=0.6)
            axis.set_axisbelow(True)
            axis.spines[["top", "right"]].set_visible(False)
        decades = math.log10(high / low)
        # Room for the texts beside the longest bars, whose width does not depend on how many decades there are.
        axes[0].set_xlim(low * 10 ** (-0.06 * decades), high * 10 ** (0.3 * decades))
        axes[-1].xaxis.set_major_formatter(
            FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")
        )
        axes[-1].set_xlabel(
            f"milliseconds a {step} (median; line: lowest to highest; in brackets: ratio to {reference})"
        )
        note = f"{variants} Dashed: the {step}'s matrix products at the machine's rate.\n{note}"
        figure.supxlabel(note, fontsize=6.3, color="0.3", x=0.01, ha="left")
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=200)


def _panels(rows: Sequence[Row], titles: dict[str, str]) -> dict[str, list[Row]]:
    """The rows of each workload, slowest first; those without rows are left out."""
    panels = {name: [row for row in rows if row["workload"] == name] for name in titles}
    return {name: sorted(some, key=lambda row: row["median_ms"], reverse=True) for name, some in panels.items() if some}


def _height(rows: Sequence[Row]) -> float:
    """Of a panel, in inches."""
    return HEADING + BAR * len(rows)


def _label(row: Row) -> str:
    return f"{row['system']} · {row['variant']}" if row["variant"] else str(row["system"])


def _milliseconds(value: float) -> str:
    return f"{_number(value)} ms"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
