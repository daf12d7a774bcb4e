"""The charts of a trade-off study: what epsilon, the clip norm, the number of rounds and the mechanism cost."""

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dpfl.charts import canvas, words
from dpfl.charts.runs import (
    ADAPTIVE,
    CLIP,
    at_fixed_noise,
    best,
    clipped,
    deltas,
    finished,
    local_work,
    plain,
    prepare,
    prepare_clips,
    private,
)
from dpfl.charts.words import number
from dpfl.errors import InputError
from dpfl.statistics import summarise

_NO_NOISE = "no noise"
_ADAPTIVE = "adaptive"
_STAR: dict[str, Any] = {
    "marker": "*",
    "markersize": 11,
    "markeredgecolor": "black",
    "markeredgewidth": 0.6,
    "linestyle": "",
    "zorder": 4,
}


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
    runs = prepare_clips(frame)
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
    return canvas.finish(figure, axes, "Rounds", caption(runs, table, top, words.clip_choice(clipped(runs), prices)))


@canvas.style
def clipping(frame: pd.DataFrame) -> Figure:
    """Draw test accuracy against the clip norm, one line per epsilon, and adaptive clipping as stars.

    Each line keeps the number of rounds of the (rounds, clip norm) pair that is best for its epsilon by
    mean validation accuracy, so that along a line nothing but the clip norm varies. A star is adaptive
    clipping with the same epsilon and rounds, at the clip norm that it came to in the last round (mean over
    seeds), with the quantile that is best by mean validation accuracy.

    Args:
        frame: The tidy frame of a study, one row per run.

    Raises:
        InputError: If the frame lacks columns, mixes runs that one chart cannot tell apart, or has no
            finished run with a clip norm.
    """
    runs = prepare_clips(frame)
    fixed, adaptive = _by_clip(runs)
    if finished(clipped(fixed)).empty:
        raise InputError("No finished run has a fixed clip norm, so there is nothing to draw against it.")
    table = summarise(finished(_best_rounds(fixed)), ["epsilon", "delta", "rounds", "clip_norm"])
    top = _ceiling(runs)

    figure, axes = canvas.start("Clip norm (L2)")
    canvas.ceiling(axes, top)
    with_rounds = len(clipped(runs)["rounds"].unique()) > 1
    line_per_epsilon(axes, table, "clip_norm", with_rounds)
    stars = _adaptive_points(adaptive, table)
    looks = canvas.looks(sorted(table["epsilon"].fillna(math.inf).unique()))
    for star in stars.to_dict("records"):
        color = looks[math.inf if pd.isna(star["epsilon"]) else star["epsilon"]].color
        axes.vlines(star["clip_norm"], star["low"], star["high"], color=color, linewidth=0.8)
        axes.plot(star["clip_norm"], star["mean"], color=color, **_STAR)
    if len(stars):
        axes.plot([], [], color="white", label=_ADAPTIVE, **_STAR)
    values = sorted(table["clip_norm"].unique())
    canvas.ticks(axes.xaxis, values, [number(value) for value in values])
    heading = f"{legend(runs)}\n(rounds)" if with_rounds else legend(runs)
    sentence = words.adaptive(stars["clip_quantile"])
    counted = pd.concat([table, stars])
    return canvas.finish(
        figure, axes, heading, caption(runs, counted, top, words.rounds_choice(clipped(runs)), sentence)
    )


