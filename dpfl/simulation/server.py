"""What the server does with the noisy mean update: its optimizer's step, and what compression makes of the model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import pydantic

from dpfl.compression import Compression
from dpfl.compression.config import count_of
from dpfl.config import Config
from dpfl.errors import InputError

if TYPE_CHECKING:
    import tensorflow as tf


class ServerOptimizer(Config):
    """The server's optimizer (Reddi et al. 2021, 2003.00295, algorithm 2). Post-processing: costs no privacy.

    Attributes:
        name: "sgd" adds the mean update times the learning rate (federated averaging at 1.0);
            "momentum" is FedAvgM; "adam" is FedAdam, without bias correction as in the paper.
        learning_rate: of the server, positive.
        momentum: decay of the mean of updates, for "momentum" and "adam", in [0, 1).
        second_momentum: decay of the mean of squared updates, for "adam", in [0, 1).
        adaptivity: the constant in Adam's denominator, tau in the paper, positive.
    """

    name: Literal["sgd", "momentum", "adam"] = "sgd"
    learning_rate: float = 1.0
    momentum: float = pydantic.Field(default=0.9, ge=0, lt=1)
    second_momentum: float = pydantic.Field(default=0.99, ge=0, lt=1)
    adaptivity: float = pydantic.Field(default=1e-3, gt=0)

    @pydantic.model_validator(mode="after")
    def _check(self) -> ServerOptimizer:
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise InputError(
                f"the server's learning rate must be a positive number, but it was {self.learning_rate:g}."
            )
        return self

    def initial_state(self, weights: list[tf.Tensor]) -> tuple[Any, ...]:
        """The optimizer's moments before the first round, as tensors shaped like the weights."""
        import tensorflow as tf

        if self.name == "sgd":
            return ()
        first = tuple(tf.zeros_like(weight) for weight in weights)
        if self.name == "momentum":
            return (first,)
        return (first, tuple(tf.fill(tf.shape(weight), self.adaptivity**2) for weight in weights))

    def numbers(self) -> tuple[float, float, float, float]:
        """What `apply` needs as numbers, so that one graph serves every value of them."""
        return self.learning_rate, self.momentum, self.second_momentum, self.adaptivity

    def apply(
        self,
        weights: list[tf.Tensor],
        update: list[tf.Tensor],
        state: tuple[Any, ...],
        numbers: tuple[tf.Tensor, ...],
    ) -> tuple[list[tf.Tensor], tuple[Any, ...]]:
        """Returns the weights and the state after one round, in graph.

        Args:
            weights: the model's weights before the round.
            update: the noisy mean of the clients' updates (after minus before).
            state: from `initial_state` or the round before.
            numbers: the values of `numbers()`, as float32 scalars.
        """
        import tensorflow as tf

        rate, decay, second_decay, adaptivity = numbers
        if self.name == "sgd":
            return [w + rate * u for w, u in zip(weights, update, strict=True)], ()
        if self.name == "momentum":
            first = tuple(decay * m + u for m, u in zip(state[0], update, strict=True))
            return [w + rate * m for w, m in zip(weights, first, strict=True)], (first,)
        first = tuple(decay * m + (1 - decay) * u for m, u in zip(state[0], update, strict=True))
        second = tuple(
            second_decay * v + (1 - second_decay) * tf.square(u) for v, u in zip(state[1], update, strict=True)
        )
        moved = [w + rate * m / (tf.sqrt(v) + adaptivity) for w, m, v in zip(weights, first, second, strict=True)]
        return moved, (first, second)


@dataclasses.dataclass(frozen=True)
class ServerStep:
    """What the server does in a round with what the mechanism released: post-processing, which costs no privacy.

    The optimizer moves the weights; pruned weights stay zero and others join them; or, of the moved weights, just
    those that moved most are released.

    Attributes:
        optimizer: the server's.
        compression: of the run.
        shapes: of the trainable weights.
        rounds: of the whole run.
    """

    optimizer: ServerOptimizer
    compression: Compression
    shapes: tuple[tuple[int, ...], ...]
    rounds: int

    @property
    def structure(self) -> tuple[Any, ...]:
        """What a compiled graph depends on: steps that agree in it differ in numbers alone."""
        of_models = (str(self.compression), self.rounds) if self.compression.of_models else ()
        return (self.optimizer.name, *of_models)

    def initial_state(self, weights: list[tf.Tensor]) -> tuple[Any, ...]:
        """The optimizer's moments before the first round, and what error feedback has left out so far: nothing."""
        import tensorflow as tf

        memory = tuple(tf.zeros_like(weight) for weight in weights) if self.compression.error_feedback else ()
        return self.optimizer.initial_state(weights), memory

    def apply(
        self,
        weights: list[tf.Tensor],
        update: list[tf.Tensor],
        state: tuple[Any, ...],
        numbers: tuple[tf.Tensor, ...],
        rounds_done: tf.Tensor,
    ) -> tuple[list[tf.Tensor], tuple[Any, ...]]:
        """Returns the weights and the state after one round, in graph.

        Args:
            weights: the model's weights before the round.
            update: the noisy mean of the clients' updates (after minus before).
            state: from `initial_state` or the round before.
            numbers: the values of `ServerOptimizer.numbers()`, as float32 scalars.
            rounds_done: rounds before this one, an int32 scalar.
        """
        moments, memory = state
        moved, moments = self.optimizer.apply(weights, update, moments, numbers)
        if self.compression.sparsity:
            moved = self._pruned(weights, moved, rounds_done)
        if self.compression.top_k is not None:
            moved, memory = self._largest_changes(weights, moved, memory)
        return moved, (moments, memory)

    def _pruned(
        self, before: Sequence[tf.Tensor], moved: Sequence[tf.Tensor], rounds_done: tf.Tensor
    ) -> list[tf.Tensor]:
        """The moved weights, zero where they were pruned before and where the schedule prunes them now.

        An optimizer's moments from before the pruning would move them.
        """
        from dpfl.compression.subspace import Subspaces

        subspaces = Subspaces(self.compression, self.shapes, self.rounds)
        kept = [weight * mask for weight, mask in zip(moved, subspaces.masks(before, rounds_done), strict=True)]
        masks = subspaces.masks(kept, rounds_done + 1)
        return [weight * mask for weight, mask in zip(kept, masks, strict=True)]

    def _largest_changes(
        self, before: Sequence[tf.Tensor], moved: Sequence[tf.Tensor], memory: tuple[tf.Tensor, ...]
    ) -> tuple[list[tf.Tensor], tuple[tf.Tensor, ...]]:
        """The weights with the largest changes alone, and the changes that are still to be made."""
        from dpfl.compression.subspace import largest_of_all

        changes = [new - old for new, old in zip(moved, before, strict=True)]
        if memory:
            changes = [change + left for change, left in zip(changes, memory, strict=True)]
        assert self.compression.top_k is not None
        released = largest_of_all(changes, count_of(self.compression.top_k, sum(map(math.prod, self.shapes))))
        if memory:
            memory = tuple(change - part for change, part in zip(changes, released, strict=True))
        return [old + part for old, part in zip(before, released, strict=True)], memory
