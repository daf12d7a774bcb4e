import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dpfl.data import FederatedData, cifar10, fashion_mnist, femnist, load, mnist

SHAPES = {"mnist": (28, 28), "fashion_mnist": (28, 28), "cifar10": (32, 32, 3)}
LOADERS = [mnist, fashion_mnist, cifar10]


def arrays(name: str, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)

    def images(n: int) -> np.ndarray:
        return rng.integers(0, 256, (n, *SHAPES[name]), dtype=np.uint8)

    y, y_test = (np.arange(n, dtype=np.uint8) % 10 for n in (60, 20))
    if name == "cifar10":
        y, y_test = y[:, None], y_test[:, None]
    return {"x_train": images(60), "y_train": y, "x_test": images(20), "y_test": y_test}


@pytest.fixture(autouse=True)
def nothing_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DPFL_DATA_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    fake(monkeypatch, lambda: (_ for _ in ()).throw(Exception("URL fetch failure.\nNo name. Sorry")))


def fake(monkeypatch: pytest.MonkeyPatch, load_data: Callable[[], Any]) -> None:
    """Puts a TensorFlow in place whose Keras does nothing but this."""
    tensorflow = ModuleType("tensorflow")
    source = SimpleNamespace(load_data=load_data)
    tensorflow.keras = SimpleNamespace(  # type: ignore[attr-defined]
        datasets=SimpleNamespace(mnist=source, fashion_mnist=source, cifar10=source)
    )
    monkeypatch.setitem(sys.modules, "tensorflow", tensorflow)


def check(data: FederatedData, name: str, content: dict[str, np.ndarray]) -> None:
    shape = SHAPES[name] if name == "cifar10" else (*SHAPES[name], 1)
    assert (data.name, data.example_shape, data.num_classes) == (name, shape, 10)
    assert (data.num_clients, data.num_examples, len(data.x_validation)) == (9, 54, 6)
    np.testing.assert_array_equal(
        data.x_test, content["x_test"].reshape(-1, *shape).astype(np.float32) / np.float32(255)
    )
    assert [sentence.split(":")[0] for sentence in data.assumptions] == ["Clients are simulated by the partition 'iid'"]
    np.testing.assert_array_equal(data.y_test, content["y_test"].ravel())


@pytest.mark.parametrize("loader", LOADERS)
def test_from_the_folder_or_the_cache_or_keras(
    loader: Callable[..., FederatedData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = loader.__name__
    downloaded, cached, given = (arrays(name, seed) for seed in range(3))
    fake(
        monkeypatch,
        lambda: (
            (downloaded["x_train"], downloaded["y_train"]),
            (downloaded["x_test"], downloaded["y_test"]),
        ),
    )
    check(loader(9), name, downloaded)
    cache = tmp_path / "home" / ".keras" / "datasets"
    cache.mkdir(parents=True)
    np.savez(cache / f"{name}.npz", **cached)
    check(loader(9), name, cached)
    np.savez(tmp_path / f"{name}.npz", **given)
    monkeypatch.setenv("DPFL_DATA_DIR", str(tmp_path))
    check(loader(9), name, given)


def test_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuses: Any) -> None:
    np.savez(tmp_path / "mnist.npz", **arrays("mnist"))
    monkeypatch.setenv("DPFL_DATA_DIR", str(tmp_path))
    iid, skewed = mnist(6, seed=1), mnist(6, "shards:1", seed=1, validation_fraction=0)
    assert (iid.num_examples, skewed.num_examples) == (54, 60)
    classes = [len(set(skewed.client(k)[1])) for k in range(6)]
    assert max(classes) <= 3
    with refuses("1000 clients", "54 examples"):
        mnist()


@pytest.mark.parametrize("loader", LOADERS)
def test_offline_the_sentence_names_the_variable(loader: Callable[..., FederatedData], refuses: Any) -> None:
    with refuses(loader.__name__, "DPFL_DATA_DIR", f"{loader.__name__}.npz"):
        loader()


def test_a_damaged_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuses: Any) -> None:
    (tmp_path / "mnist.npz").write_text("no")
    monkeypatch.setenv("DPFL_DATA_DIR", str(tmp_path))
    with refuses(str(tmp_path / "mnist.npz"), "not a valid file"):
        mnist()


