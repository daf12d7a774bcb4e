import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dpfl.data import FederatedData, cifar10, fashion_mnist, mnist

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
