"""How should updates be clipped?

Fixed clip norms from 0.05 to 4 against clip norms that follow a quantile of the updates' norms (adaptive clipping,
which pays for its counts out of the same epsilon), at each epsilon and without noise.

    uv run python experiments/clipping.py

Writes runs/clipping/{runs.csv,table.md,clipping.png,clipping_map.png} and prints, for each epsilon, the best fixed clip
norm by validation accuracy beside each quantile.
"""

import pandas as pd
import settings

import dpfl

EPSILONS = [1, 2, 4, 8, None]
CLIP_NORMS = dpfl.study.value_range(0.05, 4, 8)
QUANTILES = [0.3, 0.7, 0.5]
START = 0.1  # of adaptive clipping; it moves by a factor of at most exp(0.2) in a round


def answer(setting: settings.Setting) -> None:
    """Fixed clip norms against adaptive clipping, at each epsilon."""
    ways = dpfl.study.clipping(setting.some(CLIP_NORMS), setting.some(QUANTILES, 1), START)
    axes = {"privacy.epsilon": setting.some(EPSILONS), **ways}
    study = dpfl.Study(setting.experiment(), axes, seeds=setting.seeds, ceiling=True)
    frame = setting.run(study)
    setting.save(dpfl.charts.clipping(frame), "clipping")
    setting.save(dpfl.charts.clipping_map(frame), "clipping_map")
    setting.show(table(frame), *compared(setting, frame))


def table(frame: pd.DataFrame) -> pd.DataFrame:
    """For each epsilon the best fixed clip norm, then each quantile with the clip norm at which it ended."""
    fixed = dpfl.statistics.best(frame[frame["mechanism"] == "gaussian"], per=["epsilon"], over=["clip_norm"])
    adaptive = frame[frame["mechanism"] == "adaptive_clipping"]
    ends = adaptive.groupby(["epsilon", "clip_quantile"], dropna=False)["final_clip_norm"].mean()
    rows = [
        dpfl.statistics.summarise(fixed, ["epsilon", "mechanism", "clip_norm"]),
        dpfl.statistics.summarise(adaptive, ["epsilon", "mechanism", "clip_quantile"]).merge(
            ends.rename("clip_norm").reset_index(), on=["epsilon", "clip_quantile"]
        ),
    ]
    columns = ["epsilon", "mechanism", "clip_quantile", "clip_norm", "mean", "low", "high", "seeds"]
    return pd.concat(rows).reindex(columns=columns).sort_values(["epsilon", "clip_quantile"], na_position="last")


def compared(setting: settings.Setting, frame: pd.DataFrame) -> list[str]:
    """The median against the best fixed clip norm, as sentences: one for each epsilon."""
    if setting.seeds < 2:
        return []
    chosen = dpfl.statistics.choose(frame[frame["mechanism"] == "gaussian"], over=["clip_norm"])
    return [
        dpfl.statistics.compare(
            frame,
            {"mechanism": "adaptive_clipping", "epsilon": row.epsilon, "clip_quantile": QUANTILES[-1]},
            {"mechanism": "gaussian", "epsilon": row.epsilon, "clip_norm": row.clip_norm},
        ).statement()
        for row in chosen.itertuples()
    ]


if __name__ == "__main__":
    settings.command(answer, "clipping")
