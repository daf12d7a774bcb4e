"""How many bytes can be saved under privacy, and does fewer noised coordinates mean more accuracy?

Quantised updates with and without rotation, random coordinates, low rank, pruned models and sparse releases, each to
several degrees, at epsilon 0.5, 1, 4 and without noise; the clip norm of each point is chosen on the validation split.
Then, seed by seed, what the best setting with at most an eighth of the bytes loses or gains against no compression, and
what the best setting of all does. At last, what becomes of a network with a hidden layer, pruned and not, as a file of
TensorFlow Lite.

    uv run python experiments/compression.py

Writes runs/compression/{runs.csv,table.md,compression.png,compression_down.png}, the files in runs/compression/lite
and their table, lite.md, and prints the tables.
"""

from collections.abc import Sequence
from typing import Any

import pandas as pd
import settings

import dpfl

EPSILONS = [0.5, 4, None, 1]
CLIP_NORMS = [0.2, 0.5]
WAYS: list[dict[str, Any]] = [
    *({"bits": bits} for bits in (8, 4, 2, 1)),
    *({"bits": bits, "rotation": True} for bits in (2, 1)),
    *({"rank": rank} for rank in (8, 4, 2)),
    *({"sparsity": sparsity} for sparsity in (0.5, 0.8)),
    *({"top_k": top_k, "error_feedback": True} for top_k in (0.1, 0.05)),
    {"top_k": 0.1},
    *({"random_k": random_k} for random_k in (0.5, 0.25, 0.125)),
    *({"random_k": random_k, "bits": 4} for random_k in (0.5, 0.25)),
]
FEWER = 8
FORMATS = ("float32", "float16", "int8")


def answer(setting: settings.Setting) -> None:
    """Accuracy against the bytes that clients send, the clip norm chosen on validation."""
    ways = [dpfl.Compression(), *(dpfl.Compression(**way) for way in setting.some(WAYS))]
    axes = {
        "privacy.epsilon": setting.some(EPSILONS, 1),
        "mechanism.clip_norm": setting.some(CLIP_NORMS, 1),
        "compression": ways,
    }
    frame = setting.run(dpfl.Study(setting.experiment(evaluate_every=100), axes, seeds=setting.seeds))
    setting.save(dpfl.charts.compression(frame), "compression")
    if not setting.quick:
        setting.save(dpfl.charts.compression(frame, "down"), "compression_down")
    setting.show(table(frame), *compared(setting, frame))
    network = setting.experiment(
        model="mlp", privacy=dpfl.Privacy(epsilon=8, delta=settings.delta(setting.data.num_clients))
    )
    formats = setting.some(FORMATS, 1)
    ends = [dpfl.Compression(lite=formats, sparsity=sparsity) for sparsity in setting.some([0.0, 0.9], 1)]
    files = setting.run(dpfl.Study(network, {"compression": ends}, seeds=setting.seeds), "lite")
    setting.show(table_of_files(files, formats), name="lite")


def table(frame: pd.DataFrame) -> pd.DataFrame:
    """The best clip norm of each compression and epsilon, with the bytes of a client's round."""
    keys = ["epsilon", "compression"]
    chosen = dpfl.statistics.best(frame, per=keys, over=["clip_norm"])
    means = chosen.groupby(keys, dropna=False)[["update_bytes", "model_bytes"]].mean().round().reset_index()
    summary = dpfl.statistics.summarise(chosen, [*keys, "clip_norm"])
    return means.merge(summary, on=keys).sort_values(["epsilon", "update_bytes"])


def table_of_files(frame: pd.DataFrame, formats: Sequence[str]) -> pd.DataFrame:
    """Size and accuracy of the files of each format, means over the seeds."""
    tables = []
    for form in formats:
        sizes = frame.groupby("compression")[[f"lite_{form}_bytes", f"lite_{form}_gzip_bytes"]].mean().round()
        sizes = sizes.set_axis(["bytes", "gzip_bytes"], axis=1).reset_index()
        summary = dpfl.statistics.summarise(frame, ["compression"], value=f"lite_{form}_accuracy")
        tables.append(sizes.assign(format=form).merge(summary, on="compression"))
    columns = ["compression", "format", "bytes", "gzip_bytes", "seeds", "mean", "low", "high"]
    return pd.concat(tables, ignore_index=True)[columns].sort_values("compression", kind="stable")


def compared(setting: settings.Setting, frame: pd.DataFrame) -> list[str]:
    """For each epsilon, the best setting of an eighth of the bytes, and the best of all, against none, as sentences."""
    if setting.seeds < 2:
        return []
    chosen = dpfl.statistics.best(frame, per=["epsilon", "compression"], over=["clip_norm"])
    means = chosen.groupby(["epsilon", "compression", "clip_norm"], dropna=False)[
        ["update_bytes", "validation_accuracy"]
    ].mean()
    sentences = []
    for _, part in means.reset_index().groupby("epsilon", dropna=False):
        (whole,) = part[part["compression"] == "none"].itertuples()
        some = part[part["compression"] != "none"]
        few = some[some["update_bytes"] <= whole.update_bytes / FEWER]
        rows = {of["validation_accuracy"].idxmax() for of in (few, some) if len(of)}
        for row in sorted(rows):
            names = ("epsilon", "compression", "clip_norm")
            one, other = {name: part[name][row] for name in names}, {name: getattr(whole, name) for name in names}
            sentences.append(dpfl.statistics.compare(frame, one, other).statement())
    return sentences


if __name__ == "__main__":
    settings.command(answer, "compression")
