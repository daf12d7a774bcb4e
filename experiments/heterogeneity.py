"""Does privacy cost more where clients are unlike each other?

The same examples dealt to the same number of clients by a Dirichlet distribution over classes, from nearly one class a
client (alpha 0.1) to clients alike (iid), at each epsilon, without noise, and by plain federated averaging. The clip
norm of each point is chosen on the validation split.

    uv run python experiments/heterogeneity.py

Writes runs/heterogeneity/{runs.csv,table.md,heterogeneity.png} and prints the table. The dataset must be one that dpfl
deals to clients, such as digits or mnist, or a table without a client column.
"""

import math

import pandas as pd
import settings

import dpfl

ALPHAS = [0.1, 0.3, 1, 10, math.inf]
EPSILONS = [2, 8, None]
CLIP_NORMS = [0.25, 0.5, 1.0]


def answer(setting: settings.Setting) -> None:
    """Accuracy against the heterogeneity of the clients, at each epsilon."""
    partitions = {alpha: "iid" if alpha == math.inf else f"dirichlet:{alpha:g}" for alpha in setting.some(ALPHAS)}
    data = {alpha: setting.load(partition=partition) for alpha, partition in partitions.items()}
    alpha_of = {dealt.fingerprint: alpha for alpha, dealt in data.items()}
    axes = {"privacy.epsilon": setting.some(EPSILONS), "mechanism.clip_norm": setting.some(CLIP_NORMS, 1)}
    study = dpfl.Study(
        [setting.experiment(data=dealt) for dealt in data.values()], axes, seeds=setting.seeds, ceiling=True
    )
    runs = setting.run(study)
    frame = runs.assign(dirichlet_alpha=runs["data_fingerprint"].map(alpha_of))
    setting.save(dpfl.charts.heterogeneity(frame), "heterogeneity")
    setting.show(table(frame))


def table(frame: pd.DataFrame) -> pd.DataFrame:
    """The best clip norm at each epsilon and concentration, plain averaging last."""
    keys = ["mechanism", "epsilon", "dirichlet_alpha"]
    return dpfl.statistics.summarise(dpfl.statistics.best(frame, per=keys, over=["clip_norm"]), [*keys, "clip_norm"])


if __name__ == "__main__":
    settings.command(answer, "heterogeneity")
