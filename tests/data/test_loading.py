from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from dpfl.data import digits, from_file, load, synthetic


def test_names() -> None:
    assert load("digits").fingerprint == digits().fingerprint
    assert load("digits", clients=20, partition="shards:2", seed=3).fingerprint == (
        digits(20, "shards:2", 3).fingerprint
    )
    options: dict[str, Any] = {"alpha": 0.5, "beta": 0.5, "examples_per_client": 5}
    assert load("synthetic", clients=8, **options).fingerprint == synthetic(clients=8, **options).fingerprint


def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = pd.DataFrame({"who": np.arange(60) % 6, "a": np.arange(60), "b": 1, "y": np.arange(60) % 2})
    path = tmp_path / "t.csv"
    frame.to_csv(path, index=False)
    options: dict[str, Any] = {"client": "who", "label": "y", "features": ["a"], "split": "clients", "seed": 2}
    assert load(path, **options).fingerprint == from_file(path, **options).fingerprint
    assert load(str(path), label="y", clients=4, partition="iid", standardize=True).num_clients == 4
    monkeypatch.chdir(tmp_path)
    assert load("t.csv", client="who", label="y").name == "t"


def test_mnist_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = np.zeros((30, 28, 28), np.uint8), np.arange(30) % 10
    np.savez(tmp_path / "mnist.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    monkeypatch.setenv("DPFL_DATA_DIR", str(tmp_path))
    assert load("mnist", clients=5, validation_fraction=0).num_examples == 30


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        ("digits", {"client": "s"}, ["'digits'", "'client'", "did you mean 'clients'?"]),
        ("digits", {"label": "y"}, ["'label'"]),
        ("digits", {"features": ["a"]}, ["'features'"]),
        ("digits", {"alpha": 1}, ["'alpha'"]),
        ("synthetic", {"partition": "iid"}, ["'synthetic'", "'partition'", "'alpha', 'beta'"]),
        ("mnist", {"client": "s"}, ["'mnist'", "'client'"]),
        ("t.csv", {"alpha": 1}, ["'t.csv'", "'alpha'", "valid are 'client', 'label'"]),
        ("t.csv", {"path": "u.csv"}, ["'t.csv'", "'path'"]),
        ("digit", {}, ["'digit'", "did you mean 'digits'"]),
        ("MNIST", {}, ["'MNIST'", "'digits'", "'cifar10'", ".csv"]),
        ("fashion-mnist", {}, ["did you mean 'fashion_mnist'"]),
        ("nowhere/t.csv", {"label": "y"}, ["no file nowhere/t.csv"]),
        ("data.txt", {}, ["'data.txt'", ".parquet"]),
    ],
)
def test_what_is_refused(source: str, options: dict[str, Any], words: list[str], refuses: Any) -> None:
    with refuses(*words):
        load(source, **options)


def test_none_is_not_given() -> None:
    data = load("digits", clients=None, partition=None, client=None, label=None, features=None, alpha=None)
    assert data.fingerprint == digits().fingerprint
