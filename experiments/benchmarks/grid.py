"""How long the default grid of `dpfl tradeoff` takes, beside the same rounds under TensorFlow Federated.

Runs `dpfl tradeoff` as it is, from a cold cache, and takes its time from start to end: with imports, calibration and
figures. Then it times rounds of the grid's experiments under `engine="tff"`, at each number of local steps, with a
full cohort's expected clients, and multiplies them with how many such rounds the grid has, divided by the number of
workers. TFF's start, compilation, evaluation and figures are left out of its price.

    uv run python experiments/benchmarks/grid.py

takes about three minutes and prints a table.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

import dpfl
from dpfl.simulation.run import _start

WORKERS, LOCAL_WORK, COHORT, CLIENTS, TIMED_ROUNDS = 2, 300, 90, 300, 5


def seconds_of_the_grid(folder: Path) -> float:
    """Runs the default grid in a process of its own."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
    program = Path(sys.executable).with_name("dpfl")
    command = [program, "tradeoff", "--workers", str(WORKERS), "--out", folder / "grid"]
    start = time.perf_counter()
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def seconds_of_a_tff_round(rounds: int) -> float:
    """Median over some rounds, after one that compiles."""
    experiment = dpfl.Experiment(
        data=dpfl.data.load("digits", clients=CLIENTS),
        model="softmax",
        local=dpfl.ClientTraining(steps=LOCAL_WORK // rounds, batch_size=5, learning_rate=0.5),
        mechanism=dpfl.Gaussian(clip_norm=0.5, noise_multiplier=1.0),
        privacy=dpfl.Privacy(epsilon=None),
        sampler=dpfl.Poisson(cohort=COHORT),
        rounds=rounds,
        engine="tff",
    )
    _, process = _start(experiment, experiment.plan(), experiment.client_plan(), 0)
    random, seconds = np.random.default_rng(0), []
    for _ in range(TIMED_ROUNDS + 1):
        cohort = np.sort(random.choice(CLIENTS, COHORT, replace=False))
        start = time.perf_counter()
        process.run([cohort])
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def main() -> None:
    """Measures both and prints what they took."""
    with tempfile.TemporaryDirectory() as folder:
        ours = seconds_of_the_grid(Path(folder))
        runs = pd.read_csv(Path(folder) / "grid" / "runs.csv")
    table = Table("rounds", "local steps", "runs", "TFF: s a round", "TFF: h for all")
    total = 0.0
    for rounds, count in runs["rounds"].value_counts().sort_index().items():
        each = seconds_of_a_tff_round(int(rounds))
        total += each * rounds * count
        table.add_row(
            str(rounds), str(LOCAL_WORK // rounds), str(count), f"{each:.2f}", f"{each * rounds * count / 3600:.2f}"
        )
    console = Console()
    console.print(table)
    priced, done = total / WORKERS, int(runs["rounds"].sum())
    console.print(
        f"dpfl tradeoff: {len(runs)} runs, {done:,} rounds in {ours:.1f} s with {WORKERS} workers; "
        f"TFF's rounds on {WORKERS} processes that do not slow each other: {priced / 3600:.2f} h, "
        f"{priced / ours:,.0f} times as long."
    )


if __name__ == "__main__":
    main()
