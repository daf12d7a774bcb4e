"""LSTM, GRU and SimpleRNN layers with few operations at each step.

Keras runs its cells in a `tf.while_loop`, whose gradient adds up the weights' gradients step by step. Here the steps
are laid out in the graph, a step is little more than its product with the recurrent kernel, forwards as backwards, and
the weights' gradients are products over all steps at once: about twice as fast at a client's small minibatches. The
numbers are Keras' own up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

# Each step takes its place in the graph: longer sequences stay with Keras.
_MOST_STEPS = 200

State = list[tf.Tensor]
Gradient = Callable[..., list[tf.Tensor]]


def run_faster(layer: tf.keras.layers.Layer) -> None:
    """Replaces how a recurrent layer computes, if it is one that this module covers.

    Covered are LSTM and GRU with the activations that Keras' kernels for GPUs demand (tanh and sigmoid) and SimpleRNN
    with tanh, sigmoid, ReLU or none. Whatever else is asked for runs as before: dropout, state that is given, returned
    or kept, and at each call masks, other shapes than (batch, steps, width) and more than 200 steps.

    Args:
        layer: any layer, built, whose weights are tensors or variables.
    """
    kind: Any = _CELLS.get(type(layer))
    if kind is _Gru and not layer.reset_after:
        kind = _GruResetBefore
    if kind is None or not _is_plain(layer) or not kind.covers(layer.cell):
        return
    cell, original = layer.cell, layer.call

    def call(inputs: Any, mask: Any = None, training: Any = None, initial_state: Any = None) -> Any:
        is_sequence = isinstance(inputs, tf.Tensor) and len(inputs.shape) == 3 and inputs.shape[1] is not None
        if not is_sequence or mask is not None or initial_state is not None or inputs.shape[1] > _MOST_STEPS:
            return original(inputs, mask=mask, training=training, initial_state=initial_state)
        if layer.go_backwards:
            inputs = tf.reverse(inputs, axis=[1])
        weights = [cell.kernel, cell.recurrent_kernel, *([cell.bias] if cell.use_bias else [])]
        return _run(lambda *values: kind(cell, *values), inputs, weights, layer.return_sequences)

    layer.call = call


def _is_plain(layer: Any) -> bool:
    special = (
        layer.stateful,
        layer.return_state,
        layer.time_major,
        layer.unroll,
        layer.zero_output_for_mask,
        layer.dropout,
        layer.recurrent_dropout,
    )
    return not any(special) and layer.compute_dtype == layer.variable_dtype == "float32"


def _run(
    make_cell: Callable[..., _Cell], inputs: tf.Tensor, weights: Sequence[tf.Tensor], return_sequences: bool
) -> tf.Tensor:
    """Runs a cell from zeros over the steps.

    Args:
        make_cell: makes the cell from its weights.
        inputs: (batch, steps, width), steps and width static.
        weights: kernel, recurrent kernel, and bias where there is one.
        return_sequences: whether to return the outputs of all steps, (batch, steps, units), or the last one,
            (batch, units).
    """
    steps, width = inputs.shape[1:]

    @tf.custom_gradient
    def run(inputs: tf.Tensor, *weights: tf.Tensor) -> tuple[tf.Tensor, Gradient]:
        cell = make_cell(*weights)
        batch = tf.shape(inputs)[0]
        # Behind each other by step: a step's part is then a piece of memory that needs no copy.
        rows = tf.reshape(tf.transpose(inputs, [1, 0, 2]), [-1, width])
        products = tf.unstack(tf.reshape(cell.products(rows), [steps, batch, -1]), steps)
        state = [tf.zeros([batch, cell.units]) for _ in range(cell.states)]
        outputs, kept = [], []
        for step in range(steps):
            state, note = cell.step(products[step], state)
            outputs.append(state[0])
            kept.append(note)

        def gradient(of_outputs: tf.Tensor, **_: Any) -> list[tf.Tensor]:
            of_step = tf.unstack(of_outputs, steps, axis=1) if return_sequences else [None] * (steps - 1) + [of_outputs]
            of_state = [tf.zeros([batch, cell.units]) for _ in range(cell.states)]
            found = []
            for step in reversed(range(steps)):
                if of_step[step] is not None:
                    of_state[0] += of_step[step]
                gradients, of_state = cell.step_back(kept[step], of_state)
                found.append(gradients)
            joined = [tf.concat(parts, axis=0) for parts in zip(*reversed(found), strict=True)]
            of_rows, *of_weights = cell.gradients(rows, *joined)
            return [tf.transpose(tf.reshape(of_rows, [steps, batch, width]), [1, 0, 2]), *of_weights]

        return tf.stack(outputs, axis=1) if return_sequences else outputs[-1], gradient

    result = run(inputs, *weights)
    units = int(weights[1].shape[0])
    return tf.ensure_shape(result, [inputs.shape[0], *([steps] if return_sequences else []), units])


class _Cell:
    """A cell whose inputs and state before meet in one sum of products, which it then makes into a state.

    Args:
        cell: the Keras cell.
        kernel: (width, columns).
        recurrent_kernel: (units, columns).
        bias: (columns,), or None.
    """

    states = 1

    def __init__(
        self, cell: Any, kernel: tf.Tensor, recurrent_kernel: tf.Tensor, bias: tf.Tensor | None = None
    ) -> None:
        self.units = int(cell.units)
        self._cell, self._kernel, self._recurrent_kernel, self._bias = cell, kernel, recurrent_kernel, bias

    @staticmethod
    def covers(cell: Any) -> bool:
        """Whether this does what the Keras cell is set to."""
        return cell.activation is _TANH and cell.recurrent_activation is _SIGMOID

    def products(self, inputs: tf.Tensor) -> tf.Tensor:
        """What all steps' inputs, (rows, width), add to the sums, (rows, columns)."""
        products = tf.matmul(inputs, self._kernel)
        return products if self._bias is None else tf.nn.bias_add(products, self._bias)

    def step(self, products: tf.Tensor, state: State) -> tuple[State, Any]:
        """Returns the state after a step, of which the output is the first, and what `step_back` needs to know."""
        raise NotImplementedError

    def step_back(self, kept: Any, of_state: State) -> tuple[list[tf.Tensor], State]:
        """Returns what `gradients` needs from the step, and the gradient of the state before from that after it."""
        raise NotImplementedError

    def gradients(self, inputs: tf.Tensor, before: tf.Tensor, of_products: tf.Tensor) -> list[tf.Tensor]:
        """The gradients of the inputs and of each weight.

        Args:
            inputs: of all steps, (rows, width).
            before: the outputs before each step, (rows, units); this and what follows comes from `step_back`.
            of_products: gradients of the sums, (rows, columns).
        """
        return self._gradients(inputs, of_products, tf.matmul(before, of_products, transpose_a=True))

    def _gradients(self, inputs: tf.Tensor, of_products: tf.Tensor, of_recurrent_kernel: tf.Tensor) -> list[tf.Tensor]:
        of_inputs = tf.matmul(of_products, self._kernel, transpose_b=True)
        of_bias = [] if self._bias is None else [tf.reduce_sum(of_products, axis=0)]
        return [of_inputs, tf.matmul(inputs, of_products, transpose_a=True), of_recurrent_kernel, *of_bias]


