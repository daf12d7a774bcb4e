"""The workloads: what every system computes, the same shapes and the same data for all.

To add one, write an entry in `WORKLOADS`, and its model in the scripts of the systems that can do it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

CLIP_NORM = 1.0
NOISE_MULTIPLIER = 1.1
LEARNING_RATE = 0.1
SEED = 0

Examples = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Workload:
    """One piece of work.

    Attributes:
        title: what it is, for a heading.
        facts: numbers that belong to it and go into each row, such as the batch size.
        parameters: how many weights every system must train.
        flops: floating-point operations of the matrix products (and convolutions) of one non-private step, forwards and
            backwards, from which the least possible time follows.
        data: makes the inputs and the labels, the same at every call.
    """

    title: str
    facts: Mapping[str, Any]
    parameters: int
    flops: float
    data: Callable[[], Examples]

    def examples(self, alike: bool = False) -> Examples:
        """Returns inputs and labels; `alike` gives the first example in the place of all."""
        x, y = self.data()
        return (np.repeat(x[:1], len(x), axis=0), np.repeat(y[:1], len(y))) if alike else (x, y)


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

WORKLOADS: dict[str, Workload] = {
    "dpsgd-cnn": Workload(
        *_dp_sgd("MNIST CNN of TF Privacy's tutorial, batch 256", 256),
        parameters=26_010,
        flops=_step_flops(256, _CNN, _FIRST_CONVOLUTION),
        data=lambda: _images(256),
    ),
    "dpsgd-mlp": Workload(
        *_dp_sgd("MLP 784-100-10, batch 256", 256),
        parameters=79_510,
        flops=_step_flops(256, _MLP, 784 * 100),
        data=lambda: _vectors(256),
    ),
    "dpsgd-lstm": Workload(
        *_dp_sgd("Embedding 100x32, LSTM 64, 50 tokens, batch 64", 64, sequence_length=50),
        parameters=28_162,
        flops=_step_flops(64, _LSTM),
        data=lambda: _tokens(64, 50, 100, 2),
    ),
    "dpsgd-transformer": Workload(
        *_dp_sgd("Transformer block, width 64, 4 heads, 32 tokens, batch 64", 64, sequence_length=32),
        parameters=98_122,
        flops=_step_flops(64, _TRANSFORMER),
        data=lambda: _tokens(64, 32, 1_000, 10),
    ),
}