@canvas.style
def clipping_map(frame: pd.DataFrame) -> Figure:
    """Draw test accuracy as a map of epsilon by clip norm, one cell for each pair.

    A row keeps the number of rounds of the (rounds, clip norm) pair that is best for its epsilon by mean validation
    accuracy; the pair's cell has a frame.

    Args:
        frame: The tidy frame of a study, one row per run; runs with adaptive clipping are left out.

    Raises:
        InputError: If the frame lacks columns, mixes runs that one chart cannot tell apart, or has no
            finished run with a fixed clip norm.
    """
    runs = prepare_clips(frame)
    fixed, adaptive = _by_clip(runs)
    if finished(clipped(fixed)).empty:
        raise InputError("No finished run has a fixed clip norm, so there is nothing to draw against it.")
    if len(deltas(runs)) > 1:
        raise InputError(f"The runs differ in delta ({words.several(map(number, deltas(runs)))}): map one at a time.")
    kept = _best_rounds(fixed)
    table = summarise(finished(kept), ["epsilon", "rounds", "clip_norm"])
    chosen = best(kept, per=["epsilon"], over=["clip_norm"])[["epsilon", "clip_norm"]].drop_duplicates()
    # No noise above the largest epsilon.
    rows = sorted(kept["epsilon"].fillna(math.inf).unique())
    columns = sorted(kept["clip_norm"].unique())
    accuracy = (
        table.assign(epsilon=table["epsilon"].fillna(math.inf))
        .pivot_table(index="epsilon", columns="clip_norm", values="mean")
        .reindex(index=rows, columns=columns)
        .to_numpy()
    )

    figure, axes = canvas.map_axes(
        "Clip norm (L2)", f"{words.level(private(runs)).capitalize()} ε" if len(private(runs)) else ""
    )
    names = [_NO_NOISE if math.isinf(row) else number(row) for row in rows]
    winners = {
        (rows.index(row), columns.index(column))
        for row, column in zip(chosen["epsilon"].fillna(math.inf), chosen["clip_norm"], strict=True)
    }
    canvas.cells(figure, axes, accuracy, names, [number(column) for column in columns], winners)
    rounds = kept.groupby("epsilon", dropna=False)["rounds"].first().reset_index()
    counts = sorted(rounds["rounds"].unique())
    sentences = (
        "Cells: mean test accuracy. Frame: the clip norm with the best mean validation accuracy at this ε, a choice "
        "that is not charged to ε.",
        f"All runs have {number(counts[0])} rounds."
        if len(counts) == 1
        else "Rounds, chosen by the same measure: "
        + ", ".join(
            f"{number(count)} at {_NO_NOISE if pd.isna(epsilon) else f'ε = {number(epsilon)}'}"
            for epsilon, count in zip(rounds["epsilon"], rounds["rounds"], strict=True)
        )
        + ".",
        "Runs with adaptive clipping are not in the map." if len(adaptive) else "",
        "Crossed out: no run finished." if pd.isna(accuracy).any() else "",
        words.seeds(table["seeds"]),
        words.diverged(runs),
        words.left_out(runs),
    )
    guarantee = [words.guarantee(private(runs), deltas(runs)), words.setting(runs)]
    return canvas.finish(figure, None, "", [list(sentences), guarantee])


