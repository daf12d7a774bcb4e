"""MNIST, Fashion-MNIST and CIFAR-10 with their official test sets, dealt to simulated clients."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import numpy as np

from dpfl.data.arrays import from_arrays
from dpfl.data.federated_data import FederatedData
from dpfl.data.files import HeldOut, read_npz, scaled_images
from dpfl.errors import InputError

DATA_DIR = "DPFL_DATA_DIR"
"""Environment variable that names the folder of mnist.npz, fashion_mnist.npz and cifar10.npz."""


def mnist(
    clients: int = 1000, partition: str = "iid", seed: int = 0, *, validation_fraction: float = 0.1
) -> FederatedData:
    """MNIST: 60,000 training and 10,000 test images of shape (28, 28, 1), 10 classes.

    Read from mnist.npz in the folder that the environment variable DPFL_DATA_DIR names, else from Keras'
    cache, else downloaded by Keras.

    Args:
        clients: Number of clients.
        partition: "iid", "dirichlet:ALPHA" or "shards:PER_CLIENT".
        seed: Seed of the validation split and the partition.
        validation_fraction: Share of the training images set aside for validation; may be 0.

    Raises:
        InputError: An option is not valid, or the images are neither there nor can be downloaded.
    """
    return _images("mnist", clients, partition, seed, validation_fraction)


def fashion_mnist(
    clients: int = 1000, partition: str = "iid", seed: int = 0, *, validation_fraction: float = 0.1
) -> FederatedData:
    """Fashion-MNIST (Xiao et al. 2017): 60,000 and 10,000 images of shape (28, 28, 1); else as `mnist`."""
    return _images("fashion_mnist", clients, partition, seed, validation_fraction)


def cifar10(
    clients: int = 1000, partition: str = "iid", seed: int = 0, *, validation_fraction: float = 0.1
) -> FederatedData:
    """CIFAR-10 (Krizhevsky 2009): 50,000 and 10,000 images of shape (32, 32, 3); else as `mnist`."""
    return _images("cifar10", clients, partition, seed, validation_fraction)


def _images(name: str, clients: int, partition: str, seed: int, validation_fraction: float) -> FederatedData:
    x, y, held_out = _read(name)
    return from_arrays(
        x,
        y,
        **held_out,
        name=name,
        clients=clients,
        partition=partition,
        num_classes=10,
        validation_fraction=validation_fraction,
        seed=seed,
    )


def _read(name: str) -> tuple[np.ndarray, np.ndarray, HeldOut]:
    """Reads the file of that name where there is one, or lets Keras use its own cache or download."""
    folders = [Path.home() / ".keras" / "datasets"]
    if folder := os.environ.get(DATA_DIR):
        folders.insert(0, Path(folder).expanduser())
    for path in (folder / f"{name}.npz" for folder in folders):
        if path.is_file():
            x, y, _, held_out = read_npz(path)
            return x, y, held_out
    try:
        keras = importlib.import_module("tensorflow").keras  # slow: only where no file is at hand
        (x, y), (x_test, y_test) = getattr(keras.datasets, name).load_data()
    except Exception as error:  # Keras raises a bare Exception when the download fails
        raise InputError(
            f"{name} is not on this machine and Keras could not download it: put {name}.npz (x_train, "
            f"y_train, x_test, y_test) in a folder and set {DATA_DIR} to it."
        ) from error
    return scaled_images(x), y, {"test": (scaled_images(x_test), y_test)}
