import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dpfl.data import FederatedData


def make(**changes: Any) -> FederatedData:
    """Three clients with 2, 1 and 3 examples of shape (2, 2)."""
    fields: dict[str, Any] = {
        "name": "tiny",
        "x": np.arange(24, dtype=np.float64).reshape(6, 2, 2),
        "y": np.array([0, 1, 2, 0, 1, 2]),
        "offsets": np.array([0, 2, 3, 6]),
        "x_validation": np.empty((0, 2, 2)),
        "y_validation": np.empty(0),
        "x_test": np.ones((2, 2, 2)),
        "y_test": np.array([2, 0]),
        "num_classes": 3,
        "client_ids": ("a", "b", "c"),
        "class_names": ("x", "y", "z"),
    }
    return FederatedData(**(fields | changes))


def test_types_and_sizes() -> None:
    data = make()
    assert (data.x.dtype, data.y.dtype, data.offsets.dtype) == (np.float32, np.int32, np.int64)
    assert (data.x_test.dtype, data.y_test.dtype) == (np.float32, np.int32)
    assert (data.num_clients, data.num_examples, data.example_shape) == (3, 6, (2, 2))
    assert data.client_sizes.tolist() == [2, 1, 3]
    assert data.x_validation.shape == (0, 2, 2)


def test_client_is_a_view_of_its_rows() -> None:
    data = make()
    x, y = data.client(2)
    assert y.tolist() == [0, 1, 2]
    np.testing.assert_array_equal(x, np.arange(12, 24).reshape(3, 2, 2))
    assert np.shares_memory(x, data.x)


@pytest.mark.parametrize("k", [-1, 3])
def test_there_is_no_other_client(k: int, refuses: Any) -> None:
    with refuses(f"no client {k}", "0 to 2"):
        make().client(k)


def test_any_empty_validation_set_is_taken() -> None:
    assert make(x_validation=[], y_validation=[]).x_validation.shape == (0, 2, 2)


def test_summary_says_what_a_person_asks() -> None:
    line = make().summary()
    assert "\n" not in line
    for word in ("tiny", "3 clients", "1 to 3", "6 training", "0 validation", "2 test", "3 classes", "(2, 2)"):
        assert word in line
    assert line in repr(make())


@pytest.mark.parametrize("field", ["x", "y", "offsets", "x_test", "y_test", "x_validation", "y_validation"])
def test_arrays_stay_read_only_through_pickle(field: str) -> None:
    data = make(x_validation=np.ones((1, 2, 2)), y_validation=[1])
    for version in (data, pickle.loads(pickle.dumps(data))):
        with pytest.raises(ValueError, match="read-only"):
            getattr(version, field)[0] = 1
        with pytest.raises(AttributeError):
            setattr(version, field, None)


def test_pickle_keeps_everything() -> None:
    data = make(assumptions=("Something is public.",))
    again = pickle.loads(pickle.dumps(data))
    assert again.fingerprint == data.fingerprint
    assert (again.summary(), again.client_ids, again.assumptions) == (
        data.summary(),
        data.client_ids,
        data.assumptions,
    )


def test_fingerprint_is_of_the_content_and_not_of_names() -> None:
    data = make()
    assert len(data.fingerprint) == 64
    renamed = replace(data, name="other", client_ids=("k", "l", "m"), class_names=("1", "2", "3"), assumptions=("A.",))
    assert renamed.fingerprint == data.fingerprint == make().fingerprint
    x = data.x.copy()
    x[0, 0, 0] = 0.5
    changes: list[dict[str, Any]] = [
        {"x": x},
        {"y": [0, 1, 2, 0, 2, 1]},
        {"offsets": [0, 1, 3, 6]},
        {"x_test": np.zeros((2, 2, 2))},
        {"y_test": [0, 2]},
        {"x_validation": np.ones((1, 2, 2)), "y_validation": [1]},
        {"num_classes": 4, "class_names": ("a", "b", "c", "d")},
        {
            "x": np.arange(24).reshape(6, 4),
            "x_test": np.ones((2, 4)),
            "x_validation": [],
        },  # the same bytes in another shape
    ]
    fingerprints = {make(**change).fingerprint for change in changes} | {data.fingerprint}
    assert len(fingerprints) == len(changes) + 1


def _with(value: float) -> np.ndarray:
    x = np.zeros((6, 2, 2))
    x[4, 1, 0] = value
    x[5] = np.nan
    return x


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": _with(np.nan)}, ["training example 4", "nan", "feature 1, 0"]),
        ({"x": _with(-np.inf)}, ["training example 4", "-inf"]),
        ({"x": _with(1e300)}, ["training example 4", "inf"]),
        ({"x_test": np.full((2, 2, 2), np.nan)}, ["test example 0", "nan"]),
        ({"x": np.full((6, 2, 2), "a")}, ["training features", "not all numbers"]),
        ({"x": np.zeros(6)}, ["(6,)", "feature"]),
        ({"x": np.zeros((6, 3))}, ["test", "(2, 2)", "(3,)"]),
        ({"x": np.zeros((5, 2, 2))}, ["training labels", "(6,)", "(5,)"]),
        ({"y": [0, 1, 2, 0, 1, 3]}, ["training label 3", "row 5", "0 to 2"]),
        ({"y": [0, -1, 2, 0, 1, 2]}, ["training label -1", "row 1"]),
        ({"y": [0.0, 1, 2, 0, 1, 2]}, ["training labels", "float64", "integers"]),
        ({"y_test": [2, 9]}, ["test label 9", "row 1"]),
        ({"y_test": [2]}, ["test labels", "(1,)", "(2,)"]),
        ({"x_test": [], "y_test": []}, ["no test example"]),
        ({"offsets": [0, 2, 2, 6]}, ["'b'", "no training example"]),
        ({"offsets": [0, 4, 3, 6]}, ["'b'", "no training example"]),
        ({"offsets": [0, 2, 3, 5]}, ["end at 5", "6 training"]),
        ({"offsets": [1, 2, 3, 6]}, ["offsets", "starts at 0"]),
        ({"offsets": [0.0, 2, 3, 6]}, ["offsets", "integers"]),
        ({"offsets": [0, 6], "client_ids": ("a",)}, ["1 clients", "at least 2"]),
        ({"offsets": [0, 2, 6]}, ["2 clients", "3 different client_ids"]),
        ({"client_ids": ("a", "b", "a")}, ["3 clients", "2 different client_ids"]),
        ({"num_classes": 1, "class_names": ("x",)}, ["1 classes", "at least 2"]),
        ({"class_names": ("x",)}, ["1 class names", "3 classes"]),
    ],
)
def test_what_is_refused(changes: dict[str, Any], words: list[str], refuses: Any) -> None:
    with refuses("tiny", *words):
        make(**changes)
