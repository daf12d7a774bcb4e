"""A finished study in a notebook: sliders for epsilon, clip norm and rounds, and what the runs there say.

    import dpfl

    dpfl.explore.tradeoffs(dpfl.study.Store("runs/tradeoff"))

Nothing is trained: figures and sentences come from the study's folder. Runs with adaptive clipping, whose norm no
slider chooses, are left out where there are fixed norms. `figure`, `in_words` and `settings` do without widgets.
"""

from __future__ import annotations

import html
import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd
from matplotlib.figure import Figure

from dpfl.charts import canvas, words
from dpfl.charts.runs import ADAPTIVE, clipped, finished, plain, prepare
from dpfl.errors import InputError
from dpfl.statistics import summarise

if TYPE_CHECKING:
    import ipywidgets

    from dpfl.study import Store

AXES = {"epsilon": "Privacy budget ε", "clip_norm": "Clip norm", "rounds": "Rounds"}
"""The columns that sliders choose, and what they are called."""
_NO_NOISE = "no noise"


def settings(frame: pd.DataFrame) -> dict[str, list[float]]:
    """Returns the values that each slider has, ascending; NaN, last, stands for no noise.

    Args:
        frame: The tidy frame of a study, one row per run.

    Raises:
        InputError: The frame lacks columns, or mixes runs that one chart cannot tell apart.
    """
    runs = clipped(prepare(_fixed(frame)))
    return {column: sorted(runs[column].unique(), key=lambda value: (pd.isna(value), value)) for column in AXES}


def matching(frame: pd.DataFrame, **chosen: float) -> pd.DataFrame:
    """Returns the clipped runs with these values; NaN selects what is missing.

    Args:
        frame: The tidy frame of a study, one row per run.
        **chosen: Values by column.

    Raises:
        InputError: As of `settings`.
    """
    runs = clipped(prepare(_fixed(frame)))
    for column, value in chosen.items():
        runs = runs[runs[column].isna() if pd.isna(value) else runs[column] == value]
    return runs


@canvas.style
def figure(frame: pd.DataFrame, history: pd.DataFrame, *, epsilon: float, clip_norm: float, rounds: float) -> Figure:
    """Draws where a setting lies on the trade-off at its clip norm, and how its runs got there.

    Args:
        frame: The tidy frame of a study, one row per run.
        history: One row per round of each run.
        epsilon: Of the setting; NaN for no noise.
        clip_norm: Of the setting.
        rounds: Of the setting.

    Raises:
        InputError: As of `settings`.
    """
    runs = prepare(_fixed(frame))
    same_clip = finished(matching(frame, clip_norm=clip_norm))
    table = summarise(same_clip, ["rounds", "epsilon"])
    budgets = sorted(table["epsilon"].dropna().unique())
    free = 2 * budgets[-1] if budgets else 1.0  # where no noise has its place
    table = table.assign(epsilon=table["epsilon"].fillna(free)).sort_values("epsilon")
    ceiling = summarise(finished(plain(runs)), ["rounds"])
    ceiling = ceiling[ceiling["rounds"] == rounds]

    drawn, ((left, right),) = canvas.panels(1, 2, (7.2, 3.1), sharey=True)
    canvas.percent(left.yaxis)
    left.set(xscale="log", xlabel=AXES["epsilon"], ylabel="Test accuracy")
    looks = canvas.looks(sorted(table["rounds"].unique()))
    for count, look in looks.items():
        canvas.line(left, table[table["rounds"] == count], "epsilon", look, f"{words.number(count)} rounds")
    canvas.ceiling(left, ceiling)
    here = table[(table["rounds"] == rounds) & (table["epsilon"] == (free if pd.isna(epsilon) else epsilon))]
    left.plot(here["epsilon"], here["mean"], "o", ms=13, mfc="none", mec="#D55E00", mew=2)
    ticks = sorted(table["epsilon"].unique())
    canvas.ticks(left.xaxis, ticks, [_NO_NOISE if tick == free else words.number(tick) for tick in ticks])

    chosen = matching(frame, epsilon=epsilon, clip_norm=clip_norm, rounds=rounds)
    way = history[history["run_id"].isin(chosen["run_id"]) & history["accuracy"].notna()]
    canvas.line(right, summarise(way, ["round"]), "round", canvas.Look("#D55E00", "o"), "")
    canvas.ceiling(right, ceiling)
    right.set(xlabel="Round", title=f"{_text(epsilon)}, clip norm {words.number(clip_norm)}")
    left.set_title("At this clip norm")
    canvas.within(left)
    canvas.legend_beside(right, left, "")
    return drawn


