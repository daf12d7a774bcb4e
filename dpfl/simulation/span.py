"""The first kernel of many clients at once, by what moves it: the span of their own examples.

By SGD a dense layer's kernel moves along outer products of its inputs and the gradients of its products (examples times
kernel). If the inputs are the examples themselves, a client's kernel is

    kernel = start + examples^T coefficients,     coefficients: (examples, units),

whatever its steps were, and SGD, momentum and FedProx's term do to the coefficients what they do to the kernel. So no
client needs a kernel of its own: with the Gram matrix of its examples, `gram = examples examples^T`,

    products = examples start + gram coefficients,        |kernel - start|^2 = <coefficients, gram coefficients>,

and the cohort's sum of scaled updates is one matrix product of all examples with all scaled coefficients. `examples
start` is another one. What remains for each client is as small as its number of examples squared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

# Bytes of Gram matrices that are kept; of more clients they are made anew in every round, so that memory does not grow
# with the population.
_LARGEST_KEPT = 64_000_000
# Relative rounding of a float32 matrix product over some thousand rows, generously.
_ROUNDING = 2.0**-19
_NEGLIGIBLE = 1e-5


class Cohort(NamedTuple):
    """The spans of a chunk of clients; their examples are padded to the most that one of them has.

    Attributes:
        x: (clients * places, features); what is in places behind a client's last example does not count.
        gram: (clients, places, places), float64; neither here.
        rounded_gram: the same in float32.
        products: of the examples with the first kernel of each configuration at the round's start,
            (clients, places, configurations * units).
        places: the padded number of examples.
        units: of the layer.
    """

    x: tf.Tensor
    gram: tf.Tensor
    rounded_gram: tf.Tensor
    products: tf.Tensor
    places: tf.Tensor
    units: int

    def initial_coefficients(self) -> tf.Tensor:
        """Those of the kernel at the round's start: zeros, (clients, places, configurations * units)."""
        return tf.zeros_like(self.products)

    def products_at(self, positions: tf.Tensor, coefficients: tf.Tensor) -> tf.Tensor:
        """What the examples of a minibatch give with their client's present kernel.

        Args:
            positions: the examples' places at their clients, (clients, batch_size), int32.
            coefficients: (clients, places, configurations * units).

        Returns:
            (clients, batch_size, configurations * units).
        """
        gram = tf.gather(self.rounded_gram, positions, batch_dims=1)
        return tf.gather(self.products, positions, batch_dims=1) + tf.matmul(gram, coefficients)

    def gradient(self, positions: tf.Tensor, of_products: tf.Tensor) -> tf.Tensor:
        """The kernel's gradient as coefficients.

        Args:
            positions: as in `products_at`.
            of_products: the gradient of what it returned, zero where a place does not count.
        """
        return tf.matmul(tf.one_hot(positions, self.places), of_products, transpose_a=True)

    def squared_norms(self, coefficients: tf.Tensor) -> tf.Tensor:
        """Squared L2 norms of the kernel's updates, (clients, configurations), float32.

        In float64, because large coefficients can leave a small update. Where they cancel so far that the float32
        product in `sum_of_scaled` could be longer than its exact value says, the bound of its rounding is added;
        below a hundred-thousandth of the norm, that bound is left out.
        """
        coefficients = tf.cast(coefficients, tf.float64)
        moved = tf.matmul(self.gram, coefficients)
        squares = self._over_units(tf.reduce_sum(coefficients * moved, axis=1))
        lengths = tf.sqrt(tf.linalg.diag_part(self.gram))[:, :, None]
        by_example = tf.sqrt(self._over_units(tf.square(coefficients)))
        apart = tf.reduce_sum(lengths * by_example, axis=1)
        norms = tf.sqrt(tf.maximum(squares, 0.0))
        norms += tf.maximum(_ROUNDING * apart - _NEGLIGIBLE * norms, 0.0)
        return tf.cast(tf.square(norms), tf.float32)

    def sum_of_scaled(self, coefficients: tf.Tensor, scales: tf.Tensor) -> tf.Tensor:
        """The sum of the clients' kernel updates, each times its scale; a scale of zero takes NaN away.

        Args:
            coefficients: (clients, places, configurations * units).
            scales: (clients, configurations).

        Returns:
            (configurations, features, units).
        """
        scales = tf.repeat(scales, self.units, axis=1)[:, None, :]
        scaled = tf.math.multiply_no_nan(coefficients, tf.broadcast_to(scales, tf.shape(coefficients)))
        total = tf.matmul(self.x, tf.reshape(scaled, [-1, tf.shape(scaled)[2]]), transpose_a=True)
        return tf.transpose(tf.reshape(total, [self.x.shape[1], -1, self.units]), [1, 0, 2])

    def _over_units(self, values: tf.Tensor) -> tf.Tensor:
        """Sums (..., configurations * units) over the units."""
        return tf.reduce_sum(tf.reshape(values, tf.concat([tf.shape(values)[:-1], [-1, self.units]], axis=0)), axis=-1)


