"""What a run leaves behind."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from dpfl.compression.config import LiteFormat
from dpfl.compression.lite import to_lite
from dpfl.privacy import Guarantee
from dpfl.privacy.example_level import ClientEpsilons

if TYPE_CHECKING:
    import tensorflow as tf

    from dpfl.models.functional import FunctionalModel


@dataclasses.dataclass(frozen=True)
class Result:
    """One finished (or diverged) run.

    Attributes:
        record: one row of `runs.csv`: settings, guarantee and measurements as plain values.
        history: one dict a round: evaluations where they were made, and the engine's measurements.
        guarantee: what holds, at the level of the target's unit.
        extrapolated: what would hold in the experiment's deployment; None where it has none.
        user_guarantee: what the server's noise guarantees each client; None where it was not asked to add any.
        example_guarantee: what the clients' noise guarantees each example, whoever is drawn; None where clients
            train without example-level privacy.
        client_epsilons: what this run cost the examples of each client, by the rounds in which it really took
            part: at most the guarantee. Depends on the clients' sizes and on who was drawn: not for release.
        weights: the model's trainable weights after the last round; may be released under the guarantee.
        functional_model: the model that the weights belong to.
    """

    record: dict[str, Any]
    history: list[dict[str, Any]]
    guarantee: Guarantee
    extrapolated: Guarantee | None
    user_guarantee: Guarantee | None
    example_guarantee: Guarantee | None
    client_epsilons: ClientEpsilons | None
    weights: list[np.ndarray]
    functional_model: FunctionalModel

    def guarantees(self) -> dict[str, dict[str, Any] | None]:
        """All guarantees as plain values by the name of their attribute, as a run's record file keeps them."""
        names = ("guarantee", "extrapolated", "user_guarantee", "example_guarantee")
        return {name: None if (found := getattr(self, name)) is None else found.as_dict() for name in names}

    @property
    def accuracy(self) -> float:
        """Fraction of the test examples that the last model classifies correctly. Not private."""
        return self.record["accuracy"]

    @property
    def loss(self) -> float:
        """Mean cross-entropy of the last model on the test examples, in nats. Not private."""
        return self.record["loss"]

    def keras_model(self) -> tf.keras.Model:
        """The trained model as an ordinary Keras model; may be released under the guarantee."""
        return self.functional_model.to_keras(self.weights)

    def lite_model(self, form: LiteFormat = "float32") -> bytes:
        """The trained model as a file of TensorFlow Lite; may be released under the guarantee, as no data is looked at.

        Args:
            form: "float32", "float16" or "int8"; see `dpfl.compression.to_lite`.

        Raises:
            InputError: the weights are not finite, or TensorFlow Lite cannot convert the model.
        """
        return to_lite(self.keras_model(), form)
