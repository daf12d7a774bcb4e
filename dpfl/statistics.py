"""Means over seeds, how far they can be trusted, and whether two configurations differ.

All functions take a study's frame, one row a run, and compute after training: nothing here is private beyond what
the runs' guarantees cover, and choices made by these functions are not charged to them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy import stats

from dpfl.compression.config import LITE_COLUMNS
from dpfl.data.wording import instead
from dpfl.errors import InputError

LEVEL = 0.95

_RESAMPLES = 9_999
_MOST_EXACT = 12
_ROUNDING = 1e-12
# Columns that follow from the settings or from the run: they do not tell configurations apart.
_NO_SETTINGS = {
    *LITE_COLUMNS,
    "accuracy",
    "bytes_down",
    "bytes_up",
    "client_settings",
    "compression_settings",
    "configuration",
    "data_fingerprint",
    "epsilon_extrapolated",
    "epsilon_spent",
    "example_epsilon",
    "example_epsilon_median",
    "example_epsilon_worst",
    "final_clip_norm",
    "loss",
    "mechanism_settings",
    "model_bytes",
    "noise_multiplier",
    "reason",
    "rounds_done",
    "run_id",
    "sampling_rate",
    "seconds",
    "seed",
    "signal_to_noise",
    "status",
    "update_bytes",
    "user_epsilon",
    "validation_accuracy",
    "validation_loss",
}


def summarise(
    frame: pd.DataFrame,
    by: Sequence[str],
    value: str = "accuracy",
    interval: Literal["t", "bootstrap"] = "t",
    level: float = LEVEL,
    seed: int = 0,
) -> pd.DataFrame:
    """Returns the mean of each group and its interval over seeds.

    Student's t interval is exact for normally distributed values and the better choice with few seeds. The bootstrap
    interval is the percentile one (9,999 resamples): it assumes no distribution and stays within the values that were
    seen, but is too narrow with few seeds (for normal values a 95 % interval covers the mean in about 84 % of cases
    with 5 seeds, 90 % with 10 and 93 % with 20). BCa is not offered: it corrects by the share of resamples below the
    mean, and with few seeds so many resamples equal the mean that the correction moves the interval for no reason.

    Source of the percentile interval: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.

    Args:
        frame: one row a run; the runs of a group differ in their seed alone.
        by: the columns that make up a group; a missing value is a value like any other.
        value: the column to average; runs in which it is missing do not count.
        interval: "t" or "bootstrap".
        level: how often the interval shall cover the mean, between 0 and 1.
        seed: of the bootstrap's resamples, the same for each group.

    Returns:
        One row a group, sorted by group: the columns of `by`, then `mean`, `low`, `high` and `seeds` (how many runs
        the group has). A group of one run, or of two for the bootstrap, has no interval: NaN.

    Raises:
        InputError: a column is missing, or the interval or the level is none.
    """
    _check_columns(frame, [*by, value])
    _check_level(level)
    if interval not in ("t", "bootstrap"):
        raise InputError(f"the interval is 't' or 'bootstrap', but it was {interval!r}.")
    groups = frame.groupby(list(by), dropna=False)[value]
    table = groups.agg(mean="mean", error="sem", seeds="count")
    if interval == "t":
        half = stats.t.ppf((1 + level) / 2, table["seeds"] - 1) * table["error"]
        table = table.assign(low=table["mean"] - half, high=table["mean"] + half)
    else:
        # In the order of the table's rows, as both come from the same groups.
        ends = [_percentiles(group.dropna().to_numpy(float), level, seed) for _, group in groups]
        table = table.assign(low=[low for low, _ in ends], high=[high for _, high in ends])
    return table[["mean", "low", "high", "seeds"]].reset_index()


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two configurations compared seed by seed; differences are the one's value minus the other's.

    Attributes:
        one: the one configuration in words.
        other: the other configuration in words.
        value: the column that was compared.
        mean_one: mean of the one over the pairs.
        mean_other: mean of the other over the pairs.
        difference: mean of the pairs' differences.
        low: lower end of Student's t interval of the mean difference.
        high: upper end of it.
        level: how often the interval covers the mean difference, between 0 and 1.
        p_value: of the paired t test, two-sided.
        permutation_p_value: of the sign-flip permutation test, two-sided. Exact up to 12 pairs, where it is at least
            2 / 2^pairs: five pairs or fewer cannot reach 0.05. Above, from 9,999 random flips.
        effect_size: Cohen's d_z: the mean of the differences in units of their standard deviation; infinite where all
            differences are the same but not 0.
        pairs: number of seeds that count.
        left_out: pairs that do not count, because a run of them did not finish or lacks the value.
        unpaired: seeds that do not count, because only one configuration has them.
    """

    one: str
    other: str
    value: str
    mean_one: float
    mean_other: float
    difference: float
    low: float
    high: float
    level: float
    p_value: float
    permutation_p_value: float
    effect_size: float
    pairs: int
    left_out: int
    unpaired: int

    def statement(self) -> str:
        """The comparison in one sentence for a paper."""
        name = self.value.replace("_", " ")
        missing = [
            f"{_counted(self.left_out, 'pair')} with an unfinished run" if self.left_out else "",
            f"{_counted(self.unpaired, 'seed')} without a partner" if self.unpaired else "",
        ]
        without = " and ".join(filter(None, missing))
        exact = "exact" if self.pairs <= _MOST_EXACT else "random"
        return (
            f"Over {self.pairs} paired seeds{f' (without {without})' if without else ''}, the mean {name} was "
            f"{self.mean_one:.4g} at {self.one} and {self.mean_other:.4g} at {self.other}: a difference of "
            f"{self.difference:+.4g}, {100 * self.level:g}% confidence interval [{self.low:+.4g}, {self.high:+.4g}] "
            f"(paired t test: {_probability(self.p_value)}; {exact} sign-flip permutation test: "
            f"{_probability(self.permutation_p_value)}; Cohen's d_z = {self.effect_size:.2f})."
        )


