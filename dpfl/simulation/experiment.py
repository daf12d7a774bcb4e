"""An experiment: dataset, model, client training, mechanism, privacy target, sampler and rounds."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pydantic

import dpfl.data
from dpfl.clients import ClientTraining
from dpfl.clients.example_privacy import ClientPlan, check_clients, plan_clients
from dpfl.compression import Compression
from dpfl.config import Config
from dpfl.data import FederatedData
from dpfl.errors import InputError
from dpfl.mechanisms import Deployment, Gaussian, Mechanism, NoMechanism, Plan
from dpfl.models.named import check_named
from dpfl.privacy import Guarantee, Privacy
from dpfl.randomness import check_seed
from dpfl.sampling import Sampler
from dpfl.simulation.server import ServerOptimizer

if TYPE_CHECKING:
    from dpfl.simulation.cluster import RayCluster
    from dpfl.simulation.result import Result


def _folder(path: Any) -> Path:
    if not path or not isinstance(path, str | Path):
        raise InputError(f"checkpoints must be the path of a folder, but it was {path!r}.")
    return Path(path)


def _default_mechanism(settings: dict[str, Any]) -> Gaussian | NoMechanism:
    """What the target's unit asks of the server."""
    privacy = settings.get("privacy")
    return NoMechanism() if privacy is not None and privacy.unit == "example" else Gaussian(clip_norm=1.0)


