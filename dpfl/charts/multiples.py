"""One small panel per dataset, side by side."""

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dpfl.charts import canvas, words
from dpfl.charts.runs import clipped, deltas, finished, plain, prepare, private
from dpfl.charts.words import number
from dpfl.errors import InputError
from dpfl.statistics import best, summarise

Chart = Literal["epsilon", "clipping", "round_frequency"]
_X = {"epsilon": "epsilon", "clipping": "clip_norm", "round_frequency": "rounds"}
_NAMES = {"clip_norm": "Clip norm (L2)", "rounds": "Rounds"}
_NO_NOISE = "no noise"
_PRIVATE = "private"
_ROOM = 0.16  # a label, as a fraction of a panel's width


class _Panel(NamedTuple):
    """What one panel shows."""

    title: str
    runs: pd.DataFrame
    table: pd.DataFrame
    ceiling: pd.DataFrame


@canvas.style
def small_multiples(frame: pd.DataFrame, by: str = "dataset", chart: Chart = "epsilon") -> Figure:
    """Draw one chart for each value of a column, as small panels that share their accuracy axis.

    Args:
        frame: The tidy frame of a study, one row per run.
        by: The column that has one panel for each of its values.
        chart: "epsilon" for test accuracy against epsilon at the clip norm and number of rounds that are best by
            mean validation accuracy; "clipping" against the clip norm, or "round_frequency" against the number of
            rounds, one line per epsilon, the other of the two being chosen so.

    Raises:
        InputError: If there is no such chart or column, or the runs of a panel lack columns, mix what one panel
            cannot tell apart, or have nothing to draw.
    """
    if chart not in get_args(Chart):
        raise InputError(f"There is no chart {chart!r}: choose {words.several(get_args(Chart))}.")
    if by not in frame:
        raise InputError(f"The frame lacks {by}: pass the frame of runs that a study returns.")
    x = _X[chart]
    panels = [_panel(str(value), part, x) for value, part in frame.groupby(by)]
    if not panels:
        raise InputError(f"No run has a {by}, so there is nothing to draw.")
    looks = _looks(panels, x)

    columns = min(len(panels), 2 if len(panels) <= 4 else 3)
    rows = math.ceil(len(panels) / columns)
    figure, grid = canvas.panels(rows, columns, (5.5, 1.6 * rows + 1.5 + 0.12 * len(panels)), sharey=True)
    places = list(grid.flat)
    for axes, panel in zip(places, panels, strict=False):
        _draw(axes, panel, x, looks)
    for axes in places[len(panels) :]:
        axes.remove()
    for axes in grid[:, 0]:
        axes.set_ylabel("Test accuracy")
    corner = grid[0, -1]
    _legend(corner, panels, looks)
    levels = {words.level(private(panel.runs)) for panel in panels if len(private(panel.runs))}
    title = "" if x == "epsilon" or not levels else f"{words.several(sorted(levels)).capitalize()} ε"
    return canvas.finish(figure, corner, title, _caption(panels, by, x))


def _panel(title: str, part: pd.DataFrame, x: str) -> _Panel:
    """Return what the panel of these runs shows; whatever is wrong with them is said with the panel's name."""
    try:
        runs = prepare(part)
        if len(deltas(runs)) > 1:
            several = words.several(map(number, deltas(runs)))
            raise InputError(f"The runs differ in delta ({several}): chart one value at a time.")
        keys = list(dict.fromkeys(["epsilon", "delta", x]))
        chosen = best(clipped(runs), per=keys, over=[c for c in ("rounds", "clip_norm") if c != x])
        table = summarise(finished(chosen), keys)
        if table[x].isna().all():
            raise InputError(f"No finished run has a value of {x}, so there is nothing to draw against it.")
        ceiling = summarise(finished(best(plain(runs), per=["mechanism"], over=["rounds"])), ["rounds"])
    except InputError as error:
        raise InputError(f"{title}: {error}") from None
    return _Panel(title, runs, table, ceiling)


