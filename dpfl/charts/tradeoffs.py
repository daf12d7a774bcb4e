"""The three charts of a trade-off study: what epsilon, the clip norm and the number of rounds cost."""

import math
from collections.abc import Mapping

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dpfl.charts import canvas, words
from dpfl.charts.intervals import summarise
from dpfl.charts.runs import best, clipped, deltas, finished, local_work, plain, prepare, private
from dpfl.charts.words import number
from dpfl.errors import InputError

_NO_NOISE = "no noise"


@canvas.style
def epsilon(frame: pd.DataFrame, prices: Mapping[float, float] | None = None) -> Figure:
    """Draw test accuracy against epsilon, one line per number of rounds.

    Each point has the clip norm that is best by mean validation accuracy. Runs that are clipped but
    free of noise stand apart at the right end; federated averaging without either, at its best number
    of rounds, is the dashed line.

    Args:
        frame: The tidy frame of a study, one row per run.
        prices: What each target epsilon becomes where the best clip norm is released
            (`dpfl.study.tuning_prices`); the caption then states it.

    Raises:
        InputError: If the frame lacks columns, mixes runs that one chart cannot tell apart, or has no
            finished run with an epsilon.
    """
    runs = prepare(frame)
    if finished(private(runs)).empty:
        raise InputError("No finished run has a target epsilon, so there is nothing to draw against it.")
    table, top = _best_clip(runs), _ceiling(runs)
    noisy, free = table[table["epsilon"].notna()], table[table["epsilon"].isna()]

    budget = f"ε at δ = {words.several(map(number, deltas(runs)))}"
    figure, axes = canvas.start(f"Privacy budget {budget}, {words.level(private(runs))}")
    canvas.ceiling(axes, top)
    looks = canvas.looks(sorted(table["rounds"].unique()))
    noisy = noisy.assign(label=noisy["rounds"].map(number)).sort_values(["rounds", "delta"])
    _lines(axes, noisy, "rounds", "epsilon", looks)
    values = sorted(noisy["epsilon"].unique())
    labels = [number(value) for value in values]
    if len(free):
        values.append(values[-1] * max(2, (values[-1] / values[0]) ** 0.2))
        labels.append(_NO_NOISE)
        _lines(axes, free.assign(label="", epsilon=values[-1]), "rounds", "epsilon", looks)
    canvas.ticks(axes.xaxis, values, labels)
    return canvas.finish(figure, axes, "Rounds", _caption(runs, table, top, words.clip_choice(clipped(runs), prices)))


@canvas.style
def clipping(frame: pd.DataFrame) -> Figure:
    """Draw test accuracy against the clip norm, one line per epsilon.

    Each line keeps the number of rounds of the (rounds, clip norm) pair that is best for its epsilon by
    mean validation accuracy, so that along a line nothing but the clip norm varies.

    Args:
        frame: The tidy frame of a study, one row per run.

    Raises:
        InputError: If the frame lacks columns, mixes runs that one chart cannot tell apart, or has no
            finished run with a clip norm.
    """
    runs = prepare(frame)
    if finished(clipped(runs)).empty:
        raise InputError("No finished run has a clip norm, so there is nothing to draw against it.")
    chosen = best(clipped(runs), per=["epsilon", "delta"], over=["rounds", "clip_norm"], keep=["rounds"])
    table = summarise(finished(chosen), ["epsilon", "delta", "rounds", "clip_norm"])
    top = _ceiling(runs)

    figure, axes = canvas.start("Clip norm (L2)")
    canvas.ceiling(axes, top)
    with_rounds = len(clipped(runs)["rounds"].unique()) > 1
    _line_per_epsilon(axes, table, "clip_norm", with_rounds)
    values = sorted(table["clip_norm"].unique())
    canvas.ticks(axes.xaxis, values, [number(value) for value in values])
    legend = f"{_legend(runs)}\n(rounds)" if with_rounds else _legend(runs)
    return canvas.finish(figure, axes, legend, _caption(runs, table, top, words.rounds_choice(clipped(runs))))


