"""Per-example clipping that is broken on purpose: each way of breaking it is caught by the check named beside it.

A check that has never failed shows nothing; `test_per_example_gradients.py` runs the same checks on the true code.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import tensorflow as tf
from per_example_checks import (
    check_cancelling,
    check_cancelling_tokens,
    check_convolution,
    check_dense,
    check_example_weights,
    check_general_rule,
    check_microbatches,
    check_normalization,
    check_not_finite,
    check_recurrent,
    check_repeated_tokens,
    check_sensitivity,
    check_shared_layer,
    check_underflow,
)

from dpfl.clients.per_example import contributions, gradients, rules
from dpfl.clients.per_example.contributions import Contribution, Direct, Product, Rows

Patch = pytest.MonkeyPatch
true_sums, true_backward, true_microbatches = gradients._clipped_sums, gradients._backward, gradients._by_microbatches
UNCLIPPED = tf.constant(1e30)


def with_sums(patch: Patch, change: Callable[..., Any]) -> None:
    """`change` gets what the true sums are made from, and returns norms and sums."""
    patch.setattr(gradients, "_clipped_sums", change)


def clips_the_mean(patch: Patch) -> None:
    def sums(uses: Any, layers: Any, weights: Any, clip_norm: Any, clipping: Any) -> Any:
        norms, found = true_sums(uses, layers, weights, UNCLIPPED, "flat")
        count = tf.cast(tf.size(norms), tf.float32)
        mean, _ = tf.clip_by_global_norm([part / count for part in found], clip_norm)
        return norms, [part * count for part in mean]

    with_sums(patch, sums)


def does_not_share_the_clip_between_layers(patch: Patch) -> None:
    def sums(uses: Any, layers: Any, weights: Any, clip_norm: Any, clipping: Any) -> Any:
        more = tf.sqrt(float(len(set(layers)))) if clipping == "per_layer" else 1.0
        return true_sums(uses, layers, weights, clip_norm * more, clipping)

    with_sums(patch, sums)


def adds_the_stability_to_the_factor(patch: Patch) -> None:
    def sums(uses: Any, layers: Any, weights: Any, clip_norm: Any, clipping: Any) -> Any:
        norms, found = true_sums(uses, layers, weights, clip_norm, clipping)
        if clipping == "automatic":
            _, unclipped = true_sums(uses, layers, weights, UNCLIPPED, "flat")
            found = [part + 0.01 * more for part, more in zip(found, unclipped, strict=True)]
        return norms, found

    with_sums(patch, sums)


def weighs_after_clipping(patch: Patch) -> None:
    @dataclasses.dataclass(frozen=True)
    class Weighted:
        use: Contribution
        example_weights: tf.Tensor

        def squared_norms(self) -> tf.Tensor:
            return self.use.squared_norms()

        def weighted_sum(self, factors: tf.Tensor) -> tf.Tensor:
            return self.use.weighted_sum(factors * self.example_weights)

        def of(self, counted: tf.Tensor) -> "Weighted":
            return Weighted(self.use.of(counted), self.example_weights)

    def backward(model: Any, weights: Any, losses_of: Any, x: Any, y: Any, example_weights: Any) -> Any:
        outputs, losses, uses, layers = true_backward(model, weights, losses_of, x, y, tf.ones_like(example_weights))
        weighted = [[Weighted(use, example_weights) for use in of_weight] for of_weight in uses]
        return outputs, losses, weighted, layers

    patch.setattr(gradients, "_backward", backward)


def counts_the_padding_of_microbatches(patch: Patch) -> None:
    def by_microbatches(clipped: Any, x: Any, y: Any, example_weights: Any, size: int) -> Any:
        count = len(example_weights)
        rows = tf.minimum(tf.range(-(-count // size) * size), count - 1)
        padded = [tf.gather(part, rows) for part in (x, y, example_weights)]
        found = true_microbatches(clipped, *padded, size)
        return found._replace(norms=found.norms[:count], losses=found.losses[:count], outputs=found.outputs[:count])

    patch.setattr(gradients, "_by_microbatches", by_microbatches)


def counts_the_last_microbatch_alone(patch: Patch) -> None:
    def by_microbatches(clipped: Any, x: Any, y: Any, example_weights: Any, size: int) -> Any:
        found = true_microbatches(clipped, x, y, example_weights, size)
        start = (len(example_weights) - 1) // size * size
        return found._replace(sums=clipped(tf.constant(0), x[start:], y[start:], example_weights[start:]).sums)

    patch.setattr(gradients, "_by_microbatches", by_microbatches)


def without_bias(patch: Patch, layer: type) -> None:
    fits, rule = rules.LAYER_RULES[layer]

    def broken(layer: Any, *arguments: Any, **options: Any) -> Any:
        noted = rule(layer, *arguments, **options)
        return dataclasses.replace(noted, contributions=lambda *parts: noted.contributions(*parts)[:1])

    patch.setitem(rules.LAYER_RULES, layer, (fits, broken))


def drops_the_bias_of_dense(patch: Patch) -> None:
    without_bias(patch, tf.keras.layers.Dense)


def drops_the_bias_of_convolutions(patch: Patch) -> None:
    without_bias(patch, tf.keras.layers.Conv2D)


def drops_the_offset_of_normalization(patch: Patch) -> None:
    without_bias(patch, tf.keras.layers.LayerNormalization)


def leaves_the_bias_out_of_the_norm(patch: Patch) -> None:
    patch.setattr(Direct, "squared_norms", lambda self: tf.zeros(tf.shape(self.gradients)[0]))


def leaves_the_bias_out_of_the_sum(patch: Patch) -> None:
    patch.setattr(Direct, "weighted_sum", lambda self, _: tf.zeros(self.gradients.shape[1:]))


class Apart:
    """Several uses of a weight, whose norms are taken one by one."""

    def __init__(self, uses: Any) -> None:
        self.uses = list(uses)

    def squared_norms(self) -> tf.Tensor:
        return tf.add_n([use.squared_norms() for use in self.uses])

    def weighted_sum(self, factors: tf.Tensor) -> tf.Tensor:
        return tf.add_n([use.weighted_sum(factors) for use in self.uses])

    def of(self, counted: tf.Tensor) -> "Apart":
        return Apart(use.of(counted) for use in self.uses)


def takes_the_norms_of_a_shared_layers_calls_apart(patch: Patch) -> None:
    patch.setattr(gradients, "combined", Apart)


def forgets_a_shared_layers_second_call(patch: Patch) -> None:
    patch.setattr(gradients, "combined", lambda uses: uses[0])


def counts_a_shared_layers_first_call_twice(patch: Patch) -> None:
    true = contributions.combined
    patch.setattr(gradients, "combined", lambda uses: true([uses[0], *uses] if len(uses) > 1 else uses))


def takes_repeated_tokens_apart(patch: Patch) -> None:
    patch.setattr(Rows, "squared_norms", lambda self: tf.reduce_sum(tf.square(self.gradients), axis=[1, 2]))


def takes_positions_apart(patch: Patch) -> None:
    def squared_norms(self: Product) -> tf.Tensor:
        inputs, of_products = (tf.reduce_sum(tf.square(part), axis=2) for part in (self.inputs, self.gradients))
        return tf.reduce_sum(inputs * of_products, axis=1)

    patch.setattr(Product, "squared_norms", squared_norms)


def sums_what_is_not_finite(patch: Patch) -> None:
    patch.setattr(contributions, "_only", lambda counted, values: values)


def reuses_another_examples_input(patch: Patch) -> None:
    true = tf.vectorized_map

    def shifted(function: Any, given: Any, **options: Any) -> Any:
        inputs, of_outputs = given
        return true(function, ([tf.roll(part, 1, axis=0) for part in inputs], of_outputs), **options)

    patch.setattr(tf, "vectorized_map", shifted)


def ignores_rounding(patch: Patch) -> None:
    patch.setattr(contributions, "_ROUNDING", 0.0)


def ignores_underflow(patch: Patch) -> None:
    patch.setattr(contributions, "_UNDERFLOW", 0.0)


@pytest.mark.parametrize(
    ("mutation", "check"),
    [
        (clips_the_mean, check_dense),
        (clips_the_mean, check_example_weights),
        (does_not_share_the_clip_between_layers, check_sensitivity),
        (does_not_share_the_clip_between_layers, check_dense),
        (adds_the_stability_to_the_factor, check_sensitivity),
        (adds_the_stability_to_the_factor, check_dense),
        (weighs_after_clipping, check_example_weights),
        (counts_the_padding_of_microbatches, check_microbatches),
        (counts_the_last_microbatch_alone, check_microbatches),
        (drops_the_bias_of_dense, check_dense),
        (drops_the_bias_of_convolutions, check_convolution),
        (drops_the_offset_of_normalization, check_normalization),
        (leaves_the_bias_out_of_the_norm, check_sensitivity),
        (leaves_the_bias_out_of_the_norm, check_recurrent),
        (leaves_the_bias_out_of_the_sum, check_dense),
        (takes_the_norms_of_a_shared_layers_calls_apart, check_shared_layer),
        (forgets_a_shared_layers_second_call, check_shared_layer),
        (counts_a_shared_layers_first_call_twice, check_shared_layer),
        (takes_repeated_tokens_apart, check_repeated_tokens),
        (takes_positions_apart, check_convolution),
        (takes_positions_apart, check_recurrent),
        (sums_what_is_not_finite, check_not_finite),
        (reuses_another_examples_input, check_general_rule),
        (ignores_rounding, check_cancelling),
        (ignores_rounding, check_cancelling_tokens),
        (ignores_underflow, check_underflow),
    ],
    ids=lambda part: part.__name__,
)
def test_is_caught(mutation: Callable[[Patch], None], check: Callable[[], None], monkeypatch: Patch) -> None:
    mutation(monkeypatch)
    with pytest.raises(AssertionError):
        check()
