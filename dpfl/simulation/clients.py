"""A cohort's local training in graph: one client after the other, or many side by side.

Both give the sum of what the clients of a chunk send, and what was measured of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from dpfl.clients import ClientTraining, optimizers
from dpfl.clients.dp_sgd import client_seeds, train_privately
from dpfl.clients.optimizers import OptimizerNumbers
from dpfl.clients.schedule import examples_seen, minibatches
from dpfl.mechanisms.compressed_queries import CompressedMeanQuery
from dpfl.mechanisms.queries import MeanQuery, clip_scale
from dpfl.mechanisms.weighted_queries import WeightedMeanQuery
from dpfl.models.functional import FunctionalModel
from dpfl.simulation.span import Cohort, Span
from dpfl.simulation.state import (
    Measurements,
    PrivateSettings,
    Settings,
    State,
    expanded,
    for_each,
    norm_counts,
    unstacked,
)

# Side by side, clients become batched matrix products: faster while the cost of an operation is its dispatch, slower
# once what they change no longer fits the cache. Counted in float32 numbers.
_CHUNK_NUMBERS = 2_000_000
# What clients only read, once in a round, need not stay in the cache.
_CHUNK_READ_NUMBERS = 8_000_000


class Examples(NamedTuple):
    """All clients' examples, resident.

    Attributes:
        x: (examples, *shape) in client order.
        y: (examples,), int32.
        starts: each client's first row, (clients,), int32.
        sizes: each client's number of examples, (clients,), int32.
    """

    x: tf.Tensor
    y: tf.Tensor
    starts: tf.Tensor
    sizes: tf.Tensor


Query = MeanQuery | WeightedMeanQuery | CompressedMeanQuery


class Training:
    """What both ways of training share.

    Args:
        examples: of all clients.
        model: the model as a function of its weights.
        local: what clients do.
        query: a query of the mechanism's kind.

    Attributes:
        lanes: how many parts of a cohort are summed at the same time; whatever the number of threads is, so that the
            order of summation is the same everywhere.
    """

    lanes = 2

    def __init__(self, examples: Examples, model: FunctionalModel, local: ClientTraining, query: Query) -> None:
        self._examples, self._model, self._local, self._query = examples, model, local, query

    def chunk_size(self, state: State) -> tf.Tensor | int:
        """How many clients `sums` takes at a time."""
        raise NotImplementedError

    def sums(self, state: State, params: Any, clients: tf.Tensor, settings: Settings) -> tuple[Any, Measurements]:
        """Trains the clients of a chunk.

        Args:
            state: before the round.
            params: the round's sample params; of several configurations, those of each along the first axis.
            clients: their indices, at most `chunk_size`.
            settings: the configuration's numbers.

        Returns:
            The sum of what they send, private; and their measurements, summed.
        """
        raise NotImplementedError

    def _measured(self, norms: tf.Tensor, clip_norm: tf.Tensor, examples_clipped: tf.Tensor) -> Measurements:
        """Sums over the clients, which are along the first axis."""
        finite = tf.math.is_finite(norms)
        return Measurements(
            tf.reduce_sum(tf.where(finite, norms, 0.0), axis=0),
            norm_counts(norms, finite),
            tf.reduce_sum(tf.cast(finite & (norms > clip_norm), tf.float32), axis=0),
            tf.reduce_sum(tf.cast(~finite, tf.float32), axis=0),
            clip_norm,
            examples_clipped,
            tf.zeros_like(clip_norm),
        )

    def _sent_and_norm(
        self, params: Any, update: list[tf.Tensor], client: tf.Tensor, examples: tf.Tensor
    ) -> tuple[Any, tf.Tensor]:
        """What one client sends, private until it is summed unless the mechanism says otherwise; and its norm."""
        return self._query.sent_and_norm(self._query.client_params(params, client, examples), update)

    def _examples_seen(self, clients: tf.Tensor, settings: Settings) -> tf.Tensor:
        """How many examples each of some clients processes in a round, (clients,), int32."""
        return examples_seen(
            tf.gather(self._examples.sizes, clients),
            steps=settings.steps,
            epochs=settings.epochs,
            batch_size=self._local.batch_size,
            sampling=self._local.example_sampling if self._local.is_private else "shuffled",
        )

    def _schedule(self, state: State, clients: tf.Tensor, settings: Settings) -> tuple[tf.Tensor, tf.Tensor]:
        return minibatches(
            tf.gather(self._examples.starts, clients),
            tf.gather(self._examples.sizes, clients),
            clients,
            steps=settings.steps,
            epochs=settings.epochs,
            batch_size=self._local.batch_size,
            seed=settings.shuffling_seed,
            round_number=state.round,
        )

    def _mean_loss(
        self,
        weights: Sequence[tf.Tensor],
        x: tf.Tensor,
        y: tf.Tensor,
        mask: tf.Tensor,
        seed: tf.Tensor,
        *,
        first_products: tf.Tensor | None = None,
    ) -> tf.Tensor:
        """Mean loss over a minibatch's counted examples, with penalties; zero for an empty minibatch."""
        losses, _, penalty = self._model.losses_and_logits(
            weights, x, y, training_seed=seed, first_products=first_products
        )
        count = tf.reduce_sum(mask)
        return tf.reduce_sum(losses * mask) / tf.maximum(count, 1.0) + penalty * tf.minimum(count, 1.0)