def compare(
    frame: pd.DataFrame,
    one: Mapping[str, Any],
    other: Mapping[str, Any],
    value: str = "accuracy",
    level: float = LEVEL,
) -> Comparison:
    """Compares two configurations that ran with the same seeds, pair by pair.

    A seed draws the cohorts, the batches and the first model of both, so that pairs differ by less than runs do.
    The p-values are for one comparison that was planned; whoever makes several corrects them.

    Sources: Student's paired t test; Cohen, Statistical Power Analysis (1988), for d_z; Fisher, The Design of
    Experiments (1935), for the permutation test.

    Args:
        frame: one row a run, with the column seed; runs whose status, if there is one, is not "finished" do not count.
        one: the value of each column that selects the one configuration; None or NaN selects where it is missing.
        other: the same of the other configuration.
        value: the column to compare.
        level: how often the interval of the mean difference shall cover it, between 0 and 1.

    Raises:
        InputError: a column is missing, a configuration selects no run or several with the same seed, both select the
            same run, or fewer than two pairs are left.
    """
    _check_columns(frame, [value, "seed", *one, *other])
    _check_level(level)
    first, second = _selected(frame, one), _selected(frame, other)
    if len(same := first.index.intersection(second.index)):
        raise InputError(
            f"{_words(one)} and {_words(other)} select the same run (seed {first.loc[same[0], 'seed']}): give each "
            "configuration a value that tells it from the other."
        )
    columns = [_finished(part, value).set_index("seed") for part in (first, second)]
    both = columns[0].join(columns[1], how="inner", lsuffix="_one", rsuffix="_other")
    counted = both.dropna()
    if len(counted) < 2:
        raise InputError(
            f"{_words(one)} and {_words(other)} have {_counted(len(counted), 'pair')} of finished runs with the same "
            "seed, but a comparison needs at least 2: run both with more seeds in common."
        )
    ones, others = counted.to_numpy(float).T
    low, high, p_value, permutation, effect = _tested(ones, others, level)
    return Comparison(
        one=_words(one),
        other=_words(other),
        value=value,
        mean_one=float(ones.mean()),
        mean_other=float(others.mean()),
        difference=float((ones - others).mean()),
        low=low,
        high=high,
        level=level,
        p_value=p_value,
        permutation_p_value=permutation,
        effect_size=effect,
        pairs=len(counted),
        left_out=len(both) - len(counted),
        unpaired=len(first) + len(second) - 2 * len(both),
    )


