"""The in-graph engine: rounds of federated averaging inside one `tf.function`.

The cohort is a loop in the graph over chunks of clients: local training -> update -> clip -> sum. Memory is that of a
chunk of clients, never of the cohort. Everything that configurations of a study differ in (clip, noise, rates, steps,
seeds) is a tensor, so they share one compiled graph, and can go through it side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from dpfl.clients import ClientTraining
from dpfl.clients.dp_sgd import client_numbers, run_seeds
from dpfl.clients.example_privacy import ClientPlan
from dpfl.clients.optimizers import optimizer_numbers
from dpfl.data import FederatedData
from dpfl.mechanisms import Plan
from dpfl.mechanisms.queries import global_norm
from dpfl.models.functional import FunctionalModel
from dpfl.randomness import Purpose, stateless_seed
from dpfl.simulation.clients import Examples, OneByOne, Query, SideBySide, Training
from dpfl.simulation.data_tensors import resident_tensor
from dpfl.simulation.rounds import arrays_of, structure_of
from dpfl.simulation.server import ServerStep
from dpfl.simulation.span import Span
from dpfl.simulation.state import (
    NORM_BINS,
    NORM_QUANTILES,
    Measurements,
    PrivateSettings,
    Settings,
    State,
    for_each,
    norm_quantile,
    stacked,
    unstacked,
)

if TYPE_CHECKING:
    from dpfl.simulation.experiment import Experiment

# The most numbers that a client may have of its own to be trained beside others: see experiments/benchmarks/README.md.
_SIDE_BY_SIDE = 20_000
_SIDE_BY_SIDE_IN_SPAN = 500_000
_EVALUATION_BATCH = 1_000
_ROUNDING = 1e-5  # Differences of float32 numbers that are smaller are no noise.


class Engine:
    """Compiled rounds for one dataset, model, structure of local training, kind of server optimizer and mechanism.

    Args:
        data: the federated dataset; its arrays stay resident.
        model: the model as a function of its weights.
        local: what clients do; only its structure (`ClientTraining.structure`) is compiled in.
        server: the server's step; of its optimizer only the kind is compiled in.
        query: a query of the mechanism's kind; its numbers come with the state.
        together: whether several configurations go through the graph side by side; states and settings are then
            `stacked` ones. Only where `together_key` is not None.
    """

    def __init__(
        self,
        data: FederatedData,
        model: FunctionalModel,
        local: ClientTraining,
        server: ServerStep,
        query: Query,
        together: bool = False,
    ) -> None:
        self._model = model
        self._local = local
        self._server = server
        self._query = query
        self._together = together
        self._held_out = {
            "validation": (resident_tensor(data.x_validation), resident_tensor(data.y_validation)),
            "test": (resident_tensor(data.x_test), resident_tensor(data.y_test)),
        }
        self._training = self._way_of_training(data)
        self._graphs: dict[str, Any] = {}

    def _way_of_training(self, data: FederatedData) -> Training:
        """How clients train: from what the model, the examples and the optimizer are, so that it is always the same."""
        model, local, query = self._model, self._local, self._query
        examples = Examples(
            resident_tensor(data.x),
            resident_tensor(data.y),
            tf.constant(data.offsets[:-1], tf.int32),
            tf.constant(data.client_sizes, tf.int32),
        )
        largest, own, span = int(data.client_sizes.max()), model.parameters, None
        # Adam's step is not linear in the gradients and leaves the span.
        stays_in_span = query.only_clips and local.optimizer != "adam"
        if model.first_kernel is not None and stays_in_span and model.vectorizes and not local.is_private:
            features, units = model.shapes[model.first_kernel]
            rest = model.parameters - features * units
            if Span.pays(largest, features) and rest <= _SIDE_BY_SIDE_IN_SPAN:
                span = Span(examples.x, examples.starts, examples.sizes, largest, units)
                own = rest
        if span is None and (local.is_private or not model.vectorizes or own > _SIDE_BY_SIDE) and not self._together:
            return OneByOne(examples, model, local, query)
        return SideBySide(examples, model, local, query, together=self._together, span=span)

    def initial_state(self, plan: Plan, server: ServerStep, seed: int) -> State:
        """The state before the first round."""
        weights = tuple(tf.constant(weight) for weight in self._model.initial_weights(seed))
        return State(
            weights,
            server.initial_state(list(weights)),
            plan.query(seed, weights).initial_global_state(),
            tf.constant(0, tf.int32),
        )

    def settings(
        self, local: ClientTraining, server: ServerStep, seed: int, client_plan: ClientPlan | None = None
    ) -> Settings:
        """A configuration's numbers as tensors.

        Args:
            local: what clients do, of the engine's structure.
            server: the server's step.
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
            server=tuple(tf.constant(number, tf.float32) for number in server.optimizer.numbers()),
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
            The state after the last round, and the measurements by name: arrays of one value a round, of configurations
            side by side (rounds, configurations).
        """
        ends = np.cumsum([len(cohort) for cohort in cohorts], dtype=np.int32)
        clients = np.concatenate(cohorts).astype(np.int32)
        state, measured = self._compiled(self._rounds, 2)(state, settings, tf.constant(clients), tf.constant(ends))
        return state, self._by_name(measured)

    def partial_sum(self, state: State, clients: np.ndarray, settings: Settings) -> list[np.ndarray]:
        """What some clients of a round send, summed, and the sums of their measurements: private, both.

        Args:
            state: before the round.
            clients: their indices.
            settings: the configuration's numbers.

        Returns:
            Arrays that `finish` takes.
        """
        return arrays_of(self._compiled(self._partial_sum, 1)(state, settings, tf.constant(clients, tf.int32)))

    def finish(
        self, state: State, sums: Sequence[Sequence[np.ndarray]], cohort: int, settings: Settings
    ) -> tuple[State, dict[str, np.ndarray]]:
        """Ends a round whose clients were summed in parts: noise, mean, server step.

        Args:
            state: before the round.
            sums: what `partial_sum` gave for each part; at least one.
            cohort: how many clients there are in all parts.
            settings: the configuration's numbers.

        Returns:
            As `run_rounds` of one cohort.
        """
        nothing = self._compiled(self._partial_sum, 1)(state, settings, tf.zeros(0, tf.int32))
        total, measured = structure_of([np.sum(parts, axis=0) for parts in zip(*sums, strict=True)], nothing)
        # Every part has the clip norm among its measurements, which is no sum.
        measured = measured._replace(clip_norm=nothing[1].clip_norm)
        arguments = (state, settings, total, measured, tf.constant(cohort, tf.int32))
        state, measured = self._compiled(self._finish, 0)(*arguments)
        return state, self._by_name(tf.nest.map_structure(lambda value: value[None], measured))

    def evaluate(self, state: State, split: str) -> tuple[Any, Any]:
        """Accuracy (a fraction) and mean cross-entropy (nats) on "validation" or "test"; NaN where it is empty.

        Neither is covered by the guarantee. Of configurations side by side, both are arrays (configurations,).
        """
        x, y = self._held_out[split]
        correct, loss = (total.numpy() for total in self._compiled(self._evaluate, 2)(state.weights, x, y))
        examples = len(y) or np.nan
        return correct / examples, loss / examples

    def _by_name(self, measured: Measurements) -> dict[str, np.ndarray]:
        values = {name: array.numpy() for name, array in measured._asdict().items()}
        counts = values.pop("norm_counts")
        values |= {name: norm_quantile(counts, level) for name, level in NORM_QUANTILES.items()}
        if not self._local.is_private:
            del values["example_clipped_fraction"]
        return values

    # From here on everything runs in graph.

    def _rounds(
        self, state: State, settings: Settings, clients: tf.Tensor, ends: tf.Tensor
    ) -> tuple[State, Measurements]:
        count = tf.shape(ends)[0]
        starts = tf.concat([[0], ends[:-1]], axis=0)
        arrays = Measurements(*(tf.TensorArray(tf.float32, size=count) for _ in Measurements._fields))

        def body(index: tf.Tensor, state: State, arrays: Measurements) -> tuple[tf.Tensor, State, Measurements]:
            cohort = clients[starts[index] : ends[index]]
            total, measured = self._partial_sum(state, settings, cohort)
            state, measured = self._finish(state, settings, total, measured, tf.shape(cohort)[0])
            written = (array.write(index, value) for array, value in zip(arrays, measured, strict=True))
            return index + 1, state, Measurements(*written)

        _, state, arrays = tf.while_loop(
            lambda index, *_: index < count, body, (tf.constant(0), state, arrays), parallel_iterations=1
        )
        return state, Measurements(*(array.stack() for array in arrays))

    def _partial_sum(self, state: State, settings: Settings, cohort: tf.Tensor) -> tuple[Any, Measurements]:
        """The sum of what some clients of a round send, and of their measurements: private."""
        each = for_each if self._together else _apply
        params = each(self._query.derive_sample_params, state.query)
        clip_norm = each(self._query.clip_norm, params)
        lanes, size = self._training.lanes, tf.shape(cohort)[0]
        bounds = [size * lane // lanes for lane in range(lanes + 1)]
        total, measured = each(self._query.initial_sample_state, list(state.weights)), _zeros_like(clip_norm)
        # The loops do not depend on each other: TensorFlow runs them at the same time where it has the threads.
        for of_lane, sums in [
            self._sums(state, params, settings, cohort[bounds[lane] : bounds[lane + 1]], total, measured)
            for lane in range(lanes)
        ]:
            total = self._query.merge_sample_states(total, of_lane)
            measured = _added(measured, sums)
        return total, measured._replace(clip_norm=clip_norm)

    def _sums(
        self, state: State, params: Any, settings: Settings, clients: tf.Tensor, nothing: Any, zeros: Measurements
    ) -> tuple[Any, Measurements]:
        """One loop over chunks of clients, from sums of nothing."""
        size, chunk_size = tf.shape(clients)[0], self._training.chunk_size(state)

        def body(start: tf.Tensor, total: Any, measured: Measurements) -> tuple[tf.Tensor, Any, Measurements]:
            record, more = self._training.sums(state, params, clients[start : start + chunk_size], settings)
            total = self._query.accumulate_preprocessed_record(total, record)
            return start + chunk_size, total, _added(measured, more)

        _, total, measured = tf.while_loop(
            lambda start, *_: start < size, body, (tf.constant(0), nothing, zeros), parallel_iterations=1
        )
        return total, measured

    def _finish(
        self, state: State, settings: Settings, total: Any, measured: Measurements, size: tf.Tensor
    ) -> tuple[State, Measurements]:
        """Noise, mean and server step: the state after the round, and its measurements."""

        def one(state: State, total: Any, server: tuple[tf.Tensor, ...]) -> tuple[State, tf.Tensor]:
            mean_update, query_state, _ = self._query.get_noised_result(total, state.query)
            before = list(state.weights)
            weights, server_state = self._server.apply(before, mean_update, state.server, server, state.round)
            query_state = self._query.after_release(query_state, weights)
            after = State(tuple(weights), server_state, query_state, state.round + 1)
            return after, _signal_to_noise(self._query.exact_result(total, state.query), mean_update)

        each = for_each if self._together else _apply
        clients = tf.cast(tf.maximum(size, 1), tf.float32)
        state, signal_to_noise = each(one, state, total, settings.server)
        measured = measured._replace(
            signal_to_noise=signal_to_noise,
            update_norm=measured.update_norm / clients,
            clipped_fraction=measured.clipped_fraction / clients,
            example_clipped_fraction=measured.example_clipped_fraction / clients,
        )
        return state, measured

    def _evaluate(self, weights: tuple[tf.Tensor, ...], x: tf.Tensor, y: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Number of examples classified correctly, and the sum of their losses, both float64."""
        examples = tf.shape(y)[0]
        each = for_each if self._together else _apply

        def body(start: tf.Tensor, correct: tf.Tensor, loss: tf.Tensor) -> tuple[tf.Tensor, ...]:
            x_batch, y_batch = (part[start : start + _EVALUATION_BATCH] for part in (x, y))

            def one(weights: list[tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
                losses, logits, _ = self._model.losses_and_logits(weights, x_batch, y_batch)
                hits = tf.argmax(logits, axis=1, output_type=tf.int32) == y_batch
                hits = hits & tf.math.is_finite(losses)
                return tf.reduce_sum(tf.cast(hits, tf.float64)), tf.reduce_sum(tf.cast(losses, tf.float64))

            hits, losses = each(one, list(weights))
            return start + _EVALUATION_BATCH, correct + hits, loss + losses

        nothing = tf.zeros(tf.shape(weights[0])[:1] if self._together else [], tf.float64)
        _, correct, loss = tf.while_loop(lambda start, *_: start < examples, body, (tf.constant(0), nothing, nothing))
        return correct, loss

    def _compiled(self, function: Callable[..., Any], lengths: int) -> Callable[..., Any]:
        """A method's graph, traced once when it is first called, for any length of its last `lengths` arguments."""

        def call(*arguments: Any) -> Any:
            name = function.__name__
            if name not in self._graphs:
                fixed = len(arguments) - lengths
                specs = [self._spec(argument) for argument in arguments[:fixed]]
                specs += [_any_length(argument) for argument in arguments[fixed:]]
                self._graphs[name] = _compile(function, *specs)
            return self._graphs[name](*arguments)

        return call

    def _spec(self, structure: Any) -> Any:
        """For any number of configurations, where several are side by side."""
        if not self._together:
            return tf.nest.map_structure(tf.TensorSpec.from_tensor, structure)
        return tf.nest.map_structure(
            lambda part: tf.TensorSpec.from_tensor(part) if part.dtype.is_integer else _any_length(part), structure
        )


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


class TogetherRounds:
    """The rounds of several runs that go through one graph side by side.

    Args:
        engine: made for configurations together.
        planned: the experiments with their plans.
        servers: their servers' steps.
        seed: of all runs.
    """

    def __init__(
        self, engine: Engine, planned: Sequence[tuple[Experiment, Plan]], servers: Sequence[ServerStep], seed: int
    ) -> None:
        self._engine, self._runs = engine, range(len(planned))
        pairs = list(zip(planned, servers, strict=True))
        self._state = stacked([engine.initial_state(plan, server, seed) for (_, plan), server in pairs])
        self._settings = stacked([engine.settings(each.local, server, seed) for (each, _), server in pairs])

    def run(self, cohorts: Sequence[np.ndarray]) -> list[dict[str, np.ndarray]]:
        """Runs the next rounds, one for each cohort; returns what `Rounds.run` does, for each run."""
        self._state, measured = self._engine.run_rounds(self._state, cohorts, self._settings)
        return [{name: column[:, index] for name, column in measured.items()} for index in self._runs]

    def evaluate(self) -> list[list[float]]:
        """Accuracy and loss on the test split, then on the validation split, for each run."""
        values = [value for split in ("test", "validation") for value in self._engine.evaluate(self._state, split)]
        return [[float(value[index]) for value in values] for index in self._runs]

    def weights(self) -> list[list[np.ndarray]]:
        """The model's trainable weights after the rounds so far, for each run."""
        return [[weight.numpy() for weight in unstacked(self._state.weights, index)] for index in self._runs]


def _apply(function: Callable[..., Any], *structures: Any) -> Any:
    """What `for_each` is to several configurations, for a single one."""
    return function(*structures)


def _signal_to_noise(exact: Any, noisy: Any) -> tf.Tensor:
    """Norm of what was sent divided by that of what was added; NaN where nothing was, or nothing exact is known."""
    if exact is None:
        return tf.constant(float("nan"))
    signal, noise = global_norm(exact), global_norm([part - sent for part, sent in zip(noisy, exact, strict=True)])
    return tf.where(noise > _ROUNDING * signal, signal / noise, float("nan"))


def _zeros_like(clip_norm: tf.Tensor) -> Measurements:
    zeros = Measurements(*(tf.zeros_like(clip_norm) for _ in Measurements._fields))
    return zeros._replace(norm_counts=zeros.update_norm[..., None] * tf.zeros(NORM_BINS))


def _added(one: Measurements, other: Measurements) -> Measurements:
    return Measurements(*(left + right for left, right in zip(one, other, strict=True)))


def _any_length(tensor: tf.Tensor) -> tf.TensorSpec:
    return tf.TensorSpec([None, *tensor.shape[1:]], tensor.dtype)


def _compile(function: Callable[..., Any], *specs: Any) -> Any:
    """Traces a function."""
    return tf.function(function, autograph=False).get_concrete_function(*specs)
