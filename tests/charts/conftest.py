"""A study's frame as it would come out: a ceiling, a price of privacy, a best clip, seeds and accidents."""

from collections.abc import Callable
from itertools import product

import numpy as np
import pandas as pd
import pytest

NAN = float("nan")


def _accuracy(epsilon: float, clip: float, rounds: int) -> float:
    reached = 0.955 - 0.12 * (10 / rounds) ** 0.8
    if np.isnan(clip):
        return reached
    best = 0.5 if np.isnan(epsilon) else 0.25 * epsilon**0.3
    cost = 0.012 * np.log2(clip / (1.5 if np.isnan(epsilon) else best)) ** 2
    noise = 0 if np.isnan(epsilon) else 0.055 * (rounds / 30) ** 0.5 / epsilon**0.9
    return 0.1 + (reached - 0.1) * np.exp(-cost - noise)


def make_runs(
    epsilons: tuple[float, ...] = (0.5, 1, 2, 4, 8, NAN),
    clips: tuple[float, ...] = (0.1, 0.25, 0.5, 1, 2),
    rounds: tuple[int, ...] = (10, 30, 100, 300),
    seeds: int = 3,
    plain: bool = True,
    delta: float = 1e-3,
) -> pd.DataFrame:
    """Return runs at every point of the grid, and plain ones at every number of rounds."""
    rng = np.random.default_rng(7)
    cells = [("gaussian", *cell) for cell in product(epsilons, clips, rounds)]
    cells += [("none", NAN, NAN, count) for count in rounds] if plain else []
    rows = []
    for (mechanism, epsilon, clip, count), seed in product(cells, range(seeds)):
        spread = 0.004 if np.isnan(epsilon) else 0.004 + 0.012 / epsilon**0.7
        truth = _accuracy(epsilon, clip, count) - (0.02 if delta < 1e-3 and mechanism == "gaussian" else 0)
        accuracy, validation = np.clip(truth + spread * rng.normal(size=2), 0, 1)
        private = not np.isnan(epsilon)
        rows.append(
            {
                "status": "finished",
                "dataset": "digits",
                "clients": 300,
                "model": "softmax",
                "mechanism": mechanism,
                "unit": "user" if private else None,
                "relation": "add_or_remove_one" if private else None,
                "sampler": "poisson",
                "accountant": "pld" if private else None,
                "epsilon": epsilon,
                "delta": delta if private else NAN,
                "noise_multiplier": 3 / epsilon if private else 0.0,
                "clip_norm": clip,
                "rounds": count,
                "local_steps": 300 // count,
                "cohort": 90.0,
                "sampling_rate": 0.3,
                "seed": seed,
                "accuracy": accuracy,
                "loss": 1 - accuracy,
                "validation_accuracy": validation,
                "validation_loss": 1 - validation,
            }
        )
    return pd.DataFrame(rows)


def diverge(frame: pd.DataFrame, rows: "pd.Series[bool]") -> pd.DataFrame:
    """Return the frame with those runs diverged, as the store would hold them."""
    lost = ["accuracy", "loss", "validation_accuracy", "validation_loss"]
    frame = frame.copy()
    frame.loc[rows, "status"] = "diverged"
    frame.loc[rows, lost] = NAN
    return frame


@pytest.fixture(scope="session", name="diverge")
def diverge_fixture() -> Callable[..., pd.DataFrame]:
    return diverge


@pytest.fixture(scope="session")
def make() -> Callable[..., pd.DataFrame]:
    return make_runs


@pytest.fixture(scope="session")
def runs() -> pd.DataFrame:
    frame = make_runs()
    return diverge(frame, (frame["epsilon"] == 0.5) & (frame["clip_norm"] == 2) & (frame["rounds"] >= 100))