def best(
    runs: pd.DataFrame, per: Sequence[str], over: Sequence[str], keep: Sequence[str] | None = None
) -> pd.DataFrame:
    """Returns the runs at the best setting, chosen by mean validation accuracy over the seeds.

    A diverged run counts as accuracy 0 in the choice, so that a setting at which one lucky seed survived does not win.
    The smallest setting wins a tie.

    Args:
        runs: the runs to choose from, diverged ones included.
        per: one choice is made for each value of these columns.
        over: the columns that are chosen.
        keep: which of the chosen columns bind the runs that are returned; all unless given.

    Returns:
        The runs that have a chosen setting.

    Raises:
        InputError: there is a choice and a finished run has no validation accuracy.
    """
    winners = _winners(runs, per, over)
    columns = [*per, *(over if keep is None else keep)]
    return runs.merge(winners[columns], on=columns)


def choose(
    frame: pd.DataFrame,
    over: Sequence[str],
    per: Sequence[str] = ("epsilon",),
    prices: Mapping[float, float] | None = None,
    level: float = LEVEL,
) -> pd.DataFrame:
    """Returns the best setting for each epsilon: chosen on validation data, reported on test data.

    The choice is by mean validation accuracy over the seeds, in which a run that did not finish counts as accuracy 0.
    It looks at the models of all settings, which epsilon does not cover: `prices` says what it would cost.

    Args:
        frame: one row a run; runs with the same values of `per` and `over` differ in their seed alone.
        over: the columns that are chosen, such as `["clip_norm"]`.
        per: one choice is made for each value of these columns; a missing value is a value like any other.
        prices: what each target epsilon becomes where only the best of the settings is released
            (`dpfl.study.tuning_prices`); None leaves the price open.
        level: how often the intervals shall cover the mean, between 0 and 1.

    Returns:
        One row for each value of `per`, sorted: the columns of `per` and of `over`, `settings` (how many there were
        to choose from), `validation_accuracy` (mean by which it was chosen), of the test accuracy `mean`, `low`,
        `high` (Student's t) and `seeds` over the finished runs (NaN and 0 where none finished), and
        `epsilon_with_choice` (NaN without a target epsilon, and without prices).

    Raises:
        InputError: a column is missing, several runs of a setting have the same seed, a choice lacks validation
            accuracies, or an epsilon has no price.
    """
    keys = [*per, *over]
    _check_columns(frame, [*keys, "status", "seed", "accuracy", "validation_accuracy"])
    _check_level(level)
    if not per or not over or set(per) & set(over):
        raise InputError(f"a choice over {list(over)} per {list(per)} needs columns in both, and none in both at once.")
    if frame.empty:
        raise InputError("the frame has no runs to choose from: pass the frame of a study that has run.")
    for _, group in frame.groupby(keys, dropna=False):
        _check_seeds(group, "a setting")
    chosen = _winners(frame, per, over).rename(columns={"mean": "validation_accuracy"})
    runs = frame.merge(chosen[keys], on=keys)
    runs = runs.assign(accuracy=runs["accuracy"].where(runs["status"] == "finished"))
    table = chosen[[*keys, "settings", "validation_accuracy"]].merge(summarise(runs, keys, level=level), on=keys)
    table = table.sort_values(list(per), ignore_index=True)
    table["epsilon_with_choice"] = float("nan")
    if prices is not None:
        _check_columns(table, ["epsilon"])
        unpriced = sorted(set(table["epsilon"].dropna()) - set(prices))
        if unpriced:
            raise InputError(
                f"the prices lack epsilon {unpriced[0]:g}: take them from dpfl.study.tuning_prices for the same study."
            )
        table["epsilon_with_choice"] = table["epsilon"].map(prices).astype(float)
    return table


def _winners(runs: pd.DataFrame, per: Sequence[str], over: Sequence[str]) -> pd.DataFrame:
    """The best setting for each value of `per`, with its mean score and how many settings there were."""
    score = runs["validation_accuracy"].where(runs["status"] == "finished", 0.0)
    means = runs.assign(score=score).groupby([*per, *over], dropna=False)["score"].agg(["mean", "count", "size"])
    table = means.reset_index()
    if (table.duplicated(list(per), keep=False) & (table["count"] < table["size"])).any():
        raise InputError(
            f"Choosing the best {' and '.join(over)} needs validation_accuracy, which some finished runs lack: "
            "hold out validation data or keep one value."
        )
    table["settings"] = table.groupby(list(per), dropna=False)["size"].transform("size")
    return table.sort_values("mean", ascending=False, kind="stable").drop_duplicates(list(per))


