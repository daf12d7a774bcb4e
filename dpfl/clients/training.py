"""What a client does with the model: some local steps on its own examples, with or without example-level privacy."""

from __future__ import annotations

import math
from typing import Any, Literal

import pydantic

from dpfl.config import Config
from dpfl.errors import InputError
from dpfl.limits import LARGEST_CLIP_NORM, LARGEST_NOISE, LEAST_NOISE, SMALLEST_CLIP_NORM
from dpfl.privacy.example_level import ExampleSampling

Optimizer = Literal["sgd", "momentum", "adam"]
# The kinds that `dpfl.clients.per_example` implements, named here so that settings need no TensorFlow.
ExampleClipping = Literal["flat", "per_layer", "automatic"]

_OF_EXAMPLE_PRIVACY = ("example_noise", "example_clipping", "example_sampling", "max_batch_size", "microbatch_size")


class ClientTraining(Config):
    """What each client of a round does: local steps of SGD, momentum or Adam on minibatches of its own examples.

    Either `epochs` or `steps` says when it stops. With `example_clip` the client trains by DP-SGD (Abadi et
    al. 2016, 1607.00133): each example's gradient is clipped and noise is added in every local step, so that its
    update protects each of its examples before anybody sees it. Without, nothing on the client adds noise: its update
    is private until the mechanism has aggregated it.

    Attributes:
        learning_rate: of the optimizer, positive.
        batch_size: examples in a minibatch; the expected number of them where minibatches are Poisson samples. None
            takes all of a client's examples in every local step; not for clients with an `example_clip`.
        epochs: passes over the client's examples in a round, each of ceil(examples / batch_size) local
            steps; None if `steps` is given.
        steps: local steps in a round, the same for every client; None if `epochs` is given.
        optimizer: "sgd"; "momentum" adds up gradients that fade (Polyak 1964); "adam" is Adam with bias
            correction (Kingma & Ba 2015, 1412.6980), as Keras has it. Their state starts afresh in every round and is
            neither kept nor sent. Costs no privacy.
        momentum: decay of the mean of gradients, for "momentum" and "adam", in [0, 1).
        second_momentum: decay of the mean of squared gradients, for "adam", in [0, 1).
        adaptivity: the constant in Adam's denominator, positive: Keras' and TFF's `epsilon`.
        proximal_strength: mu of FedProx (Li et al. 2020, 1812.06127, equation 2), at least 0: a client's loss gets
            mu / 2 times the squared distance from the weights at the round's start, and its gradient mu times the
            difference, so that unlike clients drift apart less. Depends on no example: costs no privacy.
        example_clip: the largest L2 norm of one example's gradient; None trains without example-level
            privacy. Too small a norm biases the direction, too large a one raises the noise with it.
        example_noise: standard deviation of the noise on the sum of a minibatch's clipped gradients, divided by
            `example_clip`; 0 clips without noise; None calibrates it to the target, whose unit must then
            be "example". One that is given is refused where it would cost more than that target's epsilon. Every
            local step is charged, so that more steps cost epsilon or need more noise.
        example_clipping: "flat" clips all weights' gradients together; "per_layer" each layer's to an equal
            share; "automatic" scales every gradient to about the norm (AUTO-S, Bu et al. 2023, 2206.07136). The
            sensitivity is the same in all.
        example_sampling: "poisson" draws each example independently in each step, which amplifies privacy;
            "shuffled" goes through the examples in a fresh random order each epoch, which is charged without
            amplification, once an epoch, and only known where examples are replaced.
        max_batch_size: the largest Poisson minibatch; where more are drawn, a random part of them is used. It
            bounds time and memory; what it costs in privacy is accounted, by PLD alone. None uses all that are drawn.
        microbatch_size: how many examples' gradients are in memory at a time; None for all. Changes no result
            but for random layers; small values cost time.
    """

    learning_rate: float = 0.1
    batch_size: int | None = pydantic.Field(default=20, gt=0)
    epochs: int | None = pydantic.Field(default=None, gt=0)
    steps: int | None = pydantic.Field(default=None, gt=0)
    optimizer: Optimizer = "sgd"
    momentum: float = pydantic.Field(default=0.9, ge=0, lt=1)
    second_momentum: float = pydantic.Field(default=0.999, ge=0, lt=1)
    adaptivity: float = pydantic.Field(default=1e-7, gt=0, allow_inf_nan=False)
    proximal_strength: float = pydantic.Field(default=0.0, ge=0, allow_inf_nan=False)
    example_clip: float | None = None
    example_noise: float | None = None
    example_clipping: ExampleClipping = "flat"
    example_sampling: ExampleSampling = "poisson"
    max_batch_size: int | None = pydantic.Field(default=None, gt=0)
    microbatch_size: int | None = pydantic.Field(default=None, gt=0)

    @pydantic.model_validator(mode="after")
    def _check(self) -> ClientTraining:
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise InputError(
                f"the clients' learning rate must be a positive number, but it was {self.learning_rate:g}."
            )
        if (self.epochs is None) == (self.steps is None):
            raise InputError("local training needs either epochs or steps: give exactly one of them (epochs=1, say).")
        if self.example_clip is None:
            self._check_plain()
        else:
            self._check_private(self.example_clip)
        return self

    def _check_plain(self) -> None:
        """Refuses settings of DP-SGD where clients do not train by it: they would protect nobody."""
        for name in _OF_EXAMPLE_PRIVACY:
            value = getattr(self, name)
            if value != type(self).model_fields[name].default:
                raise InputError(
                    f"{name}={value!r} is for clients that train under example-level privacy: give an example_clip "
                    "(1.0, say), or leave it out."
                )

    def _check_private(self, clip: float) -> None:
        if not SMALLEST_CLIP_NORM <= clip <= LARGEST_CLIP_NORM:
            raise InputError(
                f"example_clip must be a positive number between {SMALLEST_CLIP_NORM:g} and {LARGEST_CLIP_NORM:g}, "
                f"but it was {clip:g}; None trains without example-level privacy."
            )
        noise = self.example_noise
        if noise is not None and noise != 0 and not LEAST_NOISE <= noise <= LARGEST_NOISE:
            raise InputError(
                f"example_noise must be 0 (no noise), or at least {LEAST_NOISE:g} and at most {LARGEST_NOISE:g}, "
                f"but it was {noise:g}; None calibrates it to epsilon."
            )
        if self.batch_size is None:
            raise InputError(
                "batch_size=None takes all of a client's examples in every local step, while clients with an "
                "example_clip draw each example with probability batch_size / examples: say how many are to be "
                "expected (batch_size=20), or leave example_clip out."
            )
        if self.max_batch_size is None:
            return
        if self.example_sampling == "shuffled":
            raise InputError(
                f"max_batch_size={self.max_batch_size} is for Poisson minibatches, while shuffled ones are never "
                "larger than batch_size: leave it out, or choose example_sampling='poisson'."
            )
        if self.max_batch_size < self.batch_size:
            raise InputError(
                f"max_batch_size must be at least batch_size, the expected size of a minibatch, {self.batch_size}, but "
                f"it was {self.max_batch_size}."
            )

    @property
    def is_private(self) -> bool:
        """Whether clients clip each example's gradient, with noise or without."""
        return self.example_clip is not None

    def without_example_privacy(self) -> ClientTraining:
        """The same local steps without clip and noise for examples."""
        names = ("example_clip", *_OF_EXAMPLE_PRIVACY)
        return self.replace(**{name: type(self).model_fields[name].default for name in names})

    @property
    def is_proximal(self) -> bool:
        """Whether local steps are drawn back to the weights at the round's start, as in FedProx."""
        return self.proximal_strength > 0

    @property
    def is_fed_sgd(self) -> bool:
        """Whether a client's update is minus the gradient of its mean loss over all of its examples.

        The server's optimizer then takes a step along the clients' gradients: FedSGD (McMahan et al. 2017, 1602.05629,
        section 2).
        """
        one_step = self.batch_size is None and 1 in (self.steps, self.epochs)
        return one_step and self.optimizer == "sgd" and self.learning_rate == 1 and not self.is_proximal

    @property
    def structure(self) -> tuple[Any, ...]:
        """What a compiled graph depends on: trainings that agree in it differ in numbers alone."""
        plain = (self.batch_size, self.optimizer, self.is_proximal)
        if not self.is_private:
            return plain
        return (*plain, self.example_clipping, self.example_sampling, self.max_batch_size, self.microbatch_size)

    def local_steps(self, records: int) -> int:
        """The number of local steps in a round of a client with so many examples."""
        per_epoch = 1 if self.batch_size is None else -(-records // self.batch_size)
        return self.steps if self.steps is not None else (self.epochs or 0) * per_epoch
