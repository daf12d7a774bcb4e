"""jax-privacy's DP-SGD step in JAX: `clipped_grad` and `gaussian_privatizer`, with optax' SGD, jitted."""

from collections.abc import Callable
from typing import Any

import jax
import jax_privacy
import optax
from checks import check_step
from jax_models import change, mean_loss, new_weights, plain_step, step_of
from protocol import Work, serve
from workloads import CLIP_NORM, LEARNING_RATE, NOISE_MULTIPLIER, SEED, WORKLOADS

MICROBATCHES = {"vmap": None, "microbatches-32": 32}


def private_step(
    workload: str, variant: str, noise_multiplier: float, clip_norm: float, alike: bool = False
) -> Callable[[], Any]:
    """Returns a function that does one private step."""
    batch = WORKLOADS[workload].facts["batch"]
    gradient = jax_privacy.clipped_grad(
        mean_loss(workload),
        l2_clip_norm=clip_norm,
        normalize_by=batch,
        batch_argnums=(1, 2),
        microbatch_size=MICROBATCHES[variant],
    )
    privatizer = jax_privacy.noise_addition.gaussian_privatizer(
        stddev=noise_multiplier * gradient.sensitivity(), prng_key=jax.random.key(SEED)
    )
    optimizer = optax.sgd(LEARNING_RATE)

    def update(state: Any, x: jax.Array, y: jax.Array) -> Any:
        weights, noise, memory = state
        noisy, noise = privatizer.update(gradient(weights, x, y), noise)
        changes, memory = optimizer.update(noisy, memory)
        return optax.apply_updates(weights, changes), noise, memory

    weights = new_weights(workload)
    return step_of(update, (weights, privatizer.init(weights), optimizer.init(weights)), workload, alike)


def prepare(workload: str, variant: str, threads: int) -> Work:
    """A step on one batch, checked against the plain step; XLA takes its threads from the processors it may use."""
    check_step(
        lambda noise, clip, alike: change(private_step(workload, variant, noise, clip, alike), workload),
        lambda alike: change(plain_step(workload, alike), workload),
        WORKLOADS[workload].facts["batch"],
    )
    facts = {
        "version": jax_privacy.__version__,
        "parameters": WORKLOADS[workload].parameters,
        "jax": jax.__version__,
    }
    return Work(private_step(workload, variant, NOISE_MULTIPLIER, CLIP_NORM), facts)


if __name__ == "__main__":
    serve(prepare)
