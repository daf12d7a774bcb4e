"""An experiment: dataset, model, client training, mechanism, privacy target, sampler and rounds."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import math
from typing import TYPE_CHECKING, Any

import pydantic

import dpfl.data
from dpfl.clients import LocalTraining
from dpfl.config import Config
from dpfl.data import FederatedData
from dpfl.mechanisms import Deployment, Gaussian, Mechanism, Plan
from dpfl.models.named import check_named
from dpfl.privacy import Guarantee, Privacy
from dpfl.randomness import check_seed
from dpfl.sampling import Sampler
from dpfl.simulation.server import ServerOptimizer

if TYPE_CHECKING:
    from dpfl.simulation.result import Result


class Experiment(Config):
    """One training run but for its seed, validated when it is made.

    Attributes:
        data: a `FederatedData`, or the name of a dataset that `dpfl.data.load` knows ("digits").
        model: "softmax", "mlp" or "cnn", a function that returns a new Keras model, or a Keras
            model, whose weights at this moment are the initial ones. It maps examples to logits.
        local: what a client does in a round.
        mechanism: how updates are clipped, noised and summed.
        privacy: the guarantee asked for; the mechanism's noise is calibrated to it.
        sampler: which clients take part in a round.
        rounds: the number of rounds.
        server: what the server does with the mean update.
        deployment: a larger population for which the noise is calibrated; None for the data's clients. The
            result then keeps two guarantees: what the simulation keeps, and what it stands for.
        evaluate_every: rounds between evaluations; the last round is always evaluated.

    Raises:
        InputError: a setting is wrong, or settings contradict each other.
    """

    data: FederatedData
    model: Any = "softmax"
    local: LocalTraining = LocalTraining(epochs=1)
    mechanism: Mechanism = Gaussian(clip_norm=1.0)
    privacy: Privacy
    sampler: Sampler
    rounds: int = pydantic.Field(gt=0)
    server: ServerOptimizer = ServerOptimizer()
    deployment: Deployment | None = None
    evaluate_every: int = pydantic.Field(default=10, gt=0)

    @pydantic.field_validator("data", mode="before")
    @classmethod
    def _load_named(cls, data: Any) -> Any:
        return dpfl.data.load(data) if isinstance(data, str) else data

    @pydantic.field_validator("model")
    @classmethod
    def _fit_to_data(cls, model: Any, info: pydantic.ValidationInfo) -> Any:
        """Names stay names, so that TensorFlow is not needed yet; other models are taken as they are now."""
        data = info.data.get("data")
        if data is None:
            return model
        if isinstance(model, str):
            check_named(model, data.example_shape)
            return model
        from dpfl.models.functional import FunctionalModel

        if isinstance(model, FunctionalModel):
            return model.fitted_to(data.example_shape, data.num_classes)
        return FunctionalModel(model, data.example_shape, data.num_classes)

    @pydantic.model_validator(mode="after")
    def _check_together(self) -> Experiment:
        self.mechanism.check(self.privacy, self.sampler, self.data.num_clients, self.deployment)
        return self

    def plan(self) -> Plan:
        """Calibrates the mechanism: the plan from which sampler, clip, noise and guarantee come.

        Raises:
            InputError: the privacy target cannot be met.
        """
        plan = self.mechanism.plan(
            self.privacy,
            self.sampler,
            self.data.num_clients,
            self.rounds,
            dimension=self._dimension() if self.mechanism.needs_dimension else None,
            deployment=self.deployment,
        )
        return dataclasses.replace(
            plan,
            guarantee=self._with_assumptions(plan.guarantee),
            extrapolated=plan.extrapolated and self._with_assumptions(plan.extrapolated),
        )

    def _with_assumptions(self, guarantee: Guarantee) -> Guarantee:
        """Adds what the data's preparation assumed, where there is a guarantee at all."""
        more = self.data.assumptions if math.isfinite(guarantee.epsilon) else ()
        return dataclasses.replace(guarantee, assumptions=guarantee.assumptions + more)

    def _dimension(self) -> int:
        """The number of trainable weights, for which a named model has to be built."""
        from dpfl.models.functional import FunctionalModel

        model = self.model
        if isinstance(model, str):
            model = FunctionalModel(model, self.data.example_shape, self.data.num_classes)
        return model.parameters

    def run(self, seed: int = 0, *, progress: bool = True) -> Result:
        """Trains one model.

        Args:
            seed: of initial weights, cohorts, minibatches and noise; the same seed gives the same result.
            progress: whether to show a progress bar.

        Raises:
            InputError: the privacy target cannot be met, or the model does not fit the data.
        """
        from dpfl.progress import progress_bar
        from dpfl.simulation.run import run

        seed = check_seed(seed)
        with progress_bar("training", self.rounds, "rounds", shown=progress) as advance:
            return run(self, self.plan(), seed, advance)

    def settings(self) -> dict[str, Any]:
        """All settings as plain values; the data by name and fingerprint, the model by its key."""
        groups = ("local", "mechanism", "privacy", "sampler", "server")
        return {
            "data": {
                "name": self.data.name,
                "fingerprint": self.data.fingerprint,
                "assumptions": self.data.assumptions,
            },
            "model": self.model if isinstance(self.model, str) else self.model.key,
            **{name: getattr(self, name).model_dump() for name in groups},
            "rounds": self.rounds,
            "deployment": None if self.deployment is None else self.deployment.model_dump(),
            "evaluate_every": self.evaluate_every,
        }

    def run_id(self, seed: int) -> str:
        """Identifies a run by its settings, data, seed, and the versions of dpfl, TensorFlow and dp-accounting."""
        return hashlib.sha256(f"{self.identity} {seed}".encode()).hexdigest()[:16]

    @functools.cached_property
    def identity(self) -> str:
        """Everything but the seed that a result depends on, as JSON."""
        versions = {name: importlib.metadata.version(name) for name in ("dpfl", "tensorflow", "dp-accounting")}
        return json.dumps({"settings": self.settings(), "versions": versions}, sort_keys=True)
