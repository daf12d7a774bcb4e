"""The trade-off as a table."""

import pandas as pd

from dpfl.charts.runs import CLIP, best, clipped, finished, plain, prepare_clips
from dpfl.statistics import summarise


def best_settings(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the best setting for each epsilon, chosen by mean validation accuracy over the seeds.

    Args:
        frame: The tidy frame of a study, one row per run.

    Returns:
        One row per epsilon, ascending, then clipping without noise, then plain federated averaging:
        the columns mechanism, epsilon, clip_norm, rounds, noise_multiplier, and of the test accuracy mean, low,
        high (95 % Student-t interval) and seeds.

    Raises:
        InputError: If the frame lacks columns or has no finished run.
    """
    runs = prepare_clips(frame)
    columns = ["mechanism", "epsilon", "clip_norm", "rounds", "noise_multiplier"]
    chosen = [
        best(part, per=["epsilon", "delta"], over=["rounds", *CLIP])
        for part in (clipped(runs), plain(runs))
        if len(part)
    ]
    # The table of a group begins with its mechanism, of which one epsilon may have another than the next.
    tables = [summarise(finished(part), columns).sort_values("epsilon", kind="stable") for part in chosen]
    return pd.concat([table.dropna(axis=1, how="all") for table in tables], ignore_index=True).reindex(
        columns=[*columns, "mean", "low", "high", "seeds"]
    )