def _percentiles(values: np.ndarray, level: float, seed: int) -> tuple[float, float]:
    """The bootstrap's percentile interval of a mean; NaN for fewer than three values."""
    if len(values) < 3:
        return float("nan"), float("nan")
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    found = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=_RESAMPLES,
        confidence_level=level,
        method="percentile",
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)


def _tested(ones: np.ndarray, others: np.ndarray, level: float) -> tuple[float, float, float, float, float]:
    """Of paired values: the interval's ends, the p-values of t test and permutation test, and the effect size."""
    differences = ones - others
    mean, deviation = differences.mean(), differences.std(ddof=1)
    size = max(np.abs(ones).max(), np.abs(others).max())
    if np.abs(differences).max() <= _ROUNDING * size:
        return float(mean), float(mean), 1.0, 1.0, 0.0
    # In units of the largest difference, and rounded, so that flips with the same mean are ties.
    scaled = differences / np.abs(differences).max()
    permutation = stats.permutation_test(
        (scaled,),
        lambda values, axis: np.round(np.mean(values, axis=axis), 12),
        permutation_type="samples",
        vectorized=True,
        n_resamples=2**_MOST_EXACT if len(scaled) <= _MOST_EXACT else _RESAMPLES,
        random_state=np.random.default_rng(0),
    ).pvalue
    if deviation <= _ROUNDING * size:
        return float(mean), float(mean), 0.0, float(permutation), float(np.copysign(np.inf, mean))
    half = stats.t.ppf((1 + level) / 2, len(differences) - 1) * deviation / np.sqrt(len(differences))
    p_value = stats.ttest_rel(ones, others).pvalue
    return float(mean - half), float(mean + half), float(p_value), float(permutation), float(mean / deviation)


def _selected(frame: pd.DataFrame, configuration: Mapping[str, Any]) -> pd.DataFrame:
    """The runs of a configuration, one a seed."""
    chosen = pd.Series(True, frame.index)
    for column, wanted in configuration.items():
        chosen &= frame[column].isna() if pd.isna(wanted) else frame[column] == wanted
        if not chosen.any():
            raise InputError(
                f"{_words(configuration)} selects no run: no run that is left has {column} = {_word(wanted)}; take "
                "the values from the frame's columns."
            )
    runs = frame.reset_index(drop=True)[chosen.to_numpy()]
    _check_seeds(runs, _words(configuration))
    return runs


def _finished(runs: pd.DataFrame, value: str) -> pd.DataFrame:
    """Seed and value of runs; the value is missing where a run did not finish."""
    values = runs[value].where(runs["status"] == "finished") if "status" in runs else runs[value]
    return pd.DataFrame({"seed": runs["seed"], "value": values.astype(float)})


def _check_seeds(runs: pd.DataFrame, name: str) -> None:
    """Refuses several runs with the same seed."""
    twice = runs[runs.duplicated("seed", keep=False)]
    if twice.empty:
        return
    same = twice[twice["seed"] == twice["seed"].iloc[0]]
    differing = [c for c in same.columns if c not in _NO_SETTINGS and len(same[c].unique()) > 1]
    todo = f"they differ in {', '.join(differing)}; keep one value of it" if differing else "keep one of them"
    raise InputError(f"{name} has {len(same)} runs with seed {same['seed'].iloc[0]}: {todo}.")


def _check_columns(frame: pd.DataFrame, columns: Sequence[str]) -> None:
    for column in columns:
        if column not in frame:
            raise InputError(f"the frame has no column {column!r}; {instead(column, frame.columns)}")


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise InputError(f"the level must be between 0 and 1, such as 0.95, but it was {level!r}.")


def _words(configuration: Mapping[str, Any]) -> str:
    if not configuration:
        return "every run"
    return ", ".join(f"{column.replace('_', ' ')} {_word(value)}" for column, value in configuration.items())


def _word(value: Any) -> str:
    if pd.isna(value):
        return "none"
    return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _probability(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"
