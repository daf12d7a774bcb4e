"""What the examples of each client were really charged, beside what was promised."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from dpfl.charts import canvas, words
from dpfl.charts.runs import finished
from dpfl.charts.words import number
from dpfl.errors import InputError


@canvas.style
def client_epsilons(epsilons: pd.DataFrame, frame: pd.DataFrame) -> Figure:
    """Draw the distribution over clients of the example-level epsilon that each of them spent.

    A line per promised epsilon shows, at each value, which fraction of the clients spent at most that much; the
    promised values are dotted.

    Args:
        epsilons: One row per client of each run: run_id, client and epsilon (0 for a client that never took part).
        frame: The tidy frame of a study, one row per run; of it run_id, status, unit, epsilon, delta,
            example_epsilon and the columns that the caption states. Not for release: see the caption.

    Raises:
        InputError: If a table lacks columns, no finished run protects examples, or the runs differ in what the
            caption states.
    """
    _check_columns("table of clients' epsilons", epsilons, ("run_id", "client", "epsilon"))
    needed = (
        "run_id",
        "status",
        "unit",
        "epsilon",
        "example_epsilon",
        "delta",
        "dataset",
        "model",
        "clients",
        "cohort",
    )
    _check_columns("frame", frame, (*needed, "relation"))
    runs = finished(frame)
    runs = runs[runs["example_epsilon"].notna() & runs["run_id"].isin(epsilons["run_id"])]
    if runs.empty:
        raise InputError("No finished run has epsilons of its clients' examples, so there is nothing to draw.")
    for column in ("dataset", "clients", "relation"):
        found = sorted(map(str, runs[column].dropna().unique()))
        if len(found) > 1:
            raise InputError(f"The runs differ in {column} ({words.several(found)}): chart one value at a time.")
    promised = runs["epsilon"].where(runs["unit"] == "example", runs["example_epsilon"]).astype(float)
    runs = runs.assign(promised=promised.map(lambda value: float(f"{value:.4g}")))
    spent = epsilons.rename(columns={"epsilon": "spent"}).merge(runs[["run_id", "promised"]], on="run_id")
    idle = float((spent["spent"] <= 0).mean())

    figure, axes = canvas.start("ε that a client's examples were charged, example-level")
    axes.set_ylabel("Clients charged at most so much")
    values = sorted(map(float, spent["promised"].unique()))
    looks = canvas.looks(values)
    for value in reversed(values):
        charged = np.sort(spent.loc[spent["promised"] == value, "spent"].to_numpy(float))
        share = np.arange(1, len(charged) + 1) / len(charged)
        seen = charged > 0
        # From the axis up to the first client, then a step up at each; on to the promise, which none exceeds.
        start = share[~seen][-1] if (~seen).any() else 0.0
        x = [*charged[seen][:1], *charged[seen], value]
        y = [start, *share[seen], 1.0]
        axes.step(x, y, where="post", color=looks[value].color, label=number(value))
        axes.axvline(value, color=looks[value].color, linestyle=":", linewidth=1)
    axes.set_ylim(0, 1.02)
    canvas.decades(axes.xaxis, number)
    delta = words.several(map(number, sorted(runs["delta"].dropna().unique())))
    counts = runs.groupby("promised").size()
    counted = "one run a line" if (counts == 1).all() else f"{words.span(counts)} runs a line"
    caption = [
        f"Each line: the clients of all runs with that promise, {counted}; "
        "dotted: the promised ε, which holds for every client whoever is drawn.",
        f"{100 * idle:.3g}% of the clients never took part and were charged nothing." if idle else "",
        "What a client was charged depends on its number of examples and the rounds in which it took part: "
        "not covered by the guarantee and not for release.",
        words.diverged(frame),
    ]
    promise = (
        f"Guarantee: example-level (ε, δ)-differential privacy, δ = {delta}; neighbours differ "
        f"{words.neighbours(runs['relation'].iloc[0], 'example')}."
    )
    return canvas.finish(figure, axes, "Promised ε", [caption, [promise, words.setting(runs)]])


def _check_columns(what: str, table: pd.DataFrame, columns: tuple[str, ...]) -> None:
    """Raise InputError if a table lacks columns."""
    missing = [column for column in columns if column not in table]
    if missing:
        raise InputError(f"The {what} lacks {words.several(missing)}: pass what a study returns.")
