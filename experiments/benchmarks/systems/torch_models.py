"""The workloads' models in PyTorch: with PyTorch's own layers, or with those that Opacus needs in their place."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from checks import check_parameters
from torch import nn
from workloads import LEARNING_RATE, SEED, WORKLOADS


class _LastState(nn.Module):
    """A recurrent layer's output at the last token."""

    def __init__(self, recurrent: nn.Module) -> None:
        super().__init__()
        self.recurrent = recurrent
        for name, parameter in recurrent.named_parameters():
            # Keras has one bias where PyTorch adds two; the second stays zero.
            if name.endswith(("bias_hh_l0", "hh.bias")):
                nn.init.zeros_(parameter)
                parameter.requires_grad = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.recurrent(x)[0][:, -1]


class _Block(nn.Module):
    """Self-attention and a feed-forward layer, each added to its input and normalised."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention
        self.first_norm, self.second_norm = nn.LayerNorm(64), nn.LayerNorm(64)
        self.forwards = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first_norm(x + self.attention(x, x, x, need_weights=False)[0])
        return self.second_norm(x + self.forwards(x))


class _MeanOverTokens(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(dim=1)


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 8, stride=2, padding=3),
        nn.ReLU(),
        nn.MaxPool2d(2, 1),
        nn.Conv2d(16, 32, 4, stride=2),
        nn.ReLU(),
        nn.MaxPool2d(2, 1),
        nn.Flatten(),
        nn.Linear(512, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 10))


def new_model(
    workload: str, lstm: Callable[..., nn.Module] = nn.LSTM, attention: Callable[..., nn.Module] = nn.MultiheadAttention
) -> nn.Module:
    """Returns the workload's model with its first weights, the same at every call with the same layers.

    Args:
        workload: its name.
        lstm: makes the recurrent layer.
        attention: makes the attention layer.

    Raises:
        ValueError: if the number of weights is not the workload's.
    """
    torch.manual_seed(SEED)
    models = {
        "dpsgd-cnn": _cnn,
        "dpsgd-mlp": _mlp,
        "dpsgd-lstm": lambda: nn.Sequential(
            nn.Embedding(100, 32), _LastState(lstm(32, 64, batch_first=True)), nn.Linear(64, 2)
        ),
        "dpsgd-transformer": lambda: nn.Sequential(
            nn.Embedding(1_000, 64), _Block(attention(64, 4, batch_first=True)), _MeanOverTokens(), nn.Linear(64, 10)
        ),
    }
    model = models[workload]()
    check_parameters(sum(each.numel() for each in trained(model)), WORKLOADS[workload].parameters)
    return model.train()


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The weights that training changes."""
    return [each for each in model.parameters() if each.requires_grad]


def examples(workload: str, alike: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """The workload's data as tensors; images with their channel first; `alike` gives the first example for all."""
    x, y = (torch.from_numpy(each) for each in WORKLOADS[workload].examples(alike))
    if x.ndim == 4:
        # Not permute: its strides are those of channels last, for which Opacus 1.6.0 gets Conv2d wrong.
        x = x.reshape(len(x), 1, *x.shape[1:3])
    return (x.long() if not x.is_floating_point() else x), y.long()


def plain_step(model: nn.Module, workload: str, alike: bool = False) -> Callable[[], object]:
    """Returns a function that does one step of SGD."""
    x, y = examples(workload, alike)
    optimizer = torch.optim.SGD(trained(model), LEARNING_RATE)
    criterion = nn.CrossEntropyLoss()

    def step() -> None:
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()

    return step


def change(model: nn.Module, step: Callable[[], object]) -> np.ndarray:
    """Returns what one step changes in all weights of the model, as one vector."""
    before = [each.detach().clone() for each in trained(model)]
    step()
    changes = [each.detach() - old for each, old in zip(trained(model), before, strict=True)]
    return torch.cat([each.flatten() for each in changes]).numpy()
