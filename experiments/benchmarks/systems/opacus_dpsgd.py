"""Opacus' DP-SGD step in PyTorch, in each of its ways to get gradients per example."""

from collections.abc import Callable

import numpy as np
import opacus
import torch
from checks import check_step
from opacus.layers import DPLSTM, DPMultiheadAttention
from protocol import Work, serve
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch_models import change, examples, new_model, plain_step, trained
from workloads import CLIP_NORM, LEARNING_RATE, NOISE_MULTIPLIER, WORKLOADS


def private_step(
    workload: str, variant: str, noise_multiplier: float, clip_norm: float, alike: bool = False
) -> tuple[nn.Module, Callable[[], object]]:
    """Returns the model and a function that does one private step with it, by `PrivacyEngine.make_private`."""
    x, y = examples(workload, alike)
    model = new_model(workload, DPLSTM, DPMultiheadAttention)
    loader = DataLoader(TensorDataset(x, y), batch_size=len(x))
    made = opacus.PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(trained(model), LEARNING_RATE),
        criterion=nn.CrossEntropyLoss(),
        data_loader=loader,
        noise_multiplier=noise_multiplier,
        max_grad_norm=clip_norm,
        poisson_sampling=False,
        grad_sample_mode=variant,
    )
    wrapped, optimizer = made[:2]
    criterion = made[2] if variant == "ghost" else nn.CrossEntropyLoss()

    def step() -> None:
        optimizer.zero_grad()
        criterion(wrapped(x), y).backward()
        optimizer.step()

    return model, step


def prepare(workload: str, variant: str, threads: int) -> Work:
    """A step on one batch, checked against the plain step of the same model."""
    torch.set_num_threads(threads)

    def private(noise_multiplier: float, clip_norm: float, alike: bool) -> np.ndarray:
        return change(*private_step(workload, variant, noise_multiplier, clip_norm, alike))

    def plain(alike: bool) -> np.ndarray:
        model = new_model(workload, DPLSTM, DPMultiheadAttention)
        return change(model, plain_step(model, workload, alike))

    check_step(private, plain, WORKLOADS[workload].facts["batch"])
    _, step = private_step(workload, variant, NOISE_MULTIPLIER, CLIP_NORM)
    facts = {"version": opacus.__version__, "parameters": WORKLOADS[workload].parameters, "torch": torch.__version__}
    return Work(step, facts)


if __name__ == "__main__":
    serve(prepare)
