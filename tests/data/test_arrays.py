from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpfl.data import FederatedData, from_arrays


def numbered(examples: int, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Examples whose one feature is their number."""
    return np.arange(examples, dtype=np.float64)[:, None], np.arange(examples) % classes


def numbers(x: np.ndarray) -> list[int]:
    return x[:, 0].astype(int).tolist()


def all_numbers(data: FederatedData) -> list[int]:
    return sorted(numbers(data.x) + numbers(data.x_validation) + numbers(data.x_test))


@given(
    st.lists(st.sampled_from("abcdefgh"), min_size=24, max_size=60),
    st.sampled_from(["examples", "clients"]),
    st.floats(0.01, 0.3),
    st.floats(0, 0.3),
    st.integers(0, 1000),
)
@settings(deadline=None)
def test_every_example_is_used_once_and_stays_with_its_client(
    tail: list[str], split: Any, test_fraction: float, validation_fraction: float, seed: int
) -> None:
    ids = np.array(list("abcdefghabcdefgh") + tail)
    x, y = numbered(len(ids))
    data = from_arrays(
        x,
        y,
        ids,
        test_fraction=test_fraction,
        validation_fraction=validation_fraction,
        split=split,
        seed=seed,
    )
    assert all_numbers(data) == list(range(len(ids)))
    for k, name in enumerate(data.client_ids):
        client_x, client_y = data.client(k)
        rows = numbers(client_x)
        assert rows == sorted(rows)
        assert set(ids[rows]) == {name}
        np.testing.assert_array_equal(client_y, y[rows])
    np.testing.assert_array_equal(data.y_test, y[numbers(data.x_test)])
    np.testing.assert_array_equal(data.y_validation, y[numbers(data.x_validation)])
    held_out = [set(ids[numbers(part)]) for part in (data.x_test, data.x_validation)]
    units = 8 if split == "clients" else len(ids)
    parts = [len(part) for part in held_out] if split == "clients" else [len(data.x_test), len(data.x_validation)]
    assert parts == [max(1, round(test_fraction * units)), round(validation_fraction * units)]
    if split == "clients":
        assert not (held_out[0] | held_out[1]) & set(data.client_ids)
        assert not held_out[0] & held_out[1]


@pytest.mark.parametrize("partition", [None, "iid", "dirichlet:0.1", "shards:2"])
def test_held_out_examples_do_not_depend_on_the_partition(partition: str | None) -> None:
    x, y = numbered(100)
    data = from_arrays(x, y, clients=10, partition=partition, seed=5)
    reference = from_arrays(x, y, clients=3, seed=5)
    assert numbers(data.x_test) == numbers(reference.x_test)
    assert numbers(data.x_validation) == numbers(reference.x_validation)
    assert (len(data.x_test), len(data.x_validation), data.num_examples) == (20, 10, 70)
    assert all_numbers(data) == list(range(100))
    assert data.client_ids == tuple(map(str, range(10)))
    assert any(repr(partition or "iid") in sentence for sentence in data.assumptions)


def test_seeds() -> None:
    x, y = numbered(100)
    one, again, other = (from_arrays(x, y, clients=10, seed=seed) for seed in (1, 1, 2))
    assert one.fingerprint == again.fingerprint != other.fingerprint
    assert numbers(one.x_test) != numbers(other.x_test)
    dealt, otherwise = (from_arrays(x, y, clients=10, test=(x, y), validation=(x, y), seed=seed) for seed in (1, 2))
    assert numbers(dealt.client(0)[0]) != numbers(otherwise.client(0)[0])


def test_clients_without_training_example_leave_the_population() -> None:
    x, y = numbered(40)
    ids = np.r_[np.zeros(30, int), np.arange(1, 11)]
    data = from_arrays(x, y, ids, test_fraction=0.5, seed=0)
    trained = {str(ids[number]) for number in numbers(data.x)}
    assert set(data.client_ids) == trained
    assert 2 <= data.num_clients < 11


def test_clients_are_in_sorted_order_of_their_ids() -> None:
    x, y = numbered(40)
    data = from_arrays(x, y, np.arange(40) % 4 * 9, validation_fraction=0, seed=0)
    assert data.client_ids == ("0", "9", "18", "27")
    assert len(data.x_validation) == 0


def test_given_held_out_examples_are_used_as_they_are() -> None:
    x, y = numbered(20)
    test, validation = numbered(30), (x[:4] + 100, y[:4])
    data = from_arrays(x, y, np.arange(20) % 2, test=test, validation=validation)
    assert numbers(data.x_test) == list(range(30))
    assert numbers(data.x_validation) == [100, 101, 102, 103]
    assert data.num_examples == 20
    half = from_arrays(x, y, np.arange(20) % 2, test=test, validation_fraction=0.25)
    assert (len(half.x_test), len(half.x_validation), half.num_examples) == (30, 5, 15)


def test_labels() -> None:
    x, _ = numbered(40)
    ids = np.arange(40) % 4
    for dtype in (np.uint8, np.int64, np.uint64):
        data = from_arrays(x, (np.arange(40) % 3 + 1).astype(dtype)[:, None], ids, test=(x, np.ones(40, int)))
        assert data.num_classes == 4
        assert data.class_names == ("0", "1", "2", "3")
        np.testing.assert_array_equal(data.client(1)[1], np.array(numbers(data.client(1)[0])) % 3 + 1)
    named = from_arrays(x, np.array(["dog", "cat"] * 20), ids, test=(x[:1], ["bird"]))
    assert named.class_names == ("bird", "cat", "dog")
    assert named.y_test.tolist() == [0]
    assert set(named.client(0)[1]) == {2}
    assert from_arrays(x, np.arange(40) % 2 == 0, ids).class_names == ("False", "True")
    assert from_arrays(x, np.arange(40) % 2 + 0.5, ids).class_names == ("0.5", "1.5")
    assert from_arrays(x, np.arange(40) % 2, ids, num_classes=5).num_classes == 5


def test_assumptions_say_what_the_guarantee_does_not_cover() -> None:
    x, y = numbered(40)
    ids = np.arange(40) % 4

    def words(**options: Any) -> str:
        return " ".join(from_arrays(x, y, **{"num_classes": 3, "client_ids": ids, **options}).assumptions)

    assert "Held-out examples belong to clients that train" in words()
    assert "Held-out clients never train" in words(split="clients")
    both = words(test=(x, y))
    assert "treated as public" in both
    assert "belong to clients that train" in both
    assert "belong to clients" not in words(test=(x, y), validation=(x, y))
    assert "treated as public" not in words()
    assert "classes are taken from the data" in words(num_classes=None)
    simulated = words(client_ids=None, clients=5, test=(x, y))
    assert "Clients are simulated" in simulated
    assert "public" not in simulated


X, Y = numbered(40)
IDS = np.arange(40) % 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, ["client ids", "number of clients"]),
        ({"client_ids": IDS, "clients": 3}, ["clients and partition", "without client ids"]),
        ({"client_ids": IDS, "partition": "iid"}, ["clients and partition", "without client ids"]),
        ({"clients": 3, "split": "clients"}, ["split='clients'", "client ids"]),
        ({"clients": 3, "split": "rows"}, ["'rows'", "'examples' or 'clients'"]),
        ({"clients": 3, "partition": "random"}, ["'random'", "'iid'"]),
        ({"clients": 29}, ["29 clients", "28 examples"]),
        ({"clients": 1}, ["1 clients", "at least 2"]),
        ({"clients": 3, "seed": -1}, ["it was -1"]),
        ({"clients": 3, "test_fraction": 0}, ["test_fraction is 0", "above 0"]),
        ({"clients": 3, "test_fraction": 0.6, "validation_fraction": 0.4}, ["0.6", "0.4", "sum below 1"]),
        ({"clients": 3, "validation_fraction": -0.1}, ["-0.1"]),
        ({"client_ids": IDS[:-1]}, ["40 examples", "39 client ids"]),
        ({"client_ids": IDS[:, None]}, ["client ids", "(40, 1)"]),
        ({"client_ids": IDS > 5}, ["1 clients", "at least 2"]),
        ({"client_ids": np.where(IDS == 1, np.nan, IDS)}, ["client ids", "missing in 10 rows", "row 1"]),
        ({"client_ids": pd.Series(["a", None] * 20)}, ["client ids", "missing in 20 rows", "row 1"]),
        ({"clients": 3, "y": Y[:-1]}, ["(40, 1)", "(39,)"]),
        ({"clients": 3, "y": np.eye(40)}, ["(40, 40)"]),
        ({"clients": 3, "x": X[:, 0]}, ["(40,)", "feature shape"]),
        ({"clients": 3, "x": X[:0], "y": Y[:0]}, ["(0, 1)", "at least one example"]),
        ({"clients": 3, "test": (X[:3], Y[:2])}, ["arrays (test)", "(3, 1)", "(2,)"]),
        ({"clients": 3, "test": (np.zeros((3, 2)), Y[:3])}, ["test", "(2,)", "(1,)"]),
        ({"clients": 3, "y": Y - 1}, ["label -1", "0 to 1"]),
        ({"clients": 3, "num_classes": 2}, ["label 2", "0 to 1"]),
        ({"clients": 3, "y": np.zeros(40, int)}, ["1 classes", "at least 2"]),
        ({"clients": 3, "y": ["a", "b"] * 20, "num_classes": 3}, ["2 different", "num_classes is 3"]),
        ({"clients": 3, "y": ["a", None] * 20}, ["labels", "missing in 20 rows"]),
        ({"clients": 3, "x": np.where(X == 7, np.nan, X)}, ["nan", "feature 0"]),
    ],
)
def test_what_is_refused(options: dict[str, Any], words: list[str], refuses: Any) -> None:
    with refuses(*words):
        from_arrays(**({"x": X, "y": Y} | options))


def test_measurements_are_no_classes(refuses: Any) -> None:
    x, _ = numbered(500)
    with refuses("500 different", "bin"):
        from_arrays(x, np.linspace(0, 1, 500), clients=5)