class Span:
    """The spans of all clients' examples.

    Args:
        x: all examples in client order, (examples, *shape).
        starts: each client's first row, (clients,), int32.
        sizes: each client's number of examples, (clients,), int32.
        largest: the most examples that a client has.
        units: of the first layer.
    """

    def __init__(self, x: tf.Tensor, starts: tf.Tensor, sizes: tf.Tensor, largest: int, units: int) -> None:
        self._x, self._starts, self._sizes, self._largest, self._units = x, starts, sizes, largest, units
        self._features = int(np.prod(x.shape[1:]))
        self._gram = self._all_grams() if 8 * int(x.shape[0]) * largest <= _LARGEST_KEPT else None

    @staticmethod
    def pays(largest: int, features: int) -> bool:
        """Whether Gram matrices are smaller than what they stand for."""
        return largest <= features

    @property
    def kernel_size(self) -> int:
        """Numbers in the first kernel."""
        return self._features * self._units

    @property
    def numbers_of_a_client(self) -> int:
        """Float32 numbers that a client needs for each configuration in the place of its first kernel."""
        return self._largest * self._units

    @property
    def shared_numbers_of_a_client(self) -> int:
        """Float32 numbers that a client needs for all its configurations together."""
        return self._largest * (self._features + 2 * self._largest)

    def cohort(self, clients: tf.Tensor, kernels: tf.Tensor) -> Cohort:
        """The spans of a chunk of clients, in graph.

        Args:
            clients: their indices.
            kernels: the configurations' first kernels, (configurations, features, units).
        """
        rows, places = self._rows(clients)
        x = tf.reshape(tf.gather(self._x, tf.reshape(rows, [-1])), [-1, self._features])
        if self._gram is None:
            gram = _gram(tf.reshape(x, [-1, places, self._features]))
        else:
            gram = tf.gather(self._gram, rows)[:, :, :places]
        flat = tf.reshape(tf.transpose(kernels, [1, 0, 2]), [self._features, -1])
        products = tf.reshape(tf.matmul(x, flat), [-1, places, tf.shape(flat)[1]])
        return Cohort(x, gram, tf.cast(gram, tf.float32), products, places, self._units)

    def _rows(self, clients: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Each place's row, (clients, places); a client's first row behind its last example."""
        starts, sizes = tf.gather(self._starts, clients), tf.gather(self._sizes, clients)
        places = tf.reduce_max(sizes)
        place = tf.range(places)
        return starts[:, None] + tf.where(place < sizes[:, None], place, 0), places

    def _all_grams(self) -> tf.Tensor:
        """For each example its products with those of its client, (examples, most examples of a client), float64."""
        found = np.zeros((int(self._x.shape[0]), self._largest))
        of_client: Sequence[int] = self._sizes.numpy()
        for start, size in zip(self._starts.numpy(), of_client, strict=True):
            x = np.asarray(self._x[start : start + size], np.float64).reshape(size, -1)
            found[start : start + size, :size] = x @ x.T
        return tf.constant(found)


def _gram(x: tf.Tensor) -> tf.Tensor:
    """Products of a client's examples with each other, (clients, places, places), float64."""
    x = tf.cast(x, tf.float64)
    return tf.matmul(x, x, transpose_b=True)
