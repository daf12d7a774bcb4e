"""How much accuracy does epsilon cost?

User-level privacy by the Gaussian mechanism at epsilons from 0.25 to 8, clipping without noise, and plain federated
averaging; the clip norm of each epsilon is chosen on the validation split. Then, seed by seed: what epsilon 1 loses
against no noise.

    uv run python experiments/epsilon.py

Writes runs/epsilon/{runs.csv,table.md,epsilon.png,convergence.png,signal_to_noise.png} and prints the table.
"""

import pandas as pd
import settings

import dpfl

EPSILONS = [0.25, 0.5, 2, 4, 8, 1, None]
CLIP_NORMS = [0.125, 0.25, 0.5, 1.0, 2.0]


def answer(setting: settings.Setting) -> None:
    """Accuracy against epsilon, the clip norm chosen on validation."""
    axes = {"privacy.epsilon": setting.some(EPSILONS), "mechanism.clip_norm": setting.some(CLIP_NORMS, 1)}
    study = dpfl.Study(setting.experiment(evaluate_every=5), axes, seeds=setting.seeds, ceiling=True)
    frame = setting.run(study)
    setting.save(dpfl.charts.epsilon(frame, dpfl.study.tuning_prices(study, ["mechanism.clip_norm"])), "epsilon")
    setting.save(dpfl.charts.convergence(frame, study.history()), "convergence")
    setting.save(dpfl.charts.signal_to_noise(frame, study.history()), "signal_to_noise")
    setting.show(dpfl.charts.best_settings(frame), *compared(setting, frame))


def compared(setting: settings.Setting, frame: pd.DataFrame) -> list[str]:
    """Epsilon 1 against no noise, and clipping against plain averaging, as sentences."""
    if setting.seeds < 2:
        return []
    clipped = frame[frame["mechanism"] != "none"]
    chosen = dpfl.statistics.choose(clipped, over=["clip_norm"])
    private, free = (
        {"mechanism": "gaussian", "epsilon": row.epsilon, "clip_norm": row.clip_norm}
        for row in chosen.itertuples()
        if row.epsilon == 1 or pd.isna(row.epsilon)
    )
    return [
        dpfl.statistics.compare(frame, private, free).statement(),
        dpfl.statistics.compare(frame, free, {"mechanism": "none"}).statement(),
    ]


if __name__ == "__main__":
    settings.command(answer, "epsilon", seeds=10)
