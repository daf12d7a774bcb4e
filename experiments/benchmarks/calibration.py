"""How long it takes to find the noise for a privacy target, beside dp-accounting's own calibration.

Calibrates the Gaussian noise of 100 settings (5 sampling rates x 4 numbers of rounds x 5 epsilons, delta 1e-5), under
add-or-remove and under replace-one: in a new process with an empty cache folder (cold) and in another new process that
finds the answers of the first (warm). Imports are not counted. Then, on the few cells named below, it
calls `dp_accounting.calibrate_dp_mechanism` with `PLDAccountant` at its default grid, from noise 0.2 and 1 and to a
tolerance of 1e-4, and asks that accountant for the epsilon of dpfl's noise, which must not exceed the target nor
fall more than 0.5 % below it.

    uv run python experiments/benchmarks/calibration.py

takes about two minutes, most of it dp-accounting's. Exits with an error if an epsilon is outside its bounds.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor

import dp_accounting
from dp_accounting.pld import PLDAccountant
from rich.console import Console
from rich.table import Table

from dpfl.privacy import noise_multiplier, poisson_gaussian

DELTA = 1e-5
RATES, ROUNDS, EPSILONS = (0.001, 0.01, 0.03, 0.1, 0.3), (10, 100, 300, 1000), (0.5, 1.0, 2.0, 4.0, 8.0)
GRID = list(itertools.product(RATES, ROUNDS, EPSILONS))
COMPARED = [(0.01, 100, 1.0), (0.03, 300, 2.0), (0.1, 1000, 4.0), (0.3, 100, 1.0), (0.3, 1000, 8.0)]
LOWEST = 0.995  # of the target
RELATIONS = ("add_or_remove_one", "replace_one")

Cell = tuple[float, int, float]


def calibrated(relation: str) -> dict[Cell, tuple[float, float]]:
    """For each cell of the grid the noise multiplier and the seconds that it took."""
    answers = {}
    for cell in GRID:
        rate, rounds, target = cell
        start = time.perf_counter()
        noise = noise_multiplier(target, DELTA, sampling_rate=rate, steps=rounds, relation=relation)
        answers[cell] = noise, time.perf_counter() - start
    return answers


def in_a_new_process(relation: str) -> dict[Cell, tuple[float, float]]:
    """`calibrated`, remembering nothing but what is in the cache folder."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as worker:
        return worker.submit(calibrated, relation).result()


def by_dp_accounting(cell: Cell) -> tuple[float, float]:
    """The noise multiplier of dp-accounting's own calibration, and the seconds that it took."""
    rate, rounds, target = cell
    start = time.perf_counter()
    noise = dp_accounting.calibrate_dp_mechanism(
        PLDAccountant,
        lambda noise: poisson_gaussian(noise, rate, rounds),
        target,
        DELTA,
        bracket_interval=dp_accounting.LowerEndpointAndGuess(0.2, 1.0),
        tol=1e-4,
    )
    return noise, time.perf_counter() - start


def main() -> None:
    """Prints the times, and checks the epsilons."""
    console = Console()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        grids = Table("relation", "cache", "seconds", "median of a cell, ms", title=f"{len(GRID)} calibrations by dpfl")
        answers = {}
        for relation, state in itertools.product(RELATIONS, ("cold", "warm")):
            found = in_a_new_process(relation)
            seconds = [taken for _, taken in found.values()]
            grids.add_row(relation, state, f"{sum(seconds):.3f}", f"{1e3 * statistics.median(seconds):.2f}")
            answers.setdefault(relation, found)
        console.print(grids)

    cells = Table("q", "T", "eps", "dpfl, s", "theirs, s", "noise", "theirs", "eps / target")
    ours, theirs, outside = [], [], []
    for cell in COMPARED:
        rate, rounds, target = cell
        noise, taken = answers[RELATIONS[0]][cell]
        their_noise, their_taken = by_dp_accounting(cell)
        spent = PLDAccountant().compose(poisson_gaussian(noise, rate, rounds)).get_epsilon(DELTA) / target
        ours.append(taken)
        theirs.append(their_taken)
        if not LOWEST <= spent <= 1:
            outside.append(cell)
        numbers = (f"{taken:.3f}", f"{their_taken:.2f}", f"{noise:g}", f"{their_noise:.6g}", f"{spent:.6f}")
        cells.add_row(f"{rate:g}", f"{rounds}", f"{target:g}", *numbers)
    cells.title = f"dpfl and dp-accounting: {statistics.median(theirs) / statistics.median(ours):.0f} x in the median"
    console.print(cells)
    if outside:
        sys.exit(f"The epsilon of these cells is outside [{LOWEST}, 1] of the target: {outside}.")


if __name__ == "__main__":
    main()
