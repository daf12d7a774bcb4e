"""The coordinates of an update that are trained, sent and noised in a round, in graph.

Each choice is a linear subspace with an orthonormal basis that clients and server know: some coordinates (`random_k`),
the products of a random matrix with a smaller one (`rank`), or the weights that pruning left. An update within it is a
shorter record, of the same L2 norm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from dpfl.compression.config import Compression, kept_weights, matrix_shape
from dpfl.noise import normal_like, round_seed


class Subspace(NamedTuple):
    """The subspace of a round.

    Attributes:
        indices: of the coordinates that `random_k` chose, int32 (k,); empty elsewhere.
        bases: for each tensor that `rank` makes smaller a matrix with orthonormal columns, float32 (longer side, rank),
            in the order of the tensors; empty elsewhere.
        masks: for each tensor float32, 1 where a coordinate is trained and 0 where it is not; empty under `rank`, and
            where all are.
    """

    indices: Any = ()
    bases: tuple[tf.Tensor, ...] = ()
    masks: tuple[tf.Tensor, ...] = ()


class Subspaces:
    """The subspaces of a run.

    Args:
        compression: of updates.
        shapes: of the trainable weights.
        rounds: of the whole run.

    Raises:
        InputError: the weights cannot be compressed so.
    """

    def __init__(self, compression: Compression, shapes: Sequence[Sequence[int]], rounds: int) -> None:
        compression.check_shapes(shapes)
        self._compression = compression
        self._shapes = [tuple(shape) for shape in shapes]
        self._sizes = [math.prod(shape) for shape in shapes]
        self.record_shapes = compression.record_shapes(shapes)
        self._kept = np.array(
            [
                [kept_weights(shape, compression.sparsity_after(done, rounds)) for shape in shapes]
                for done in (range(rounds + 1) if compression.sparsity else [])
            ],
            np.int32,
        )

    def of_round(self, seed: tf.Tensor, round_number: tf.Tensor, masks: tuple[tf.Tensor, ...] = ()) -> Subspace:
        """The subspace of a round, which is public.

        Args:
            seed: of the run's subspaces, int32 (2,).
            round_number: from 0, an int32 scalar.
            masks: what pruning left, from `masks`.
        """
        compression = self._compression
        if compression.random_k is not None:
            dimension = sum(self._sizes)
            order = tf.random.experimental.stateless_shuffle(tf.range(dimension), round_seed(seed, round_number))
            indices = order[: self.record_shapes[0][0]]
            chosen = tf.scatter_nd(indices[:, None], tf.ones_like(indices, tf.float32), [dimension])
            return Subspace(indices=indices, masks=tuple(_as_tensors(chosen, self._shapes)))
        if compression.rank is not None:
            seeds = round_seed(seed, round_number)
            longer = [(index, max(matrix_shape(shape))) for index, shape in self._projected()]
            bases = [
                _orthonormal(side, compression.rank, round_seed(seeds, tf.constant(index))) for index, side in longer
            ]
            return Subspace(bases=tuple(bases))
        return Subspace(masks=masks)

    def all_masks(self) -> tuple[tf.Tensor, ...]:
        """The masks of a model that is not pruned; empty where none ever is."""
        return tuple(tf.ones(shape) for shape in self._shapes) if self._compression.sparsity else ()

    def masks(self, weights: Sequence[tf.Tensor], rounds_done: tf.Tensor) -> tuple[tf.Tensor, ...]:
        """What pruning leaves of a released model: the largest weights of each kernel, and all of the other tensors.

        Of a model that is pruned already they are the same masks again: weights of zero come last.

        Args:
            weights: as they are released.
            rounds_done: after how many rounds, an int32 scalar.

        Returns:
            float32 tensors of the weights' shapes, with as many ones as `Compression.sent_coordinates` says; empty
            where there is no pruning.
        """
        if not self._compression.sparsity:
            return ()
        kept = tf.gather(tf.constant(self._kept), rounds_done)
        return tuple(
            _largest(weight, kept[index]) if len(weight.shape) > 1 else tf.ones_like(weight)
            for index, weight in enumerate(weights)
        )

    def records(self, subspace: Subspace, update: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """The record of an update: its coordinates in the subspace, of `record_shapes`.

        Under pruning a record keeps the update's shapes, with zeros where weights are pruned.

        Args:
            subspace: of the round.
            update: tensors of the weights' shapes, which may have further axes in front. Private, and so is the record.
        """
        if self._compression.random_k is not None:
            return [tf.gather(_as_vector(update, self._shapes), subspace.indices, axis=-1)]
        if subspace.bases:
            record, bases = list(update), iter(subspace.bases)
            for index, shape in self._projected():
                matrix, basis = _reshaped(update[index], shape, matrix_shape(shape)), next(bases)
                of_rows = matrix_shape(shape)[0] >= matrix_shape(shape)[1]
                record[index] = tf.matmul(basis, matrix, transpose_a=True) if of_rows else tf.matmul(matrix, basis)
            return record
        return self._masked(subspace, update)

    def updates(self, subspace: Subspace, record: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """The update within the subspace that has a record; the inverse of `records` there.

        Args:
            subspace: of the round.
            record: tensors of `record_shapes`.
        """
        if self._compression.random_k is not None:
            return _as_tensors(tf.scatter_nd(subspace.indices[:, None], record[0], [sum(self._sizes)]), self._shapes)
        if subspace.bases:
            update, bases = list(record), iter(subspace.bases)
            for index, shape in self._projected():
                basis, factor = next(bases), record[index]
                of_rows = matrix_shape(shape)[0] >= matrix_shape(shape)[1]
                product = tf.matmul(basis, factor) if of_rows else tf.matmul(factor, basis, transpose_b=True)
                update[index] = tf.reshape(product, shape)
            return update
        return self._masked(subspace, record)

    def onto(self, subspace: Subspace, gradients: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Gradients projected onto the subspace.

        Args:
            subspace: of the round.
            gradients: tensors of the weights' shapes, which may have further axes in front.
        """
        if subspace.bases:
            projected, bases = list(gradients), iter(subspace.bases)
            for index, shape in self._projected():
                basis, (rows, columns) = next(bases), matrix_shape(shape)
                matrix = _reshaped(gradients[index], shape, (rows, columns))
                if rows >= columns:
                    matrix = tf.matmul(basis, tf.matmul(basis, matrix, transpose_a=True))
                else:
                    matrix = tf.matmul(tf.matmul(matrix, basis), basis, transpose_b=True)
                projected[index] = _reshaped(matrix, (rows, columns), shape)
            return projected
        return self._masked(subspace, gradients)

    def sent(self, subspace: Subspace, record: Sequence[tf.Tensor]) -> tf.Tensor:
        """The coordinates of records that are sent, as vectors (..., coordinates) whose length both sides know.

        Args:
            subspace: of the round.
            record: from `records`.
        """
        vector = _as_vector(record, self.record_shapes)
        if not self._is_pruned(subspace):
            return vector
        return tf.gather(vector, tf.where(self._mask(subspace) > 0)[:, 0], axis=-1)

    def sent_count(self, subspace: Subspace) -> tf.Tensor:
        """How many coordinates are sent, an int32 scalar."""
        if self._is_pruned(subspace):
            return tf.cast(tf.add_n([tf.reduce_sum(mask) for mask in subspace.masks]), tf.int32)
        return tf.constant(sum(math.prod(shape) for shape in self.record_shapes))

    def received(self, subspace: Subspace, vector: tf.Tensor) -> list[tf.Tensor]:
        """The records whose coordinates were sent.

        Args:
            subspace: of the round.
            vector: from `sent`.
        """
        if self._is_pruned(subspace):
            mask = self._mask(subspace)
            places = tf.cast(tf.maximum(tf.cumsum(mask) - 1, 0), tf.int32)
            vector = tf.where(mask > 0, tf.gather(vector, places, axis=-1), 0.0)
        return _as_tensors(vector, self.record_shapes)

    def _is_pruned(self, subspace: Subspace) -> bool:
        return self._compression.sparsity > 0 and bool(subspace.masks)

    def _mask(self, subspace: Subspace) -> tf.Tensor:
        return _as_vector(subspace.masks, self._shapes)

    def _projected(self) -> list[tuple[int, tuple[int, ...]]]:
        """The tensors that `rank` makes smaller."""
        return [(index, shape) for index, shape in enumerate(self._shapes) if self._compression.projects(shape)]

    def _masked(self, subspace: Subspace, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        if not subspace.masks:
            return list(tensors)
        return [tensor * mask for tensor, mask in zip(tensors, subspace.masks, strict=True)]


def _reshaped(tensor: tf.Tensor, old: Sequence[int], new: Sequence[int]) -> tf.Tensor:
    """A tensor (..., *old) as (..., *new)."""
    front = tf.shape(tensor)[: len(tensor.shape) - len(old)]
    return tf.reshape(tensor, tf.concat([front, new], axis=0))


def _as_vector(tensors: Sequence[tf.Tensor], shapes: Sequence[Sequence[int]]) -> tf.Tensor:
    """Tensors (..., *shape) as vectors (..., coordinates)."""
    flat = [_reshaped(tensor, shape, [math.prod(shape)]) for tensor, shape in zip(tensors, shapes, strict=True)]
    return tf.concat(flat, axis=-1)


def _as_tensors(vector: tf.Tensor, shapes: Sequence[Sequence[int]]) -> list[tf.Tensor]:
    """The tensors (..., *shape) of vectors (..., coordinates)."""
    parts = tf.split(vector, [math.prod(shape) for shape in shapes], axis=-1)
    return [_reshaped(part, [0], shape) for part, shape in zip(parts, shapes, strict=True)]


class Projection(NamedTuple):
    """How a client that knows the released model and the round, and nothing else, trains within the round's subspace.

    Attributes:
        subspaces: of the run.
        seed: of the subspaces, int32 (2,).
    """

    subspaces: Subspaces
    seed: Any

    def onto(self, weights: Sequence[tf.Tensor], round_number: tf.Tensor) -> Callable[[Any], list[tf.Tensor]]:
        """What projects gradients in a round.

        Args:
            weights: those of the round's start, or after any of its local steps, which give the same masks.
            round_number: from 0, an int32 scalar.
        """
        masks = self.subspaces.masks(weights, round_number)
        subspace = self.subspaces.of_round(tf.constant(self.seed), round_number, masks)
        return lambda gradients: self.subspaces.onto(subspace, gradients)

    def gated(self, weights: Sequence[tf.Tensor], round_number: tf.Tensor) -> list[tf.Tensor]:
        """The weights themselves, with gradients that come out projected.

        Args:
            weights: as in `onto`.
            round_number: from 0, an int32 scalar.
        """
        onto = self.onto([tf.stop_gradient(weight) for weight in weights], round_number)

        @tf.custom_gradient
        def through(*tensors: tf.Tensor) -> tuple[list[tf.Tensor], Callable[..., list[tf.Tensor]]]:
            return [tf.identity(tensor) for tensor in tensors], lambda *gradients: onto(gradients)

        return list(through(*weights))


def _largest(weight: tf.Tensor, kept: tf.Tensor) -> tf.Tensor:
    """1 at so many of the largest entries by magnitude, the first of equal ones, and 0 elsewhere."""
    sizes = tf.reshape(tf.abs(weight), [-1])
    order = tf.argsort(sizes, direction="DESCENDING", stable=True)[:kept]
    return tf.reshape(tf.scatter_nd(order[:, None], tf.ones_like(order, tf.float32), tf.shape(sizes)), tf.shape(weight))


def largest_of_all(tensors: Sequence[tf.Tensor], count: int) -> list[tf.Tensor]:
    """The largest entries of some tensors by magnitude, zeros elsewhere.

    Args:
        tensors: float32.
        count: how many entries of all tensors together.
    """
    shapes = [tensor.shape.as_list() for tensor in tensors]
    vector = _as_vector(tensors, shapes)
    return _as_tensors(vector * _largest(vector, tf.constant(count)), shapes)


def _orthonormal(rows: int, columns: int, seed: tf.Tensor) -> tf.Tensor:
    """A random matrix with orthonormal columns, float32 (rows, columns), uniform among all of them."""
    draws = normal_like(tf.zeros([rows, columns]), seed)
    # In float64, so that what float32 rounds does not depend on how a machine takes the matrix apart.
    basis, upper = tf.linalg.qr(tf.cast(draws, tf.float64))
    return tf.cast(basis * tf.sign(tf.linalg.diag_part(upper)), tf.float32)