def test_the_real_mnist(shared_file: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPFL_DATA_DIR", str(shared_file("mnist.npz").parent))
    data = mnist(clients=100, partition="shards:2")
    assert (data.num_examples, len(data.x_validation), len(data.x_test)) == (54_000, 6_000, 10_000)
    assert (float(data.x.min()), float(data.x.max())) == (0, 1)
    assert np.bincount(data.y_test).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


def written(seed: int = 0) -> dict[str, np.ndarray]:
    """What six writers wrote on paper: 5, 6, ... 10 training examples and 2 test examples each."""
    rng = np.random.default_rng(seed)
    writers = np.repeat(np.arange(6, dtype=np.int16), np.arange(5, 11))
    shuffled = rng.permutation(len(writers))
    x, x_test = (rng.integers(0, 256, (n, 28, 28), dtype=np.uint8) for n in (len(writers), 12))
    y, y_test = (rng.integers(0, 62, n).astype(np.uint8) for n in (len(writers), 12))
    return {"x_train": x, "y_train": y, "u_train": writers[shuffled], "x_test": x_test, "y_test": y_test}


def test_writers_are_the_clients_of_femnist(tmp_path: Path) -> None:
    content = written()
    np.savez(tmp_path / "mine.npz", **content)
    data = femnist(tmp_path / "mine.npz", validation_fraction=0)
    assert (data.name, data.num_clients, data.num_classes) == ("femnist", 6, 62)
    assert data.client_sizes.tolist() == [5, 6, 7, 8, 9, 10]
    for writer in range(6):
        x, y = data.client(writer)
        rows = content["u_train"] == writer
        # Paper is 0, ink 1.
        np.testing.assert_allclose(x, 1 - content["x_train"][rows][..., None] / 255, atol=1e-7)
        np.testing.assert_array_equal(y, content["y_train"][rows])
    np.testing.assert_allclose(data.x_test, 1 - content["x_test"][..., None] / 255, atol=1e-7)
    np.testing.assert_array_equal(data.y_test, content["y_test"])
    assert [data.class_names[label] for label in (0, 10, 36, 61)] == ["0", "A", "a", "z"]
    (sentence,) = data.assumptions
    assert "belong to clients that train" in sentence


def test_femnist_from_the_folder_or_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "home" / ".keras" / "datasets"
    cache.mkdir(parents=True)
    np.savez(cache / "femnist_leaf_writers.npz", **written(1))
    cached = load("femnist", seed=3)
    assert (cached.num_examples, len(cached.x_validation), len(cached.x_test)) == (41, 4, 12)
    np.savez(tmp_path / "femnist_leaf_writers.npz", **written(2))
    monkeypatch.setenv("DPFL_DATA_DIR", str(tmp_path))
    found = femnist(tmp_path / "femnist_leaf_writers.npz", 3)
    assert load("femnist", seed=3).fingerprint == found.fingerprint != cached.fingerprint
    assert load("femnist").fingerprint != found.fingerprint  # another seed holds out others


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x_train": np.zeros((45, 28, 28))}, ["uint8", "(examples, 28, 28)"]),
        ({"x_train": np.full((45, 28, 28, 1), 255.0)}, ["uint8"]),
        ({"x_test": np.zeros((12, 32, 32), np.uint8)}, ["uint8", "(examples, 28, 28)"]),
        ({"x_test": None}, ["no x_test and y_test"]),
        ({"y_test": None}, ["'y_test' is needed"]),
        ({"u_train": None}, ["'u_train' is needed"]),
        ({"u_train": np.zeros(3, np.int16)}, ["45 examples but 3 client ids"]),
        ({"y_train": np.full(45, 62)}, ["62", "from 0 to 61"]),
    ],
)
def test_a_file_of_something_else_is_no_femnist(
    change: dict[str, Any], words: list[str], tmp_path: Path, refuses: Any
) -> None:
    content = {name: array for name, array in {**written(), **change}.items() if array is not None}
    np.savez(tmp_path / "other.npz", **content)
    with refuses(*words):
        femnist(tmp_path / "other.npz")


def test_without_femnist_the_sentence_names_the_variable(tmp_path: Path, refuses: Any) -> None:
    with refuses("femnist_leaf_writers.npz", "DPFL_DATA_DIR", "u_train"):
        femnist()
    with refuses("no file", "nowhere.npz"):
        femnist(tmp_path / "nowhere.npz")


def test_the_real_femnist(shared_file: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPFL_DATA_DIR", str(shared_file("femnist_leaf_writers.npz").parent))
    data = femnist()
    assert (data.num_clients, data.num_classes, data.num_examples) == (298, 62, 37_085)
    assert (len(data.x_validation), len(data.x_test)) == (4_121, 4_730)
    # Little of a page is ink, and its corner none.
    assert 0.03 < data.x.mean() < 0.05
    assert np.median(data.x[:, 0, 0]) == 0
