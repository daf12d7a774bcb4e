"""All charts that a frame of runs supports, drawn into a folder."""

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from matplotlib.figure import Figure

from dpfl.charts import sweeps, tradeoffs, words
from dpfl.charts.clients import client_epsilons as epsilons_of_clients
from dpfl.charts.compression import compression
from dpfl.charts.convergence import convergence, signal_to_noise
from dpfl.charts.multiples import small_multiples
from dpfl.charts.pareto import pareto
from dpfl.charts.runs import ADAPTIVE, clipped, finished, private
from dpfl.charts.saving import save
from dpfl.charts.words import number
from dpfl.errors import InputError

_TASK = ("dataset", "model", "clients")
_NEEDED = ("status", "dataset", "mechanism", "epsilon", "clip_norm", "rounds")
_GUARANTEE = ("unit", "relation", "sampler", "accountant")


class _Chart(NamedTuple):
    """A chart of one set of runs.

    Attributes:
        draw: Makes the figure from the runs.
        axes: The columns that need more than one value.
        varying: The columns that may differ between the runs of the chart, of those that `_focus` knows.
    """

    draw: Callable[[pd.DataFrame], Figure]
    axes: tuple[str, ...] = ()
    varying: tuple[str, ...] = ()


def draw_all(
    frame: pd.DataFrame,
    history: pd.DataFrame | None,
    client_epsilons: pd.DataFrame | None,
    folder: str | os.PathLike[str],
    formats: Sequence[str] = ("png", "pdf"),
    prices: Mapping[float, float] | None = None,
) -> dict[str, str]:
    """Draw every chart that the runs support into a folder.

    Runs that no chart can show together (of several datasets, models, numbers of clients or guarantees) get one
    set of charts each, in a subfolder named by what differs. Where a study varies the cohort, the local work, the
    mechanism, the compression or the clients' heterogeneity, charts over something else show the value that most runs
    have; their captions name it.

    Args:
        frame: The tidy frame of a study, one row per run.
        history: One row per round of each run; None where it is not known.
        client_epsilons: What the examples of each client were charged: run_id, client and epsilon; None where it is
            not known.
        folder: Where the files go, named by their chart; those that exist are replaced.
        formats: Any of png, svg and pdf, at least one.
        prices: What each target epsilon becomes where the best clip norm is released, as of `dpfl.charts.epsilon`.

    Returns:
        For each chart (in a subfolder: "subfolder/chart") the path of its file in the first format, or a sentence,
        with its full stop, that says why the chart was not drawn.

    Raises:
        InputError: If there is no such format, or the frame lacks columns.
    """
    if not formats or set(formats) - {"png", "svg", "pdf"}:
        raise InputError(
            f"Figures can be written as png, svg and pdf, but the formats were {list(formats)}: choose some."
        )
    missing = [column for column in _NEEDED if column not in frame]
    if missing:
        raise InputError(f"The frame lacks {words.several(missing)}: pass the frame of runs that a study returns.")
    frame, folder = frame.reset_index(drop=True), Path(folder)
    drawn: dict[str, str] = {}
    for name, part in _parts(frame):
        for chart, made in _charts(part, history, client_epsilons, prices).items():
            path = folder / name / chart
            drawn[f"{name}/{chart}" if name else chart] = _drawn(made, part, path, formats)
    several = _Chart(small_multiples, axes=("dataset",))
    drawn["small_multiples"] = _drawn(several, frame, folder / "small_multiples", formats)
    return drawn


def _charts(
    frame: pd.DataFrame,
    history: pd.DataFrame | None,
    client_epsilons: pd.DataFrame | None,
    prices: Mapping[float, float] | None,
) -> dict[str, _Chart]:
    """Return the charts of one set of runs."""
    work = sweeps.work_column(frame) or "local_steps"
    # Fixed clip norms and adaptive clipping have a place in one chart.
    clips = ("mechanism",) if set(clipped(frame)["mechanism"]) <= {ADAPTIVE, "gaussian"} else ()
    charts = {
        "epsilon": _Chart(lambda runs: tradeoffs.epsilon(runs, prices), ("epsilon",), clips),
        "clipping": _Chart(tradeoffs.clipping, ("clip_norm",), clips),
        "clipping_map": _Chart(tradeoffs.clipping_map, ("clip_norm", "epsilon"), clips),
        "round_frequency": _Chart(lambda runs: tradeoffs.round_frequency(runs, prices), ("rounds",), clips),
        "mechanisms": _Chart(tradeoffs.mechanisms, ("mechanism",), ("mechanism",)),
        "cohort": _Chart(sweeps.cohort, ("cohort",), ("cohort",)),
        "local_steps": _Chart(sweeps.local_steps, (work,), (work,)),
        "convergence": _Chart(lambda runs: convergence(runs, _known(history, "history"))),
        "signal_to_noise": _Chart(lambda runs: signal_to_noise(runs, _known(history, "history"))),
        "pareto": _Chart(pareto, ("bytes_up",), ("cohort", work, "compression")),
        "compression": _Chart(compression, ("compression",), ("compression",)),
        "compression_down": _Chart(lambda runs: compression(runs, "down"), ("compression",), ("compression",)),
        "client_epsilons": _Chart(
            lambda runs: epsilons_of_clients(_known(client_epsilons, "table of clients' epsilons"), runs),
            varying=("mechanism", "cohort", work, "dirichlet_alpha", "compression"),
        ),
    }
    if "dirichlet_alpha" in frame:
        charts["heterogeneity"] = _Chart(sweeps.heterogeneity, ("dirichlet_alpha",), ("dirichlet_alpha",))
    return charts