@canvas.style
def round_frequency(frame: pd.DataFrame, prices: Mapping[float, float] | None = None) -> Figure:
    """Draw test accuracy against the number of rounds, one line per epsilon.

    Each point has the clip norm that is best by mean validation accuracy. The axis on top counts the
    local steps per round, if the total local work is held fixed.

    Args:
        frame: The tidy frame of a study, one row per run.
        prices: What each target epsilon becomes where the best clip norm is released
            (`dpfl.study.tuning_prices`); the caption then states it.

    Raises:
        InputError: If the frame lacks columns, mixes runs that one chart cannot tell apart, or has no
            finished run.
    """
    runs = prepare(frame)
    table, top = _best_clip(runs), summarise(finished(plain(runs)), ["rounds"])
    values = sorted({*table["rounds"], *top["rounds"]})
    work = local_work(runs)

    figure, axes = canvas.start("Rounds")
    if len(top) > 1:
        canvas.line(axes, top, "rounds", canvas.PLAIN, canvas.NON_PRIVATE)
    else:
        canvas.ceiling(axes, top)
    _line_per_epsilon(axes, table, "rounds", with_rounds=False)
    canvas.ticks(axes.xaxis, values, [number(value) for value in values])
    if len(work) == 1:
        steps = axes.secondary_xaxis("top")
        steps.set_xlabel("Local steps per round")
        steps.spines["top"].set_visible(True)
        canvas.ticks(steps.xaxis, values, [number(work[0] / value) for value in values])
    caption = _caption(runs, table, top, words.clip_choice(clipped(runs), prices), words.work(work))
    return canvas.finish(figure, axes, _legend(runs), caption)


def _best_clip(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the accuracy at each (epsilon, delta, rounds), with the clip norm that is best there."""
    keys = ["epsilon", "delta", "rounds"]
    return summarise(finished(best(clipped(runs), per=keys, over=["clip_norm"])), keys)


def _ceiling(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the accuracy of plain federated averaging at its best number of rounds: one row, or none."""
    return summarise(finished(best(plain(runs), per=["mechanism"], over=["rounds"])), ["rounds"])


def _line_per_epsilon(axes: Axes, table: pd.DataFrame, x: str, with_rounds: bool) -> None:
    """Draw the lines from no noise down to the smallest epsilon."""
    label = table["epsilon"].map(number).where(table["epsilon"].notna(), _NO_NOISE)
    if with_rounds:
        label += table["rounds"].map(lambda rounds: f" ({number(rounds)})")
    table = table.assign(label=label, epsilon=table["epsilon"].fillna(math.inf))
    looks = canvas.looks(sorted(table["epsilon"].unique()))
    _lines(axes, table.sort_values("epsilon", ascending=False, kind="stable"), "epsilon", x, looks)


def _lines(axes: Axes, table: pd.DataFrame, by: str, x: str, looks: dict[float, canvas.Look]) -> None:
    """Draw a line per value of `by` and delta; where there are several deltas, dashes tell them apart."""
    known = sorted(table["delta"].dropna().unique())
    lines = [points for _, points in table.groupby([by, "delta"], sort=False, dropna=False)]
    step = min(5, 20 / max(len(lines), 1)) if len(table[x].unique()) == 1 else 0
    for place, points in enumerate(lines):
        label, delta, look = points["label"].iloc[0], points["delta"].iloc[0], looks[points[by].iloc[0]]
        if len(known) > 1 and delta in known:
            label += f", δ = {number(delta)}"
            look = look._replace(linestyle=canvas.LINES[known.index(delta) % len(canvas.LINES)])
        canvas.line(axes, points.sort_values(x), x, look, label, step * (place - (len(lines) - 1) / 2))


def _legend(runs: pd.DataFrame) -> str:
    """Return the title of a legend that lists values of epsilon."""
    if private(runs).empty:
        return ""
    at = f"\nat δ = {number(deltas(runs)[0])}" if len(deltas(runs)) == 1 else ""
    return f"{words.level(private(runs)).capitalize()} ε{at}"


def _caption(runs: pd.DataFrame, table: pd.DataFrame, top: pd.DataFrame, *choices: str) -> list[list[str]]:
    """Return the paragraphs of a caption, as sentences: what is drawn, and under which guarantee."""
    drawn = [
        *choices,
        words.noise_free(finished(clipped(runs))),
        words.plain(top["rounds"]),
        words.statistics(pd.concat([table["seeds"], top["seeds"]])),
        words.diverged(runs),
    ]
    return [drawn, [words.guarantee(private(runs), deltas(runs)), words.setting(runs)]]
