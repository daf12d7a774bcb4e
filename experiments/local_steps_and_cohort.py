"""How many clients should take part in a round, and how long should each of them train?

Two studies of user-level privacy: over the expected cohort, and over the local steps of a client in a round, at a fixed
number of rounds. The clip norm of each point is chosen on the validation split. A larger cohort needs more noise on the
sum, since sampling amplifies less, but divides it by more clients; local steps cost no privacy, but updates grow.

    uv run python experiments/local_steps_and_cohort.py

Writes runs/local_steps_and_cohort/{cohort.md,local_steps.md,cohort.png,local_steps.png}, with the runs in two folders
beside them, and prints the tables.
"""

import pandas as pd
import settings

import dpfl

EPSILONS = [1, 4, None]
CLIP_NORMS = [0.25, 0.5, 1.0, 2.0]
FRACTIONS = [0.03, 0.1, 0.3, 0.6, 1.0]
STEPS = [1, 2, 5, 10, 20]


def answer(setting: settings.Setting) -> None:
    """Accuracy against the cohort, then against local steps, at each epsilon."""
    base = setting.experiment()
    clients = base.data.num_clients
    cohorts = [max(1, round(fraction * clients)) for fraction in FRACTIONS]
    shared = {"privacy.epsilon": setting.some(EPSILONS), "mechanism.clip_norm": setting.some(CLIP_NORMS, 1)}
    for column, path, values, chart in (
        ("cohort", "sampler.cohort", cohorts, dpfl.charts.cohort),
        ("local_steps", "local.steps", STEPS, dpfl.charts.local_steps),
    ):
        study = dpfl.Study(base, {path: setting.some(values), **shared}, seeds=setting.seeds, ceiling=True)
        frame = setting.run(study, column)
        setting.save(chart(frame), column)
        setting.show(table(frame, column), name=column)


def table(frame: pd.DataFrame, column: str) -> pd.DataFrame:
    """The best clip norm at each epsilon and value of the column, plain averaging last."""
    runs = dpfl.statistics.best(frame, per=["mechanism", "epsilon", column], over=["clip_norm"])
    return dpfl.statistics.summarise(runs, ["mechanism", "epsilon", column, "clip_norm", "noise_multiplier"])


if __name__ == "__main__":
    settings.command(answer, "local_steps_and_cohort")