class OneByOne(Training):
    """Clients train one after the other: for models whose own operations are large, and for DP-SGD at the client."""

    def chunk_size(self, state: State) -> int:
        """One."""
        return 1

    def sums(self, state: State, params: Any, clients: tf.Tensor, settings: Settings) -> tuple[Any, Measurements]:
        """See `Training.sums`."""
        client = clients[0]
        if isinstance(settings.private, PrivateSettings):
            update, examples_clipped = self._train_privately(state, params, client, settings.private)
        else:
            update, examples_clipped = self._train(state, params, client, settings), tf.constant(0.0)
        sent, norm = self._sent_and_norm(params, update, client, self._examples_seen(clients, settings)[0])
        return sent, self._measured(norm[None], self._query.clip_norm(params), examples_clipped)

    def _train_privately(
        self, state: State, params: Any, client: tf.Tensor, private: PrivateSettings
    ) -> tuple[list[tf.Tensor], tf.Tensor]:
        """Update (after minus before) of one client, and the fraction of its examples' gradients that it clipped."""
        start, size = self._examples.starts[client], self._examples.sizes[client]
        return train_privately(
            self._model,
            state.weights,
            self._examples.x[start : start + size],
            self._examples.y[start : start + size],
            training=self._local,
            numbers=private.numbers,
            seeds=client_seeds(private.seeds, state.round, client),
            onto=lambda gradients: self._query.onto(params, gradients),
        )

    def _train(self, state: State, params: Any, client: tf.Tensor, settings: Settings) -> list[tf.Tensor]:
        """Update (after minus before) of one client that trains without example-level privacy."""
        rows, mask = self._schedule(state, client[None], settings)
        seed = tf.random.experimental.stateless_fold_in(
            tf.random.experimental.stateless_fold_in(settings.model_seed, state.round), client
        )
        numbers = settings.optimizer

        def body(step: tf.Tensor, weights: list[tf.Tensor], moments: Any) -> tuple[tf.Tensor, list[tf.Tensor], Any]:
            x, y = tf.gather(self._examples.x, rows[0, step]), tf.gather(self._examples.y, rows[0, step])
            with tf.GradientTape() as tape:
                tape.watch(weights)
                step_seed = tf.random.experimental.stateless_fold_in(seed, step)
                loss = self._mean_loss(weights, x, y, mask[0, step], step_seed)
            gradients = tape.gradient(loss, weights)
            if self._local.is_proximal:
                strength = numbers.proximal_strength
                gradients = optimizers.with_proximal_term(gradients, weights, state.weights, strength)
            gradients = self._query.onto(params, gradients)
            return step + 1, *optimizers.step(self._local.optimizer, weights, gradients, moments, numbers, step)

        before = list(state.weights)
        start = (tf.constant(0), before, optimizers.initial_moments(self._local.optimizer, before))
        steps = tf.shape(mask)[1]
        _, after, _ = tf.while_loop(lambda step, *_: step < steps, body, start, parallel_iterations=1)
        return [new - old for new, old in zip(after, before, strict=True)]


