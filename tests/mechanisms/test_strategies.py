"""Banded strategies: unit columns, and errors that published theorems and independent searches confirm."""

import math

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg, optimize

from dpfl.mechanisms import strategies
from dpfl.mechanisms.strategies import (
    as_matrix,
    as_rows,
    banded_strategy,
    check_unit_columns,
    mean_squared_error,
    workload,
)
from dpfl.simulation.server import ServerOptimizer

SETTINGS = settings(max_examples=25, deadline=None, derandomize=True)


def dense_error(matrix: np.ndarray, momentum: float = 0.0) -> float:
    """The mean squared error by its definition."""
    whole = linalg.toeplitz(workload(len(matrix), momentum), np.zeros(len(matrix)))
    return float(np.sum(np.square(whole @ np.linalg.inv(matrix))) / len(matrix))


def unconstrained_optimum(rounds: int, momentum: float = 0.0) -> float:
    """The least error of any strategy with unit columns, a fixed point (Denisov et al. 2022, 2202.08312)."""
    whole = linalg.toeplitz(workload(rounds, momentum), np.zeros(rounds))
    gram, multipliers = whole.T @ whole, np.ones(rounds)
    for _ in range(3000):
        root = np.sqrt(multipliers)
        values, vectors = np.linalg.eigh(root[:, None] * gram * root)
        product = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
        multipliers = np.diag(product)
    found = product / np.outer(root, root)
    found /= np.sqrt(np.outer(np.diag(found), np.diag(found)))
    return float(np.trace(gram @ np.linalg.inv(found)) / rounds)


class TestShape:
    @SETTINGS
    @given(st.integers(1, 40), st.integers(1, 50), st.sampled_from([0.0, 0.5, 0.9]))
    def test_columns_have_norm_one_and_few_entries(self, rounds, bands, momentum):
        columns = banded_strategy(rounds, bands, momentum)
        matrix = as_matrix(columns)
        assert columns.shape == (rounds, min(bands, rounds))
        np.testing.assert_allclose(np.linalg.norm(matrix, axis=0), 1, atol=1e-12)
        np.testing.assert_array_equal(matrix, np.tril(matrix))
        np.testing.assert_array_equal(np.tril(matrix, -bands), 0)
        assert np.all(np.diag(matrix) > 0)
        rows = as_rows(columns)
        for t in range(rounds):
            for k in range(rows.shape[1]):
                assert rows[t, k] == (matrix[t, t - k] if t >= k else 0)

    def test_one_band_is_the_identity(self):
        np.testing.assert_array_equal(as_matrix(banded_strategy(7, 1, 0.9)), np.eye(7))

    def test_is_the_columns_that_are_normalised_not_the_rows(self):
        matrix = as_matrix(banded_strategy(30, 5))
        assert np.abs(np.linalg.norm(matrix, axis=1) - 1).max() > 0.1

    @pytest.mark.parametrize("factor", [1 + 1e-8, 1 - 1e-8, math.nan])
    def test_wrong_norms_are_refused(self, factor):
        columns = banded_strategy(6, 3).copy()
        columns[4] *= factor
        with pytest.raises(RuntimeError, match="column 4 of the strategy has norm"):
            check_unit_columns(columns)

    def test_is_read_only(self):
        with pytest.raises(ValueError, match="read-only"):
            banded_strategy(6, 3)[0, 0] = 2


class TestError:
    @SETTINGS
    @given(st.integers(1, 25), st.integers(1, 8), st.sampled_from([0.0, 0.9]))
    def test_is_its_definition(self, rounds, bands, momentum):
        columns = banded_strategy(rounds, bands)
        assert mean_squared_error(columns, momentum) == pytest.approx(dense_error(as_matrix(columns), momentum))

    def test_of_independent_noise(self):
        # jax-privacy's tests have 5.0 for 9 rounds and one band (banded_test.py, test_implicit_error): (T + 1) / 2.
        assert mean_squared_error(banded_strategy(9, 1)) == pytest.approx(5.0)

    @pytest.mark.parametrize(("bands", "expected"), [(1, 128.5), (8, 20.35), (32, 9.146), (256, 6.373)])
    def test_over_256_rounds(self, bands, expected):
        # What the documentation of `banded_strategy` states.
        assert mean_squared_error(banded_strategy(256, bands)) == pytest.approx(expected, rel=1e-3)

    def test_workload_is_what_the_server_does(self):
        server = ServerOptimizer(name="momentum", learning_rate=1.0, momentum=0.8)
        numbers = tuple(tf.constant(number, tf.float32) for number in server.numbers())
        weights, state = [tf.zeros(1)], server.initial_state([tf.zeros(1)])
        path = []
        for update in (1.0, 0.0, 0.0, 0.0, 0.0):
            weights, state = server.apply(weights, [tf.constant([update])], state, numbers)
            path.append(float(weights[0][0]))
        np.testing.assert_allclose(workload(5, 0.8), path, rtol=1e-6)