def in_words(store: Store, frame: pd.DataFrame, *, epsilon: float, clip_norm: float, rounds: float) -> str:
    """Returns what the runs of a setting reached and what they guarantee, in sentences.

    Args:
        store: Of the study, whose records hold the guarantees.
        frame: The tidy frame of the study, one row per run.
        epsilon: Of the setting; NaN for no noise.
        clip_norm: Of the setting.
        rounds: Of the setting.

    Raises:
        InputError: As of `settings`.
    """
    chosen = matching(frame, epsilon=epsilon, clip_norm=clip_norm, rounds=rounds)
    if chosen.empty:
        return "The study has no run at this setting."
    done = finished(chosen)
    if done.empty:
        return f"None of the {len(chosen)} runs at this setting finished: {words.several(set(chosen['status']))}."
    row = summarise(done.assign(all=0), ["all"]).iloc[0]
    interval = "" if pd.isna(row["low"]) else f" (95 % Student-t interval {row['low']:.1%} to {row['high']:.1%})"
    reached = f"Test accuracy {row['mean']:.1%}{interval} over {row['seeds']:.0f} seeds."
    lost = f" {len(chosen) - len(done)} of {len(chosen)} runs diverged." if len(done) < len(chosen) else ""
    return f"{reached}{lost} {store.guarantee(done['run_id'].iloc[0]).statement()}"


def tradeoffs(store: Store) -> ipywidgets.VBox:
    """Returns sliders for epsilon, clip norm and rounds, with the figure and the guarantee of what they choose.

    Args:
        store: Of a study that has run (`dpfl.study.Store(folder)`).

    Raises:
        InputError: ipywidgets is not installed, no run has ended, or the study mixes runs that one chart cannot tell
            apart.
    """
    try:
        import ipywidgets
    except ModuleNotFoundError:
        raise InputError(
            'sliders need ipywidgets, which is not installed: install it with "pip install ipywidgets", or in dpfl\'s '
            'own folder with "uv sync --extra notebook".'
        ) from None
    frame, history = store.frame(), store.history()
    if frame.empty:
        raise InputError(f"no run has ended in {store.folder} yet: run the study first.")
    sliders = {
        column: ipywidgets.SelectionSlider(
            options=[(_option(column, value), value) for value in values],
            value=values[len(values) // 2],
            description=AXES[column],
            style={"description_width": "10em"},
            layout={"width": "32em"},
            continuous_update=False,
        )
        for column, values in settings(frame).items()
    }
    image = ipywidgets.Image(format="png", layout={"max_width": "60em"})
    text = ipywidgets.HTML(layout={"max_width": "60em"})

    def show(_: Mapping[str, Any] | None = None) -> None:
        chosen = {column: slider.value for column, slider in sliders.items()}
        image.value = _png(figure(frame, history, **chosen))
        text.value = html.escape(in_words(store, frame, **chosen))

    for slider in sliders.values():
        slider.observe(show, names="value")
    show()
    return ipywidgets.VBox([*sliders.values(), image, text])


def _fixed(frame: pd.DataFrame) -> pd.DataFrame:
    """The runs without those of adaptive clipping, unless these are all there is."""
    if "mechanism" not in frame:
        return frame
    adaptive = frame["mechanism"] == ADAPTIVE
    return frame if (adaptive | (frame["mechanism"] == "none")).all() else frame[~adaptive]


def _text(epsilon: float) -> str:
    return _NO_NOISE if pd.isna(epsilon) else f"ε = {words.number(epsilon)}"


def _option(column: str, value: float) -> str:
    return _NO_NOISE if column == "epsilon" and pd.isna(value) else words.number(value)


def _png(drawn: Figure) -> bytes:
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
