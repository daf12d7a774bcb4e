"""What does each mechanism's trust cost, at the same epsilon?

All mechanisms under one sampler and one relation that all of them have an analysis for: groups of clients take turns
(Cyclic, nothing is amplified), and neighbours differ in one client replaced by an empty contribution. A server that
sees all updates and noises their sum (Gaussian, adaptive clipping, and correlated noise: tree aggregation and a banded
matrix), one that sees just their sum by secure aggregation (distributed discrete Gaussian), and one that is not trusted
at all (local Gaussian). Beside them, in the table alone, the Gaussian mechanism under Poisson sampling, whose
amplification the comparison leaves out. The clip norm of each point is chosen on the validation split.

    uv run python experiments/mechanisms.py

Writes runs/mechanisms/{runs.csv,table.md,mechanisms.png} and prints the table.
"""

import math

import pandas as pd
import settings

import dpfl

EPSILONS = [1, 2, 4, 8, 16]
CLIP_NORMS = [0.25, 1.0]


def answer(setting: settings.Setting) -> None:
    """Accuracy against epsilon for each mechanism."""
    clients = setting.data.num_clients
    sampler = dpfl.Cyclic(cohort=max(1, math.ceil(0.2 * clients)))
    base = setting.experiment(
        sampler=sampler,
        privacy=dpfl.Privacy(epsilon=1, delta=settings.delta(clients), relation="replace_special"),
    )
    bands = sampler.period(clients)
    mechanisms = [
        dpfl.AdaptiveClipping(clip_norm=1.0, count_noise=0.5),  # room for much noise in few clients
        dpfl.TreeAggregation(clip_norm=1.0),
        dpfl.BandedMatrix(clip_norm=1.0, bands=bands),
        dpfl.DistributedDiscreteGaussian(clip_norm=1.0),
        dpfl.LocalGaussian(clip_norm=1.0),
        dpfl.Gaussian(clip_norm=1.0),
    ]
    experiments = [base.replace(mechanism=mechanism) for mechanism in setting.some(mechanisms)]
    sampled = base.replace(sampler=dpfl.Poisson(cohort=sampler.cohort))
    axes = {"privacy.epsilon": setting.some(EPSILONS), "mechanism.clip_norm": setting.some(CLIP_NORMS, 1)}
    study = dpfl.Study([*experiments, sampled], axes, seeds=setting.seeds, ceiling=True)
    frame = setting.run(study)
    cyclic = frame[frame["sampler"] == "cyclic"]
    setting.save(dpfl.charts.mechanisms(cyclic), "mechanisms")
    setting.show(table(frame))


def table(frame: pd.DataFrame) -> pd.DataFrame:
    """The best clip norm of each mechanism and epsilon."""
    keys = ["mechanism", "sampler", "epsilon"]
    return dpfl.statistics.summarise(
        dpfl.statistics.best(frame, per=keys, over=["clip_norm"]), [*keys, "clip_norm", "noise_multiplier"]
    )


if __name__ == "__main__":
    settings.command(answer, "mechanisms")
