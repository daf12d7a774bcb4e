"""What happens from round to round: accuracy, the epsilon spent, and the signal beside the noise."""

import math

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dpfl.charts import canvas, words
from dpfl.charts.runs import clipped, deltas, finished, plain, prepare, private
from dpfl.charts.tradeoffs import caption, legend, line_per_epsilon
from dpfl.charts.words import number
from dpfl.errors import InputError
from dpfl.statistics import best, summarise

_BETWEEN_MARKERS = 0.1  # as a fraction of the axes' diagonal
_KEYS = ["epsilon", "delta"]


@canvas.style
def convergence(frame: pd.DataFrame, history: pd.DataFrame) -> Figure:
    """Draw test accuracy over the rounds, one line per epsilon, and below it the epsilon spent so far.

    Each line has the clip norm and the number of rounds that are best for its epsilon by mean validation
    accuracy after the last round.

    Args:
        frame: The tidy frame of a study, one row per run.
        history: One row per round of each run: run_id, round, epsilon_spent and accuracy (NaN where the model was
            not evaluated).

    Raises:
        InputError: If a table lacks columns, the frame mixes runs that one chart cannot tell apart, or no finished
            run has evaluated rounds.
    """
    runs = _with_rounds(frame, history, ("epsilon_spent", "accuracy"))
    noisy, top = _rounds_of(_lines_of(runs), history), _rounds_of(_ceiling_of(runs), history)
    table = summarise(noisy.dropna(subset="accuracy"), [*_KEYS, "round"])
    ceiling = summarise(top.dropna(subset="accuracy"), ["round"])
    if table.empty and ceiling.empty:
        raise InputError("No finished run has evaluated rounds in the history, so there is no convergence to draw.")
    # Lines without noise stay, as empty ones, so that both panels have the same looks.
    spent = noisy.groupby([*_KEYS, "round"], dropna=False)["epsilon_spent"].max().reset_index(name="mean")
    with_spent = bool(spent["mean"].notna().any())

    ratios = {"height_ratios": [5, 2]} if with_spent else {}
    figure, grid = canvas.panels(1 + with_spent, 1, (5.5, 4.6 if with_spent else 3.8), sharex=True, **ratios)
    axes, last = grid[0, 0], grid[-1, 0]
    axes.set_ylabel("Test accuracy")
    last.set_xlabel("Round")
    canvas.percent(axes.yaxis)
    if len(ceiling):
        canvas.line(axes, ceiling, "round", canvas.PLAIN, canvas.NON_PRIVATE)
    line_per_epsilon(axes, table, "round", with_rounds=False)
    if with_spent:
        last.set(ylabel="ε spent", yscale="log")
        canvas.decades(last.yaxis, number)
        line_per_epsilon(last, spent.assign(low=spent["mean"], high=spent["mean"]), "round", with_rounds=False)
        figure.align_ylabels([axes, last])
    _thin_markers(axes)
    _thin_markers(last)
    sentences = (
        words.choice(clipped(runs), "line"),
        "Below: ε after each round, at the δ of the guarantee." if with_spent else "",
        "Accuracies before the last round are measured by the simulation, and are not covered.",
    )
    top_rounds = ceiling.assign(rounds=top["rounds"].iloc[0]) if len(top) else ceiling.assign(rounds=math.nan)
    return canvas.finish(figure, axes, legend(runs), caption(runs, table, top_rounds, *sentences))


@canvas.style
def signal_to_noise(frame: pd.DataFrame, history: pd.DataFrame) -> Figure:
    """Draw the signal-to-noise ratio over the rounds, one line per epsilon: medians over the seeds.

    Each line has the clip norm and the number of rounds that are best for its epsilon by mean validation
    accuracy.

    Args:
        frame: The tidy frame of a study, one row per run.
        history: One row per round of each run: run_id, round and signal_to_noise.

    Raises:
        InputError: If a table lacks columns, the frame mixes runs that one chart cannot tell apart, or no finished
            run has noise.
    """
    runs = _with_rounds(frame, history, ("signal_to_noise",))
    rounds = _rounds_of(_lines_of(runs), history)
    ratio = rounds["signal_to_noise"].astype(float)
    rounds = rounds[(ratio > 0) & (ratio < math.inf)]
    if rounds.empty:
        raise InputError("No finished run has noise in its history, so there is no signal-to-noise ratio to draw.")
    by = rounds.groupby([*_KEYS, "round"], dropna=False)["signal_to_noise"]
    table = by.agg(mean="median", low="min", high="max", seeds="count").reset_index()

    figure, axes = canvas.start("Round")
    axes.set(xscale="linear", yscale="log", ylabel="Signal-to-noise ratio")
    canvas.decades(axes.yaxis, number)
    axes.axhline(1, color=canvas.PLAIN.color, linewidth=0.8, linestyle=canvas.PLAIN.linestyle, label="signal = noise")
    line_per_epsilon(axes, table, "round", with_rounds=False)
    _thin_markers(axes)
    seeds = words.span(table["seeds"])
    sentences = (
        words.choice(clipped(runs), "line"),
        "Signal: norm of the mean clipped update; noise: norm of what the server added to it.",
        "Dashed: at 1 the noise is as long as the signal.",
        "One seed per line." if seeds == "1" else f"Lines: medians over {seeds} seeds; bands: from lowest to highest.",
        "Ratios are measured by the simulation, and are not covered.",
        words.diverged(runs),
    )
    promise = [words.guarantee(private(runs), deltas(runs)), words.setting(runs)]
    return canvas.finish(figure, axes, legend(runs), [sentences, promise])


def _with_rounds(frame: pd.DataFrame, history: pd.DataFrame, columns: tuple[str, ...]) -> pd.DataFrame:
    """Return the prepared runs, after a look at the columns that tie them to their rounds."""
    if "run_id" not in frame:
        raise InputError("The frame lacks run_id: pass the frame of runs that a study returns.")
    missing = [column for column in ("run_id", "round", *columns) if column not in history]
    if missing:
        raise InputError(f"The history lacks {words.several(missing)}: pass the history that a study returns.")
    return prepare(frame)


def _lines_of(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the finished runs at the setting that is best for their epsilon."""
    return finished(best(clipped(runs), per=_KEYS, over=["rounds", "clip_norm"]))


def _ceiling_of(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the finished runs of plain federated averaging at its best number of rounds."""
    return finished(best(plain(runs), per=["mechanism"], over=["rounds"]))


def _rounds_of(runs: pd.DataFrame, history: pd.DataFrame) -> pd.DataFrame:
    """Return the rounds of some runs with their run's epsilon, delta and number of rounds."""
    return history.merge(runs[["run_id", *_KEYS, "rounds"]], on="run_id")


def _thin_markers(axes: Axes) -> None:
    """Leave a marker here and there on each line, which may have hundreds of rounds."""
    for line in axes.lines:
        if np.isfinite(np.asarray(line.get_ydata(), float)).any():
            line.set_markevery(_BETWEEN_MARKERS)
