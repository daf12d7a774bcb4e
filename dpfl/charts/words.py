"""What a chart says in words: numbers, lists and the caption."""

from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd

_RELATIONS = {
    "add_or_remove_one": "by adding or removing one {unit}",
    "replace_one": "by replacing one {unit}",
    "replace_special": "by replacing one {unit} with an empty contribution",
}
_NAMES = {
    "rdp": "RDP",
    "pld": "PLD",
    "poisson": "Poisson",
    "capped_poisson": "capped Poisson",
    "cyclic_poisson": "cyclic Poisson",
    "fixed_size": "fixed-size",
    "balls_in_bins": "balls-in-bins",
    "everyone": "no",
    "gaussian": "Gaussian mechanism",
    "skellam": "distributed Skellam mechanism",
    "discrete_gaussian": "distributed discrete Gaussian mechanism",
    "banded_matrix": "banded matrix factorisation",
    "local_gaussian": "local Gaussian mechanism",
    "local_laplace": "local Laplace mechanism",
}


def number(value: float) -> str:
    """Return a number as short as it can be read: 1e-3, 0.25, 300 or 3,383; NaN is none."""
    if pd.isna(value):
        return "none"
    if value and abs(value) < 0.01:
        return np.format_float_scientific(value, precision=3, trim="-", exp_digits=1)
    return f"{value:,.0f}" if value == round(value) else f"{value:.4g}"


def several(items: Iterable[str]) -> str:
    """Return "a", "a and b" or "a, b and c"."""
    *first, last = items
    return f"{', '.join(first)} and {last}" if first else last


def name(value: str) -> str:
    """Return the name of a sampler, an accountant or another part as prose writes it."""
    return _NAMES.get(value, value.replace("_", " "))


def level(private: pd.DataFrame) -> str:
    """Return the privacy unit as an adjective, such as "user-level"."""
    return f"{private['unit'].iloc[0]}-level"


def guarantee(private: pd.DataFrame, deltas: list[float]) -> str:
    """Return the sentence that states what the private runs guarantee."""
    if private.empty:
        return "No run has a privacy guarantee."
    run = private.iloc[0]
    relation = _RELATIONS.get(run["relation"], f"in the sense of {name(run['relation'])} ({{unit}})")
    return (
        f"Guarantee: {level(private)} (ε, δ)-differential privacy, δ = {several(map(number, deltas))}; "
        f"neighbours differ {relation.format(unit=run['unit'])}; "
        f"{name(run['mechanism'])}; {name(run['sampler'])} sampling; {name(run['accountant'])} accountant."
        f"{_extrapolation(private)}"
    )


def _extrapolation(private: pd.DataFrame) -> str:
    """Return the sentence that says for whom an extrapolated guarantee holds; empty where none is."""
    run = private.iloc[0]
    if pd.isna(run.get("deployment_clients")):
        return ""
    spent = private["epsilon_spent"]
    simulated = "no guarantee" if spent.isna().any() else f"up to ε = {number(spent.max())}"
    return (
        f" ε is extrapolated: it holds for {number(run['deployment_clients'])} clients, "
        f"{number(run['deployment_cohort'])} per round; the simulated clients have {simulated}."
    )


def setting(runs: pd.DataFrame) -> str:
    """Return the sentence that says what was trained and on whom."""
    run = runs.iloc[0]
    return (
        f"Dataset {run['dataset']}, model {run['model']}, {run['clients']:,} clients, "
        f"{number(run['cohort'])} expected per round."
    )


def statistics(seeds: pd.Series) -> str:
    """Return the sentence that says what points and bands are, from the seeds behind each point."""
    low, high = seeds.min(), seeds.max()
    if high == 1:
        return "One seed per point, so there are no intervals."
    count = f"{high}" if low == high else f"{low} to {high}"
    return f"Points: means over {count} seeds; bands and bars: 95% Student-t intervals."


def clip_choice(clipped: pd.DataFrame, prices: Mapping[float, float] | None) -> str:
    """Return the sentence that says which clip norm a point has, and what choosing it costs."""
    if clipped.empty:
        return ""
    values = len(clipped["clip_norm"].unique())
    if values == 1:
        return f"All clipped runs have clip norm {number(clipped['clip_norm'].iloc[0])}."
    chosen = "Each point has the clip norm with the best mean validation accuracy; that choice is not charged to ε."
    if not prices:
        return chosen
    return (
        f"{chosen} To release just the best of a random number of random clip norms, {values} on average, would cost "
        f"ε = {several(number(price) for price in prices.values())} instead of {several(map(number, prices))}."
    )


def rounds_choice(clipped: pd.DataFrame) -> str:
    """Return the sentence that says which number of rounds a line has."""
    if len(clipped["rounds"].unique()) == 1:
        return f"All clipped runs have {number(clipped['rounds'].iloc[0])} rounds."
    return (
        "Each line has the number of rounds (in brackets) that reaches the best mean validation accuracy at "
        "any clip norm; that choice is not charged to ε."
    )


def noise_free(clipped: pd.DataFrame) -> str:
    """Return the sentence that explains the runs without noise; empty if there are none."""
    return "No noise: clipping alone, without a guarantee." if clipped["epsilon"].isna().any() else ""


def plain(rounds: pd.Series) -> str:
    """Return the sentence that explains the dashed line, from the number of rounds it has, if any."""
    if rounds.empty:
        return ""
    over = f" ({number(rounds.iloc[0])} rounds)" if len(rounds) == 1 else ""
    return f"Dashed: federated averaging without clip and noise{over}."


def work(totals: list[float]) -> str:
    """Return the sentence about local work, from the values that rounds × local steps takes."""
    if len(totals) > 1:
        return f"Rounds × local steps varies from {number(totals[0])} to {number(totals[-1])}."
    return f"Rounds × local steps is {number(totals[0])} throughout." if totals else ""


def diverged(runs: pd.DataFrame) -> str:
    """Return the sentence about runs that diverged; empty if none did."""
    count = int((runs["status"] == "diverged").sum())
    if not count:
        return ""
    return f"{count} of {len(runs)} runs diverged: not in the means, counted as 0% in choices."