class _SimpleRnn(_Cell):
    @staticmethod
    def covers(cell: Any) -> bool:
        return cell.activation in _FROM_OUTPUTS

    def step(self, products: tf.Tensor, state: State) -> tuple[State, Any]:
        output = self._cell.activation(tf.matmul(state[0], self._recurrent_kernel) + products)
        return [output], (state[0], output)

    def step_back(self, kept: Any, of_state: State) -> tuple[list[tf.Tensor], State]:
        before, output = kept
        of_sum = _FROM_OUTPUTS[self._cell.activation](output, of_state[0])
        return [before, of_sum], [tf.matmul(of_sum, self._recurrent_kernel, transpose_b=True)]


class _Lstm(_Cell):
    """Keras' order of the gates is input, forget, candidate, output.

    All four are one tanh, as sigmoid(z) = tanh(z / 2) / 2 + 1 / 2: the inner half goes into the weights, and the
    derivative's two halves, which `of_products` is without, do too.
    """

    states = 2

    def __init__(
        self, cell: Any, kernel: tf.Tensor, recurrent_kernel: tf.Tensor, bias: tf.Tensor | None = None
    ) -> None:
        self._scale, self._shift = (
            tf.constant(np.repeat(values, int(cell.units)), tf.float32)
            for values in ([0.5, 0.5, 1.0, 0.5], [0.5, 0.5, 0.0, 0.5])
        )
        kernel, recurrent_kernel = kernel * self._scale, recurrent_kernel * self._scale
        super().__init__(cell, kernel, recurrent_kernel, None if bias is None else bias * self._scale)
        self._kernel_back, recurrent_kernel_back = kernel * self._scale, recurrent_kernel * self._scale
        # Transposed once: a product with few rows takes half as long again with a kernel that it must transpose.
        self._recurrent_kernel_back = tf.transpose(recurrent_kernel_back)

    def step(self, products: tf.Tensor, state: State) -> tuple[State, Any]:
        before, carry_before = state
        activated = tf.tanh(tf.matmul(before, self._recurrent_kernel) + products)
        entering, forgetting, candidate, leaving = tf.split(activated * self._scale + self._shift, 4, axis=1)
        carry = forgetting * carry_before + entering * candidate
        squashed = tf.tanh(carry)
        factors = (candidate, carry_before, entering, squashed)
        return [leaving * squashed, carry], (before, activated, factors, forgetting, leaving)

    def step_back(self, kept: Any, of_state: State) -> tuple[list[tf.Tensor], State]:
        before, activated, factors, forgetting, leaving = kept
        of_output, of_carry = of_state
        of_carry += _of_tanh(factors[-1], of_output * leaving)
        of_gates = tf.concat([of_carry, of_carry, of_carry, of_output], axis=1) * tf.concat(factors, axis=1)
        of_products = _of_tanh(activated, of_gates)
        of_before = tf.matmul(of_products, self._recurrent_kernel_back)
        return [before, of_products], [of_before, of_carry * forgetting]

    def gradients(self, inputs: tf.Tensor, before: tf.Tensor, of_products: tf.Tensor) -> list[tf.Tensor]:
        _, *of_weights = super().gradients(inputs, before, of_products)
        squares = tf.square(self._scale)
        of_inputs = tf.matmul(of_products, self._kernel_back, transpose_b=True)
        return [of_inputs, *(of_weight * squares for of_weight in of_weights)]


