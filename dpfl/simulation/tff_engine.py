"""The rounds of one run as a TensorFlow Federated learning process."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from dpfl.clients.example_privacy import ClientPlan
from dpfl.compression.subspace import Projection, Subspaces
from dpfl.data import FederatedData
from dpfl.mechanisms import Plan
from dpfl.models.functional import FunctionalModel
from dpfl.randomness import Purpose, stateless_seed
from dpfl.simulation.experiment import Experiment
from dpfl.simulation.rounds import arrays_of, structure_of
from dpfl.simulation.server import ServerStep
from dpfl.simulation.state import NORM_QUANTILES
from dpfl.tff.aggregation import after_release, measured, simulated
from dpfl.tff.models import evaluation_model
from dpfl.tff.optimizers import optimizer_of
from dpfl.tff.processes import learning_process, records
from dpfl.tff.runtime import tensorflow_federated

_EVALUATION_BATCH = 1_000


class TffRounds:
    """The rounds of one run under TensorFlow Federated: see `Rounds`.

    Cohorts, minibatches, initial weights and noise are those of the in-graph engine, so that both give the same
    weights up to the rounding of float32. The noise that clients draw under local and distributed mechanisms is not:
    TFF does not tell an aggregator which client it serves, so they draw it afresh.

    Args:
        experiment: what to run.
        model: its model as a function of its weights.
        server: the server's step.
        plan: of the server.
        client_plan: of clients that train by DP-SGD; None if they do not.
        seed: of everything random.

    Raises:
        InputError: there is no TensorFlow Federated on this machine.
    """

    def __init__(
        self,
        experiment: Experiment,
        model: FunctionalModel,
        server: ServerStep,
        plan: Plan,
        client_plan: ClientPlan | None,
        seed: int,
    ) -> None:
        self._tff = tensorflow_federated()
        self._data, self._model, self._plan = experiment.data, model, plan
        self._is_private = client_plan is not None
        weighted = plan.mechanism.weighting == "examples"
        mean = self._tff.aggregators.MeanFactory(no_nan_division=True) if weighted else simulated(plan, seed)
        self._process = learning_process(
            model,
            experiment.local,
            aggregator=measured(mean),
            server_optimizer=_server_optimizer(server),
            seed=seed,
            client_plan=client_plan,
            weighted=weighted,
            projection=_projection(plan, model, seed),
        )
        self._state = self._process.initialize()
        self._rounds_done = 0
        self._evaluation: Any = None

    def run(self, cohorts: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """See `Rounds.run`."""
        rows = [self._round(cohort) for cohort in cohorts]
        return {name: np.array([row[name] for row in rows], np.float32) for name in rows[0]}

    def evaluate(self, split: str) -> tuple[float, float]:
        """See `Rounds.evaluate`."""
        x, y = _held_out(self._data, split)
        if not len(y):
            return float("nan"), float("nan")
        dataset = tf.data.Dataset.from_tensor_slices(collections.OrderedDict(x=x, y=y)).batch(_EVALUATION_BATCH)
        if self._evaluation is None:
            spec = dataset.element_spec
            self._evaluation = self._tff.learning.algorithms.build_fed_eval(
                evaluation_model(self._model, input_spec=spec)
            )
        weights = self._tff.learning.models.ModelWeights(tuple(self.weights()), ())
        state = self._evaluation.set_model_weights(self._evaluation.initialize(), weights)
        metrics = self._evaluation.next(state, [dataset]).metrics["client_work"]["eval"]["current_round_metrics"]
        return float(metrics["accuracy"]), float(metrics["loss"])

    def weights(self) -> list[np.ndarray]:
        """See `Rounds.weights`."""
        return [np.asarray(weight) for weight in self._process.get_model_weights(self._state).trainable]

    def state(self) -> list[np.ndarray]:
        """See `Rounds.state`."""
        return [np.array(self._rounds_done), *arrays_of(self._state)]

    def restore(self, state: Sequence[np.ndarray]) -> None:
        """See `Rounds.restore`."""
        self._rounds_done = int(state[0])
        self._state = structure_of(state[1:], self._state)

    def _round(self, cohort: np.ndarray) -> dict[str, float]:
        clients = [records(*self._data.client(client), client, self._rounds_done) for client in cohort]
        output = self._process.next(self._state, clients)
        self._state = output.state
        self._state = after_release(self._plan, self._state, self.weights())
        self._rounds_done += 1
        return self._measurements(output.metrics, max(len(cohort), 1))

    def _measurements(self, metrics: Any, clients: int) -> dict[str, float]:
        seen = metrics["aggregator"]
        found = {
            "update_norm": seen.norms / clients,
            "clipped_fraction": seen.clipped / clients,
            "non_finite_updates": seen.non_finite,
            "clip_norm": seen.clip_norm,
        }
        if self._is_private:
            found["example_clipped_fraction"] = metrics["client_work"] / clients
        # TensorFlow Federated adds up what clients report and keeps the exact sum to itself.
        found |= dict.fromkeys(["signal_to_noise", *NORM_QUANTILES], float("nan"))
        return {name: float(value) for name, value in found.items()}


def _held_out(data: FederatedData, split: str) -> tuple[np.ndarray, np.ndarray]:
    return (data.x_test, data.y_test) if split == "test" else (data.x_validation, data.y_validation)


def _projection(plan: Plan, model: FunctionalModel, seed: int) -> Projection | None:
    """How clients train the weights that compression leaves; None where these are all."""
    if not plan.compression.selects:
        return None
    return Projection(Subspaces(plan.compression, model.shapes, plan.rounds), stateless_seed(seed, Purpose.SUBSPACE))


def _server_optimizer(server: ServerStep) -> Any:
    """The server's step as TFF's optimizer, which takes before minus after for a gradient; it counts the rounds."""

    def initialize(weights: list[tf.Tensor]) -> Any:
        return tf.constant(0), server.initial_state(weights)

    def apply(weights: list[tf.Tensor], gradients: list[tf.Tensor], state: Any) -> tuple[list[tf.Tensor], Any]:
        numbers = tuple(tf.constant(number, tf.float32) for number in server.optimizer.numbers())
        rounds_done, inner = state
        update = [-gradient for gradient in gradients]
        weights, inner = server.apply(weights, update, inner, numbers, rounds_done)
        return weights, (rounds_done + 1, inner)

    return optimizer_of(initialize, apply)
