"""Rules of recurrent layers.

A cell is two dense products at every step, of the inputs and of the state before, so its weights' gradients are
products over steps (`contributions.Product`). To see them, the rules run the recurrence themselves, as Keras defines
it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from dpfl.clients.per_example.contributions import Direct, Product
from dpfl.clients.per_example.rules import Noted, Pairs, Rule

if TYPE_CHECKING:
    from dpfl.clients.per_example.capture import Capture

Step = Callable[[tf.Tensor, tf.Tensor, list[tf.Tensor]], list[tf.Tensor]]


def _recurrent(
    layer: Any,
    capture: Capture,
    inputs: Any,
    mask: tf.Tensor | None,
    initial_state: Any,
    step: Step,
    input_bias: Any,
    recurrent_bias: Any,
) -> Noted:
    """Runs a cell over the steps and notes its two products.

    Args:
        layer: the recurrent layer.
        capture: notes.
        inputs: (batch, steps, width), or a list of these and the initial states, as functional models pass them.
        mask: which steps count, (batch, steps), or None.
        initial_state: the states before the first step, of which the output is the first; None for zeros.
        step: from the input's products, the state's products, and the states to the new states.
        input_bias: added to the input's products, or None.
        recurrent_bias: added to the state's products, or None.
    """
    cell = layer.cell
    inputs, initial_state, _ = layer._process_inputs(inputs, initial_state, None)
    inputs = tf.cast(inputs, tf.float32)
    if layer.go_backwards:
        inputs = tf.reverse(inputs, axis=[1])
        mask = None if mask is None else tf.reverse(mask, axis=[1])
    steps = tf.shape(inputs)[1]
    products = tf.tensordot(inputs, cell.kernel, 1)
    if input_bias is not None:
        products += input_bias
    products = capture.watch(products)
    # Adding a zero that is watched gives the gradients of the state's products at every step.
    added = capture.watch(tf.zeros_like(products))
    # Read from arrays, a step's gradient is written to its place; slices would each have one as large as all steps.
    by_step, added_by_step = (
        tf.TensorArray(tf.float32, steps, clear_after_read=False).unstack(tf.transpose(part, [1, 0, 2]))
        for part in (products, added)
    )
    mask_by_step = None if mask is None else tf.transpose(mask)[:, :, None]
    units = int(cell.units)

    def body(index: tf.Tensor, state: list[tf.Tensor], kept: tf.TensorArray) -> Any:
        recurrent = tf.matmul(state[0], cell.recurrent_kernel) + added_by_step.read(index)
        if recurrent_bias is not None:
            recurrent += recurrent_bias
        new = step(by_step.read(index), recurrent, state)
        if mask_by_step is not None:
            new = [tf.where(mask_by_step[index], after, before) for after, before in zip(new, state, strict=True)]
        return index + 1, new, kept.write(index, new[0])

    start = [tf.ensure_shape(state, [inputs.shape[0], units]) for state in initial_state]
    kept = tf.TensorArray(tf.float32, steps, element_shape=[inputs.shape[0], units])
    _, last, kept = tf.while_loop(
        lambda index, *_: index < steps, body, (tf.constant(0), start, kept), maximum_iterations=steps
    )
    sequence = tf.transpose(kept.stack(), [1, 0, 2])
    sequence.set_shape([inputs.shape[0], inputs.shape[1], units])
    outputs = sequence if layer.return_sequences else last[0]
    before = tf.concat([start[0][:, None], sequence[:, :-1]], axis=1)
    before.set_shape(sequence.shape)

    def contributions(of_products: tf.Tensor, of_added: tf.Tensor) -> Pairs:
        of_products.set_shape(products.shape)
        of_added.set_shape(products.shape)
        of_products, of_added = capture.rows(of_products), capture.rows(of_added)
        found: Pairs = [
            (cell.kernel, Product(capture.rows(inputs), of_products, cell.kernel.shape)),
            (cell.recurrent_kernel, Product(capture.rows(before), of_added, cell.recurrent_kernel.shape)),
        ]
        if cell.use_bias:
            summed = tf.reduce_sum(of_products, axis=1)
            if recurrent_bias is not None:
                summed = tf.stack([summed, tf.reduce_sum(of_added, axis=1)], axis=1)
            found.append((cell.bias, Direct(summed)))
        return found

    return Noted([outputs, *last] if layer.return_state else outputs, [products, added], contributions)


def _lstm(
    layer: Any,
    call: Any,
    capture: Capture,
    inputs: Any,
    mask: Any = None,
    training: Any = None,
    initial_state: Any = None,
) -> Noted:
    cell = layer.cell

    def step(products: tf.Tensor, recurrent: tf.Tensor, state: list[tf.Tensor]) -> list[tf.Tensor]:
        entering, forgetting, candidate, leaving = tf.split(products + recurrent, 4, axis=1)
        carry = cell.recurrent_activation(forgetting) * state[1]
        carry += cell.recurrent_activation(entering) * cell.activation(candidate)
        return [cell.recurrent_activation(leaving) * cell.activation(carry), carry]

    return _recurrent(layer, capture, inputs, mask, initial_state, step, cell.bias if cell.use_bias else None, None)


def _gru(
    layer: Any,
    call: Any,
    capture: Capture,
    inputs: Any,
    mask: Any = None,
    training: Any = None,
    initial_state: Any = None,
) -> Noted:
    cell = layer.cell

    def step(products: tf.Tensor, recurrent: tf.Tensor, state: list[tf.Tensor]) -> list[tf.Tensor]:
        update, reset, candidate = tf.split(products, 3, axis=1)
        recurrent_update, recurrent_reset, recurrent_candidate = tf.split(recurrent, 3, axis=1)
        kept = cell.recurrent_activation(update + recurrent_update)
        reset = cell.recurrent_activation(reset + recurrent_reset)
        return [kept * state[0] + (1 - kept) * cell.activation(candidate + reset * recurrent_candidate)]

    biases = tf.unstack(cell.bias) if cell.use_bias else (None, None)
    return _recurrent(layer, capture, inputs, mask, initial_state, step, *biases)


def _simple(
    layer: Any,
    call: Any,
    capture: Capture,
    inputs: Any,
    mask: Any = None,
    training: Any = None,
    initial_state: Any = None,
) -> Noted:
    cell = layer.cell

    def step(products: tf.Tensor, recurrent: tf.Tensor, state: list[tf.Tensor]) -> list[tf.Tensor]:
        return [cell.activation(products + recurrent)]

    return _recurrent(layer, capture, inputs, mask, initial_state, step, cell.bias if cell.use_bias else None, None)


def _is_plain(layer: Any) -> bool:
    """Whether the layer starts from zeros at every call and draws no random numbers."""
    return not (
        layer.stateful or layer.time_major or layer.zero_output_for_mask or layer.dropout or layer.recurrent_dropout
    )


def starts_masked(
    layer: Any, inputs: Any, mask: Any = None, training: Any = None, initial_state: Any = None, **_: Any
) -> bool:
    """Whether a recurrent layer's first steps may be masked after a state that is given.

    What Keras gives out at such steps is zero, and not the state, as the rules here have it.
    """
    is_given = initial_state is not None or isinstance(inputs, list | tuple)
    return isinstance(layer, tf.keras.layers.RNN) and is_given and mask is not None


RECURRENT_RULES: dict[type, tuple[Callable[[Any], bool], Rule]] = {
    tf.keras.layers.LSTM: (_is_plain, _lstm),
    tf.keras.layers.GRU: (lambda layer: _is_plain(layer) and layer.reset_after, _gru),
    tf.keras.layers.SimpleRNN: (_is_plain, _simple),
}
