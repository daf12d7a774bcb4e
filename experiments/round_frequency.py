"""How often should clients send what they learned?

A client's local work is held at 300 steps and split into 3 to 300 rounds. At user level, at a fixed epsilon and, for
contrast, at a fixed noise multiplier, where each more round costs epsilon; the clip norm of each point is chosen on the
validation split. At example level, with DP-SGD in the clients of a few silos, what costs is the local step, not the
round: however the steps are split, the noise is the same.

    uv run python experiments/round_frequency.py

Writes runs/round_frequency/{user.md,example.md,round_frequency_user.png,round_frequency_example.png}, with the runs in
two folders beside them, and prints the tables. At example level a dataset without clients of its own is dealt to 10.
"""

from __future__ import annotations

import settings

import dpfl
from dpfl.statistics import best, summarise

LOCAL_WORK = 300
ROUNDS = [3, 10, 30, 100, 300]
EPSILONS, CLIP_NORMS = [1, 4], [0.25, 0.5, 1.0, 2.0]
NOISE_MULTIPLIERS = [8.0, 2.5]  # about what epsilon 1 and 4 ask for in 100 rounds of 90 among 300 clients
SILOS, EXAMPLE_EPSILONS, EXAMPLE_CLIP = 10, [1, 2, 8], 1.0
DEALT = ("digits", "mnist", "fashion_mnist", "cifar10")


def answer(setting: settings.Setting) -> None:
    """Accuracy against the number of rounds at fixed local work, for clients and for examples."""
    rounds = dpfl.study.round_frequency(ROUNDS[:2] if setting.quick else ROUNDS, LOCAL_WORK)

    clients = setting.experiment()
    clip_norms = setting.some(CLIP_NORMS, 1)
    calibrated = {"privacy.epsilon": EPSILONS, "mechanism.clip_norm": clip_norms, **rounds}
    free = clients.replace(mechanism=dpfl.Gaussian(clip_norm=1.0, noise_multiplier=1.0), **{"privacy.epsilon": None})
    fixed = {"mechanism.noise_multiplier": NOISE_MULTIPLIERS, "mechanism.clip_norm": clip_norms, **rounds}
    experiments = [
        *dpfl.Study(clients, calibrated, ceiling=True).experiments,
        *dpfl.study.grid(free, fixed),
    ]
    frame = setting.run(dpfl.Study(experiments, seeds=setting.seeds), "user")
    setting.save(dpfl.charts.round_frequency(frame), "round_frequency_user")
    columns = ["mechanism", "epsilon", "rounds", "local_steps", "noise_multiplier", "clip_norm", "epsilon_spent"]
    noised = frame["epsilon"].isna() & (frame["mechanism"] != "none")
    frame = frame.assign(fixed_noise=frame["noise_multiplier"].where(noised))
    chosen = best(frame, per=["mechanism", "epsilon", "fixed_noise", "rounds"], over=["clip_norm"])
    setting.show(summarise(chosen, columns), name="user")

    data = setting.load(clients=SILOS) if setting.source in DEALT else setting.data
    silos = setting.experiment(
        data=data,
        local=setting.local(LOCAL_WORK, batch_size=32, example_clip=EXAMPLE_CLIP),
        mechanism=dpfl.NoMechanism(),
        privacy=dpfl.Privacy(unit="example", epsilon=1, delta=settings.delta(data.num_examples)),
        sampler=dpfl.Everyone(),
    )
    axes = {"privacy.epsilon": setting.some(EXAMPLE_EPSILONS, 1), **rounds}
    frame = setting.run(dpfl.Study(silos, axes, seeds=setting.seeds, ceiling=True), "example")
    setting.save(dpfl.charts.round_frequency(frame), "round_frequency_example")
    columns = ["unit", "epsilon", "rounds", "local_steps", "example_noise_multiplier", "example_epsilon"]
    setting.show(summarise(frame, columns), name="example")


if __name__ == "__main__":
    settings.command(answer, "round_frequency")