class Experiment(Config):
    """One training run but for its seed, validated when it is made.

    Attributes:
        data: a `FederatedData`, the name of a dataset that `dpfl.data.load` knows ("digits"), or a mapping of that
            function's arguments ({"source": "scores.csv", "client": "school", "label": "passed"}).
        model: "softmax", "mlp" or "cnn", a function that returns a new Keras model, or a Keras
            model, whose weights at this moment are the initial ones. It maps examples to logits.
        local: what a client does in a round, with or without example-level privacy.
        privacy: the guarantee asked for. The mechanism's noise is calibrated to it where its unit is "user", the
            noise of the clients' local steps where it is "example".
        mechanism: how updates are clipped, noised and summed; by default with clip norm 1 for the unit "user", and
            neither clipped nor noised for the unit "example". There a mechanism with a noise multiplier of its own adds
            to the clients' noise, and the result keeps both guarantees.
        sampler: which clients take part in a round.
        rounds: the number of rounds.
        server: what the server does with the mean update.
        compression: how updates and models are made smaller; by default they are not.
        deployment: a larger population for which the noise is calibrated; None for the data's clients. The
            result then keeps two guarantees: what the simulation keeps, and what it stands for.
        evaluate_every: rounds between evaluations; the last round is always evaluated.
        engine: "graph", dpfl's own, or "tff", which runs the same rounds as a TensorFlow Federated learning process:
            slower, and to the same numbers up to the rounding of float32.

    Raises:
        InputError: a setting is wrong, or settings contradict each other.
    """

    data: FederatedData
    model: Any = "softmax"
    local: ClientTraining = ClientTraining(epochs=1)
    privacy: Privacy
    mechanism: Mechanism = pydantic.Field(default_factory=_default_mechanism)
    sampler: Sampler
    rounds: int = pydantic.Field(gt=0)
    server: ServerOptimizer = ServerOptimizer()
    compression: Compression = Compression()
    deployment: Deployment | None = None
    evaluate_every: int = pydantic.Field(default=10, gt=0)
    engine: Literal["graph", "tff"] = "graph"

    @pydantic.field_validator("data", mode="before")
    @classmethod
    def _load_named(cls, data: Any) -> Any:
        if isinstance(data, str):
            return dpfl.data.load(data)
        if isinstance(data, Mapping):
            if "source" not in data:
                raise InputError("data given by its settings needs a 'source': a name, a file or a folder.")
            return dpfl.data.load(**data)
        return data

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
        check_clients(self.local, self.privacy, self.data.client_sizes)
        if self.privacy.unit == "example":
            if self.mechanism.name != "none" and self.mechanism.noise_multiplier is None:
                raise InputError(
                    "under the unit example the clients' noise meets the target, and the mechanism "
                    f"{self.mechanism.name} has no noise of its own: choose the mechanism none, or give it a "
                    "noise_multiplier."
                )
            if self.deployment is not None:
                raise InputError(
                    "a deployment is a larger number of clients, on which an example-level guarantee does not depend: "
                    "leave it out, or choose the unit user."
                )
        self.mechanism.check(self._server_target, self.sampler, self.data.num_clients, self.deployment)
        self.mechanism.check_compression(self.compression)
        if self.engine == "tff" and self.compression.of_updates and self.mechanism.weighting == "examples":
            raise InputError(
                "updates weighted by examples are averaged by TensorFlow Federated's own aggregator, which does not "
                'know the compression: choose engine="graph", or weighting="equal".'
            )
        return self

    @property
    def _server_target(self) -> Privacy:
        """What the server's mechanism has to meet: nothing where the clients' noise meets the target."""
        return self.privacy if self.privacy.unit == "user" else self.privacy.replace(unit="user", epsilon=None)

    def plan(self) -> Plan:
        """Calibrates the mechanism: the plan from which the server's sampler, clip, noise and guarantee come.

        Raises:
            InputError: the privacy target cannot be met, or the model's weights cannot be compressed so.
        """
        plan = self.mechanism.plan(
            self._server_target,
            self.sampler,
            self.data.num_clients,
            self.rounds,
            dimension=self._dimension(),
            deployment=self.deployment,
            compression=self.compression,
        )
        return dataclasses.replace(
            plan,
            guarantee=self._with_assumptions(plan.guarantee),
            extrapolated=plan.extrapolated and self._with_assumptions(plan.extrapolated),
        )

    def client_plan(self, rounds: int | None = None) -> ClientPlan | None:
        """Calibrates the clients: the plan from which the clip, noise and guarantee of their local steps come.

        Args:
            rounds: how many there will be; None for as many as the server's plan has.

        Returns:
            The plan, or None where clients train without example-level privacy.

        Raises:
            InputError: the privacy target cannot be met.
        """
        if not self.local.is_private:
            return None
        rounds = self.plan().rounds if rounds is None else rounds
        plan = plan_clients(self.local, self.privacy, self.sampler, self.data.client_sizes, rounds)
        return dataclasses.replace(plan, guarantee=self._with_assumptions(plan.guarantee))

    def _with_assumptions(self, guarantee: Guarantee) -> Guarantee:
        """Adds what the data's preparation assumed, where there is a guarantee at all."""
        if not math.isfinite(guarantee.epsilon):
            return guarantee
        more = self.data.assumptions
        if self.compression.of_updates or self.compression.of_models:
            more += (
                f"Updates and models are compressed ({self.compression.in_words()}), which it does not depend on: what "
                "clients do comes before their updates are clipped or after they are noised, and the server's part "
                "looks at nothing but what was released.",
            )
        return dataclasses.replace(guarantee, assumptions=guarantee.assumptions + more)

    def _dimension(self) -> int | None:
        """The number of coordinates of an update where anything depends on it: a named model is then built."""
        compression = self.compression
        if not (self.mechanism.needs_dimension or compression.of_updates or compression.of_models):
            return None
        from dpfl.models.functional import FunctionalModel

        model = self.model
        if isinstance(model, str):
            model = FunctionalModel(model, self.data.example_shape, self.data.num_classes)
        compression.check_shapes(model.shapes)
        return sum(math.prod(shape) for shape in compression.record_shapes(model.shapes))

    def run(
        self,
        seed: int = 0,
        *,
        progress: bool = True,
        checkpoints: str | Path | None = None,
        checkpoint_every: int = 10,
        cluster: RayCluster | None = None,
    ) -> Result:
        """Trains one model.

        With a folder for checkpoints, a run that was killed goes on from its last checkpoint when it is called again,
        to the same result bit for bit, and a run that has ended gives its result again without training. (In TensorFlow
        Federated, clients of local and distributed mechanisms draw their noise afresh: what they gave after the
        checkpoint is not repeated.)

        Args:
            seed: of initial weights, cohorts, minibatches and noise; the same seed gives the same result.
            progress: whether to show a progress bar.
            checkpoints: a folder where `<run id>.npz` holds the run after its latest rounds; several runs can share
                it. Whoever has that file can take the noise off what is released: it is as secret as the seed. None
                keeps nothing.
            checkpoint_every: rounds from one checkpoint to the next.
            cluster: splits the cohort of each round over processes of many machines, for one large run; None does all
                in this process. The run and its checkpoints are the same ones: its weights differ by no more than the
                order in which float32 numbers are summed. The machines see the training examples.

        Raises:
            InputError: the privacy target cannot be met, the model does not fit the data, the folder cannot take
                checkpoints, the run's checkpoint is another plan's or in another process' hands, or the cluster cannot
                be used.
        """
        from dpfl.progress import progress_bar
        from dpfl.simulation.checkpoints import Checkpoints
        from dpfl.simulation.run import run

        seed = check_seed(seed)
        kept = None if checkpoints is None else Checkpoints(_folder(checkpoints), checkpoint_every)
        if cluster is not None and self.engine == "tff":
            raise InputError('a cluster trains by the in-graph engine: leave it out, or choose engine="graph".')
        started = contextlib.nullcontext() if cluster is None else cluster.started()
        with started as actors, progress_bar("training", self.rounds, "rounds", shown=progress) as advance:
            plan = self.plan()
            return run(self, plan, self.client_plan(plan.rounds), seed, advance, kept, actors)

    def settings(self) -> dict[str, Any]:
        """All settings as plain values; the data by name and fingerprint, the model by its key."""
        groups = ("local", "mechanism", "privacy", "sampler", "server", "compression")
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
            "engine": self.engine,
        }

    def run_id(self, seed: int) -> str:
        """Identifies a run by its settings, data, seed, and the versions of dpfl, TensorFlow and dp-accounting."""
        return hashlib.sha256(f"{self.identity} {seed}".encode()).hexdigest()[:16]

    @functools.cached_property
    def configuration(self) -> str:
        """Identifies the settings and the data, whatever the seed and the versions."""
        return hashlib.sha256(json.dumps(self.settings(), sort_keys=True).encode()).hexdigest()[:16]

    @functools.cached_property
    def identity(self) -> str:
        """Everything but the seed that a result depends on, as JSON."""
        names = ["tensorflow", "dp-accounting"] + ["tensorflow-federated"] * (self.engine == "tff")
        # dpfl's own as it was when this process began, whatever has been installed since.
        versions = {"dpfl": dpfl.__version__, **{name: importlib.metadata.version(name) for name in names}}
        return json.dumps({"settings": self.settings(), "versions": versions}, sort_keys=True)
