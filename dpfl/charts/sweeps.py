"""Accuracy against one more setting: the cohort, the local work, or how unlike each other the clients are."""

import math
from collections.abc import Callable

import pandas as pd
from matplotlib.figure import Figure

from dpfl.charts import canvas, words
from dpfl.charts.runs import clipped, finished, local_work, plain, prepare
from dpfl.charts.tradeoffs import caption, legend, line_per_epsilon
from dpfl.charts.words import number
from dpfl.errors import InputError
from dpfl.statistics import best, summarise

_IID = "iid"


@canvas.style
def cohort(frame: pd.DataFrame) -> Figure:
    """Draw test accuracy against the expected number of clients in a round, one line per epsilon.

    Each point has the clip norm and the number of rounds that are best by mean validation accuracy. The
    axis on top has the fraction of clients in a round.

    Args:
        frame: The tidy frame of a study, one row per run.

    Raises:
        InputError: If the frame lacks columns, mixes runs that one chart cannot tell apart, or has no
            finished run.
    """
    runs = prepare(frame, varying=("cohort",))
    clients = float(runs["clients"].iloc[0])
    top = ("Fraction of clients in a round", lambda value: f"{100 * value / clients:.3g}%")
    return _sweep(runs, "cohort", "Expected clients in a round (cohort)", number, top=top)


@canvas.style
def local_steps(frame: pd.DataFrame) -> Figure:
    """Draw test accuracy against the local steps (or epochs) of a client in a round, one line per epsilon.

    Each point has the clip norm and the number of rounds that are best by mean validation accuracy.

    Args:
        frame: The tidy frame of a study, one row per run, with the column local_steps, or local_epochs where
            clients count epochs.

    Raises:
        InputError: If the frame lacks columns, mixes runs that one chart cannot tell apart, has no finished
            run, or has runs that count steps beside runs that count epochs.
    """
    column = work_column(frame)
    if column is None:
        raise InputError(
            "The frame has neither local_steps nor local_epochs for all of its runs: keep those runs that count the "
            "local work in one of them."
        )
    unit = column.removeprefix("local_")
    return _sweep(prepare(frame, varying=(column,)), column, f"Local {unit} of a client in a round", number)


@canvas.style
def heterogeneity(frame: pd.DataFrame) -> Figure:
    """Draw test accuracy against how much the clients' labels differ, one line per epsilon.

    Each point has the clip norm and the number of rounds that are best by mean validation accuracy; plain
    federated averaging is a line of its own.

    Args:
        frame: The tidy frame of a study, one row per run, with one column more: dirichlet_alpha, the concentration
            of the Dirichlet partition behind each run (small where clients are unlike each other, `inf` where
            examples were dealt to them at random).

    Raises:
        InputError: If the frame lacks columns, mixes runs that one chart cannot tell apart, has no finished
            run, or has a concentration that is not above 0.
    """
    column = "dirichlet_alpha"
    if column not in frame:
        raise InputError(
            "The frame lacks dirichlet_alpha: add this column, the concentration of each run's Dirichlet partition, or "
            "inf where examples were dealt at random."
        )
    if not (frame[column].astype(float) > 0).all():
        raise InputError(
            "Some runs have a dirichlet_alpha that is not above 0: give each run the concentration of its partition, "
            "or inf where examples were dealt at random."
        )
    runs = prepare(frame, varying=(column,)).astype({column: float})
    finite = sorted(set(runs[column]) - {math.inf})
    end = finite[-1] * max(2, (finite[-1] / finite[0]) ** 0.2) if finite else 1.0
    runs[column] = runs[column].replace(math.inf, end)
    remark = "α is the concentration of the Dirichlet distribution that each client's labels were drawn from"
    dealt = end not in finite and (frame[column].astype(float) == math.inf).any()
    return _sweep(
        runs,
        column,
        "Dirichlet α (left: clients unlike each other; right: alike)",
        lambda value: _IID if dealt and value == end else number(value),
        remark=f"{remark}; iid: examples dealt at random." if dealt else f"{remark}.",
    )


def work_column(frame: pd.DataFrame) -> str | None:
    """Return the column that counts the local work of all runs: local_steps, local_epochs, or None if neither does."""
    runs = finished(frame) if "status" in frame else frame
    known = (column for column in ("local_steps", "local_epochs") if column in frame and runs[column].notna().all())
    return next(known, None)


def _sweep(
    runs: pd.DataFrame,
    column: str,
    xlabel: str,
    text: Callable[[float], str],
    *,
    top: tuple[str, Callable[[float], str]] | None = None,
    remark: str = "",
) -> Figure:
    """Draw test accuracy against a column of numbers, one line per epsilon.

    Args:
        runs: What `prepare` returned.
        column: What goes to the right, logarithmically.
        xlabel: What the axis is called.
        text: A value as its tick says it.
        top: What a second axis above the chart is called, and a value as its tick says it; None for no such axis.
        remark: One more sentence for the caption.
    """
    keys = ["epsilon", "delta", column]
    chosen = best(clipped(runs), per=keys, over=["rounds", "clip_norm"])
    table = summarise(finished(chosen), keys)
    ceiling = summarise(finished(best(plain(runs), per=[column], over=["rounds"])), [column, "rounds"])
    values = sorted({*table[column], *ceiling[column]})

    figure, axes = canvas.start(xlabel)
    lone = len(ceiling) == 1 and len(values) > 1
    if len(ceiling) > 1:
        canvas.line(axes, ceiling, column, canvas.PLAIN, canvas.NON_PRIVATE)
    else:
        canvas.ceiling(axes, ceiling)
    line_per_epsilon(axes, table, column, with_rounds=False)
    canvas.ticks(axes.xaxis, values, [text(value) for value in values])
    if top is not None:
        above = axes.secondary_xaxis("top")
        above.set_xlabel(top[0])
        above.spines["top"].set_visible(True)
        canvas.ticks(above.xaxis, values, [top[1](value) for value in values])
    sentences = (
        words.choice(clipped(runs), per=[column]),
        remark,
        words.work(local_work(runs)) if column == "local_steps" else "",
        f"The dashed line was measured at {text(ceiling[column].iloc[0])} on the x axis." if lone else "",
    )
    return canvas.finish(figure, axes, legend(runs), caption(runs, table, ceiling, *sentences))
