"""The non-private step in PyTorch."""

import torch
from protocol import Work, serve
from torch_models import new_model, plain_step
from workloads import WORKLOADS


def prepare(workload: str, variant: str, threads: int) -> Work:
    """PyTorch's own layers and SGD, eagerly."""
    torch.set_num_threads(threads)
    facts = {"version": torch.__version__, "parameters": WORKLOADS[workload].parameters}
    return Work(plain_step(new_model(workload), workload), facts)


if __name__ == "__main__":
    serve(prepare)