@canvas.style
def round_frequency(frame: pd.DataFrame, prices: Mapping[float, float] | None = None) -> Figure:
    """Draw test accuracy against the number of rounds, at fixed epsilon and at fixed noise.

    At fixed epsilon there is one line per epsilon, and the noise of a round grows with their number. Runs whose noise
    multiplier was given have a panel of their own, with one line per noise multiplier and, below, the epsilon that so
    many rounds spend. Each point has the clip norm that is best by mean validation accuracy. The axis on top counts the
    local steps per round, if the total local work is held fixed.

    Args:
        frame: The tidy frame of a study, one row per run.
        prices: What each target epsilon becomes where the best clip norm is released
            (`dpfl.study.tuning_prices`); the caption then states it.

    Raises:
        InputError: If the frame lacks columns, mixes runs that one chart cannot tell apart, or has no
            finished run.
    """
    runs = prepare_clips(frame, fixed_noise=True)
    fixed = at_fixed_noise(runs)
    calibrated = runs.drop(index=fixed.index)
    top = summarise(finished(plain(runs)), ["rounds"])
    table, spent = _best_clip(calibrated), _best_clip_at_fixed_noise(fixed)
    work = local_work(runs)
    figure, panels = canvas.frequency_axes(len(table) > 0 or fixed.empty, len(spent) > 0)
    if "target" in panels:
        axes = panels["target"]
        _over_rounds(axes, top)
        line_per_epsilon(axes, table, "rounds", with_rounds=False)
        _round_axis(axes, sorted({*table["rounds"], *top["rounds"]}), work)
        title = legend(calibrated)
        if "noise" in panels:
            axes.set_title("At fixed ε")
    if "noise" in panels:
        axes, below = panels["noise"], panels["spent"]
        _over_rounds(axes, top)
        looks = canvas.looks(sorted(spent["noise_multiplier"].unique(), reverse=True))
        for noise, look in looks.items():
            points = spent[spent["noise_multiplier"] == noise]
            canvas.line(axes, points, "rounds", look, f"noise {number(noise)}")
            below.plot(points["rounds"], points["epsilon_spent"], **look._asdict())
        values = sorted({*spent["rounds"], *top["rounds"]})
        _round_axis(axes, values, work)
        axes.set_xlabel("")
        axes.tick_params(labelbottom=False)
        canvas.ticks(below.xaxis, values, [number(value) for value in values])
        if "target" in panels:
            axes.set_title("At fixed noise")
        else:
            title = "Noise multiplier"
    noisy = runs[runs["epsilon"].notna() | (runs["noise_multiplier"] > 0)]
    choice = words.clip_choice(clipped(runs), prices)
    counted = pd.concat([table["seeds"], spent["seeds"], top["seeds"]])
    sentences = [
        choice,
        words.work(work),
        "Below: the ε that so many rounds spend at that noise." if "spent" in panels else "",
        words.noise_free(finished(clipped(calibrated))),
        words.plain(top["rounds"]),
        words.statistics(counted),
        words.diverged(runs),
        words.left_out(runs),
    ]
    deltas_of_all = sorted(noisy["delta"].dropna().unique())
    guarantee = [words.guarantee(noisy, deltas_of_all), words.setting(runs)]
    main = panels["target"] if "target" in panels else panels["noise"]
    if "target" in panels and "noise" in panels:
        canvas.within(main)
        canvas.legend_beside(panels["noise"], main, title)
        canvas.legend_beside(panels["spent"], panels["noise"], "Noise multiplier")
        return canvas.finish(figure, None, "", [sentences, guarantee])
    return canvas.finish(figure, main, title, [sentences, guarantee])


@canvas.style
def mechanisms(frame: pd.DataFrame) -> Figure:
    """Draw test accuracy against epsilon, one line per mechanism.

    Each point has the clip norm and the number of rounds that are best by mean validation accuracy. Mechanisms may come
    with samplers, relations and accountants of their own: the caption states each one's guarantee.

    Args:
        frame: The tidy frame of a study, one row per run.

    Raises:
        InputError: If the frame lacks columns, mixes runs that one chart cannot tell apart (one mechanism under two
            samplers, say), or has no finished run with an epsilon.
    """
    own = ("mechanism", "relation", "sampler", "accountant")
    runs = prepare(frame, varying=(*own, "clip_quantile", "cohort"))
    noisy = private(runs)
    if finished(noisy).empty:
        raise InputError("No finished run has a target epsilon, so there is nothing to draw against it.")
    for mechanism, part in noisy.groupby("mechanism"):
        for column in own[1:]:
            if len(values := sorted(part[column].unique())) > 1:
                raise InputError(
                    f"The runs of {mechanism} differ in {column} ({words.several(values)}): chart one value at a time."
                )
    chosen = best(noisy, per=["mechanism", "epsilon", "delta"], over=["rounds", *CLIP[1:]])
    table = summarise(finished(chosen), ["mechanism", "epsilon", "delta"])
    top = _ceiling(runs)

    known = deltas(runs)
    figure, axes = canvas.start(f"Privacy budget ε at δ = {words.several(map(number, known))}, {words.level(noisy)}")
    canvas.ceiling(axes, top)
    looks = canvas.kinds(list(dict.fromkeys(noisy["mechanism"])))
    for mechanism, look in looks.items():
        points = table[table["mechanism"] == mechanism].sort_values("epsilon")
        if len(points):
            canvas.line(axes, points, "epsilon", look, words.short_name(mechanism))
    values = sorted(table["epsilon"].unique())
    canvas.ticks(axes.xaxis, values, [number(value) for value in values])
    sentences = [
        words.choice(noisy, per=["mechanism"]),
        words.plain(top["rounds"]),
        words.statistics(pd.concat([table["seeds"], top["seeds"]])),
        words.diverged(runs),
        words.left_out(runs),
    ]
    return canvas.finish(figure, axes, "Mechanism", [sentences, [words.guarantees(noisy, known), words.setting(runs)]])


