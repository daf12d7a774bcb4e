"""The systems that run.py can measure, and the environments that they need.

To add one, write its script in systems/ and an entry here. The workloads are in systems/workloads.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

SYSTEMS_FOLDER = Path(__file__).parent / "systems"
TORCH = ("torch==2.13.0",)
PYTORCH = (*TORCH, "opacus==1.6.0")
JAX = ("jax==0.10.2", "jaxlib==0.10.2", "jax-privacy==2.0.0", "optax==0.2.8")


@dataclass(frozen=True)
class System:
    """One of the systems side by side.

    Attributes:
        scripts: its workers, files in systems/ (see systems/protocol.py), by the workloads that each can do, as a
            pattern of names.
        variants: its ways to do them, each measured by itself; the fastest is the one in ratios.
        requirements: what its own environment needs; none stands for dpfl's own environment.
        own_plain: the system that does the same work without privacy in the same framework, if there is one.
    """

    scripts: Mapping[str, str]
    variants: tuple[str, ...] = ("",)
    requirements: tuple[str, ...] = ()
    own_plain: str | None = None

    def script(self, workload: str) -> str | None:
        """The file of its worker for a workload; None if it cannot do it."""
        return next((script for pattern, script in self.scripts.items() if fnmatch(workload, pattern)), None)


@dataclass(frozen=True)
class MemoryTest(System):
    """One of dpfl's own workers that measure memory, in two variants, a small one and a large one.

    Attributes:
        target: how many times as much memory the large one may take.
        compared: the fact that is compared.
    """

    target: float = 1.0
    compared: str = "peak_megabytes"


STEPS, ROUNDS = "dpsgd-*", "fedavg-*"
SYSTEMS: dict[str, System] = {
    "plain": System({STEPS: "keras_plain.py"}),
    "dpfl": System({STEPS: "dpfl_dpsgd.py", ROUNDS: "dpfl_rounds.py"}, own_plain="plain"),
    "tf-privacy": System(
        {STEPS: "tf_privacy_dpsgd.py"}, ("loop", "vectorized", "DPModel", "DPModel-xla"), own_plain="plain"
    ),
    "torch": System({STEPS: "torch_plain.py"}, requirements=PYTORCH),
    "opacus": System({STEPS: "opacus_dpsgd.py"}, ("hooks", "ghost", "functorch", "ew"), PYTORCH, "torch"),
    "jax": System({STEPS: "jax_plain.py"}, requirements=JAX),
    "jax-privacy": System({STEPS: "jax_privacy_dpsgd.py"}, ("vmap", "microbatches-32"), JAX, "jax"),
    "tff": System(
        {ROUNDS: "tff_rounds.py"},
        ("functional-iterator", "iterator-tensors", "iterator-resident", "functional", "keras"),
    ),
    "pfl-research": System({ROUNDS: "pfl_rounds.py"}, ("1-thread", "2-threads", "2-processes"), ("pfl==0.6.0", *TORCH)),
    "flower": System(
        {ROUNDS: "flower_rounds.py"},
        ("server-clip", "client-clip"),
        ("flwr[simulation]==1.41.0", "ray==2.55.1", *TORCH),
    ),
    "fedjax": System(
        {ROUNDS: "fedjax_rounds.py"},
        requirements=("fedjax==0.0.17", "dm-haiku==0.0.17", "jax==0.10.2", "jaxlib==0.10.2"),
    ),
}
MATMUL = System({"*": "matmul.py"})
MEMORY: dict[str, MemoryTest] = {
    "dpsgd-cnn": MemoryTest({"dpsgd-cnn": "dpfl_memory.py"}, ("256", "4096-in-microbatches"), target=1.3),
    "fedavg-large": MemoryTest(
        {"fedavg-large": "dpfl_cohort_memory.py"}, ("100", "10000"), target=1.2, compared="beyond_megabytes"
    ),
}
