"""The non-private step in JAX."""

import jax
from jax_models import plain_step
from protocol import Work, serve
from workloads import WORKLOADS


def prepare(workload: str, variant: str, threads: int) -> Work:
    """`jax.grad` and optax' SGD, jitted; XLA takes as many threads as the process may use processors."""
    return Work(plain_step(workload), {"version": jax.__version__, "parameters": WORKLOADS[workload].parameters})


if __name__ == "__main__":
    serve(prepare)
