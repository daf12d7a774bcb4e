"""The workloads' models in JAX: pure functions of their weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from checks import check_parameters
from workloads import LEARNING_RATE, SEED, WORKLOADS

Weights = dict[str, Any]
Forward = Callable[[Weights, jax.Array], jax.Array]


def _kernel(generator: np.random.Generator, *shape: int) -> jax.Array:
    """Uniform as Glorot and Bengio have it."""
    field = int(np.prod(shape[:-2]))
    limit = np.sqrt(6 / (field * (shape[-2] + shape[-1])))
    return jnp.asarray(generator.uniform(-limit, limit, shape), jnp.float32)


def _layer(generator: np.random.Generator, *shape: int) -> Weights:
    return {"kernel": _kernel(generator, *shape), "bias": jnp.zeros(shape[-1])}


def _dense(layer: Weights, x: jax.Array) -> jax.Array:
    return x @ layer["kernel"] + layer["bias"]


def _convolution(layer: Weights, x: jax.Array, padding: str) -> jax.Array:
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, layer["kernel"], (2, 2), padding, dimension_numbers=layout) + layer["bias"]


def _pool(x: jax.Array) -> jax.Array:
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 1, 1, 1), "VALID")


def _normalised(layer: Weights, x: jax.Array) -> jax.Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-3) * layer["scale"] + layer["bias"]


def _cnn_weights(generator: np.random.Generator) -> Weights:
    return {
        "first": _layer(generator, 8, 8, 1, 16),
        "second": _layer(generator, 4, 4, 16, 32),
        "third": _layer(generator, 512, 32),
        "last": _layer(generator, 32, 10),
    }


def _cnn(weights: Weights, x: jax.Array) -> jax.Array:
    x = _pool(jax.nn.relu(_convolution(weights["first"], x, "SAME")))
    x = _pool(jax.nn.relu(_convolution(weights["second"], x, "VALID")))
    x = jax.nn.relu(_dense(weights["third"], x.reshape(len(x), -1)))
    return _dense(weights["last"], x)


def _mlp_weights(generator: np.random.Generator) -> Weights:
    return {"first": _layer(generator, 784, 100), "last": _layer(generator, 100, 10)}


def _mlp(weights: Weights, x: jax.Array) -> jax.Array:
    return _dense(weights["last"], jax.nn.relu(_dense(weights["first"], x)))


def _lstm_weights(generator: np.random.Generator) -> Weights:
    return {
        "embedding": jnp.asarray(generator.uniform(-0.05, 0.05, (100, 32)), jnp.float32),
        "input": _layer(generator, 32, 256),
        "state": _kernel(generator, 64, 256),
        "last": _layer(generator, 64, 2),
    }


def _lstm(weights: Weights, tokens: jax.Array) -> jax.Array:
    inputs = _dense(weights["input"], weights["embedding"][tokens])

    def cell(carry: tuple[jax.Array, jax.Array], gates: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        hidden, memory = carry
        entry, forget, candidate, exit_ = jnp.split(gates + hidden @ weights["state"], 4, axis=-1)
        memory = jax.nn.sigmoid(forget) * memory + jax.nn.sigmoid(entry) * jnp.tanh(candidate)
        return (jax.nn.sigmoid(exit_) * jnp.tanh(memory), memory), None

    zeros = jnp.zeros((len(tokens), 64))
    (hidden, _), _ = jax.lax.scan(cell, (zeros, zeros), jnp.swapaxes(inputs, 0, 1))
    return _dense(weights["last"], hidden)


def _transformer_weights(generator: np.random.Generator) -> Weights:
    norms = {name: {"scale": jnp.ones(64), "bias": jnp.zeros(64)} for name in ("first_norm", "second_norm")}
    projections = {name: _layer(generator, 64, 64) for name in ("query", "key", "value", "out")}
    return {
        "embedding": jnp.asarray(generator.uniform(-0.05, 0.05, (1_000, 64)), jnp.float32),
        "up": _layer(generator, 64, 128),
        "down": _layer(generator, 128, 64),
        "last": _layer(generator, 64, 10),
        **norms,
        **projections,
    }


def _transformer(weights: Weights, tokens: jax.Array) -> jax.Array:
    x = weights["embedding"][tokens]
    query, key, value = (_dense(weights[name], x).reshape(*tokens.shape, 4, 16) for name in ("query", "key", "value"))
    attended = jax.nn.dot_product_attention(query, key, value).reshape(x.shape)
    x = _normalised(weights["first_norm"], x + _dense(weights["out"], attended))
    x = _normalised(weights["second_norm"], x + _dense(weights["down"], jax.nn.relu(_dense(weights["up"], x))))
    return _dense(weights["last"], x.mean(axis=1))


MODELS: dict[str, tuple[Callable[[np.random.Generator], Weights], Forward]] = {
    "dpsgd-cnn": (_cnn_weights, _cnn),
    "dpsgd-mlp": (_mlp_weights, _mlp),
    "dpsgd-lstm": (_lstm_weights, _lstm),
    "dpsgd-transformer": (_transformer_weights, _transformer),
}


def new_weights(workload: str) -> Weights:
    """Returns the first weights of the workload's model, the same at every call.

    Raises:
        ValueError: if their number is not the workload's.
    """
    weights = MODELS[workload][0](np.random.default_rng(SEED))
    check_parameters(sum(each.size for each in jax.tree.leaves(weights)), WORKLOADS[workload].parameters)
    return weights


def mean_loss(workload: str) -> Callable[[Weights, jax.Array, jax.Array], jax.Array]:
    """The mean cross-entropy as a function of weights, inputs and labels."""
    forward = MODELS[workload][1]
    return lambda weights, x, y: optax.softmax_cross_entropy_with_integer_labels(forward(weights, x), y).mean()


def step_of(update: Callable[..., Any], state: Any, workload: str, alike: bool = False) -> Callable[[], Any]:
    """Returns a function that does one jitted step on the state that the last one left, and returns when it is done.

    Args:
        update: (state, x, y) -> state; the weights come first in the state.
        state: the state to start from.
        workload: whose data to use.
        alike: the first example in the place of all.
    """
    x, y = (jnp.asarray(each) for each in WORKLOADS[workload].examples(alike))
    jitted = jax.jit(update, donate_argnums=0)
    held = [state]

    def step() -> Any:
        held[0] = jax.block_until_ready(jitted(held[0], x, y))
        return held[0]

    return step


def change(step: Callable[[], Any], workload: str) -> np.ndarray:
    """Returns what one step changes in all weights, as one vector."""
    before, after = jax.tree.leaves(new_weights(workload)), jax.tree.leaves(step()[0])
    return np.concatenate([np.asarray(new - old).ravel() for new, old in zip(after, before, strict=True)])


def plain_step(workload: str, alike: bool = False) -> Callable[[], Any]:
    """Returns a function that does one step of SGD."""
    optimizer = optax.sgd(LEARNING_RATE)
    loss = mean_loss(workload)

    def update(state: Any, x: jax.Array, y: jax.Array) -> Any:
        weights, memory = state
        changes, memory = optimizer.update(jax.grad(loss)(weights, x, y), memory)
        return optax.apply_updates(weights, changes), memory

    weights = new_weights(workload)
    return step_of(update, (weights, optimizer.init(weights)), workload, alike)
