"""A round of federated averaging in FedJAX: its `for_each_client`, client datasets, optimizer and tree functions.

FedJAX (0.0.17, its last release) has no differential privacy. What is added here is little: `client_final`, which its
documentation names as the place for it, clips a client's update by FedJAX' own `tree_clip_by_global_norm`, and the
server draws Gaussian noise by `jax.random`. Otherwise the round is that of its `algorithms.fed_avg`, without the norms
that it reports of all clients.

Of its two backends for `for_each_client` this is `jit`, one client after the other. The other one, `pmap`, takes as
many clients at a time as there are devices, which on CPUs are `--xla_force_host_platform_device_count`. It calls
`jax.device_put_replicated`, which JAX 0.10 no longer has, and with JAX 0.4.38 to 0.7.2 it returns updates with one
dimension too many; mended by hand it was slower on those (2 devices on 2 cores) than `jit` on JAX 0.10.2 for all
workloads that were tried.

The models are pure functions of their weights, which are a list in Keras' layout and order.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from typing import Any

import fedjax
import jax
import jax.numpy as jnp
import numpy as np
from checks import check_parameters, check_round
from protocol import Work, serve
from workloads import CLIP_NORM, LEARNING_RATE, NOISE_MULTIPLIER, SEED, WORKLOADS, FederatedWorkload

Weights = list[jax.Array]


def _dense(weights: Sequence[jax.Array], x: jax.Array) -> jax.Array:
    kernel, bias = weights
    return x @ kernel + bias


def _layers(weights: Weights, x: jax.Array) -> jax.Array:
    """Dense layers with rectifiers between them: softmax regression, if there is one layer."""
    for place in range(0, len(weights) - 2, 2):
        x = jax.nn.relu(_dense(weights[place : place + 2], x))
    return _dense(weights[-2:], x)


def _convolution(kernel: jax.Array, bias: jax.Array, x: jax.Array) -> jax.Array:
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.nn.relu(jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=layout) + bias)


def _cnn(weights: Weights, x: jax.Array) -> jax.Array:
    x = _convolution(*weights[2:4], _convolution(*weights[:2], x))
    x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return _layers(weights[4:], x.reshape(len(x), -1))


def _lstm(weights: Weights, tokens: jax.Array) -> jax.Array:
    embedding, kernel, recurrent, bias, *last = weights
    inputs = _dense((kernel, bias), embedding[tokens])

    def cell(carry: tuple[jax.Array, jax.Array], gates: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        hidden, memory = carry
        entry, forget, candidate, exit_ = jnp.split(gates + hidden @ recurrent, 4, axis=-1)
        memory = jax.nn.sigmoid(forget) * memory + jax.nn.sigmoid(entry) * jnp.tanh(candidate)
        return (jax.nn.sigmoid(exit_) * jnp.tanh(memory), memory), None

    zeros = jnp.zeros((len(tokens), recurrent.shape[0]))
    (hidden, _), _ = jax.lax.scan(cell, (zeros, zeros), jnp.swapaxes(inputs, 0, 1))
    return _dense(last, hidden)


FORWARD: dict[str, Callable[[Weights, jax.Array], jax.Array]] = {
    "fedavg-mlp": _layers,
    "fedavg-softmax": _layers,
    "fedavg-cnn": _cnn,
    "fedavg-shakespeare": _lstm,
    "fedavg-large": _layers,
}


def gradient_of(name: str) -> Callable[[Weights, dict[str, jax.Array]], Weights]:
    """Returns the gradient of a minibatch's mean cross-entropy, as a function of weights and minibatch."""

    def loss(weights: Weights, batch: dict[str, jax.Array]) -> jax.Array:
        logits = jax.nn.log_softmax(FORWARD[name](weights, batch["x"]))
        return -jnp.take_along_axis(logits, batch["y"][:, None], axis=-1).mean()

    return jax.grad(loss)


