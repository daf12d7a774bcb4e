"""A small experiment, and frames without what depends on the clock."""

from collections.abc import Callable

import pandas as pd
import pytest

import dpfl


@pytest.fixture(scope="session")
def base() -> dpfl.Experiment:
    return dpfl.Experiment(
        data=dpfl.data.digits(clients=40),
        local=dpfl.ClientTraining(learning_rate=0.3, batch_size=5, steps=2),
        mechanism=dpfl.Gaussian(clip_norm=0.5),
        privacy=dpfl.Privacy(epsilon=8, delta=1e-2),
        sampler=dpfl.Poisson(cohort=20),
        rounds=4,
    )


@pytest.fixture(scope="session")
def same_runs() -> Callable[[pd.DataFrame, pd.DataFrame], None]:
    """Asserts that two frames have the same runs with the same results, up to float32 where runs trained together."""

    def check(one: pd.DataFrame, other: pd.DataFrame) -> None:
        pd.testing.assert_frame_equal(
            one.drop(columns="seconds"), other.drop(columns="seconds"), rtol=1e-4, check_dtype=False
        )

    return check