class _Gru(_Cell):
    """Keras' order of the gates is update, reset, candidate; the reset gate acts on the state's product."""

    def __init__(
        self, cell: Any, kernel: tf.Tensor, recurrent_kernel: tf.Tensor, biases: tf.Tensor | None = None
    ) -> None:
        super().__init__(cell, kernel, recurrent_kernel, None if biases is None else biases[0])
        self._recurrent_bias = None if biases is None else biases[1]

    def step(self, products: tf.Tensor, state: State) -> tuple[State, Any]:
        before = state[0]
        recurrent = tf.matmul(before, self._recurrent_kernel)
        if self._recurrent_bias is not None:
            recurrent = tf.nn.bias_add(recurrent, self._recurrent_bias)
        sizes = [2 * self.units, self.units]
        (of_inputs, entering), (of_before, remembered) = (
            tf.split(part, sizes, axis=1) for part in (products, recurrent)
        )
        gates = tf.sigmoid(of_inputs + of_before)
        update, reset = tf.split(gates, 2, axis=1)
        candidate = tf.tanh(entering + reset * remembered)
        change = before - candidate
        return [update * change + candidate], (before, gates, update, reset, remembered, candidate, change)

    def step_back(self, kept: Any, of_state: State) -> tuple[list[tf.Tensor], State]:
        before, gates, update, reset, remembered, candidate, change = kept
        of_output = of_state[0]
        passed = of_output * update
        of_candidate = _of_tanh(candidate, of_output - passed)
        of_gates = _of_sigmoid(gates, tf.concat([of_output * change, of_candidate * remembered], axis=1))
        of_recurrent = tf.concat([of_gates, of_candidate * reset], axis=1)
        of_before = tf.matmul(of_recurrent, self._recurrent_kernel, transpose_b=True) + passed
        return [before, of_recurrent, of_candidate], [of_before]

    def gradients(self, inputs: tf.Tensor, before: tf.Tensor, *of_step: tf.Tensor) -> list[tf.Tensor]:
        of_recurrent, of_candidate = of_step
        of_products = tf.concat([of_recurrent[:, : 2 * self.units], of_candidate], axis=1)
        found = self._gradients(inputs, of_products, tf.matmul(before, of_recurrent, transpose_a=True))
        if self._recurrent_bias is not None:
            found[-1] = tf.stack([found[-1], tf.reduce_sum(of_recurrent, axis=0)])
        return found


