"""The tidy frame of runs: what a chart needs of it, and the choices made on validation.

A run is *private* if it has a target epsilon, *clipped* if updates (or, under the unit example, the gradients of
examples) are clipped at all, so that the clipped runs are the private ones, those without noise and those at fixed
noise, and *plain* if it is federated averaging without clip and noise.
"""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from dpfl.charts.words import number, several
from dpfl.errors import InputError
from dpfl.statistics import best as best

_PER_CHART = ("dataset", "model", "clients", "cohort")
_UNCOMPRESSED = "none"
_PER_GUARANTEE = ("mechanism", "unit", "relation", "sampler", "accountant")
_DEPLOYMENT = ("deployment_clients", "deployment_cohort")
_SETTING = ("epsilon", "delta", "clip_norm", "rounds")
# Of larger populations that runs stand for, of clients that train by DP-SGD, and of adaptive clipping.
_MAY_BE_MISSING = (
    *_DEPLOYMENT,
    *("example_clip_norm", "example_noise_multiplier", "clip_quantile", "final_clip_norm", "epsilon_spent"),
)
ADAPTIVE = "adaptive_clipping"
CLIP = ("mechanism", "clip_norm", "clip_quantile")
"""The columns that say how a run clips."""
_MEASURED = ("status", "seed", "noise_multiplier", "accuracy", "validation_accuracy")


def prepare(frame: pd.DataFrame, varying: Sequence[str] = (), *, fixed_noise: bool = False) -> pd.DataFrame:
    """Return a copy of the runs, checked: whatever one chart averages over differs in its seed alone.

    Under the unit example the columns clip_norm and noise_multiplier become those of the gradients. Failed runs are
    left out, as are those at fixed noise unless they are asked for; `attrs` counts both for the caption.

    Args:
        frame: The tidy frame of a study, one row per run.
        varying: Further columns that may differ between the runs, since the chart tells their values apart.
        fixed_noise: Whether the chart knows runs with noise that have no target epsilon.

    Raises:
        InputError: If a column is missing, no run is finished, or runs are mixed that no chart can
            tell apart.
    """
    missing = [c for c in (*_PER_CHART, *_PER_GUARANTEE, *_SETTING, *_MEASURED) if c not in frame]
    if missing:
        raise InputError(f"The frame lacks {several(missing)}: pass the frame of runs that a study returns.")
    frame = frame.assign(**{column: float("nan") for column in _MAY_BE_MISSING if column not in frame})
    frame["compression"] = frame["compression"].fillna(_UNCOMPRESSED) if "compression" in frame else _UNCOMPRESSED
    floats = [*_MAY_BE_MISSING, "epsilon", "delta", "clip_norm", "noise_multiplier", "accuracy", "validation_accuracy"]
    runs = _by_unit(frame.astype(dict.fromkeys(floats, float)))
    failed = runs["status"] == "failed"
    left_out: list[Any] = [] if fixed_noise else list(at_fixed_noise(runs[~failed]).index)
    runs = runs[~failed].drop(index=left_out).reset_index(drop=True)
    if finished(runs).empty:
        also = f", {len(left_out)} have noise but no target epsilon" if len(left_out) else ""
        raise InputError(f"None of the {len(frame)} runs is finished{also}, so there is nothing to draw.")
    runs.attrs.update(failed=int(failed.sum()), at_fixed_noise=len(left_out), all=len(frame))
    noisy = runs[runs["epsilon"].notna() | (runs["noise_multiplier"] > 0)]
    of_clips = ("mechanism", "clip_quantile")
    alike = ((runs, (*_PER_CHART, "compression")), (clipped(runs), of_clips), (noisy, (*_PER_GUARANTEE, *_DEPLOYMENT)))
    for rows, columns in alike:
        for column in columns:
            if column in varying:
                continue
            values = sorted(map(str, rows[column].dropna().unique()))
            if column in _DEPLOYMENT and values and rows[column].isna().any():
                values.append("none")
            if len(values) > 1:
                raise InputError(f"The runs differ in {column} ({several(values)}): chart one value at a time.")
    noise = ["noise_multiplier"] if fixed_noise else []
    twice = runs[runs.duplicated(["mechanism", "clip_quantile", *_SETTING, *noise, *varying, "seed"])]
    if len(twice):
        run = twice.iloc[0]
        raise InputError(
            f"Several runs share seed {run['seed']}, epsilon {number(run['epsilon'])}, clip norm "
            f"{number(run['clip_norm'])} and {number(run['rounds'])} rounds, so they differ in something "
            "that the chart cannot show: keep one value of it."
        )
    return runs


def prepare_clips(frame: pd.DataFrame, *, fixed_noise: bool = False) -> pd.DataFrame:
    """Return the runs as `prepare` does, where fixed clip norms may stand beside adaptive clipping.

    Args:
        frame: As of `prepare`.
        fixed_noise: As of `prepare`.

    Raises:
        InputError: As of `prepare`, or there are mechanisms of other kinds beside each other.
    """
    runs = prepare(frame, varying=("mechanism", "clip_quantile"), fixed_noise=fixed_noise)
    mechanisms = sorted(clipped(runs)["mechanism"].unique())
    if len(mechanisms) > 1 and mechanisms != [ADAPTIVE, "gaussian"]:
        raise InputError(f"The runs differ in mechanism ({several(mechanisms)}): chart one value at a time.")
    return runs


def _by_unit(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the runs with clip and noise of what is protected."""
    by_example = frame["example_clip_norm"].notna()
    if (by_example & ((frame["mechanism"] != "none") | (frame["unit"] != "example"))).any():
        raise InputError(
            "Some runs clip both updates and the gradients of examples, while a chart knows one clip norm: leave these "
            "runs out, and draw them from the frame's columns."
        )
    runs = frame.reset_index(drop=True)
    for column in ("clip_norm", "noise_multiplier"):
        runs[column] = runs[column].where(~by_example.to_numpy(), runs[f"example_{column}"])
    return runs


def finished(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs that ended with a model."""
    return runs[runs["status"] == "finished"]


def clipped(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs in which something was clipped, with and without noise."""
    return runs[~_is_plain(runs)]


def private(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs with a target epsilon."""
    return runs[runs["epsilon"].notna()]


def at_fixed_noise(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs with noise that was given and not calibrated to a target."""
    return runs[runs["epsilon"].isna() & (runs["noise_multiplier"] > 0)]


def plain(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs of federated averaging without clip and noise."""
    return runs[_is_plain(runs)]


def _is_plain(runs: pd.DataFrame) -> pd.Series:
    averaged = runs["mechanism"] == "none"
    return averaged & runs["example_clip_norm"].isna() if "example_clip_norm" in runs else averaged


def deltas(runs: pd.DataFrame) -> list[float]:
    """Return the values of delta that the private runs were given, ascending."""
    return sorted(private(runs)["delta"].unique())


def local_work(runs: pd.DataFrame) -> list[float]:
    """Return the values that rounds x local steps takes, ascending; none if the steps are not known."""
    if "local_steps" not in runs or runs["local_steps"].isna().any():
        return []
    return sorted((runs["rounds"] * runs["local_steps"]).unique())
