"""A small federated dataset and engines over it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dpfl.clients import ClientTraining
from dpfl.clients.example_privacy import ClientPlan, plan_clients
from dpfl.data import FederatedData, from_arrays
from dpfl.mechanisms import Gaussian, NoMechanism, Plan
from dpfl.models.functional import FunctionalModel
from dpfl.privacy import Privacy
from dpfl.sampling import BaseSampler, Poisson
from dpfl.simulation.engine import Engine
from dpfl.simulation.server import ServerOptimizer, ServerStep
from dpfl.simulation.state import Settings, State


@pytest.fixture(scope="session")
def images() -> FederatedData:
    """30 clients with 1 to 9 images of 6 x 6 and three classes that can be told apart."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 10, 30)
    owners = np.repeat(np.arange(30), sizes)
    y = rng.integers(0, 3, len(owners))
    x = rng.normal(size=(len(owners), 6, 6, 1)).astype(np.float32) * 0.3
    x[np.arange(len(owners)), y, :, 0] += 1
    held_out = (x[:40] + 0.1, y[:40])
    return from_arrays(x, y, owners, test=held_out, validation=held_out)


class Setup:
    """An engine with one configuration."""

    def __init__(
        self,
        data: FederatedData,
        model: object = "softmax",
        *,
        clip_norm: float | None = 0.5,
        mechanism: Any = None,
        sampler: BaseSampler | None = None,
        relation: str = "add_or_remove_one",
        epsilon: float | None = None,
        local: ClientTraining | None = None,
        server: ServerOptimizer | None = None,
        cohort: int = 10,
        seed: int = 0,
    ) -> None:
        self.local = local or ClientTraining(learning_rate=0.3, batch_size=4, epochs=2)
        self.model = FunctionalModel(model, data.example_shape, data.num_classes)
        mechanism = mechanism or (NoMechanism() if clip_norm is None else Gaussian(clip_norm=clip_norm))
        self.plan: Plan = mechanism.plan(
            Privacy(epsilon=epsilon, delta=1e-2, relation=relation),
            sampler or Poisson(cohort=cohort),
            data.num_clients,
            10,
            dimension=self.model.parameters,
        )
        self.client_plan: ClientPlan | None = None
        if self.local.is_private:
            target = Privacy(unit="example", epsilon=None, delta=1e-3, relation=relation)
            self.client_plan = plan_clients(self.local, target, self.plan.sampler, data.client_sizes, 10)
        self.server = ServerStep(server or ServerOptimizer(), self.plan.compression, tuple(self.model.shapes), 10)
        query = self.plan.query(0, self.model.initial_weights(0))
        self.engine = Engine(data, self.model, self.local, self.server, query)
        self.seed = seed

    @property
    def state(self) -> State:
        return self.engine.initial_state(self.plan, self.server, self.seed)

    @property
    def settings(self) -> Settings:
        return self.engine.settings(self.local, self.server, self.seed, self.client_plan)

    def run(self, cohorts: list[np.ndarray], state: State | None = None) -> tuple[State, dict[str, np.ndarray]]:
        return self.engine.run_rounds(state or self.state, cohorts, self.settings)


@pytest.fixture
def setup(images: FederatedData) -> Callable[..., Setup]:
    return lambda *arguments, **options: Setup(images, *arguments, **options)