def _drawn(chart: _Chart, frame: pd.DataFrame, path: Path, formats: Sequence[str]) -> str:
    """Draw one chart; return the path of its first file, or why there is none."""
    try:
        for column in chart.axes:
            _check_axis(frame, column)
        figure = chart.draw(frame if chart.axes == ("dataset",) else _focus(frame, chart.varying))
        files = [path.with_name(f"{path.name}.{suffix}") for suffix in formats]
        for file in files:
            save(figure, file)
    except InputError as error:
        return str(error)
    return str(files[0])


def _check_axis(frame: pd.DataFrame, column: str) -> None:
    """Raise InputError unless the column has several values among the finished runs."""
    if column not in frame:
        raise InputError(f"The frame lacks {column}, so there is nothing to draw against it.")
    runs = finished(frame)
    if column in ("epsilon", "clip_norm", "mechanism"):  # which plain runs have none of
        runs = runs[runs.index.isin(clipped(runs).index) | runs.index.isin(private(runs).index)]
    if column == "clip_norm" and "example_clip_norm" in runs:
        runs = runs.assign(clip_norm=runs["clip_norm"].astype(float).fillna(runs["example_clip_norm"].astype(float)))
    values = runs[column].unique()
    known = runs[column].dropna().unique()
    if len(known) == 0:
        raise InputError(f"No finished run has a value of {column}, so there is nothing to draw against it.")
    # Without noise, there is no epsilon, which is a value on the axis of epsilon.
    if len(values if column == "epsilon" else known) == 1:
        only = str(known[0]) if known[0] in (math.inf, str(known[0])) else number(known[0])
        raise InputError(f"All finished runs have the same {column} ({only}), so there is nothing to draw against it.")


def _known(table: pd.DataFrame | None, what: str) -> pd.DataFrame:
    """Return the table; raise InputError where it is not known."""
    if table is None or table.empty:
        raise InputError(f"There is no {what}, which this chart is drawn from.")
    return table


def _focus(frame: pd.DataFrame, varying: Sequence[str]) -> pd.DataFrame:
    """Return the runs of one chart: of whatever it cannot vary those with the commonest value, the first in a tie."""
    work = sweeps.work_column(frame)
    for column in ("mechanism", "cohort", "dirichlet_alpha", "compression", work):
        if column is None or column not in frame or column in varying:
            continue
        of = clipped(frame) if column == "mechanism" else frame
        if column == work and not frame.groupby("rounds")[column].nunique().gt(1).any():
            continue  # goes with the number of rounds
        values = of[column].dropna()
        if len(values.unique()) > 1:
            counts = values.value_counts().reindex(values.unique())
            frame = frame[(frame[column] == counts.idxmax()) | ~frame.index.isin(of.index)]
    return frame


def _parts(frame: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield the sets of runs that charts can show together, each with the name of its subfolder; one has none."""
    for task, part in _split(frame, _TASK):
        under = private(part)
        for promise, runs in _split(under, _GUARANTEE):
            together = pd.concat([runs, part.drop(under.index)]).sort_index()
            yield "-".join(map(_file_name, (*task, *promise))), together


def _split(frame: pd.DataFrame, columns: Sequence[str]) -> list[tuple[tuple[object, ...], pd.DataFrame]]:
    """Return the parts of the frame that agree in some columns, each with its values of those that differ at all."""
    differing = [column for column in columns if column in frame and len(frame[column].dropna().unique()) > 1]
    return list(frame.groupby(differing)) if differing else [((), frame)]


def _file_name(value: object) -> str:
    """Return a value as a part of a folder's name."""
    return re.sub(r"[^\w.,()=-]+", "_", str(value)).strip(".") or "_"