def _by_clip(runs: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the runs with fixed clip norms (and the plain ones), and those with adaptive clipping."""
    adaptive = runs["mechanism"] == ADAPTIVE
    return runs[~adaptive], runs[adaptive]


def _best_rounds(fixed: pd.DataFrame) -> pd.DataFrame:
    """Return the clipped runs with the number of rounds that is best for their epsilon at any clip norm."""
    return best(clipped(fixed), per=["epsilon", "delta"], over=["rounds", "clip_norm"], keep=["rounds"])


def _adaptive_points(adaptive: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """Return accuracy and last clip norm of adaptive clipping, with the best quantile, for each line of the table."""
    keys = ["epsilon", "delta", "rounds"]
    of_lines = adaptive.merge(table[keys].drop_duplicates(), on=keys)
    if finished(of_lines).empty:
        return table[:0].assign(clip_quantile=[])
    chosen = finished(best(of_lines, per=keys, over=["clip_quantile"]))
    points = summarise(chosen, [*keys, "clip_quantile"])
    last = chosen["final_clip_norm"].fillna(chosen["clip_norm"])
    places = chosen.assign(clip_norm=last).groupby(keys, dropna=False)["clip_norm"].mean().reset_index()
    return points.merge(places, on=keys)


def _best_clip_at_fixed_noise(fixed: pd.DataFrame) -> pd.DataFrame:
    """Return accuracy and epsilon spent at each (noise multiplier, rounds), with the clip norm that is best there."""
    keys = ["noise_multiplier", "rounds"]
    chosen = finished(best(fixed, per=keys, over=list(CLIP)))
    return summarise(chosen, keys).merge(chosen.groupby(keys)["epsilon_spent"].max().reset_index(), on=keys)


def _over_rounds(axes: Axes, top: pd.DataFrame) -> None:
    """Draw plain federated averaging: a line over the rounds, or across the axes where there is one number of them."""
    if len(top) > 1:
        canvas.line(axes, top, "rounds", canvas.PLAIN, canvas.NON_PRIVATE)
    else:
        canvas.ceiling(axes, top)


def _round_axis(axes: Axes, values: list[float], work: list[float]) -> None:
    """Put ticks at the numbers of rounds and, if local work is held fixed, the local steps per round on top."""
    canvas.ticks(axes.xaxis, values, [number(value) for value in values])
    if len(work) == 1:
        steps = axes.secondary_xaxis("top")
        steps.set_xlabel("Local steps per round")
        steps.spines["top"].set_visible(True)
        canvas.ticks(steps.xaxis, values, [number(work[0] / value) for value in values])


def _best_clip(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the accuracy at each (epsilon, delta, rounds), with the clip norm that is best there."""
    keys = ["epsilon", "delta", "rounds"]
    return summarise(finished(best(clipped(runs), per=keys, over=list(CLIP))), keys)


def _ceiling(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the accuracy of plain federated averaging at its best number of rounds: one row, or none."""
    return summarise(finished(best(plain(runs), per=["mechanism"], over=["rounds"])), ["rounds"])


def line_per_epsilon(axes: Axes, table: pd.DataFrame, x: str, with_rounds: bool) -> None:
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


def legend(runs: pd.DataFrame) -> str:
    """Return the title of a legend that lists values of epsilon."""
    if private(runs).empty:
        return ""
    at = f"\nat δ = {number(deltas(runs)[0])}" if len(deltas(runs)) == 1 else ""
    return f"{words.level(private(runs)).capitalize()} ε{at}"


def caption(runs: pd.DataFrame, table: pd.DataFrame, top: pd.DataFrame, *choices: str) -> list[list[str]]:
    """Return the paragraphs of a caption, as sentences: what is drawn, and under which guarantee."""
    drawn = [
        *choices,
        words.noise_free(finished(clipped(runs))),
        words.plain(top["rounds"]),
        words.statistics(pd.concat([table["seeds"], top["seeds"]])),
        words.diverged(runs),
        words.left_out(runs),
    ]
    return [drawn, [words.guarantee(private(runs), deltas(runs)), words.setting(runs)]]
