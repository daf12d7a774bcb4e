"""The federated workloads' models in PyTorch, and their weights from and to Keras' layout and order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from checks import check_parameters
from torch import nn
from workloads import WORKLOADS

Layout = Callable[[torch.Tensor], torch.Tensor]
IMAGE = 4  # dimensions of a batch of images


class _LastState(nn.Module):
    """An LSTM's output at the last token."""

    def __init__(self, inputs: int, units: int) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(inputs, units, batch_first=True)
        # Keras has one bias where PyTorch adds two; the second stays zero.
        nn.init.zeros_(self.recurrent.bias_hh_l0)
        self.recurrent.bias_hh_l0.requires_grad = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.recurrent(x)[0][:, -1]


class _FlatImage(nn.Flatten):
    """Flattens images of a known shape (channels, height, width), which the next layer's weights depend on."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shape = shape


_MODELS: dict[str, Callable[[], nn.Module]] = {
    "fedavg-mlp": lambda: nn.Sequential(nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 10)),
    "fedavg-softmax": lambda: nn.Sequential(nn.Linear(64, 10)),
    "fedavg-cnn": lambda: nn.Sequential(
        nn.Conv2d(3, 32, 3),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        _FlatImage(64, 14, 14),
        nn.Linear(64 * 14 * 14, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    ),
    "fedavg-shakespeare": lambda: nn.Sequential(nn.Embedding(90, 8), _LastState(8, 128), nn.Linear(128, 90)),
    "fedavg-large": lambda: nn.Sequential(
        nn.Linear(784, 1_000), nn.ReLU(), nn.Linear(1_000, 200), nn.ReLU(), nn.Linear(200, 10)
    ),
}


def build(workload: str) -> nn.Module:
    """Returns the workload's model with its first weights, the same at every call.

    Raises:
        ValueError: if the number of weights is not the workload's.
    """
    model = _MODELS[workload]().train()
    set_weights(model, WORKLOADS[workload].first_weights())
    check_parameters(sum(each.numel() for each in trained(model)), WORKLOADS[workload].parameters)
    return model


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The weights that training changes."""
    return [each for each in model.parameters() if each.requires_grad]


def weights_of(model: nn.Module) -> list[np.ndarray]:
    """Returns copies of a model's weights in Keras' layout and order."""
    return [to_keras(each.detach()).numpy().copy(order="C") for each, to_keras, _ in _layouts(model)]


def set_weights(model: nn.Module, arrays: Sequence[np.ndarray]) -> None:
    """Sets a model's weights to copies of arrays in Keras' layout and order."""
    with torch.no_grad():
        for array, (parameter, _, from_keras) in zip(arrays, _layouts(model), strict=True):
            parameter.copy_(from_keras(torch.tensor(array)))


def tensors(x: np.ndarray, y: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns a batch of examples as the models take them: images channels first, tokens and labels as 64-bit."""
    inputs = torch.tensor(x)
    if inputs.ndim == IMAGE:
        inputs = inputs.permute(0, 3, 1, 2).contiguous()
    return inputs if inputs.is_floating_point() else inputs.long(), torch.tensor(y).long()


def loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Returns the mean loss of a minibatch as `tensors` makes it."""
    return nn.functional.cross_entropy(model(x), y)


def gradient(workload: str, weights: Sequence[np.ndarray], x: np.ndarray, y: np.ndarray) -> list[np.ndarray]:
    """Returns the gradient of the mean loss of one minibatch (as NumPy arrays) at these weights, in Keras' layout."""
    model = build(workload)
    set_weights(model, weights)
    loss(model, *tensors(x, y)).backward()
    return [to_keras(each.grad).numpy().copy(order="C") for each, to_keras, _ in _layouts(model)]


def _layouts(model: nn.Module) -> Iterator[tuple[nn.Parameter, Layout, Layout]]:
    """Yields each trained parameter in Keras' order, with what takes it to Keras' layout and back."""
    image: tuple[int, ...] = ()
    for layer in model.modules():
        if isinstance(layer, _FlatImage):
            image = layer.shape
        elif isinstance(layer, nn.Linear):
            yield layer.weight, *(_after_image(image) if image else (torch.t, torch.t))
            yield layer.bias, _same, _same
            image = ()
        elif isinstance(layer, nn.Conv2d):
            yield layer.weight, lambda w: w.permute(2, 3, 1, 0), lambda w: w.permute(3, 2, 0, 1)
            yield layer.bias, _same, _same
        elif isinstance(layer, nn.Embedding):
            yield layer.weight, _same, _same
        elif isinstance(layer, nn.LSTM):
            # Both have the gates in the order input, forget, cell, output.
            yield layer.weight_ih_l0, torch.t, torch.t
            yield layer.weight_hh_l0, torch.t, torch.t
            yield layer.bias_ih_l0, _same, _same


def _same(w: torch.Tensor) -> torch.Tensor:
    return w


def _after_image(shape: tuple[int, ...]) -> tuple[Layout, Layout]:
    """The layouts of a dense layer on flattened images: PyTorch flattens them channels first, Keras channels last."""
    channels, height, width = shape

    def to_keras(w: torch.Tensor) -> torch.Tensor:
        return w.reshape(-1, channels, height, width).permute(2, 3, 1, 0).reshape(height * width * channels, -1)

    def from_keras(w: torch.Tensor) -> torch.Tensor:
        return w.reshape(height, width, channels, -1).permute(3, 2, 0, 1).reshape(-1, channels * height * width)

    return to_keras, from_keras
