"""The peak memory of dpfl's DP-SGD step, as a fact: it does the step a few times and does not need to be measured."""

import resource
import sys
from pathlib import Path

import numpy as np
from dpfl_dpsgd import private_step
from keras_models import use_threads
from protocol import Work, serve
from workloads import WORKLOADS

import dpfl

STEPS = 3
MICROBATCH = 256


def peak_megabytes() -> float:
    """The most resident memory that this process ever had; not what its parent had, which ru_maxrss can start from."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    unit = 1024**2 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def prepare(workload: str, variant: str, threads: int) -> Work:
    """Takes the batch from the variant's first number; microbatches of 256."""
    use_threads(threads)
    imported = peak_megabytes()
    batch = int(variant.split("-")[0])
    x, y = (np.resize(each, (batch, *each.shape[1:])) for each in WORKLOADS[workload].examples())
    _, step = private_step(workload, (x, y), microbatch_size=MICROBATCH)
    for _ in range(STEPS):
        step()
    facts = {
        "version": dpfl.__version__,
        "batch": batch,
        "microbatch_size": MICROBATCH,
        "peak_megabytes": peak_megabytes(),
        "import_megabytes": imported,
    }
    return Work(step, facts)


if __name__ == "__main__":
    serve(prepare, warm_up=0)
