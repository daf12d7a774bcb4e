from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from dpfl.data import from_dataframe, from_file


def table() -> pd.DataFrame:
    number = np.arange(80)
    return pd.DataFrame({"who": number % 8, "a": number / 3, "b": np.where(number % 2 == 0, "x", "y"), "y": number % 4})


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet", ".CSV"])
def test_tables_round_trip(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"ratings{suffix}"
    if suffix == ".parquet":
        table().to_parquet(path)
    else:
        table().to_csv(path, sep="\t" if "tsv" in suffix else ",", index=False)
    options: dict[str, Any] = {"standardize": True, "split": "clients", "test_fraction": 0.25, "seed": 4}
    read = from_file(path, client="who", label="y", **options)
    direct = from_dataframe(table(), "who", "y", **options)
    assert read.fingerprint == direct.fingerprint
    assert read.assumptions == direct.assumptions
    assert read.name == "ratings"
    dealt = from_file(str(path), label="y", features=["a"], clients=5, partition="dirichlet:1", name="dealt")
    assert (dealt.num_clients, dealt.example_shape, dealt.name) == (5, (1,), "dealt")


def test_one_person_is_one_client_in_a_long_file(tmp_path: Path) -> None:
    """Read in pieces, pandas would give the ids of a long column two types, and person 7 two clients."""
    path = tmp_path / "long.csv"
    lines = [f"7,{row},{row % 2}" for row in range(300_000)] + [f"eight,{row},{row % 2}" for row in range(100)]
    path.write_text("\n".join(["who,a,y", *lines]))
    data = from_file(path, client="who", label="y", test_fraction=0.01, validation_fraction=0)
    assert data.client_ids == ("7", "eight")


def images(n: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 256, (n, *shape), dtype=np.uint8)


def test_npz_with_client_ids(tmp_path: Path) -> None:
    path = tmp_path / "own.npz"
    x = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    y, ids = np.arange(50) % 2, np.array([f"c{k % 5}" for k in range(50)])
    np.savez(path, x=x, y=y, client_ids=ids, hospital=np.arange(50) % 3)
    data = from_file(path, test_fraction=0.1, validation_fraction=0)
    assert data.client_ids == ("c0", "c1", "c2", "c3", "c4")
    assert (data.num_examples, len(data.x_test)) == (45, 5)
    rows = {row.tobytes(): k for k, row in enumerate(x)}
    for k in range(5):
        for row, label in zip(*data.client(k), strict=True):
            number = rows[row.tobytes()]
            assert (number % 5, number % 2) == (k, label)
    assert from_file(path, client="hospital").client_ids == ("0", "1", "2")


def test_npz_in_the_way_of_keras(tmp_path: Path) -> None:
    path = tmp_path / "pictures.npz"
    x, x_test = images(40, 4, 5), images(10, 4, 5)
    np.savez(path, x_train=x, y_train=np.arange(40)[:, None] % 3, x_test=x_test, y_test=np.arange(10) % 3)
    data = from_file(path, clients=6, validation_fraction=0.25)
    assert data.example_shape == (4, 5, 1)
    assert (data.num_examples, len(data.x_validation), len(data.x_test)) == (30, 10, 10)
    np.testing.assert_array_equal(data.x_test, np.float32(x_test[..., None]) / np.float32(255))
    assert data.x.max() <= 1
    assert sorted(np.r_[data.x, data.x_validation].sum(axis=(1, 2, 3))) == pytest.approx(
        sorted(x.sum(axis=(1, 2)) / 255), rel=1e-4
    )


def test_npz_may_bring_validation_and_coloured_images(tmp_path: Path) -> None:
    path = tmp_path / "colour.npz"
    x, y = images(20, 2, 2, 3), np.arange(20) % 2
    np.savez(path, x=x, y=y, x_test=x[:3], y_test=y[:3], x_validation=x[:2], y_validation=y[:2])
    data = from_file(path, clients=4)
    assert data.example_shape == (2, 2, 3)
    assert (data.num_examples, len(data.x_validation), len(data.x_test)) == (20, 2, 3)


def test_only_uint8_images_are_scaled(tmp_path: Path) -> None:
    path = tmp_path / "series.npz"
    np.savez(path, x=np.full((20, 4, 5), 200.0), y=np.arange(20) % 2)
    data = from_file(path, clients=4)
    assert data.example_shape == (4, 5)
    assert data.x.max() == 200
    np.savez(path, x=images(20, 6), y=np.arange(20) % 2)
    assert from_file(path, clients=4).x.max() > 1


def test_what_is_refused(tmp_path: Path, refuses: Any) -> None:
    with refuses("no file", "none.csv"):
        from_file(tmp_path / "none.csv", client="a", label="b")
    with refuses("no file", "none.npz"):
        from_file(tmp_path / "none.npz", clients=3)
    with refuses("data.xlsx", "unknown suffix", ".parquet"):
        from_file("data.xlsx", label="y")
    with refuses("no file"):
        from_file("~/nobody.csv", label="y")

    csv = tmp_path / "t.csv"
    table().to_csv(csv, index=False)
    with refuses("t.csv", "the label", "'who', 'a', 'b', 'y'"):
        from_file(csv, client="who")
    with refuses("'whom'", "did you mean 'who'"):
        from_file(csv, client="whom", label="y")

    npz = tmp_path / "t.npz"
    np.savez(npz, x=np.zeros((9, 2)), labels=np.arange(9) % 3)
    with refuses("t.npz", "x, labels", "'y' is needed"):
        from_file(npz, clients=3)
    np.savez(npz, x_train=np.zeros((9, 2)), y_train=np.arange(9) % 3, x_test=np.zeros((9, 2)))
    with refuses("t.npz", "'y_test' is needed"):
        from_file(npz, clients=3)
    np.savez(npz, x=np.zeros((9, 2)), y=np.arange(9) % 3, writer=np.arange(9) % 4)
    with refuses("x, y, writer", "'writers' is needed"):
        from_file(npz, client="writers")
    for option in ({"label": "y"}, {"features": ["x"]}, {"standardize": True}):
        with refuses("t.npz", "for tables"):
            from_file(npz, clients=3, **option)  # type: ignore[arg-type]
    np.savez(npz, x=np.zeros((9, 2)), y=np.array([1, "a", None] * 3, dtype=object))
    with refuses("t.npz", "not a valid file", "pickle"):
        from_file(npz, clients=3)


@pytest.mark.parametrize("name", ["bad.npz", "bad.parquet", "bad.csv.gz", "empty.csv"])
def test_damaged_files_are_refused(tmp_path: Path, name: str, refuses: Any) -> None:
    path = tmp_path / name
    path.write_bytes(b"" if name == "empty.csv" else b"this is. not\nthat")
    with refuses(name, "not a valid file"):
        from_file(path, label=None if name.endswith("npz") else "y", clients=2)


def test_insteval(shared_file: Any) -> None:
    data = from_file(shared_file("insteval.csv.gz"), client="s", label="y", features=["dept", "service", "studage"])
    assert data.num_examples + len(data.x_validation) + len(data.x_test) == 73_421
    assert 2_900 < data.num_clients <= 2_972
    assert data.class_names == ("1", "2", "3", "4", "5")
    assert data.example_shape == (3,)


def test_femnist_with_its_writers(shared_file: Any) -> None:
    data = from_file(shared_file("femnist_leaf_writers.npz"), client="u_train", validation_fraction=0)
    assert (data.num_clients, data.num_classes, data.num_examples) == (298, 62, 41_206)
    assert (len(data.x_test), data.example_shape) == (4_730, (28, 28, 1))
    assert data.x.max() == 1
