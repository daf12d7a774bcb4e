"""Keras' optimizers with the settings of DP-SGD, under the names and arguments of TensorFlow Privacy.

They hold the settings and apply noisy gradients; clipping and noise happen in `DPModel`, which sees single examples.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any, NoReturn, get_args

import tensorflow as tf

from dpfl.clients.per_example import Clipping
from dpfl.errors import InputError
from dpfl.limits import LARGEST_CLIP_NORM, LARGEST_NOISE, LEAST_NOISE, SMALLEST_CLIP_NORM


class DPOptimizer:
    """What the private optimizers have in common; a mix-in in front of a Keras optimizer.

    The settings cannot be changed afterwards, so that what is accounted is what was done.

    Attributes:
        l2_norm_clip: the largest L2 norm of an example's clipped gradient, all weights together.
        noise_multiplier: standard deviation of the noise on the sum of clipped gradients, divided by `l2_norm_clip`.
        num_microbatches: None, or the batch size: every example is clipped on its own.
        clipping: "flat", "per_layer" or "automatic".
        microbatch_size: how many examples are worked on at a time; None for all.
    """

    def _set_privacy(
        self,
        l2_norm_clip: float,
        noise_multiplier: float,
        num_microbatches: int | None,
        gradient_accumulation_steps: int,
        clipping: Clipping,
        microbatch_size: int | None,
    ) -> None:
        if not (
            isinstance(l2_norm_clip, numbers.Real) and SMALLEST_CLIP_NORM <= float(l2_norm_clip) <= LARGEST_CLIP_NORM
        ):
            raise InputError(
                f"l2_norm_clip must be a number between {SMALLEST_CLIP_NORM:g} and {LARGEST_CLIP_NORM:g}, but it was "
                f"{l2_norm_clip!r}."
            )
        if not (
            isinstance(noise_multiplier, numbers.Real)
            and (noise_multiplier == 0 or LEAST_NOISE <= float(noise_multiplier) <= LARGEST_NOISE)
        ):
            raise InputError(
                f"noise_multiplier must be 0 (no noise, no privacy) or a number between {LEAST_NOISE:g} and "
                f"{LARGEST_NOISE:g}, but it was {noise_multiplier!r}; dpfl.privacy.noise_multiplier finds the one for "
                "an epsilon."
            )
        if gradient_accumulation_steps != 1:
            raise InputError(
                f"gradient_accumulation_steps must be 1, but it was {gradient_accumulation_steps!r}: give fit the "
                "larger batch_size and bound the memory by microbatch_size."
            )
        if clipping not in get_args(Clipping):
            raise InputError(f"there is no clipping {clipping!r}: choose {', '.join(get_args(Clipping))}.")
        for name, value in (("num_microbatches", num_microbatches), ("microbatch_size", microbatch_size)):
            if value is not None and not (isinstance(value, numbers.Integral) and value >= 1):
                raise InputError(f"{name} must be None or a whole number of at least 1, but it was {value!r}.")
        self._privacy: dict[str, Any] = {
            "l2_norm_clip": float(l2_norm_clip),
            "noise_multiplier": float(noise_multiplier),
            "num_microbatches": num_microbatches,
            "clipping": clipping,
            "microbatch_size": microbatch_size,
        }

    @property
    def l2_norm_clip(self) -> float:
        """The largest L2 norm of an example's clipped gradient."""
        return self._privacy["l2_norm_clip"]

    @property
    def noise_multiplier(self) -> float:
        """Standard deviation of the noise on the sum of clipped gradients, divided by `l2_norm_clip`."""
        return self._privacy["noise_multiplier"]

    @property
    def num_microbatches(self) -> int | None:
        """None, or the batch size."""
        return self._privacy["num_microbatches"]

    @property
    def clipping(self) -> Clipping:
        """How an example's gradient is brought to the clip norm."""
        return self._privacy["clipping"]

    @property
    def microbatch_size(self) -> int | None:
        """How many examples are worked on at a time."""
        return self._privacy["microbatch_size"]

    def apply_noisy_gradients(self, gradients: Sequence[tf.Tensor], weights: Sequence[tf.Variable]) -> None:
        """Moves the weights by gradients that already carry their noise; only `DPModel` calls this."""
        super().apply_gradients(list(zip(gradients, weights, strict=True)))  # type: ignore[misc]

    def minimize(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: an aggregate loss has no per-example gradients."""
        raise _alone(self)

    def compute_gradients(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: an aggregate loss has no per-example gradients."""
        raise _alone(self)

    def apply_gradients(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: the gradients may not be private."""
        raise _alone(self)

    def get_config(self) -> dict[str, Any]:
        """The arguments that make this optimizer again."""
        return {**super().get_config(), **self._privacy}  # type: ignore[misc]


def _alone(optimizer: DPOptimizer) -> InputError:
    return InputError(
        f"{type(optimizer).__name__} trains privately in a dpfl.DPModel alone: wrap the Keras model, "
        "model = dpfl.DPModel(model), before compile and fit."
    )


@tf.keras.utils.register_keras_serializable("dpfl")
class DPKerasSGDOptimizer(DPOptimizer, tf.keras.optimizers.SGD):
    """DP-SGD (Abadi et al. 2016, 1607.00133) with momentum, for `dpfl.DPModel`.

    The arguments are those of `tensorflow_privacy.DPKerasSGDOptimizer`, which is 14 to 197 times as slow
    (`experiments/benchmarks/run.py`). The noise for an epsilon comes from the accountant::

        noise = dpfl.privacy.noise_multiplier(
            target_epsilon=3, delta=1e-5, sampling_rate=256 / 60_000, steps=15 * 235
        )
        model = dpfl.DPModel(keras_model)
        model.compile(optimizer=dpfl.DPKerasSGDOptimizer(1.0, noise, learning_rate=0.5), loss="mse")

    Args:
        l2_norm_clip: the largest L2 norm of an example's clipped gradient, all weights together.
        noise_multiplier: standard deviation of the noise on the sum of clipped gradients, divided by
            `l2_norm_clip`; 0 adds none.
        num_microbatches: None, or the batch size: every example is clipped on its own.
        gradient_accumulation_steps: 1; TensorFlow Privacy's others are refused.
        learning_rate: of SGD, or a schedule.
        momentum: of SGD, in [0, 1].
        nesterov: whether the momentum is Nesterov's.
        clipping: "flat", "per_layer" or "automatic"; see `dpfl.clients.per_example.clipped_gradients`.
        microbatch_size: how many examples are worked on at a time, which bounds the memory; None for all.
        **kwargs: passed on to `tf.keras.optimizers.SGD`; they act on the noisy gradient and cost no privacy.

    Raises:
        InputError: a setting that is out of range or cannot be private.
    """

    def __init__(
        self,
        l2_norm_clip: float,
        noise_multiplier: float,
        num_microbatches: int | None = None,
        gradient_accumulation_steps: int = 1,
        learning_rate: Any = 0.01,
        momentum: float = 0.0,
        nesterov: bool = False,
        *,
        clipping: Clipping = "flat",
        microbatch_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        self._set_privacy(
            l2_norm_clip, noise_multiplier, num_microbatches, gradient_accumulation_steps, clipping, microbatch_size
        )
        kwargs.setdefault("name", type(self).__name__)
        super().__init__(learning_rate=learning_rate, momentum=momentum, nesterov=nesterov, **kwargs)


@tf.keras.utils.register_keras_serializable("dpfl")
class DPKerasAdamOptimizer(DPOptimizer, tf.keras.optimizers.Adam):
    """DP-Adam: Adam on the noisy gradients of DP-SGD, for `dpfl.DPModel`; see `DPKerasSGDOptimizer`.

    Args:
        l2_norm_clip: the largest L2 norm of an example's clipped gradient, all weights together.
        noise_multiplier: standard deviation of the noise on the sum of clipped gradients, divided by
            `l2_norm_clip`; 0 adds none.
        num_microbatches: None, or the batch size: every example is clipped on its own.
        gradient_accumulation_steps: 1; TensorFlow Privacy's others are refused.
        learning_rate: of Adam, or a schedule.
        beta_1: decay of the mean of gradients.
        beta_2: decay of the mean of squared gradients.
        epsilon: the constant in Adam's denominator; no privacy parameter.
        amsgrad: whether the largest mean of squared gradients so far is used.
        clipping: "flat", "per_layer" or "automatic".
        microbatch_size: how many examples are worked on at a time, which bounds the memory; None for all.
        **kwargs: passed on to `tf.keras.optimizers.Adam`.

    Raises:
        InputError: a setting that is out of range or cannot be private.
    """

    def __init__(
        self,
        l2_norm_clip: float,
        noise_multiplier: float,
        num_microbatches: int | None = None,
        gradient_accumulation_steps: int = 1,
        learning_rate: Any = 0.001,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-7,
        amsgrad: bool = False,
        *,
        clipping: Clipping = "flat",
        microbatch_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        self._set_privacy(
            l2_norm_clip, noise_multiplier, num_microbatches, gradient_accumulation_steps, clipping, microbatch_size
        )
        kwargs.setdefault("name", type(self).__name__)
        super().__init__(
            learning_rate=learning_rate, beta_1=beta_1, beta_2=beta_2, epsilon=epsilon, amsgrad=amsgrad, **kwargs
        )


@tf.keras.utils.register_keras_serializable("dpfl")
class DPKerasAdagradOptimizer(DPOptimizer, tf.keras.optimizers.Adagrad):
    """DP-Adagrad: Adagrad on the noisy gradients of DP-SGD, for `dpfl.DPModel`; see `DPKerasSGDOptimizer`.

    Args:
        l2_norm_clip: the largest L2 norm of an example's clipped gradient, all weights together.
        noise_multiplier: standard deviation of the noise on the sum of clipped gradients, divided by
            `l2_norm_clip`; 0 adds none.
        num_microbatches: None, or the batch size: every example is clipped on its own.
        gradient_accumulation_steps: 1; TensorFlow Privacy's others are refused.
        learning_rate: of Adagrad, or a schedule.
        initial_accumulator_value: where the sums of squares start.
        epsilon: the constant in Adagrad's denominator; no privacy parameter.
        clipping: "flat", "per_layer" or "automatic".
        microbatch_size: how many examples are worked on at a time, which bounds the memory; None for all.
        **kwargs: passed on to `tf.keras.optimizers.Adagrad`.

    Raises:
        InputError: a setting that is out of range or cannot be private.
    """

    def __init__(
        self,
        l2_norm_clip: float,
        noise_multiplier: float,
        num_microbatches: int | None = None,
        gradient_accumulation_steps: int = 1,
        learning_rate: Any = 0.001,
        initial_accumulator_value: float = 0.1,
        epsilon: float = 1e-7,
        *,
        clipping: Clipping = "flat",
        microbatch_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        self._set_privacy(
            l2_norm_clip, noise_multiplier, num_microbatches, gradient_accumulation_steps, clipping, microbatch_size
        )
        kwargs.setdefault("name", type(self).__name__)
        super().__init__(
            learning_rate=learning_rate,
            initial_accumulator_value=initial_accumulator_value,
            epsilon=epsilon,
            **kwargs,
        )