class _GruResetBefore(_Cell):
    """The reset gate acts on the state, before its product; Keras' `reset_after=False`."""

    def __init__(
        self, cell: Any, kernel: tf.Tensor, recurrent_kernel: tf.Tensor, bias: tf.Tensor | None = None
    ) -> None:
        super().__init__(cell, kernel, recurrent_kernel, bias)
        sizes = [2 * self.units, self.units]
        self._of_gates, self._of_candidate = tf.split(recurrent_kernel, sizes, axis=1)

    def step(self, products: tf.Tensor, state: State) -> tuple[State, Any]:
        before = state[0]
        of_inputs, entering = tf.split(products, [2 * self.units, self.units], axis=1)
        gates = tf.sigmoid(tf.matmul(before, self._of_gates) + of_inputs)
        update, reset = tf.split(gates, 2, axis=1)
        remembered = reset * before
        candidate = tf.tanh(tf.matmul(remembered, self._of_candidate) + entering)
        change = before - candidate
        return [update * change + candidate], (before, gates, update, reset, remembered, candidate, change)

    def step_back(self, kept: Any, of_state: State) -> tuple[list[tf.Tensor], State]:
        before, gates, update, reset, remembered, candidate, change = kept
        of_output = of_state[0]
        passed = of_output * update
        of_candidate = _of_tanh(candidate, of_output - passed)
        of_remembered = tf.matmul(of_candidate, self._of_candidate, transpose_b=True)
        of_gates = _of_sigmoid(gates, tf.concat([of_output * change, of_remembered * before], axis=1))
        of_before = tf.matmul(of_gates, self._of_gates, transpose_b=True) + passed + of_remembered * reset
        return [before, of_gates, remembered, of_candidate], [of_before]

    def gradients(self, inputs: tf.Tensor, before: tf.Tensor, *of_step: tf.Tensor) -> list[tf.Tensor]:
        of_gates, remembered, of_candidate = of_step
        of_recurrent_kernel = [
            tf.matmul(left, right, transpose_a=True) for left, right in ((before, of_gates), (remembered, of_candidate))
        ]
        return self._gradients(
            inputs, tf.concat([of_gates, of_candidate], axis=1), tf.concat(of_recurrent_kernel, axis=1)
        )


def _of_tanh(outputs: tf.Tensor, of_outputs: tf.Tensor) -> tf.Tensor:
    return tf.raw_ops.TanhGrad(y=outputs, dy=of_outputs)


def _of_sigmoid(outputs: tf.Tensor, of_outputs: tf.Tensor) -> tf.Tensor:
    return tf.raw_ops.SigmoidGrad(y=outputs, dy=of_outputs)


_TANH, _SIGMOID = tf.keras.activations.tanh, tf.keras.activations.sigmoid
# The gradient before each activation from what comes out of it.
_FROM_OUTPUTS: dict[Callable[..., tf.Tensor], Callable[[tf.Tensor, tf.Tensor], tf.Tensor]] = {
    _TANH: _of_tanh,
    _SIGMOID: _of_sigmoid,
    tf.keras.activations.relu: lambda outputs, of_outputs: tf.raw_ops.ReluGrad(gradients=of_outputs, features=outputs),
    tf.keras.activations.linear: lambda outputs, of_outputs: of_outputs,
}
_CELLS: dict[type, type[_Cell]] = {
    tf.keras.layers.LSTM: _Lstm,
    tf.keras.layers.GRU: _Gru,
    tf.keras.layers.SimpleRNN: _SimpleRnn,
}
