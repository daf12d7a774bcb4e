"""What a client does with the model: some steps of SGD on its own examples."""

from __future__ import annotations

import math

import pydantic

from dpfl.config import Config
from dpfl.errors import InputError


class LocalTraining(Config):
    """Plain SGD on the client's own examples.

    A client goes through its examples in a fresh random order each epoch, in minibatches; the last
    minibatch of an epoch may be smaller. Either `epochs` or `steps` says when it stops. Nothing on
    the client adds noise: its update is private until the mechanism has aggregated it.

    Attributes:
        learning_rate: of SGD, positive.
        batch_size: examples in a minibatch.
        epochs: passes over the client's examples in a round; None if `steps` is given.
        steps: local steps in a round, the same for every client; None if `epochs` is given.
    """

    learning_rate: float = 0.1
    batch_size: int = pydantic.Field(default=20, gt=0)
    epochs: int | None = pydantic.Field(default=None, gt=0)
    steps: int | None = pydantic.Field(default=None, gt=0)

    @pydantic.model_validator(mode="after")
    def _check(self) -> LocalTraining:
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise InputError(
                f"the clients' learning rate must be a positive number, but it was {self.learning_rate:g}."
            )
        if (self.epochs is None) == (self.steps is None):
            raise InputError("local training needs either epochs or steps: give exactly one of them (epochs=1, say).")
        return self
