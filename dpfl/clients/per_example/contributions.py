"""What one use of a weight adds to each example's gradient, kept in the form that is cheapest to clip and sum.

Everything here is private.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import tensorflow as tf

# Writing and reading an element of a per-example gradient costs as much as so many multiplications (CPU, float32).
_MULTIPLICATIONS_PER_ELEMENT = 16

# Added to sums of squares: what is lost of them in float32, where squares below 1e-38 count as zero.
_UNDERFLOW = 1e-36

# Where positions cancel so far that less than the first remains of a squared norm, the second of what cancelled is
# added to it: more than its rounding error, which would make the gradient look shorter than it is.
_CANCELLED, _ROUNDING = 1e-2, 5e-7


class Contribution(Protocol):
    """The gradients of all examples with respect to one weight, (batch, *shape of the weight), in some form."""

    def squared_norms(self) -> tf.Tensor:
        """The squared L2 norm of each example's gradient, (batch,)."""

    def weighted_sum(self, factors: tf.Tensor) -> tf.Tensor:
        """The sum over examples of factor times gradient, in the weight's shape; factors are (batch,)."""

    def of(self, counted: tf.Tensor) -> Contribution:
        """The same with zeros for the examples that are not counted, (batch,) bool, whatever they were."""

    def materialized(self) -> tf.Tensor:
        """The gradients themselves, (batch, *shape)."""


@dataclasses.dataclass(frozen=True)
class Direct:
    """Gradients that are there as they are: biases, scales, and whatever has no better form.

    Attributes:
        gradients: (batch, *shape of the weight).
    """

    gradients: tf.Tensor

    def squared_norms(self) -> tf.Tensor:
        """See `Contribution`."""
        return tf.reduce_sum(tf.square(self.gradients), axis=list(range(1, self.gradients.shape.rank)))

    def weighted_sum(self, factors: tf.Tensor) -> tf.Tensor:
        """See `Contribution`."""
        shape = tf.shape(self.gradients)
        flat = tf.reshape(self.gradients, [shape[0], tf.reduce_prod(shape[1:])])
        summed = tf.reshape(tf.matmul(factors[None], flat), shape[1:])
        return tf.ensure_shape(summed, self.gradients.shape[1:])

    def of(self, counted: tf.Tensor) -> Direct:
        """See `Contribution`."""
        return Direct(_only(counted, self.gradients))

    def materialized(self) -> tf.Tensor:
        """See `Contribution`."""
        return self.gradients


class Product:
    """Gradients that are sums of outer products over positions: dense layers, convolutions, projections.

    An example's gradient is inputs^T gradients, a matrix of I x O. Its norm comes either from the matrix itself or
    from two matrices of positions x positions ("ghost norm", Li et al. 2022, 2110.05679, section 4), whichever costs
    less. Where the matrix is made, the sum over examples reads it again; else the sum is one product over all
    examples and positions ("book-keeping", Bu et al. 2023, 2210.00038).

    Args:
        inputs: of the layer, (batch, positions, I).
        gradients: of the loss with respect to the layer's products, (batch, positions, O).
        shape: of the weight, I x O elements in the order of the matrix.
    """

    def __init__(self, inputs: tf.Tensor, gradients: tf.Tensor, shape: Sequence[int]) -> None:
        self.inputs, self.gradients, self.shape = inputs, gradients, tuple(shape)
        self._matrices: tf.Tensor | None = None

    def squared_norms(self) -> tf.Tensor:
        """See `Contribution`."""
        positions = self.inputs.shape[1]
        if positions == 1:
            inputs, gradients = (tf.reduce_sum(tf.square(part), axis=[1, 2]) for part in (self.inputs, self.gradients))
            return (inputs + _UNDERFLOW) * (gradients + _UNDERFLOW)
        if self._is_cheaper_by_positions(positions):
            inputs, gradients = (tf.matmul(part, part, transpose_b=True) for part in (self.inputs, self.gradients))
            lengths = tf.sqrt(tf.linalg.diag_part(inputs) + _UNDERFLOW) * tf.sqrt(
                tf.linalg.diag_part(gradients) + _UNDERFLOW
            )
            return _not_below(tf.reduce_sum(inputs * gradients, axis=[1, 2]), tf.square(tf.reduce_sum(lengths, axis=1)))
        # Transposed, as the narrower gradients are the better left side.
        self._matrices = tf.matmul(self.gradients, self.inputs, transpose_a=True)
        return tf.reduce_sum(tf.square(self._matrices), axis=[1, 2])

    def weighted_sum(self, factors: tf.Tensor) -> tf.Tensor:
        """See `Contribution`."""
        width, height = self.inputs.shape[2], self.gradients.shape[2]
        if self._matrices is not None:
            flat = tf.reshape(self._matrices, [-1, width * height])
            return tf.reshape(tf.transpose(tf.reshape(tf.matmul(factors[None], flat), [height, width])), self.shape)
        weighted = tf.reshape(self.gradients * factors[:, None, None], [-1, height])
        return tf.reshape(tf.matmul(tf.reshape(self.inputs, [-1, width]), weighted, transpose_a=True), self.shape)

    def of(self, counted: tf.Tensor) -> Product:
        """See `Contribution`."""
        return Product(_only(counted, self.inputs), _only(counted, self.gradients), self.shape)

    def materialized(self) -> tf.Tensor:
        """See `Contribution`."""
        matrices = tf.matmul(self.inputs, self.gradients, transpose_a=True)
        return tf.reshape(matrices, [-1, *self.shape])

    def _is_cheaper_by_positions(self, positions: int | None) -> bool:
        width, height = self.inputs.shape[2], self.gradients.shape[2]
        if positions is None:
            return False
        return positions**2 * (width + height) <= _MULTIPLICATIONS_PER_ELEMENT * width * height