class SideBySide(Training):
    """Clients train side by side, and configurations too: their weights are stacked in batched matrix products.

    A pair is a client under a configuration; everything that differs between pairs has them along its first axis, a
    client's configurations one behind the other. Where the model's first kernel moves in the span of a client's
    examples, `Span` stands for it.

    Args:
        examples, model, local, query: as in `Training`.
        together: whether states and settings are those of several configurations; see `dpfl.simulation.state`. They
            share the seed, the cohorts and the numbers of steps.
        span: the clients' spans; None to give each pair a first kernel of its own.
    """

    def __init__(
        self,
        examples: Examples,
        model: FunctionalModel,
        local: ClientTraining,
        query: Query,
        *,
        together: bool,
        span: Span | None,
    ) -> None:
        super().__init__(examples, model, local, query)
        self._together, self._span = together, span
        if together:
            self.lanes = 1  # Configurations fill an operation, and workers of a study have one thread.

    def chunk_size(self, state: State) -> tf.Tensor:
        """As many clients as fit the cache with all their configurations, at least one."""
        own, read = self._model.parameters, 1
        if self._span is not None:
            own += self._span.numbers_of_a_client - self._span.kernel_size
            read = self._span.shared_numbers_of_a_client
        configurations = tf.shape(state.weights[0])[0] if self._together else 1
        fitting = tf.minimum(_CHUNK_NUMBERS // (configurations * own), _CHUNK_READ_NUMBERS // read)
        return tf.maximum(1, fitting)

    def sums(self, state: State, params: Any, clients: tf.Tensor, settings: Settings) -> tuple[Any, Measurements]:
        """See `Training.sums`; of several configurations, these are along the first axis."""
        weights, numbers, query = list(state.weights), settings.optimizer, self._query
        if not self._together:
            weights, numbers = expanded((weights, numbers))
        cohort = None
        if self._span is not None:
            cohort = self._span.cohort(clients, weights[self._first_kernel])
        updates = self._train(state, params, clients, weights, numbers, settings, cohort)
        if isinstance(query, CompressedMeanQuery) and query.clips_many:
            total, norms = query.sums(params, clients, updates)
            return total, self._measured(norms, query.clip_norm(params), tf.constant(0.0))
        if not isinstance(query, MeanQuery) or not query.only_clips:
            return self._sums_of_records(params, clients, updates, settings)
        norms = self._norms(updates, clients, cohort)
        params = params if self._together else params[None]
        clip_norms = query.clip_norm(params)
        scales = clip_scale(norms, clip_norms)
        total = [
            cohort.sum_of_scaled(update, scales)
            if cohort is not None and index == self._first_kernel
            else _sum_of_scaled(update, scales)
            for index, update in enumerate(updates)
        ]
        measured = self._measured(norms, clip_norms, tf.zeros_like(clip_norms))
        if self._together:
            return for_each(query.sent, params, total, tf.transpose(norms)), measured
        return query.sent(params[0], unstacked(total), norms[:, 0]), unstacked(measured)

    @property
    def _first_kernel(self) -> int:
        index = self._model.first_kernel
        assert index is not None  # Only asked for where there is a span.
        return index

    def _train(
        self,
        state: State,
        params: Any,
        clients: tf.Tensor,
        weights: list[tf.Tensor],
        numbers: OptimizerNumbers,
        settings: Settings,
        cohort: Cohort | None,
    ) -> list[tf.Tensor]:
        """Updates (after minus before) of all pairs, each (pairs, *shape); in a span, the first kernel's coefficients.

        Args:
            state: before the round.
            params: the round's sample params.
            clients: their indices.
            weights: before the round, of each configuration.
            numbers: of the optimizer, of each configuration.
            settings: seeds and numbers of steps.
            cohort: the clients' spans.
        """
        rows, mask = self._schedule(state, clients, settings)
        count, configurations = tf.shape(clients)[0], tf.shape(weights[0])[0]
        before = [tf.tile(weight, [count] + [1] * (len(weight.shape) - 1)) for weight in weights]
        numbers_of = [_along_pairs(numbers, count, weight) for weight in before]
        if cohort is not None:
            before[self._first_kernel] = cohort.initial_coefficients()
            numbers_of[self._first_kernel] = tf.nest.map_structure(lambda part: tf.repeat(part, cohort.units), numbers)

        def body(step: tf.Tensor, present: list[tf.Tensor], moments: Any) -> tuple[tf.Tensor, list[tf.Tensor], Any]:
            gradients = self._gradients(clients, rows[:, step], mask[:, step], present, configurations, cohort)
            if cohort is None:  # In a span queries take all coordinates.
                gradients = self._query.onto(params, gradients)
            # Moments and the proximal term would carry on a client that has come to its end before the others.
            goes_on = tf.reduce_any(mask[:, step] > 0, axis=1)
            stepped = [
                self._step(step, goes_on, *one)
                for one in zip(present, gradients, before, moments, numbers_of, strict=True)
            ]
            return step + 1, [weight for weight, _ in stepped], [kept for _, kept in stepped]

        start = (
            tf.constant(0),
            before,
            [optimizers.initial_moments(self._local.optimizer, [weight]) for weight in before],
        )
        steps = tf.shape(mask)[1]
        _, after, _ = tf.while_loop(lambda step, *_: step < steps, body, start, parallel_iterations=1)
        return [new - old for new, old in zip(after, before, strict=True)]

    def _step(
        self,
        step: tf.Tensor,
        goes_on: tf.Tensor,
        weight: tf.Tensor,
        gradient: Any,
        start: tf.Tensor,
        moments: tuple[list[tf.Tensor], ...],
        numbers: OptimizerNumbers,
    ) -> tuple[tf.Tensor, tuple[list[tf.Tensor], ...]]:
        """One tensor of all pairs after a local step, with its moments."""
        gradients = [gradient]
        if self._local.is_proximal:
            gradients = optimizers.with_proximal_term(gradients, [weight], [start], numbers.proximal_strength)
        (moved,), moments = optimizers.step(self._local.optimizer, [weight], gradients, moments, numbers, step)
        if self._local.optimizer != "sgd" or self._local.is_proximal:
            of_row = tf.repeat(goes_on, tf.shape(weight)[0] // tf.shape(goes_on)[0])
            moved = tf.where(tf.reshape(of_row, [-1] + [1] * (len(weight.shape) - 1)), moved, weight)
        return moved, moments

    def _gradients(
        self,
        clients: tf.Tensor,
        rows: tf.Tensor,
        mask: tf.Tensor,
        weights: list[tf.Tensor],
        configurations: tf.Tensor,
        cohort: Cohort | None,
    ) -> list[Any]:
        """Gradients of all pairs on a minibatch of each client; in a span, the first kernel's as coefficients.

        Args:
            clients: their indices.
            rows: of their examples, (clients, batch_size).
            mask: which of them count.
            weights: of all pairs; in a span, the first kernel's coefficients.
            configurations: their number.
            cohort: the clients' spans.
        """
        y, mask = (tf.repeat(part, configurations, axis=0) for part in (tf.gather(self._examples.y, rows), mask))
        seed = tf.zeros(2, tf.int32)  # Models with random layers are not trained side by side.
        if cohort is None:
            x = tf.repeat(tf.gather(self._examples.x, rows), configurations, axis=0)
            with tf.GradientTape() as tape:
                tape.watch(weights)
                losses = tf.vectorized_map(
                    lambda one: self._mean_loss(one[0], one[1], one[2], one[3], seed), (weights, x, y, mask)
                )
            return tape.gradient(losses, weights)
        kernel, batch_size = self._first_kernel, tf.shape(rows)[1]
        positions = rows - tf.gather(self._examples.starts, clients)[:, None]
        products = cohort.products_at(positions, weights[kernel])
        products = tf.reshape(products, [-1, batch_size, configurations, cohort.units])
        products = tf.reshape(tf.transpose(products, [0, 2, 1, 3]), [-1, batch_size, cohort.units])
        own = weights[:kernel] + weights[kernel + 1 :]
        unseen = tf.zeros(self._model.shapes[kernel])
        x = tf.zeros([batch_size, *self._model.example_shape])

        def mean_loss(one: Any) -> tf.Tensor:
            rest, products, y, mask = one
            return self._mean_loss([*rest[:kernel], unseen, *rest[kernel:]], x, y, mask, seed, first_products=products)

        with tf.GradientTape() as tape:
            tape.watch([own, products])
            losses = tf.vectorized_map(mean_loss, (own, products, y, mask))
        gradients, of_products = tape.gradient(losses, [own, products])
        of_products = tf.reshape(of_products, [-1, configurations, batch_size, cohort.units])
        of_products = tf.reshape(
            tf.transpose(of_products, [0, 2, 1, 3]), [-1, batch_size, configurations * cohort.units]
        )
        return [*gradients[:kernel], cohort.gradient(positions, of_products), *gradients[kernel:]]

    def _norms(self, updates: list[tf.Tensor], clients: tf.Tensor, cohort: Cohort | None) -> tf.Tensor:
        """L2 norms of all tensors of an update together, (clients, configurations)."""
        squares = [
            cohort.squared_norms(update)
            if cohort is not None and index == self._first_kernel
            else tf.reshape(_squares(update), [tf.shape(clients)[0], -1])
            for index, update in enumerate(updates)
        ]
        return tf.sqrt(tf.add_n(squares))

    def _sums_of_records(
        self, params: Any, clients: tf.Tensor, updates: list[tf.Tensor], settings: Settings
    ) -> tuple[Any, Measurements]:
        """What clients send one by one, summed: of queries that do more to a record than clip it."""
        # Drawing at the client falls back to a loop over the clients, which needs no words.
        records, norms = tf.vectorized_map(
            lambda one: self._sent_and_norm(params, *one),
            (updates, clients, self._examples_seen(clients, settings)),
            warn=False,
        )
        total = tf.nest.map_structure(lambda part: tf.reduce_sum(part, axis=0), records)
        return total, self._measured(norms, self._query.clip_norm(params), tf.constant(0.0))


def _squares(update: tf.Tensor) -> tf.Tensor:
    """Sums of squares over all axes but the first."""
    return tf.reduce_sum(tf.square(update), axis=list(range(1, len(update.shape))))


def _sum_of_scaled(update: tf.Tensor, scales: tf.Tensor) -> tf.Tensor:
    """Sums (pairs, *shape) over clients, each times its scale (clients, configurations): (configurations, *shape)."""
    flat = tf.reshape(update, tf.concat([tf.shape(scales), [-1]], axis=0))
    total = tf.reduce_sum(tf.math.multiply_no_nan(flat, tf.broadcast_to(scales[:, :, None], tf.shape(flat))), axis=0)
    return tf.reshape(total, [-1, *update.shape[1:]])


def _along_pairs(numbers: OptimizerNumbers, clients: tf.Tensor, weight: tf.Tensor) -> OptimizerNumbers:
    """Each configuration's numbers for all pairs, in a shape that broadcasts along a weight's other axes."""
    shape = [-1] + [1] * (len(weight.shape) - 1)
    return tf.nest.map_structure(lambda part: tf.reshape(tf.tile(part, [clients]), shape), numbers)
