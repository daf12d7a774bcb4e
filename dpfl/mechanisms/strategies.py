"""Banded strategies for correlated noise: which lower-triangular matrix C serves a training run best.

The noise of round t is the t-th row of C^-1 z, with z independent from round to round (Choquette-Choo et al. 2023,
2306.08153). After every round the model holds the workload's row of it, A C^-1 z, where A sums the rounds so far
(and applies the server's momentum). A strategy is good when the mean square of these errors is small, and its
sensitivity is 1 when every column of C has norm 1.

Here a banded matrix is an array of its columns, shape (rounds, bands): `columns[j, k]` is C[j + k, j], and zero where
j + k lies beyond the last round.
"""

from __future__ import annotations

import functools

import numpy as np
from scipy import linalg, optimize, signal

# Up to here all entries are optimised, in seconds; beyond, the first column stands for all others, which costs
# about 3 % in the mean squared error.
LARGEST_OPTIMISED = 1_000
_NORM_TOLERANCE = 1e-9
_FEWEST_ITERATIONS = 60  # what is left after these is 0.3 % of the error in the worst case tried
_ROUNDS_TIMES_ITERATIONS = 60_000
_TOLERANCE = 1e-7  # of the error, relative, in one iteration


@functools.lru_cache(maxsize=64)
def banded_strategy(rounds: int, bands: int, momentum: float = 0.0) -> np.ndarray:
    """The banded matrix with columns of norm 1 under which the models' errors are smallest in the mean square.

    The mean is over the models after each round. Up to `LARGEST_OPTIMISED` rounds the search heads for the global
    optimum: the error is convex in C^T C, which C determines and is determined by, so that there is no other
    stationary point. Beyond, all columns but the last are the same but for their place.

    Mean squared error of prefix sums over 256 rounds, each mechanism at sensitivity 1: independent noise (1 band)
    128.5, 8 bands 20.35, 32 bands 9.146, 256 bands 6.373; tree aggregation 36.04, with Honaker's estimate 21.62.

    Args:
        rounds: the size of the matrix.
        bands: the number of diagonals, the main one included; at least 1.
        momentum: of the server, in [0, 1).

    Returns:
        The columns, shape (rounds, min(bands, rounds)), read-only.

    Raises:
        RuntimeError: a column does not have norm 1, so that the strategy's sensitivity would be wrong.
    """
    bands = min(bands, rounds)
    columns = _of_unit_columns(_inside(np.tile(_toeplitz_coefficients(rounds, bands, momentum), (rounds, 1))))
    if bands > 1 and rounds <= LARGEST_OPTIMISED:
        columns = _optimised(columns, momentum)
    check_unit_columns(columns)
    columns.setflags(write=False)
    return columns


def check_unit_columns(columns: np.ndarray) -> None:
    """Refuses a strategy one of whose columns does not have norm 1.

    Raises:
        RuntimeError: says which column.
    """
    norms = np.linalg.norm(columns, axis=1)
    worst = int(np.argmax(np.abs(norms - 1)))
    if not abs(norms[worst] - 1) <= _NORM_TOLERANCE:
        raise RuntimeError(
            f"column {worst} of the strategy has norm {norms[worst]:.12g} instead of 1: this is an error in dpfl, "
            "please report it."
        )


def as_matrix(columns: np.ndarray) -> np.ndarray:
    """The banded matrix in full, shape (rounds, rounds)."""
    rounds, bands = columns.shape
    return sum((np.diag(columns[: rounds - k, k], -k) for k in range(bands)), np.zeros((rounds, rounds)))


def as_rows(columns: np.ndarray) -> np.ndarray:
    """The rows of a banded matrix, shape (rounds, bands): entry [t, k] is C[t, t - k], zero where t < k."""
    rows = np.zeros_like(columns)
    for k in range(columns.shape[1]):
        rows[k:, k] = columns[: len(columns) - k, k]
    return rows


def workload(rounds: int, momentum: float = 0.0) -> np.ndarray:
    """What an update adds to the model 0, 1, 2, ... rounds later: the first column of A, shape (rounds,).

    Args:
        rounds: the number of rounds.
        momentum: of the server: m <- momentum m + update, model <- model + m.
    """
    return np.cumsum(momentum ** np.arange(rounds))


