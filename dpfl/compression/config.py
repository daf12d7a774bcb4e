"""What a study says of compression, validated when it is made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import pydantic

from dpfl.config import Config
from dpfl.errors import InputError

LiteFormat = Literal["float32", "float16", "int8"]
LITE_COLUMNS = tuple(
    f"lite_{form}_{measure}" for form in get_args(LiteFormat) for measure in ("bytes", "gzip_bytes", "accuracy")
)
"""What `Compression.lite` measures of a run, as columns of `runs.csv`."""


class Compression(Config):
    """How updates and models are made smaller. By default they are not: updates and weights travel in float32.

    Everything here keeps the guarantee that the mechanism states. What clients do to their updates (`bits`, `random_k`,
    `rank`, pruning) comes before the clip, so that the mechanism sees nothing but records clipped to its norm; under a
    local mechanism, quantisation comes after the client's noise. What the server does (`top_k`, pruning) and what
    becomes of the last model (`lite`) looks at nothing but released weights: post-processing.

    `random_k`, `rank` and `sparsity` leave fewer coordinates that are trained, sent and noised; one of them at a time.
    Clients train within these coordinates: in every local step the gradient is projected onto them.

    Attributes:
        bits: of a coordinate of an update, from 1 to 8, by uniform stochastic quantisation: unbiased, with one float32
            scale for 128 coordinates (Alistarh et al. 2017, 1610.02132, section 3.2: buckets). None for float32.
        rotation: whether updates are rotated at random before they are quantised, by Hadamard transforms of 128
            coordinates with random signs, new in each round and known to all, so that no coordinate is much larger than
            the others (Suresh et al. 2017, 1611.00429, section 3).
        random_k: how many coordinates of an update are trained, sent and noised: a whole number, or a fraction
            below 1 of all. New in each round, from a seed that all share, so that no index is sent (Konecny et al.
            2016, 1610.05492, section 2: random mask).
        rank: of the updates of kernels. A kernel moves by the product of a random matrix with orthonormal columns, new
            in each round from a seed that all share, and a matrix of so many rows, which is trained, sent and noised
            (ibid.: low rank; as in LoRA with one factor frozen, Sun et al. 2024, 2403.12313). Other tensors go whole.
        sparsity: the fraction of each kernel's weights that are zero after pruning, from 0 up to (excluding) 1: those
            that were smallest in the released model. Biases and other vectors are not pruned.
        pruning_begins: when pruning begins, as a fraction of all rounds.
        pruning_ends: when the sparsity is reached, as a fraction of all rounds. In between it grows as
            1 - (1 - t)^3 (Zhu & Gupta 2017, 1710.01878, equation 1).
        pruning_every: rounds from one pruning to the next.
        top_k: in how many coordinates the released model changes in a round, those that change most: a whole number, or
            a fraction below 1 of all weights. None for all.
        error_feedback: whether the server adds what `top_k` left out to the next round's change (Karimireddy et al.
            2019, 1901.09847). It is the server's memory of released values, and costs no privacy; for what clients
            leave out there is none (see the error).
        lite: formats into which the last model is turned by TensorFlow Lite, to measure size and test accuracy:
            "float32", "float16", or "int8" (weights in 8 bits, activations stored in float32: no example is
            looked at). See `dpfl.compression.to_lite`.

    Raises:
        InputError: a setting is wrong, or settings contradict each other.
    """

    bits: int | None = None
    rotation: bool = False
    random_k: int | float | None = None
    rank: int | None = None
    sparsity: float = 0.0
    pruning_begins: float = 0.1
    pruning_ends: float = 0.6
    pruning_every: int = pydantic.Field(default=1, gt=0)
    top_k: int | float | None = None
    error_feedback: bool = False
    lite: tuple[LiteFormat, ...] = ()

    @pydantic.model_validator(mode="after")
    def _check(self) -> Compression:
        if self.bits is not None and not 1 <= self.bits <= 8:
            raise InputError(
                f"an update is quantised to 1 to 8 bits a coordinate, but bits was {self.bits}: choose one of these, "
                "or leave it out for float32."
            )
        if self.rotation and self.bits is None:
            raise InputError(
                "rotation helps quantisation, and float32 needs none: give bits (4, say), or leave it out."
            )
        for name, value in (("random_k", self.random_k), ("top_k", self.top_k)):
            if value is not None and not (0 < value < 1 or (1 <= value < math.inf and value == int(value))):
                raise InputError(
                    f"{name} is a number of coordinates, at least 1, or a fraction of all, above 0 and below 1, but it "
                    f"was {value:g}."
                )
        if self.rank is not None and self.rank < 1:
            raise InputError(f"the rank of a kernel's update must be at least 1, but it was {self.rank}.")
        self._check_pruning()
        several = [name for name in ("random_k", "rank", "sparsity") if getattr(self, name)]
        if len(several) > 1:
            raise InputError(f"{' and '.join(several)} each say which coordinates are sent: choose one of them.")
        if self.top_k is not None and self.sparsity:
            raise InputError("top_k and sparsity each say which weights the server moves: choose one of them.")
        if self.error_feedback and self.top_k is None:
            raise InputError(
                "error_feedback is the server's, for what top_k leaves out of the released model: give top_k (what "
                "clients leave out is not fed back, as it would carry a client's data from the rounds it took part in "
                "into others, for which no guarantee here is stated)."
            )
        return self

    def _check_pruning(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise InputError(
                f"sparsity is the fraction of weights that pruning sets to zero, at least 0 and below 1 (a mask of "
                f"nothing trains nothing), but it was {self.sparsity:g}."
            )
        if not 0 <= self.pruning_begins <= self.pruning_ends <= 1:
            raise InputError(
                "pruning begins and ends at fractions of all rounds, 0 <= pruning_begins <= pruning_ends <= 1, but "
                f"they were {self.pruning_begins:g} and {self.pruning_ends:g}."
            )

    @property
    def of_updates(self) -> bool:
        """Whether updates are anything else than all weights in float32."""
        return self.bits is not None or self.selects

    @property
    def selects(self) -> bool:
        """Whether only some coordinates are trained, sent and noised."""
        return self.random_k is not None or self.rank is not None or self.sparsity > 0

    @property
    def of_models(self) -> bool:
        """Whether the server does more with a released update than to add it."""
        return self.sparsity > 0 or self.top_k is not None

    def in_words(self) -> str:
        """The compression as a clause, such as "4 bits, rotated; pruned to 0.9"; "none" where there is none."""
        parts = []
        if self.random_k is not None:
            parts.append(f"random k {self.random_k:g}")
        if self.rank is not None:
            parts.append(f"rank {self.rank}")
        if self.sparsity:
            parts.append(f"sparsity {self.sparsity:g}")
        if self.bits is not None:
            parts.append(f"{self.bits} bit{'s' * (self.bits > 1)}{' rotated' * self.rotation}")
        if self.top_k is not None:
            parts.append(f"top k {self.top_k:g}{' with feedback' * self.error_feedback}")
        return ", ".join(parts) or "none"

    def sparsity_after(self, rounds_done: int, rounds: int) -> float:
        """The sparsity of the model that is released after so many rounds.

        Zhu & Gupta 2017 (1710.01878), equation 1, with an initial sparsity of 0; as
        `tensorflow_model_optimization`'s `PolynomialDecay` of power 3.

        Args:
            rounds_done: from 0, when the model is the initial one and not pruned.
            rounds: of the whole run.
        """
        last = self.last_pruning(rounds_done, rounds)
        if last is None:
            return 0.0
        begin, end = self.pruning_steps(rounds)
        if end == begin:
            return self.sparsity
        progress = (last - begin) / (end - begin)
        return self.sparsity * (1.0 - (1.0 - progress) ** 3)

    def pruning_steps(self, rounds: int) -> tuple[int, int]:
        """After how many rounds pruning begins, at least 1, and ends.

        Args:
            rounds: of the whole run.
        """
        begin = max(1, math.ceil(self.pruning_begins * rounds))
        return begin, max(begin, math.floor(self.pruning_ends * rounds))

    def last_pruning(self, rounds_done: int, rounds: int) -> int | None:
        """After how many rounds the model that is released after so many was pruned last; None if it never was.

        Args:
            rounds_done: from 0.
            rounds: of the whole run.
        """
        begin, end = self.pruning_steps(rounds)
        if not self.sparsity or rounds_done < begin:
            return None
        return rounds_done - (rounds_done - begin) % self.pruning_every if rounds_done < end else end

    def check_shapes(self, shapes: Sequence[Sequence[int]]) -> None:
        """Refuses what a model of these weights cannot give.

        Args:
            shapes: of the trainable weights.

        Raises:
            InputError: there are fewer coordinates than `random_k` or `top_k`, no kernel that `rank` makes smaller or
                `sparsity` can prune.
        """
        dimension = sum(math.prod(shape) for shape in shapes)
        for name, value in (("random_k", self.random_k), ("top_k", self.top_k)):
            if value is not None and value > dimension:
                raise InputError(
                    f"{name} is {value:g}, but the model has {dimension:,} weights: choose at most so many, or a "
                    "fraction below 1."
                )
        if self.rank is not None and not any(self.projects(shape) for shape in shapes):
            sides = max((max(matrix_shape(shape)) for shape in shapes if len(shape) > 1), default=0)
            raise InputError(
                f"rank {self.rank} makes no kernel's update smaller, the longest side of one being {sides}: choose a "
                "smaller rank, or leave it out."
            )
        if self.sparsity and not any(len(shape) > 1 for shape in shapes):
            raise InputError("the model has no kernel that could be pruned: leave sparsity out.")

    def projects(self, shape: Sequence[int]) -> bool:
        """Whether a tensor's update is sent as a factor of its rank."""
        return self.rank is not None and len(shape) > 1 and max(matrix_shape(shape)) > self.rank

    def record_shapes(self, shapes: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
        """Shapes of what the mechanism clips, sums and noises.

        Args:
            shapes: of the trainable weights.
        """
        if self.random_k is not None:
            return [(count_of(self.random_k, sum(math.prod(shape) for shape in shapes)),)]
        return [self._record_shape(shape) for shape in shapes]

    def _record_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        if self.rank is None or not self.projects(shape):
            return tuple(shape)
        rows, columns = matrix_shape(shape)
        return (self.rank, columns) if rows >= columns else (rows, self.rank)

    def sent_coordinates(self, shapes: Sequence[Sequence[int]], rounds_done: int, rounds: int) -> int:
        """How many coordinates a client sends in the round after so many.

        Args:
            shapes: of the trainable weights.
            rounds_done: rounds before this one.
            rounds: of the whole run.
        """
        sparsity = self.sparsity_after(rounds_done, rounds)
        return sum(kept_weights(shape, sparsity) for shape in self.record_shapes(shapes))


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """A kernel as a matrix: all axes but the last are its rows."""
    return math.prod(shape[:-1]), shape[-1]


def count_of(k: float, dimension: int) -> int:
    """How many coordinates k stands for: itself, or if it is a fraction so much of the dimension, at least one."""
    return max(1, round(k * dimension)) if k < 1 else int(k)


def kept_weights(shape: Sequence[int], sparsity: float) -> int:
    """How many weights of a tensor pruning leaves: all but the fraction of a kernel's, and always one."""
    size = math.prod(shape)
    return size if len(shape) < 2 else max(1, size - round(sparsity * size))
