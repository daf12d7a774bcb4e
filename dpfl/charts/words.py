"""What a chart says in words: numbers, lists and the caption."""

from collections.abc import Iterable, Mapping, Sequence

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
    "adaptive_clipping": "Gaussian mechanism with adaptive clipping",
    "tree_aggregation": "tree aggregation (DP-FTRL)",
    "none": "noise in the clients' local steps (DP-SGD)",
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


_SHORT_NAMES = {
    "gaussian": "Gaussian",
    "adaptive_clipping": "Gaussian, adaptive clip",
    "tree_aggregation": "tree (DP-FTRL)",
    "banded_matrix": "banded matrix (DP-FTRL)",
    "skellam": "distributed Skellam",
    "discrete_gaussian": "distr. discrete Gaussian",
    "local_gaussian": "local Gaussian",
    "local_laplace": "local Laplace",
    "none": "DP-SGD at clients",
}


def short_name(mechanism: str) -> str:
    """Return the name of a mechanism for a legend."""
    return _SHORT_NAMES.get(mechanism, name(mechanism))


def guarantees(private: pd.DataFrame, deltas: list[float]) -> str:
    """Return the sentence that states what the private runs guarantee, mechanism by mechanism."""
    parts = []
    for mechanism, runs in private.groupby("mechanism", sort=False):
        run = runs.iloc[0]
        relation = neighbours(run["relation"], run["unit"])
        parts.append(
            f"{short_name(str(mechanism))}: {name(run['sampler'])} sampling, {relation}, {name(run['accountant'])}"
        )
    alike = (
        "" if len(private["relation"].unique()) == 1 else " The relations differ, so equal ε are not equal promises."
    )
    return (
        f"Guarantee: {level(private)} (ε, δ)-differential privacy, δ = {several(map(number, deltas))}. "
        f"Sampling, how neighbours differ, and accountant: {'; '.join(parts)}.{alike}"
    )


def adaptive(quantiles: pd.Series) -> str:
    """Return the sentence that explains the stars of adaptive clipping; empty if there are none."""
    if quantiles.empty:
        return ""
    values = several(number(value) for value in sorted(quantiles.unique()))
    return (
        f"Stars: adaptive clipping to the quantile {values.replace(' and ', ' or ')} of the norms (the best on "
        "validation), at the clip norm of its last round."
    )


def seeds(counts: pd.Series) -> str:
    """Return the sentence that says how many seeds a mean has."""
    return f"{span(counts)} seeds."


def left_out(runs: pd.DataFrame) -> str:
    """Return the sentences about runs that `prepare` left out; empty if it left none out."""
    failed, fixed = runs.attrs.get("failed", 0), runs.attrs.get("at_fixed_noise", 0)
    sentences = [f"{failed} of {runs.attrs['all']} runs failed: left out."] if failed else []
    sentences += [f"{fixed} runs at fixed noise, without a target ε, are left out."] if fixed else []
    return " ".join(sentences)


def guarantee(private: pd.DataFrame, deltas: list[float]) -> str:
    """Return the sentence that states what the private runs guarantee."""
    if private.empty:
        return "No run has a privacy guarantee."
    run = private.iloc[0]
    relation = _RELATIONS.get(run["relation"], f"in the sense of {name(run['relation'])} ({{unit}})")
    return (
        f"Guarantee: {level(private)} (ε, δ)-differential privacy, δ = {several(map(number, deltas))}; "
        f"neighbours differ {relation.format(unit=run['unit'])}; "
        f"{' or '.join(map(name, private['mechanism'].unique()))}; {_sampling(run)}; "
        f"{name(run['accountant'])} accountant."
        f"{_extrapolation(private)}"
    )


def _sampling(run: pd.Series) -> str:
    """Return how clients are sampled; under the unit example how these sample minibatches, which is what counts."""
    minibatches = run.get("example_sampling")
    if run["unit"] != "example" or pd.isna(minibatches):
        return f"{name(run['sampler'])} sampling"
    return f"{name(minibatches)} minibatches"


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
        f"{span(runs['cohort'])} expected per round.{_shared(runs)}"
    )


def _shared(runs: pd.DataFrame) -> str:
    """Return what else all runs share, as sentences: their local work and their Dirichlet partition, where known."""
    sentences = ""
    if "compression" in runs and list(runs["compression"].unique()) not in ([], ["none"]):
        ways = runs["compression"].unique()
        sentences = f" Compression: {ways[0]}." if len(ways) == 1 else ""
    for column in ("local_steps", "local_epochs"):
        if column in runs and runs[column].notna().all() and len(runs[column].unique()) == 1:
            sentences += f" Local {column.removeprefix('local_')} in a round: {number(runs[column].iloc[0])}."
    if "dirichlet_alpha" in runs and len(runs["dirichlet_alpha"].unique()) == 1:
        alpha = float(runs["dirichlet_alpha"].iloc[0])
        sentences += " Examples dealt to clients at random." if np.isinf(alpha) else f" Dirichlet α: {number(alpha)}."
    return sentences


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
    values = len(clipped[["mechanism", "clip_norm", "clip_quantile"]].drop_duplicates())
    if values == 1:
        return f"All clipped runs have clip norm {number(clipped['clip_norm'].iloc[0])}."
    adaptive = " (or adaptive clipping)" if len(clipped["mechanism"].unique()) > 1 else ""
    chosen = (
        f"Each point has the clip norm{adaptive} with the best mean validation accuracy; that choice is not charged "
        "to ε."
    )
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
    over = f" ({number(rounds.iloc[0])} rounds)" if len(rounds.unique()) == 1 else ""
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


def span(values: pd.Series) -> str:
    """Return "30", or "30 to 90" where values differ."""
    low, high = values.min(), values.max()
    return number(low) if low == high else f"{number(low)} to {number(high)}"


def choice(clipped: pd.DataFrame, what: str = "point", per: Sequence[str] = ()) -> str:
    """Return the sentence that says which clip norm and number of rounds each point or line has.

    Args:
        clipped: The runs with a clip.
        what: What the choice is made for.
        per: The columns whose values each have a choice of their own.
    """
    if clipped.empty:
        return ""
    phrases = {"clip_norm": "clip norm", "rounds": "number of rounds"}
    groups = [part for _, part in clipped.groupby(list(per), dropna=False)] if per else [clipped]
    several_of = [column for column in phrases if any(len(part[column].unique()) > 1 for part in groups)]
    if several_of:
        best = f"the {several(phrases[column] for column in several_of)} with the best mean validation accuracy"
        return f"Each {what} has {best}; that choice is not charged to ε."
    alone = [column for column in phrases if len(clipped[column].unique()) == 1]
    values = {
        "clip_norm": f"clip norm {number(clipped['clip_norm'].iloc[0])}",
        "rounds": f"{number(clipped['rounds'].iloc[0])} rounds",
    }
    return f"All clipped runs have {several(values[column] for column in alone)}." if alone else ""


def size(count: float) -> str:
    """Return a number of bytes in decimal units: 800 B, 1.2 MB."""
    units = ("B", "kB", "MB", "GB", "TB")
    place = int(min(max(np.floor(np.log10(max(count, 1)) / 3 + 1e-9), 0), len(units) - 1))
    return f"{count / 1000**place:.3g} {units[place]}"


def neighbours(relation: str, unit: str) -> str:
    """Return how neighbouring datasets differ, such as "by adding or removing one user"."""
    return _RELATIONS.get(relation, f"in the sense of {name(relation)} ({{unit}})").format(unit=unit)