class TestOptimum:
    def test_of_two_rounds_in_closed_form(self):
        # C = [[cos a, 0], [sin a, 1]]: the least of ((1 + (1 - sin a)^2) / cos(a)^2 + 1) / 2 is (3 + sqrt(5)) / 4.
        assert mean_squared_error(banded_strategy(2, 2)) == pytest.approx((3 + math.sqrt(5)) / 4, rel=1e-6)

    @pytest.mark.parametrize("rounds", [2, 3, 8, 32])
    @pytest.mark.parametrize("momentum", [0.0, 0.9])
    def test_with_all_bands_is_that_of_all_strategies(self, rounds, momentum):
        found = mean_squared_error(banded_strategy(rounds, rounds, momentum), momentum)
        assert found == pytest.approx(unconstrained_optimum(rounds, momentum), rel=1e-5)

    @pytest.mark.parametrize(("rounds", "bands", "momentum"), [(6, 2, 0.0), (6, 3, 0.0), (7, 3, 0.9)])
    def test_with_few_bands_is_an_independent_searchs(self, rounds, bands, momentum):
        lower = [(i, j) for i in range(rounds) for j in range(i + 1) if i - j < bands]
        places = tuple(np.transpose(lower))

        def loss(values):
            matrix = np.zeros((rounds, rounds))
            matrix[places] = values
            return dense_error(matrix / np.linalg.norm(matrix, axis=0), momentum)

        numbers = np.random.default_rng(0)
        best = min(
            optimize.minimize(
                loss, [1.0 if i == j else numbers.normal() * 0.3 for i, j in lower], options={"gtol": 1e-7}
            ).fun
            for _ in range(3)
        )
        assert mean_squared_error(banded_strategy(rounds, bands, momentum), momentum) == pytest.approx(best, rel=1e-5)

    @pytest.mark.parametrize("rounds", [16, 256])
    def test_lies_between_published_bounds(self, rounds):
        # Of the root mean square for prefix sums: Henzinger, Upadhyay and Upadhyay 2023 (2211.05006) from below,
        # Fichtenberger, Henzinger and Upadhyay 2022 (2202.11205) from above.
        least = (2 + math.log((2 * rounds + 1) / 5) + math.log(2 * rounds + 1) / (2 * rounds)) / math.pi
        most = 1 + math.log(4 * rounds / 5) / math.pi
        assert least**2 <= mean_squared_error(banded_strategy(rounds, rounds)) <= most**2

    def test_more_bands_never_hurt(self):
        errors = [mean_squared_error(banded_strategy(60, bands)) for bands in range(1, 61)]
        assert np.all(np.diff(errors) <= 1e-4 * np.array(errors[:-1]))

    def test_is_for_its_own_momentum(self):
        for momentum, other in ((0.0, 0.9), (0.9, 0.0)):
            own = mean_squared_error(banded_strategy(50, 8, momentum), momentum)
            assert own < mean_squared_error(banded_strategy(50, 8, other), momentum)


class TestLongRuns:
    @pytest.mark.parametrize(("bands", "momentum"), [(4, 0.0), (32, 0.0), (32, 0.9)])
    def test_one_column_for_all_costs_little(self, monkeypatch, bands, momentum):
        best = mean_squared_error(banded_strategy(300, bands, momentum), momentum)
        monkeypatch.setattr(strategies, "LARGEST_OPTIMISED", 100)
        simple = mean_squared_error(banded_strategy.__wrapped__(300, bands, momentum), momentum)
        assert best < simple < 1.05 * best

    @pytest.mark.parametrize("momentum", [0.0, 0.9, 0.99])
    def test_ten_thousand_rounds(self, momentum):
        columns = banded_strategy(10_000, 64, momentum)
        check_unit_columns(columns)
        # All columns but the last are the same, and more bands are better.
        np.testing.assert_allclose(columns[: 10_000 - 63], np.broadcast_to(columns[0], (10_000 - 63, 64)), rtol=1e-12)
        assert columns[0, 0] > columns[0, 1] > 0
