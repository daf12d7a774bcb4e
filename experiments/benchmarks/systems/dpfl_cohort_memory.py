"""The peak memory of a round of dpfl's in-graph engine, as a fact, with small and large cohorts of the same clients."""

import time
from pathlib import Path

import numpy as np
from dpfl_rounds import federated, rounds_of
from keras_models import use_threads
from protocol import Work, serve
from workloads import SEED, WORKLOADS

import dpfl

POPULATION = 10_000
ROUNDS = 2


def megabytes(name: str) -> float:
    """A field of Linux' /proc/self/status: VmRSS, the resident memory, or VmHWM, the most that it was."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def forget_the_peak() -> None:
    """Sets VmHWM to what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def prepare(workload: str, variant: str, threads: int) -> Work:
    """Takes the cohort from the variant; the data is the same.

    What the data takes while it is made and checked is no part of the peak, since a cohort's memory could hide in it.
    The rounds are, the first with the building of its graph. "beyond" is the peak without the imports and the arrays of
    the data.
    """
    use_threads(threads)
    imported = megabytes("VmRSS")
    cohort = np.sort(np.random.default_rng(SEED).choice(POPULATION, int(variant), replace=False))
    data = federated(workload, *WORKLOADS[workload].client_examples(POPULATION))
    rounds = rounds_of(workload, data)
    forget_the_peak()
    before = megabytes("VmRSS")
    seconds = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        rounds.run([cohort])
        seconds.append(time.perf_counter() - started)
    peak, of_data = megabytes("VmHWM"), (data.x.nbytes + data.y.nbytes) / 1024**2
    facts = {
        "version": dpfl.__version__,
        "cohort": len(cohort),
        "clients": POPULATION,
        "import_megabytes": imported,
        "data_megabytes": of_data,
        "before_megabytes": before,
        "peak_megabytes": peak,
        "beyond_megabytes": peak - imported - of_data,
        "milliseconds_a_client": 1_000 * seconds[-1] / len(cohort),
    }
    return Work(lambda: None, facts)


if __name__ == "__main__":
    serve(prepare, warm_up=0)
