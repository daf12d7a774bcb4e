import numpy as np
import pandas as pd
import pytest

from dpfl.charts.intervals import summarise


def test_interval_equals_the_one_computed_by_hand():
    # Mean 0.9; deviations -0.1, 0, 0.1: standard deviation 0.1, standard error 0.1 / sqrt(3);
    # the 97.5 % quantile of Student's t with 2 degrees of freedom is 4.302653 in any table.
    frame = pd.DataFrame({"rounds": 10, "accuracy": [0.8, 0.9, 1.0]})
    (row,) = summarise(frame, ["rounds"]).to_dict("records")
    assert row == pytest.approx(
        {"rounds": 10, "mean": 0.9, "low": 0.9 - 0.2484138, "high": 0.9 + 0.2484138, "seeds": 3}, abs=1e-6
    )


def test_each_group_has_its_own_row_and_nan_is_a_group():
    frame = pd.DataFrame({"epsilon": [2.0, 1.0, np.nan, 1.0], "accuracy": [0.9, 0.5, 0.95, 0.7]})
    table = summarise(frame, ["epsilon"])
    assert table["epsilon"].tolist()[:2] == [1.0, 2.0]
    assert np.isnan(table["epsilon"].iloc[2])
    assert table["mean"].tolist() == pytest.approx([0.6, 0.9, 0.95])
    assert table["seeds"].tolist() == [2, 1, 1]
    # Two values: half the width is 12.7062 (t, 1 degree of freedom) x 0.1 (standard error).
    assert table["high"].iloc[0] - table["mean"].iloc[0] == pytest.approx(1.270620, abs=1e-6)


def test_one_seed_has_no_interval_and_equal_seeds_have_an_empty_one():
    frame = pd.DataFrame({"rounds": [1, 2, 2], "accuracy": [0.5, 0.7, 0.7]})
    one, equal = summarise(frame, ["rounds"]).itertuples()
    assert np.isnan([one.low, one.high]).all()
    assert (equal.low, equal.high) == pytest.approx((0.7, 0.7))


def test_no_runs_give_no_rows():
    table = summarise(pd.DataFrame({"rounds": [], "accuracy": []}), ["rounds"])
    assert table.empty
    assert list(table) == ["rounds", "mean", "low", "high", "seeds"]