def _looks(panels: list[_Panel], x: str) -> dict[float, canvas.Look]:
    """Return a look for each line of any panel: for each epsilon (infinite for no noise), or for all private runs."""
    if x == "epsilon":
        return canvas.looks([0.0])
    return canvas.looks(sorted({v for panel in panels for v in panel.table["epsilon"].fillna(math.inf)}))


def _draw(axes: Axes, panel: _Panel, x: str, looks: Mapping[float, canvas.Look]) -> None:
    """Draw one panel."""
    axes.set(xscale="log", title=panel.title)
    axes.margins(x=0.1)
    axes.set_xlabel(_NAMES.get(x) or f"{words.level(private(panel.runs)).capitalize()} ε\nat δ = {_delta(panel)}")
    canvas.percent(axes.yaxis)
    canvas.ceiling(axes, panel.ceiling)
    if x != "epsilon":
        table = panel.table.assign(level=panel.table["epsilon"].fillna(math.inf))
        for level in sorted(table["level"].unique(), reverse=True):
            canvas.line(axes, table[table["level"] == level].sort_values(x), x, looks[level], "")
        values = sorted(table[x].unique())
        canvas.ticks(axes.xaxis, values, [number(value) for value in values], _ROOM)
        return
    noisy, free = (panel.table[panel.table["epsilon"].isna() == bare] for bare in (False, True))
    canvas.line(axes, noisy, x, looks[0.0], "")
    values = sorted(noisy["epsilon"])
    labels = [number(value) for value in values]
    if len(free):
        values.append(values[-1] * max(2, (values[-1] / values[0]) ** 0.3))
        labels.append(_NO_NOISE.replace(" ", "\n"))
        canvas.line(axes, free.assign(epsilon=values[-1]), x, looks[0.0], "")
    canvas.ticks(axes.xaxis, values, labels, _ROOM)


def _delta(panel: _Panel) -> str:
    """Return the delta of the panel's guarantee."""
    return number(deltas(panel.runs)[0])


def _legend(axes: Axes, panels: list[_Panel], looks: Mapping[float, canvas.Look]) -> None:
    """Name in one panel the lines of all of them."""
    for line in axes.lines:
        line.set_label("")
    if any(len(panel.ceiling) for panel in panels):
        axes.plot([], [], label=canvas.NON_PRIVATE, **canvas.PLAIN._asdict())
    for level, look in sorted(looks.items(), reverse=True):
        label = _NO_NOISE if level == math.inf else number(level) if level else _PRIVATE
        axes.plot([], [], label=label, markeredgecolor="white", markeredgewidth=0.4, **look._asdict())


def _caption(panels: list[_Panel], by: str, x: str) -> list[list[str]]:
    """Return the paragraphs of the caption: what is drawn, and under which guarantees."""
    runs = pd.concat([panel.runs for panel in panels])
    ceilings = pd.concat([panel.ceiling for panel in panels])
    table = pd.concat([panel.table for panel in panels])
    drawn = [
        words.choice(clipped(runs), per=[by, x]),
        words.noise_free(finished(clipped(runs))),
        words.plain(ceilings["rounds"]),
        words.statistics(pd.concat([table["seeds"], ceilings["seeds"]])),
        words.diverged(runs),
    ]
    promises: dict[str, list[_Panel]] = {}
    for panel in panels:
        promises.setdefault(words.guarantee(private(panel.runs), deltas(panel.runs)), []).append(panel)
    paragraphs = []
    for promise, under in promises.items():
        names = words.several(panel.title if by == "dataset" else f"{by} {panel.title}" for panel in under)
        settings = dict.fromkeys(words.setting(panel.runs) for panel in under)
        paragraphs.append([promise if len(promises) == 1 else f"{names}: {promise}", *settings])
    return [drawn, *paragraphs]
