import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from dpfl.data import digits, synthetic


def test_digits_are_scikit_learns_each_used_once() -> None:
    data = digits()
    assert (data.num_clients, data.num_examples, len(data.x_validation), len(data.x_test)) == (300, 1247, 250, 300)
    assert (data.example_shape, data.num_classes) == ((8, 8, 1), 10)
    pixels, labels = load_digits(return_X_y=True)
    expected = sorted((*row, label) for row, label in zip(pixels.tolist(), labels.tolist(), strict=True))
    x = np.concatenate([data.x, data.x_validation, data.x_test]).reshape(-1, 64) * 16
    y = np.concatenate([data.y, data.y_validation, data.y_test])
    assert sorted((*row, label) for row, label in zip(x.tolist(), y.tolist(), strict=True)) == expected
    for held_out in (data.y_validation, data.y_test):
        shares = np.bincount(labels) / len(labels) * len(held_out)
        assert np.abs(np.bincount(held_out) - shares).max() <= 1


def test_digits_options() -> None:
    iid, skewed, other = digits(), digits(50, "dirichlet:0.1"), digits(seed=1)
    np.testing.assert_array_equal(iid.x_test, skewed.x_test)
    assert (iid.x_test != other.x_test).any()
    assert skewed.num_clients == 50
    assert digits().fingerprint == iid.fingerprint
    assert set(skewed.client_sizes) == {24, 25}
    assert any("'dirichlet:0.1'" in sentence for sentence in skewed.assumptions)


def test_digits_refuses_more_clients_than_examples(refuses: Any) -> None:
    with refuses("1248 clients", "1247 examples"):
        digits(1248)


def test_importing_and_digits_need_no_tensorflow() -> None:
    code = (
        "import sys, dpfl.data\n"
        "heavy = {'tensorflow', 'keras', 'pandas', 'sklearn', 'pyarrow', 'scipy'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "dpfl.data.digits(); dpfl.data.synthetic()\n"
        "assert not {'tensorflow', 'keras'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_synthetic_sizes() -> None:
    data = synthetic(clients=20, examples_per_client=7, test_fraction=0.5, validation_fraction=0.25)
    assert set(data.client_sizes) == {7}
    assert (data.num_clients, len(data.x_test), len(data.x_validation)) == (20, 70, 35)
    tail = synthetic(clients=400, max_examples_per_client=1000, seed=1).client_sizes
    assert (tail.min(), tail.max()) == (pytest.approx(50, abs=3), 1000)
    logs = np.log(tail[(tail > 60) & (tail < 1000)] - 50.0)
    assert np.median(tail) == pytest.approx(50 + np.exp(4), rel=0.25)
    assert logs.max() - logs.min() > 4
    assert synthetic(clients=60).client_sizes.max() > 1000
    assert len(synthetic(clients=3, examples_per_client=1, test_fraction=0, validation_fraction=0).x_test) == 1


def test_synthetic_is_seeded() -> None:
    one, again, other = (synthetic(clients=5, examples_per_client=9, seed=seed) for seed in (1, 1, 2))
    assert one.fingerprint == again.fingerprint != other.fingerprint


def test_synthetic_features_follow_the_law() -> None:
    """Beta is a standard deviation; v_k has variance 1 around B_k; Sigma_jj = j^-1.2."""
    data = synthetic(0, 3, clients=3000, examples_per_client=20)
    clients = data.x.reshape(3000, 20, 60)
    v = clients.mean(axis=1)
    noise = np.arange(1, 61) ** -1.2
    np.testing.assert_allclose(clients.var(axis=1, ddof=1).mean(axis=0), noise, rtol=0.05)
    assert v.mean(axis=1).std() == pytest.approx(3, rel=0.05)
    np.testing.assert_allclose(v.var(axis=1, ddof=1).mean(), 1 + noise.mean() / 20, rtol=0.02)
    assert synthetic(0, 0, clients=3000, examples_per_client=1).x.mean() == pytest.approx(0, abs=0.01)


def test_synthetic_iid_has_one_model_for_all_and_the_other_one_each() -> None:
    def accuracy(**options: Any) -> float:
        data = synthetic(clients=1000, examples_per_client=5, seed=3, **options)
        model = LogisticRegression(max_iter=1000).fit(data.x, data.y)
        return float(model.score(data.x_test, data.y_test))

    assert accuracy(iid=True) > 0.85
    assert accuracy(beta=0) < 0.4
    data = synthetic(clients=200, examples_per_client=50, iid=True)
    np.testing.assert_allclose(data.x.var(axis=0), np.arange(1, 61) ** -1.2, rtol=0.1)
    np.testing.assert_allclose(data.x.mean(axis=0), 0, atol=0.05)
    assert data.name == "synthetic-iid"


def test_held_out_examples_are_labelled_by_the_model_of_their_client() -> None:
    """With one client and a far-away second, a linear model of the training examples must fit the test ones."""
    data = synthetic(0, 100, clients=2, examples_per_client=2000, seed=1)
    model = LogisticRegression(max_iter=500).fit(data.x, data.y)
    assert model.score(data.x_test, data.y_test) > 0.95
    sides = [(part.mean(axis=1) > data.x.mean()).mean() for part in (data.x_test, data.x_validation)]
    assert sides == pytest.approx([0.5, 0.5], abs=0.1)  # both hold examples of both clients


def test_alpha_changes_no_label() -> None:
    """u_k shifts the logits of all classes alike; float32 rounding may flip a few."""
    none, much = (synthetic(alpha, 1, clients=50, examples_per_client=100) for alpha in (0, 3))
    np.testing.assert_array_equal(none.x, much.x)
    assert (none.y == much.y).mean() > 0.999


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alpha": -1}, ["alpha is -1"]),
        ({"beta": np.nan}, ["beta nan"]),
        ({"clients": 0}, ["clients is 0", "at least 1"]),
        ({"clients": 1}, ["1 clients", "at least 2"]),
        ({"examples_per_client": 0}, ["examples_per_client 0"]),
        ({"max_examples_per_client": 0}, ["max_examples_per_client 0"]),
        ({"examples_per_client": 5, "max_examples_per_client": 9}, ["examples_per_client fixes"]),
        ({"test_fraction": -0.1}, ["test_fraction -0.1"]),
        ({"seed": -3}, ["it was -3"]),
    ],
)
def test_synthetic_refusals(options: dict[str, Any], words: list[str], refuses: Any) -> None:
    with refuses(*words):
        synthetic(**options)
