"""The in-graph engine: rounds of federated averaging inside one `tf.function`.

The cohort is a loop in the graph: local training -> update -> clip -> sum. Memory is that of a chunk
of clients, never of the cohort. Everything that configurations of a study differ in (clip, noise,
rates, steps, seeds) is a tensor, so they share one compiled graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from dpfl.clients import ClientTraining, optimizers
from dpfl.clients.dp_sgd import ClientNumbers, ClientSeeds, client_numbers, client_seeds, run_seeds, train_privately
from dpfl.clients.example_privacy import ClientPlan
from dpfl.clients.optimizers import OptimizerNumbers, optimizer_numbers
from dpfl.clients.schedule import examples_seen, minibatches
from dpfl.data import FederatedData
from dpfl.mechanisms import Plan
from dpfl.mechanisms.queries import MeanQuery, global_norm
from dpfl.mechanisms.weighted_queries import WeightedMeanQuery
from dpfl.models.functional import FunctionalModel
from dpfl.randomness import Purpose, stateless_seed
from dpfl.simulation.rounds import arrays_of, structure_of
from dpfl.simulation.server import ServerOptimizer

# Side by side, a chunk of clients becomes batched matrix products: faster while the cost of an
# operation is its dispatch, slower once the weights of a chunk no longer fit the cache.
_VECTORIZED_PARAMETERS = 20_000
_VECTORIZED_CLIENTS = 128
_EVALUATION_BATCH = 1_000


class State(NamedTuple):
    """Everything that a round changes.

    Attributes:
        weights: the model's trainable weights; released after each round.
        server: the server optimizer's moments.
        query: the mechanism's state, with the seed and the round of its noise.
        round: rounds done, int32.
    """

    weights: tuple[tf.Tensor, ...]
    server: tuple[Any, ...]
    query: Any
    round: tf.Tensor


class PrivateSettings(NamedTuple):
    """What clients that train by DP-SGD need: numbers, and the run's seeds of sampling, noise and random layers."""

    numbers: ClientNumbers
    seeds: ClientSeeds


class Settings(NamedTuple):
    """What differs between configurations that share a compiled graph; all are scalars or seeds.

    Clients that train by DP-SGD look at `private` alone; where there are none it is empty.
    """

    steps: tf.Tensor
    epochs: tf.Tensor
    optimizer: OptimizerNumbers
    server: tuple[tf.Tensor, ...]
    shuffling_seed: tf.Tensor
    model_seed: tf.Tensor
    private: PrivateSettings | tuple[()]


class Measurements(NamedTuple):
    """What a simulation sees of a round and nobody may release: not covered by any guarantee.

    Attributes:
        update_norm: mean L2 norm of the updates before clipping.
        clipped_fraction: fraction of the cohort whose update was clipped.
        non_finite_updates: clients whose update was NaN or infinite, and counted as zero.
        clip_norm: the norm to which updates were clipped.
        example_clipped_fraction: mean over clients and local steps of the fraction of a minibatch's examples whose
            gradient was longer than their clip norm; only of clients that train by DP-SGD.
    """

    update_norm: tf.Tensor
    clipped_fraction: tf.Tensor
    non_finite_updates: tf.Tensor
    clip_norm: tf.Tensor
    example_clipped_fraction: tf.Tensor