def mean_squared_error(columns: np.ndarray, momentum: float = 0.0) -> float:
    """Mean over the rounds of the variance of a model's coordinate, for noise z of variance 1.

    Args:
        columns: of the strategy.
        momentum: of the server.
    """
    return float(np.mean(np.sum(np.square(_errors(columns, momentum)[0]), axis=1)))


def _errors(columns: np.ndarray, momentum: float) -> tuple[np.ndarray, np.ndarray]:
    """A C^-1 and C^-1."""
    inverse = linalg.lapack.dtbtrs(columns.T, np.eye(len(columns)), uplo="L")[0]
    # A = 1 / ((1 - z) (1 - momentum z)) as a filter of the rounds.
    return signal.lfilter([1.0], [1.0, -1.0 - momentum, momentum], inverse, axis=0), inverse


def _inside(columns: np.ndarray) -> np.ndarray:
    """The columns without what lies below the last row."""
    rounds, bands = columns.shape
    return np.where(np.add.outer(np.arange(rounds), np.arange(bands)) < rounds, columns, 0.0)


def _of_unit_columns(columns: np.ndarray) -> np.ndarray:
    return columns / np.linalg.norm(columns, axis=1, keepdims=True)


def _toeplitz_coefficients(rounds: int, bands: int, momentum: float) -> np.ndarray:
    """The first column of the best banded Toeplitz matrix, shape (bands,), its first entry 1.

    The error of the model after t + 1 rounds is the sum of the first t + 1 squares of w, the power series
    1 / ((1 - z) (1 - momentum z) c(z)), times the sensitivity, the sum of squares of c.
    """
    weights = 1 - np.arange(rounds) / rounds  # the share of models that the k-th coefficient of w is in
    effect = workload(rounds, momentum)

    def loss(tail: np.ndarray) -> tuple[float, np.ndarray]:
        coefficients = np.concatenate([[1.0], tail])
        error = signal.lfilter([1.0], coefficients, effect)
        weighted = weights * error
        norm, total = coefficients @ coefficients, weighted @ error
        derivative = signal.lfilter([1.0], coefficients, error)  # of the error by c_j, but for the sign and j rounds
        slopes = [weighted[k:] @ derivative[: rounds - k] for k in range(1, bands)]
        gradient = 2 * tail * total - 2 * norm * np.array(slopes)
        return norm * total / start, gradient / start

    # The square root of the prefix sums, 1 / sqrt(1 - z), cut off (Fichtenberger et al. 2022, 2202.11205).
    root = np.cumprod(np.concatenate([[1.0], 1 - 0.5 / np.arange(1, bands)]))
    if bands == 1:
        return root
    start = 1.0
    start = loss(root[1:])[0]
    found = optimize.minimize(loss, root[1:], jac=True, method="L-BFGS-B", options={"ftol": _TOLERANCE})
    return np.concatenate([[1.0], found.x])


def _optimised(columns: np.ndarray, momentum: float) -> np.ndarray:
    """The best strategy near the given one, each column a free direction."""
    rounds, bands = columns.shape
    iterations = max(_FEWEST_ITERATIONS, _ROUNDS_TIMES_ITERATIONS // rounds)
    start = mean_squared_error(columns, momentum) * rounds

    def loss(values: np.ndarray) -> tuple[float, np.ndarray]:
        free = values.reshape(columns.shape)
        norms = np.linalg.norm(free, axis=1, keepdims=True)
        unit = free / norms
        errors, inverse = _errors(unit, momentum)
        # With B = A C^-1 the derivative of |B|^2 by C is -2 B^T B C^-T, of which the bands are needed.
        gram = errors.T @ errors
        gradient = np.zeros_like(unit)
        product = gram @ inverse.T
        for k in range(bands):
            gradient[: rounds - k, k] = -2 * np.diagonal(product, -k)
        # Of the normalised columns by the free ones.
        gradient = (gradient - unit * np.sum(unit * gradient, axis=1, keepdims=True)) / norms
        return float(np.trace(gram)) / start, _inside(gradient).ravel() / start

    found = optimize.minimize(
        loss, columns.ravel(), jac=True, method="L-BFGS-B", options={"maxiter": iterations, "ftol": _TOLERANCE}
    )
    return _of_unit_columns(_inside(found.x.reshape(columns.shape)))
