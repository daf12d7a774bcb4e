"""The workloads: what every system computes, the same shapes and the same data for all.

To add one, write an entry in `WORKLOADS`, and its model in the scripts of the systems that can do it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

CLIP_NORM = 1.0
NOISE_MULTIPLIER = 1.1
LEARNING_RATE = 0.1
SEED = 0

Examples = tuple[np.ndarray, np.ndarray]


Shape = tuple[int, ...]


@dataclass(frozen=True)
class Workload:
    """One piece of work.

    Attributes:
        title: what it is, for a heading.
        facts: numbers that belong to it and go into each row, such as the batch size.
        parameters: how many weights every system must train.
        flops: floating-point operations of the matrix products (and convolutions) of one step (a round, where that is
            the step) without privacy, forwards and backwards, from which the least possible time follows.
    """

    title: str
    facts: Mapping[str, Any]
    parameters: int
    flops: float


@dataclass(frozen=True)
class BatchWorkload(Workload):
    """A training step on one batch.

    Attributes:
        data: makes the inputs and the labels, the same at every call.
    """

    data: Callable[[], Examples]

    def examples(self, alike: bool = False) -> Examples:
        """Returns inputs and labels; `alike` gives the first example in the place of all."""
        x, y = self.data()
        return (np.repeat(x[:1], len(x), axis=0), np.repeat(y[:1], len(y))) if alike else (x, y)


@dataclass(frozen=True)
class FederatedWorkload(Workload):
    """A round of federated averaging with central Gaussian privacy, in which all clients take part.

    From the global weights each client takes `local_steps` steps of SGD with learning rate `LEARNING_RATE` on
    minibatches of `batch` of its examples, each example once, in any order. Its update is clipped to the L2 norm
    `CLIP_NORM`, all weights together. Gaussian noise of standard deviation `NOISE_MULTIPLIER` x `CLIP_NORM` is added to
    the sum, which is divided by the number of clients and added to the global weights.

    Attributes:
        clients: how many there are.
        examples_per_client: the same for each.
        batch: examples in a local step's minibatch.
        local_steps: of each client in a round; together they see each example once.
        example: one example's shape.
        words: for sequences of whole numbers, how many different ones there are; 0 for numbers between 0 and 1.
        classes: how many different labels.
        shapes: of the weights, in Keras' layout and order.
    """

    clients: int
    examples_per_client: int
    batch: int
    local_steps: int
    example: Shape
    words: int
    classes: int
    shapes: tuple[Shape, ...]

    def client_examples(self, clients: int | None = None, alike: bool = False) -> Examples:
        """Returns random data, the same at every call.

        Args:
            clients: how many, the first ones; all if left out. More than the workload has can be asked for.
            alike: whether all examples of a client are its first one, so that their order does not matter.

        Returns:
            Inputs, (clients, examples, *example), float32, or int32 where they are words; labels, (clients, examples),
            int32.
        """
        number, examples = clients or self.clients, self.examples_per_client
        inputs, labels = np.random.default_rng((SEED, 0)), np.random.default_rng((SEED, 1))
        shape = (number, examples, *self.example)
        x = inputs.integers(0, self.words, shape, np.int32) if self.words else inputs.random(shape, np.float32)
        y = labels.integers(0, self.classes, (number, examples), np.int32)
        return (np.repeat(x[:, :1], examples, axis=1), np.repeat(y[:, :1], examples, axis=1)) if alike else (x, y)

    def first_weights(self) -> list[np.ndarray]:
        """Returns the weights before the first round, float32, the same at every call.

        Matrices are uniform in Glorot and Bengio's (2010) limits, biases are zero: an LSTM's of its forget gate too.
        """
        generator = np.random.default_rng((SEED, 2))
        return [_glorot(generator, shape) if len(shape) > 1 else np.zeros(shape, np.float32) for shape in self.shapes]


def _glorot(generator: np.random.Generator, shape: Shape) -> np.ndarray:
    limit = math.sqrt(6 / (math.prod(shape[:-2]) * (shape[-2] + shape[-1])))
    return generator.uniform(-limit, limit, shape).astype(np.float32)


def _images(batch: int) -> Examples:
    generator = np.random.default_rng(SEED)
    return (
        generator.uniform(size=(batch, 28, 28, 1)).astype(np.float32),
        generator.integers(0, 10, size=batch).astype(np.int32),
    )


def _vectors(batch: int) -> Examples:
    x, y = _images(batch)
    return x.reshape(batch, 784), y


def _tokens(batch: int, length: int, words: int, classes: int) -> Examples:
    generator = np.random.default_rng(SEED)
    return (
        generator.integers(0, words, size=(batch, length)).astype(np.int32),
        generator.integers(0, classes, size=batch).astype(np.int32),
    )


def _federated(
    title: str,
    *,
    clients: int,
    batch: int,
    local_steps: int,
    example: Shape,
    shapes: tuple[Shape, ...],
    products: int,
    to_the_input: int = 0,
    words: int = 0,
) -> FederatedWorkload:
    """One in which clients see each of their examples once; `products` and `to_the_input` as `_step_flops` wants."""
    examples = batch * local_steps
    facts = {
        "clients": clients,
        "examples_per_client": examples,
        "batch": batch,
        "local_steps": local_steps,
        "clip_norm": CLIP_NORM,
        "noise_multiplier": NOISE_MULTIPLIER,
    }
    return FederatedWorkload(
        title,
        facts,
        parameters=sum(math.prod(shape) for shape in shapes),
        flops=_step_flops(clients * examples, products, to_the_input),
        clients=clients,
        examples_per_client=examples,
        batch=batch,
        local_steps=local_steps,
        example=example,
        words=words,
        classes=shapes[-1][0],
        shapes=shapes,
    )


def _dense(*widths: int) -> tuple[Shape, ...]:
    """The shapes of fully connected layers' weights."""
    return tuple(shape for pair in itertools.pairwise(widths) for shape in (pair, pair[1:]))