class Engine:
    """Compiled rounds for one dataset, model, structure of local training, kind of server optimizer and mechanism.

    Args:
        data: the federated dataset; its arrays stay resident.
        model: the model as a function of its weights.
        local: what clients do; only its structure (`ClientTraining.structure`) is compiled in.
        server: the server's optimizer; only its kind is compiled in.
        query: a query of the mechanism's kind; its numbers come with the state.
    """

    def __init__(
        self,
        data: FederatedData,
        model: FunctionalModel,
        local: ClientTraining,
        server: ServerOptimizer,
        query: MeanQuery | WeightedMeanQuery,
    ) -> None:
        self._model = model
        self._local = local
        self._server = server
        self._query = query
        self._x, self._y = tf.constant(data.x), tf.constant(data.y)
        self._starts = tf.constant(data.offsets[:-1], tf.int32)
        self._sizes = tf.constant(data.client_sizes, tf.int32)
        self._held_out = {
            "validation": (tf.constant(data.x_validation), tf.constant(data.y_validation)),
            "test": (tf.constant(data.x_test), tf.constant(data.y_test)),
        }
        tiny = model.vectorizes and model.parameters <= _VECTORIZED_PARAMETERS
        self._vectorizes = tiny and not local.is_private
        self._compiled_rounds: Any = None
        self._compiled_evaluation: Any = None

    def initial_state(self, plan: Plan, server: ServerOptimizer, seed: int) -> State:
        """The state before the first round."""
        weights = tuple(tf.constant(weight) for weight in self._model.initial_weights(seed))
        return State(
            weights,
            server.initial_state(list(weights)),
            plan.query(seed, weights).initial_global_state(),
            tf.constant(0, tf.int32),
        )

    def settings(
        self, local: ClientTraining, server: ServerOptimizer, seed: int, client_plan: ClientPlan | None = None
    ) -> Settings:
        """A configuration's numbers as tensors.

        Args:
            local: what clients do, of the engine's structure.
            server: the server's optimizer.
            seed: the run's seed.
            client_plan: the plan of clients that train by DP-SGD; None if they do not.
        """
        private: PrivateSettings | tuple[()] = ()
        if client_plan is not None:
            numbers = client_numbers(client_plan.training, client_plan.noise_multiplier)
            private = PrivateSettings(numbers, run_seeds(seed))
        return Settings(
            steps=tf.constant(local.steps or 0, tf.int32),
            epochs=tf.constant(local.epochs or 0, tf.int32),
            optimizer=optimizer_numbers(local),
            server=tuple(tf.constant(number, tf.float32) for number in server.numbers()),
            shuffling_seed=tf.constant(stateless_seed(seed, Purpose.SHUFFLING)),
            model_seed=tf.constant(stateless_seed(seed, Purpose.MODEL)),
            private=private,
        )

    def run_rounds(
        self, state: State, cohorts: Sequence[np.ndarray], settings: Settings
    ) -> tuple[State, dict[str, np.ndarray]]:
        """Runs one round for each cohort.

        Args:
            state: before the first of these rounds.
            cohorts: client indices of each round; an empty cohort releases noise alone.
            settings: the configuration's numbers.

        Returns:
            The state after the last round, and the measurements by name, arrays of one value a round.
        """
        ends = np.cumsum([len(cohort) for cohort in cohorts], dtype=np.int32)
        clients = np.concatenate(cohorts).astype(np.int32)
        arguments = (state, tf.constant(clients), tf.constant(ends), settings)
        if self._compiled_rounds is None:
            self._compiled_rounds = _compile(self._rounds, *arguments)
        state, measured = self._compiled_rounds(*arguments)
        values = {name: array.numpy() for name, array in measured._asdict().items()}
        if not self._local.is_private:
            del values["example_clipped_fraction"]
        return state, values

    def evaluate(self, state: State, split: str) -> tuple[float, float]:
        """Accuracy (a fraction) and mean cross-entropy (nats) on "validation" or "test".

        Both are NaN on an empty split. Neither is covered by the guarantee.
        """
        x, y = self._held_out[split]
        if not len(y):
            return float("nan"), float("nan")
        if self._compiled_evaluation is None:
            self._compiled_evaluation = _compile(self._evaluate, state.weights, x, y)
        correct, loss = self._compiled_evaluation(state.weights, x, y)
        return float(correct) / len(y), float(loss) / len(y)

    # From here on everything runs in graph.

    def _rounds(
        self, state: State, clients: tf.Tensor, ends: tf.Tensor, settings: Settings
    ) -> tuple[State, Measurements]:
        count = tf.shape(ends)[0]
        starts = tf.concat([[0], ends[:-1]], axis=0)
        arrays = Measurements(*(tf.TensorArray(tf.float32, size=count) for _ in Measurements._fields))

        def body(index: tf.Tensor, state: State, arrays: Measurements) -> tuple[tf.Tensor, State, Measurements]:
            state, measured = self._round(state, clients[starts[index] : ends[index]], settings)
            written = (array.write(index, value) for array, value in zip(arrays, measured, strict=True))
            return index + 1, state, Measurements(*written)

        _, state, arrays = tf.while_loop(
            lambda index, *_: index < count, body, (tf.constant(0), state, arrays), parallel_iterations=1
        )
        return state, Measurements(*(array.stack() for array in arrays))

    def _round(self, state: State, cohort: tf.Tensor, settings: Settings) -> tuple[State, Measurements]:
        size = tf.shape(cohort)[0]
        params = self._query.derive_sample_params(state.query)
        clip_norm = self._query.clip_norm(params)
        chunk_size = _VECTORIZED_CLIENTS if self._vectorizes else 1

        def body(start: tf.Tensor, total: Any, measured: Measurements) -> tuple[tf.Tensor, Any, Measurements]:
            chunk = cohort[start : start + chunk_size]
            examples = self._examples_seen(chunk, settings)
            if self._vectorizes:
                updates = self._train_chunk(state, chunk, settings)
                norms = tf.vectorized_map(global_norm, updates)
                # Drawing at the client falls back to a loop over the clients, which needs no words.
                records = tf.vectorized_map(
                    lambda one: self._preprocess(params, *one), (updates, chunk, examples), warn=False
                )
                record = tf.nest.map_structure(lambda part: tf.reduce_sum(part, axis=0), records)
                examples_clipped = tf.constant(0.0)
            else:
                update, examples_clipped = self._train_one(state, chunk[0], settings)
                norms = global_norm(update)[None]
                record = self._preprocess(params, update, chunk[0], examples[0])
            finite = tf.math.is_finite(norms)
            measured = Measurements(
                measured.update_norm + tf.reduce_sum(tf.where(finite, norms, 0.0)),
                measured.clipped_fraction + tf.reduce_sum(tf.cast(finite & (norms > clip_norm), tf.float32)),
                measured.non_finite_updates + tf.reduce_sum(tf.cast(~finite, tf.float32)),
                clip_norm,
                measured.example_clipped_fraction + examples_clipped,
            )
            return start + chunk_size, self._query.accumulate_preprocessed_record(total, record), measured

        nothing = self._query.initial_sample_state(list(state.weights))
        zeros = Measurements(*(tf.constant(0.0) for _ in Measurements._fields))._replace(clip_norm=clip_norm)
        _, total, measured = tf.while_loop(
            lambda start, *_: start < size, body, (tf.constant(0), nothing, zeros), parallel_iterations=1
        )
        mean_update, query_state, _ = self._query.get_noised_result(total, state.query)
        weights, server_state = self._server.apply(list(state.weights), mean_update, state.server, settings.server)
        clients = tf.cast(tf.maximum(size, 1), tf.float32)
        measured = measured._replace(
            update_norm=measured.update_norm / clients,
            clipped_fraction=measured.clipped_fraction / clients,
            example_clipped_fraction=measured.example_clipped_fraction / clients,
        )
        return State(tuple(weights), server_state, query_state, state.round + 1), measured

    def _preprocess(self, params: Any, update: list[tf.Tensor], client: tf.Tensor, examples: tf.Tensor) -> Any:
        """What one client sends: private until it is summed, unless the mechanism says otherwise."""
        return self._query.preprocess_record(self._query.client_params(params, client, examples), update)

    def _examples_seen(self, clients: tf.Tensor, settings: Settings) -> tf.Tensor:
        """How many examples each of some clients processes in a round, (clients,), int32."""
        return examples_seen(
            tf.gather(self._sizes, clients),
            steps=settings.steps,
            epochs=settings.epochs,
            batch_size=self._local.batch_size,
            sampling=self._local.example_sampling if self._local.is_private else "shuffled",
        )

    def _schedule(self, state: State, clients: tf.Tensor, settings: Settings) -> tuple[tf.Tensor, tf.Tensor]:
        return minibatches(
            tf.gather(self._starts, clients),
            tf.gather(self._sizes, clients),
            clients,
            steps=settings.steps,
            epochs=settings.epochs,
            batch_size=self._local.batch_size,
            seed=settings.shuffling_seed,
            round_number=state.round,
        )

    def _train_chunk(self, state: State, clients: tf.Tensor, settings: Settings) -> list[tf.Tensor]:
        """Updates (after minus before) of some clients trained side by side, each (clients, *shape)."""
        rows, mask = self._schedule(state, clients, settings)
        before = [tf.repeat(weight[None], tf.shape(clients)[0], axis=0) for weight in state.weights]

        def gradients_at(step: tf.Tensor, weights: list[tf.Tensor]) -> list[Any]:
            x, y = tf.gather(self._x, rows[:, step]), tf.gather(self._y, rows[:, step])
            with tf.GradientTape() as tape:
                tape.watch(weights)
                losses = tf.vectorized_map(
                    lambda one: self._mean_loss(one[0], one[1], one[2], one[3], tf.zeros(2, tf.int32)),
                    (weights, x, y, mask[:, step]),
                )
            return tape.gradient(losses, weights)

        return self._local_steps(mask, gradients_at, before, settings)

    def _train_one(self, state: State, client: tf.Tensor, settings: Settings) -> tuple[list[tf.Tensor], tf.Tensor]:
        """Update (after minus before) of one client, and the fraction of its examples' gradients that it clipped."""
        if not isinstance(settings.private, PrivateSettings):
            return self._train_client(state, client, settings), tf.constant(0.0)
        start, size = self._starts[client], self._sizes[client]
        return train_privately(
            self._model,
            state.weights,
            self._x[start : start + size],
            self._y[start : start + size],
            training=self._local,
            numbers=settings.private.numbers,
            seeds=client_seeds(settings.private.seeds, state.round, client),
        )

    def _train_client(self, state: State, client: tf.Tensor, settings: Settings) -> list[tf.Tensor]:
        """Update (after minus before) of one client that trains without example-level privacy."""
        rows, mask = self._schedule(state, client[None], settings)
        seed = tf.random.experimental.stateless_fold_in(
            tf.random.experimental.stateless_fold_in(settings.model_seed, state.round), client
        )

        def gradients_at(step: tf.Tensor, weights: list[tf.Tensor]) -> list[Any]:
            x, y = tf.gather(self._x, rows[0, step]), tf.gather(self._y, rows[0, step])
            with tf.GradientTape() as tape:
                tape.watch(weights)
                step_seed = tf.random.experimental.stateless_fold_in(seed, step)
                loss = self._mean_loss(weights, x, y, mask[0, step], step_seed)
            return tape.gradient(loss, weights)

        return self._local_steps(mask, gradients_at, list(state.weights), settings)

    def _local_steps(
        self,
        mask: tf.Tensor,
        gradients_at: Callable[[tf.Tensor, list[tf.Tensor]], list[Any]],
        before: list[tf.Tensor],
        settings: Settings,
    ) -> list[tf.Tensor]:
        """Takes the local steps of one client, or of a chunk of them side by side.

        Args:
            mask: which rows of the minibatches count, (clients, steps, batch_size).
            gradients_at: the weights' gradients on a step's minibatches.
            before: the weights, with the clients along the first axis where they train side by side.
            settings: the configuration's numbers.
        """
        steps, optimizer, is_proximal = tf.shape(mask)[1], self._local.optimizer, self._local.is_proximal

        def body(
            step: tf.Tensor, weights: list[tf.Tensor], moments: tuple[list[tf.Tensor], ...]
        ) -> tuple[tf.Tensor, list[tf.Tensor], tuple[list[tf.Tensor], ...]]:
            gradients, numbers = gradients_at(step, weights), settings.optimizer
            if is_proximal:
                gradients = optimizers.with_proximal_term(gradients, weights, before, numbers.proximal_strength)
            moved, moments = optimizers.step(optimizer, weights, gradients, moments, numbers, step)
            if self._vectorizes and (optimizer != "sgd" or is_proximal):
                # Moments and the proximal term would carry on a client that has come to its end before the others of
                # its chunk.
                goes_on = tf.reduce_any(mask[:, step] > 0, axis=1)
                moved = [tf.where(_along(goes_on, new), new, old) for new, old in zip(moved, weights, strict=True)]
            return step + 1, moved, moments

        start = (tf.constant(0), before, optimizers.initial_moments(optimizer, before))
        _, after, _ = tf.while_loop(lambda step, *_: step < steps, body, start, parallel_iterations=1)
        return [new - old for new, old in zip(after, before, strict=True)]

    def _mean_loss(
        self, weights: Sequence[tf.Tensor], x: tf.Tensor, y: tf.Tensor, mask: tf.Tensor, seed: tf.Tensor
    ) -> tf.Tensor:
        """Mean loss over a minibatch's counted examples, with penalties; zero for an empty minibatch."""
        losses, _, penalty = self._model.losses_and_logits(weights, x, y, training_seed=seed)
        count = tf.reduce_sum(mask)
        return tf.reduce_sum(losses * mask) / tf.maximum(count, 1.0) + penalty * tf.minimum(count, 1.0)

    def _evaluate(self, weights: tuple[tf.Tensor, ...], x: tf.Tensor, y: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Number of examples classified correctly, and the sum of their losses."""
        examples = tf.shape(y)[0]

        def body(start: tf.Tensor, correct: tf.Tensor, loss: tf.Tensor) -> tuple[tf.Tensor, ...]:
            x_batch, y_batch = (part[start : start + _EVALUATION_BATCH] for part in (x, y))
            losses, logits, _ = self._model.losses_and_logits(weights, x_batch, y_batch)
            hits = tf.argmax(logits, axis=1, output_type=tf.int32) == y_batch
            hits = hits & tf.math.is_finite(losses)
            return (
                start + _EVALUATION_BATCH,
                correct + tf.reduce_sum(tf.cast(hits, tf.int32)),
                loss + tf.reduce_sum(tf.cast(losses, tf.float64)),
            )

        nothing = (tf.constant(0), tf.constant(0), tf.constant(0.0, tf.float64))
        _, correct, loss = tf.while_loop(lambda start, *_: start < examples, body, nothing)
        return correct, loss


class GraphRounds:
    """The rounds of one run in the in-graph engine: see `Rounds`."""

    def __init__(self, engine: Engine, state: State, settings: Settings) -> None:
        self._engine, self._state, self._settings = engine, state, settings

    def run(self, cohorts: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """See `Rounds.run`."""
        self._state, measured = self._engine.run_rounds(self._state, cohorts, self._settings)
        return measured

    def evaluate(self, split: str) -> tuple[float, float]:
        """See `Rounds.evaluate`."""
        return self._engine.evaluate(self._state, split)

    def weights(self) -> list[np.ndarray]:
        """See `Rounds.weights`."""
        return [weight.numpy() for weight in self._state.weights]

    def state(self) -> list[np.ndarray]:
        """See `Rounds.state`."""
        return arrays_of(self._state)

    def restore(self, state: Sequence[np.ndarray]) -> None:
        """See `Rounds.restore`."""
        self._state = structure_of(state, self._state)


def _along(clients: tf.Tensor, stacked: tf.Tensor) -> tf.Tensor:
    """One value for each client, in a shape that broadcasts along the other axes of a tensor."""
    return tf.reshape(clients, [-1] + [1] * (len(stacked.shape) - 1))


def _compile(function: Callable[..., Any], fixed: Any, *arguments: Any) -> Any:
    """Traces a function once, for any length of its second and its third argument."""

    def opened(tensor: tf.Tensor) -> tf.TensorSpec:
        return tf.TensorSpec([None, *tensor.shape[1:]], tensor.dtype)

    return tf.function(function, autograph=False).get_concrete_function(
        fixed, opened(arguments[0]), opened(arguments[1]), *arguments[2:]
    )
