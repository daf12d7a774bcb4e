"""The systems that run.py can measure, and the environments that they need.

To add one, write its script in systems/ and an entry here. The workloads are in systems/workloads.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

SYSTEMS_FOLDER = Path(__file__).parent / "systems"
PYTORCH = ("torch==2.13.0", "opacus==1.6.0")
JAX = ("jax==0.10.2", "jaxlib==0.10.2", "jax-privacy==2.0.0", "optax==0.2.8")


@dataclass(frozen=True)
class System:
    """One of the systems side by side.

    Attributes:
        script: its worker, a file in systems/; see systems/protocol.py.
        workloads: the workloads that it can do, as a pattern of names.
        variants: its ways to do them, each measured by itself; the fastest is the one in ratios.
        requirements: what its own environment needs; none stands for dpfl's own environment.
        own_plain: the system that does the same work without privacy in the same framework, if there is one.
    """

    script: str
    workloads: str
    variants: tuple[str, ...] = ("",)
    requirements: tuple[str, ...] = ()
    own_plain: str | None = None

    def can_do(self, workload: str) -> bool:
        """Whether the workload is among its workloads."""
        return fnmatch(workload, self.workloads)


SYSTEMS: dict[str, System] = {
    "plain": System("keras_plain.py", "dpsgd-*"),
    "dpfl": System("dpfl_dpsgd.py", "dpsgd-*", own_plain="plain"),
    "tf-privacy": System(
        "tf_privacy_dpsgd.py", "dpsgd-*", ("loop", "vectorized", "DPModel", "DPModel-xla"), own_plain="plain"
    ),
    "torch": System("torch_plain.py", "dpsgd-*", requirements=PYTORCH),
    "opacus": System("opacus_dpsgd.py", "dpsgd-*", ("hooks", "ghost", "functorch", "ew"), PYTORCH, "torch"),
    "jax": System("jax_plain.py", "dpsgd-*", requirements=JAX),
    "jax-privacy": System("jax_privacy_dpsgd.py", "dpsgd-*", ("vmap", "microbatches-32"), JAX, "jax"),
}
MATMUL = System("matmul.py", "*")
MEMORY = System("dpfl_memory.py", "dpsgd-cnn", ("256", "4096-in-microbatches"))