def _step_flops(batch: int, products: float, to_the_input: float = 0.0) -> float:
    """The forward pass, the gradients of the weights and those of the inputs; a layer next to the data needs none."""
    return 2.0 * batch * (3 * products - to_the_input)


def _dp_sgd(title: str, batch: int, **facts: Any) -> tuple[str, dict[str, Any]]:
    return title, {"batch": batch, "clip_norm": CLIP_NORM, "noise_multiplier": NOISE_MULTIPLIER, **facts}


_FIRST_CONVOLUTION = 14 * 14 * 16 * 8 * 8
_CNN = _FIRST_CONVOLUTION + 5 * 5 * 32 * 4 * 4 * 16 + 512 * 32 + 32 * 10
_MLP = 784 * 100 + 100 * 10
_LSTM = 50 * 4 * 64 * (32 + 64) + 64 * 2
_TRANSFORMER = 32 * (4 * 64 * 64 + 2 * 32 * 64 + 2 * 64 * 128) + 64 * 10

_LARGE = 784 * 1_000 + 1_000 * 200 + 200 * 10
_FIRST_OF_CIFAR = 30 * 30 * 32 * 3 * 3 * 3
_CIFAR = _FIRST_OF_CIFAR + 28 * 28 * 64 * 3 * 3 * 32 + 14 * 14 * 64 * 128 + 128 * 10
_CHARACTERS = 80 * 4 * 128 * (8 + 128) + 128 * 90

WORKLOADS: dict[str, BatchWorkload | FederatedWorkload] = {
    "dpsgd-cnn": BatchWorkload(
        *_dp_sgd("MNIST CNN of TF Privacy's tutorial, batch 256", 256),
        parameters=26_010,
        flops=_step_flops(256, _CNN, _FIRST_CONVOLUTION),
        data=lambda: _images(256),
    ),
    "dpsgd-mlp": BatchWorkload(
        *_dp_sgd("MLP 784-100-10, batch 256", 256),
        parameters=79_510,
        flops=_step_flops(256, _MLP, 784 * 100),
        data=lambda: _vectors(256),
    ),
    "dpsgd-lstm": BatchWorkload(
        *_dp_sgd("Embedding 100x32, LSTM 64, 50 tokens, batch 64", 64, sequence_length=50),
        parameters=28_162,
        flops=_step_flops(64, _LSTM),
        data=lambda: _tokens(64, 50, 100, 2),
    ),
    "dpsgd-transformer": BatchWorkload(
        *_dp_sgd("Transformer block, width 64, 4 heads, 32 tokens, batch 64", 64, sequence_length=32),
        parameters=98_122,
        flops=_step_flops(64, _TRANSFORMER),
        data=lambda: _tokens(64, 32, 1_000, 10),
    ),
    "fedavg-mlp": _federated(
        "100 clients x 60 examples, MLP 784-100-10, batch 20",
        clients=100,
        batch=20,
        local_steps=3,
        example=(784,),
        shapes=_dense(784, 100, 10),
        products=_MLP,
        to_the_input=784 * 100,
    ),
    "fedavg-softmax": _federated(
        "300 clients x 5 examples, softmax 64-10, batch 5",
        clients=300,
        batch=5,
        local_steps=1,
        example=(64,),
        shapes=_dense(64, 10),
        products=64 * 10,
        to_the_input=64 * 10,
    ),
    "fedavg-cnn": _federated(
        "50 clients x 50 images 32x32x3, CNN with 2 convolutions, batch 10",
        clients=50,
        batch=10,
        local_steps=5,
        example=(32, 32, 3),
        shapes=((3, 3, 3, 32), (32,), (3, 3, 32, 64), (64,), *_dense(14 * 14 * 64, 128, 10)),
        products=_CIFAR,
        to_the_input=_FIRST_OF_CIFAR,
    ),
    "fedavg-shakespeare": _federated(
        "50 roles x 20 sequences of 80 characters, LSTM 128, batch 10",
        clients=50,
        batch=10,
        local_steps=2,
        example=(80,),
        words=90,
        shapes=((90, 8), (8, 4 * 128), (128, 4 * 128), (4 * 128,), *_dense(128, 90)),
        products=_CHARACTERS,
    ),
    "fedavg-large": _federated(
        "1,000 clients x 10 examples, MLP 784-1000-200-10, batch 10",
        clients=1_000,
        batch=10,
        local_steps=1,
        example=(784,),
        shapes=_dense(784, 1_000, 200, 10),
        products=_LARGE,
        to_the_input=784 * 1_000,
    ),
}
LETTERS = dict(zip("abcde", (name for name in WORKLOADS if name.startswith("fedavg-")), strict=True))