def training(name: str, clip_norm: float) -> Callable[..., Any]:
    """Returns FedJAX' function that trains each client and clips its update."""
    gradient = gradient_of(name)
    optimizer = fedjax.optimizers.sgd(LEARNING_RATE)

    def client_init(server: Weights, _: Any) -> dict[str, Any]:
        return {"weights": server, "optimizer": optimizer.init(server)}

    def client_step(state: dict[str, Any], batch: dict[str, jax.Array]) -> dict[str, Any]:
        gradients = gradient(state["weights"], batch)
        memory, weights = optimizer.apply(gradients, state["optimizer"], state["weights"])
        return {"weights": weights, "optimizer": memory}

    def client_final(server: Weights, state: dict[str, Any]) -> Weights:
        update = [after - before for after, before in zip(state["weights"], server, strict=True)]
        clipped: Weights = fedjax.tree_util.tree_clip_by_global_norm(update, clip_norm)
        return clipped

    return fedjax.for_each_client(client_init, client_step, client_final)


@jax.jit
def _released(weights: Weights, total: Weights, key: jax.Array, deviation: jax.Array, clients: jax.Array) -> Weights:
    keys = jax.random.split(key, len(weights))
    return [
        weight + (each + deviation * jax.random.normal(own, each.shape)) / clients
        for weight, each, own in zip(weights, total, keys, strict=True)
    ]


def rounds_of(
    workload: FederatedWorkload, name: str, *, noise_multiplier: float, clip_norm: float, x: np.ndarray, y: np.ndarray
) -> Callable[[], Weights]:
    """Returns a function that does one round with all clients from the weights that the last round left."""
    train = training(name, clip_norm)
    clients = [
        (number, fedjax.ClientDataset({"x": own_x, "y": own_y}))
        for number, (own_x, own_y) in enumerate(zip(x, y, strict=True))
    ]
    weights = [jnp.asarray(each) for each in workload.first_weights()]
    key = jax.random.key(SEED)

    def one_round() -> Weights:
        nonlocal weights, key
        key, own = jax.random.split(key)
        batches = (
            (number, data.shuffle_repeat_batch(batch_size=workload.batch, num_epochs=1), {}) for number, data in clients
        )
        total = fedjax.tree_util.tree_sum(update for _, update in train(weights, batches))
        weights = _released(weights, total, own, noise_multiplier * clip_norm, float(len(clients)))
        return jax.block_until_ready(weights)

    return one_round


def prepare(workload: str, variant: str, threads: int) -> Work:
    """Rounds with all clients, the first of them checked; XLA takes its threads from the processors it may use."""
    work = WORKLOADS[workload]
    assert isinstance(work, FederatedWorkload)
    fedjax.set_for_each_client_backend("jit")

    def checked(noise_multiplier: float, clip_norm: float, x: np.ndarray, y: np.ndarray) -> list[np.ndarray]:
        one = rounds_of(work, workload, noise_multiplier=noise_multiplier, clip_norm=clip_norm, x=x, y=y)
        return [np.asarray(each) for each in one()]

    compiled = jax.jit(gradient_of(workload))

    def gradient(weights: list[np.ndarray], x: np.ndarray, y: np.ndarray) -> list[np.ndarray]:
        return [np.asarray(each) for each in compiled([jnp.asarray(weight) for weight in weights], {"x": x, "y": y})]

    check_parameters(sum(each.size for each in work.first_weights()), work.parameters)
    check_round(checked, gradient, work)
    x, y = work.client_examples()
    one_round = rounds_of(work, workload, noise_multiplier=NOISE_MULTIPLIER, clip_norm=CLIP_NORM, x=x, y=y)
    facts = {
        "version": importlib.metadata.version("fedjax"),
        "parameters": work.parameters,
        "clients": len(x),
        "jax": jax.__version__,
    }
    return Work(one_round, facts)


if __name__ == "__main__":
    serve(prepare)
