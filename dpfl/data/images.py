"""Images: MNIST, Fashion-MNIST and CIFAR-10 dealt to simulated clients, and FEMNIST with the writers as clients."""

from __future__ import annotations

import dataclasses
import importlib
import os
import string
from pathlib import Path

import numpy as np

from dpfl.data.arrays import HELD_OUT, from_arrays
from dpfl.data.federated_data import FederatedData
from dpfl.data.files import HeldOut, read_npz, scaled_images
from dpfl.errors import InputError

DATA_DIR = "DPFL_DATA_DIR"
"""Environment variable that names the folder of mnist.npz, fashion_mnist.npz, cifar10.npz and FEMNIST's file."""
_FEMNIST_FILE = "femnist_leaf_writers.npz"
_FEMNIST_CLASSES = string.digits + string.ascii_uppercase + string.ascii_lowercase


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


def femnist(path: str | Path | None = None, seed: int = 0, *, validation_fraction: float = 0.1) -> FederatedData:
    """FEMNIST (Caldas et al. 2018, 1812.01097): handwritten digits and letters, 62 classes, a client for each writer.

    The test examples are those that the file sets aside of each writer. Pixels are turned into 1 - pixel / 255: ink is
    1 and paper 0, as in MNIST, so that paper adds nothing to a gradient.

    Args:
        path: An .npz with LEAF's split: `x_train` and `x_test`, uint8 (examples, 28, 28), paper 255; their classes
            `y_train` and `y_test` from 0 to 61 (0-9, A-Z, a-z); `u_train`, the number of the writer. None for the file
            femnist_leaf_writers.npz in the folder that the environment variable DPFL_DATA_DIR names, else in Keras'
            cache.
        seed: Seed of the validation split.
        validation_fraction: Share of the training examples set aside for validation; may be 0. A writer whose
            examples are all set aside is no client.

    Raises:
        InputError: The file is not there or holds something else, or an option is not valid.
    """
    path = _file(_FEMNIST_FILE) if path is None else Path(path).expanduser()
    if path is None:
        raise InputError(
            f"femnist is not on this machine: put {_FEMNIST_FILE} (x_train, y_train, u_train, x_test, y_test) in a "
            f"folder and set {DATA_DIR} to it, or give its path."
        )
    x, y, writers, held_out = read_npz(path, "u_train")
    if "test" not in held_out:
        raise InputError(f"{path} holds no x_test and y_test: FEMNIST needs the examples that its writers set aside.")
    x_test, y_test = held_out["test"]
    data = from_arrays(
        _ink(x, path),
        y,
        writers,
        name="femnist",
        test=(_ink(x_test, path), y_test),
        num_classes=len(_FEMNIST_CLASSES),
        validation_fraction=validation_fraction,
        seed=seed,
    )
    # That the writers of the test examples train is more than `from_arrays` can know.
    return dataclasses.replace(data, class_names=tuple(_FEMNIST_CLASSES), assumptions=(HELD_OUT["examples"],))


def _ink(images: np.ndarray, path: Path) -> np.ndarray:
    """Turns images whose paper is 1, as they are read, into ones whose ink is 1."""
    if images.shape[1:] != (28, 28, 1) or not ((images >= 0) & (images <= 1)).all():
        raise InputError(f"{path} has no images of FEMNIST: they must be of type uint8 and shape (examples, 28, 28).")
    return 1 - images


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
    if (path := _file(f"{name}.npz")) is not None:
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


def _file(name: str) -> Path | None:
    """Finds a file in the folder that DPFL_DATA_DIR names, or in Keras' cache."""
    folders = [Path.home() / ".keras" / "datasets"]
    if folder := os.environ.get(DATA_DIR):
        folders.insert(0, Path(folder).expanduser())
    return next((folder / name for folder in folders if (folder / name).is_file()), None)