@dataclasses.dataclass(frozen=True)
class Rows:
    """Gradients that are added to the rows of a table: embeddings. The table is never made for an example.

    Attributes:
        rows: which row each position looked up, (batch, positions), int32.
        gradients: with respect to what was looked up, (batch, positions, width).
        shape: of the table, (rows, width).
    """

    rows: tf.Tensor
    gradients: tf.Tensor
    shape: tuple[int, int]

    def squared_norms(self) -> tf.Tensor:
        """See `Contribution`. Positions that looked up the same row add up before they are squared."""
        products = tf.matmul(self.gradients, self.gradients, transpose_b=True)
        same = tf.equal(self.rows[:, :, None], self.rows[:, None, :])  # "==" compares objects in TFF's graphs
        lengths = tf.sqrt(tf.linalg.diag_part(products))
        uncancelled = tf.where(same, lengths[:, :, None] * lengths[:, None, :], 0.0)
        return _not_below(
            tf.reduce_sum(tf.where(same, products, 0.0), axis=[1, 2]), tf.reduce_sum(uncancelled, axis=[1, 2])
        )

    def weighted_sum(self, factors: tf.Tensor) -> tf.Tensor:
        """See `Contribution`."""
        weighted = tf.reshape(self.gradients * factors[:, None, None], [-1, self.shape[1]])
        return tf.math.unsorted_segment_sum(weighted, tf.reshape(self.rows, [-1]), self.shape[0])

    def of(self, counted: tf.Tensor) -> Rows:
        """See `Contribution`."""
        return Rows(self.rows, _only(counted, self.gradients), self.shape)

    def materialized(self) -> tf.Tensor:
        """See `Contribution`."""
        hits = tf.one_hot(self.rows, self.shape[0], dtype=self.gradients.dtype)
        return tf.matmul(hits, self.gradients, transpose_a=True)


def combined(uses: Sequence[Contribution]) -> Contribution:
    """All uses of one weight as one contribution: gradients add up before norms are taken.

    Args:
        uses: at least one, of the same weight; several for layers that a model calls more than once.
    """
    first = uses[0]
    if len(uses) == 1:
        return first
    if all(isinstance(use, Product) for use in uses):
        inputs = tf.concat([use.inputs for use in uses if isinstance(use, Product)], axis=1)
        gradients = tf.concat([use.gradients for use in uses if isinstance(use, Product)], axis=1)
        assert isinstance(first, Product)
        return Product(inputs, gradients, first.shape)
    if all(isinstance(use, Rows) for use in uses):
        rows = tf.concat([use.rows for use in uses if isinstance(use, Rows)], axis=1)
        gradients = tf.concat([use.gradients for use in uses if isinstance(use, Rows)], axis=1)
        assert isinstance(first, Rows)
        return Rows(rows, gradients, first.shape)
    return Direct(tf.add_n([use.materialized() for use in uses]))


def _not_below(squared_norms: tf.Tensor, uncancelled: tf.Tensor) -> tf.Tensor:
    """Squared norms that are not shorter than the gradients; `uncancelled` is what they were if nothing cancelled."""
    above = tf.maximum(squared_norms, 0.0) + _ROUNDING * uncancelled
    return tf.where(squared_norms < _CANCELLED * uncancelled, above, squared_norms)


def _only(counted: tf.Tensor, values: tf.Tensor) -> tf.Tensor:
    mask = tf.reshape(counted, [-1] + [1] * (values.shape.rank - 1))
    return tf.where(mask, values, tf.zeros((), values.dtype))
