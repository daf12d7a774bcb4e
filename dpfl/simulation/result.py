"""What a run leaves behind."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from dpfl.privacy import Guarantee

if TYPE_CHECKING:
    import tensorflow as tf

    from dpfl.models.functional import FunctionalModel


@dataclasses.dataclass(frozen=True)
class Result:
    """One finished (or diverged) run.

    Attributes:
        record: one row of `runs.csv`: settings, guarantee and measurements as plain values.
        history: one dict a round: evaluations where they were made, and the engine's measurements.
        guarantee: what holds for the released weights.
        extrapolated: what would hold in the experiment's deployment; None where it has none.
        weights: the model's trainable weights after the last round; may be released under the guarantee.
        functional_model: the model that the weights belong to.
    """

    record: dict[str, Any]
    history: list[dict[str, Any]]
    guarantee: Guarantee
    extrapolated: Guarantee | None
    weights: list[np.ndarray]
    functional_model: FunctionalModel

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
