"""Means over seeds, comparisons of configurations, and the choice on validation data."""

import itertools
import math
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import dpfl
from dpfl.statistics import Comparison, choose, compare, summarise

NAN = float("nan")


def paired(ones: list[float], others: list[float], **columns: object) -> pd.DataFrame:
    """A frame in which clip norm 1 and clip norm 2 have these accuracies, seeds 0, 1, ..."""
    rows = [
        {"run_id": f"{clip}-{seed}", "status": "finished", "clip_norm": clip, "seed": seed, "accuracy": accuracy}
        for clip, values in ((1.0, ones), (2.0, others))
        for seed, accuracy in enumerate(values)
    ]
    return pd.DataFrame(rows).assign(**columns)


ONE, OTHER = {"clip_norm": 1}, {"clip_norm": 2}


def test_interval_equals_the_one_computed_by_hand() -> None:
    # Mean 0.9; deviations -0.1, 0, 0.1: standard deviation 0.1, standard error 0.1 / sqrt(3);
    # the 97.5 % quantile of Student's t with 2 degrees of freedom is 4.302653 in any table, the 95 % one 2.919986.
    frame = pd.DataFrame({"rounds": 10, "accuracy": [0.8, 0.9, 1.0]})
    (row,) = summarise(frame, ["rounds"]).to_dict("records")
    assert row == pytest.approx(
        {"rounds": 10, "mean": 0.9, "low": 0.9 - 0.2484138, "high": 0.9 + 0.2484138, "seeds": 3}, abs=1e-6
    )
    assert summarise(frame, ["rounds"], level=0.9)["high"].iloc[0] == pytest.approx(0.9 + 0.1685854, abs=1e-6)


def test_each_group_has_its_own_row_and_nan_is_a_group() -> None:
    frame = pd.DataFrame({"epsilon": [2.0, 1.0, NAN, 1.0], "accuracy": [0.9, 0.5, 0.95, 0.7]})
    table = summarise(frame, ["epsilon"])
    assert table["epsilon"].tolist()[:2] == [1.0, 2.0]
    assert np.isnan(table["epsilon"].iloc[2])
    assert table["mean"].tolist() == pytest.approx([0.6, 0.9, 0.95])
    assert table["seeds"].tolist() == [2, 1, 1]
    # Two values: half the width is 12.7062 (t, 1 degree of freedom) x 0.1 (standard error).
    assert table["high"].iloc[0] - table["mean"].iloc[0] == pytest.approx(1.270620, abs=1e-6)


def test_one_seed_has_no_interval_and_equal_seeds_have_an_empty_one() -> None:
    frame = pd.DataFrame({"rounds": [1, 2, 2], "accuracy": [0.5, 0.7, 0.7]})
    one, equal = summarise(frame, ["rounds"]).itertuples()
    assert np.isnan([one.low, one.high]).all()
    assert (equal.low, equal.high) == pytest.approx((0.7, 0.7))


@pytest.mark.parametrize("interval", ["t", "bootstrap"])
def test_no_runs_give_no_rows(interval: str) -> None:
    table = summarise(pd.DataFrame({"rounds": [], "accuracy": []}), ["rounds"], interval=interval)
    assert table.empty
    assert list(table) == ["rounds", "mean", "low", "high", "seeds"]


def test_bootstrap_of_three_seeds_is_that_of_all_27_resamples() -> None:
    values = [0.5, 0.6, 0.9]
    means = [np.mean(resample) for resample in itertools.product(values, repeat=3)]
    frame = pd.DataFrame({"rounds": 10, "accuracy": values})
    # The smallest mean has probability 1/27 = 3.7 %: a 90 % interval ends at the second smallest and second largest.
    (row,) = summarise(frame, ["rounds"], interval="bootstrap", level=0.9).itertuples()
    assert (row.low, row.high) == pytest.approx((sorted(set(np.round(means, 9)))[1], (0.9 + 0.9 + 0.6) / 3))
    assert row.mean == pytest.approx(np.mean(values))


def test_bootstrap_is_determined_by_its_seed_and_by_nothing_else() -> None:
    rng = np.random.default_rng(3)
    frame = pd.DataFrame({"rounds": [1] * 8 + [2] * 8, "accuracy": rng.normal(size=16)})
    table = summarise(frame, ["rounds"], interval="bootstrap", seed=5)
    again = summarise(frame, ["rounds"], interval="bootstrap", seed=5)
    pd.testing.assert_frame_equal(table, again)
    alone = summarise(frame[frame["rounds"] == 2], ["rounds"], interval="bootstrap", seed=5)
    assert alone["low"].iloc[0] == table["low"].iloc[1]
    assert summarise(frame, ["rounds"], interval="bootstrap", seed=6)["low"].iloc[0] != table["low"].iloc[0]
    # Percentile intervals mirror with the values, and stay within them.
    mirrored = summarise(frame.assign(accuracy=-frame["accuracy"]), ["rounds"], interval="bootstrap", seed=5)
    assert mirrored["low"].tolist() == pytest.approx((-table["high"]).tolist())


def test_bootstrap_has_no_interval_for_two_seeds_and_an_empty_one_for_equal_seeds() -> None:
    frame = pd.DataFrame({"rounds": [1, 1, 2, 2, 2, 3, 3, 3], "accuracy": [0.5, 0.6, 0.7, 0.7, 0.7, 0.1, 0.2, NAN]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        two, equal, missing = summarise(frame, ["rounds"], interval="bootstrap").itertuples()
    assert np.isnan([two.low, two.high, missing.low, missing.high]).all()
    assert (equal.low, equal.high) == (0.7, 0.7)
    assert missing.seeds == 2


@pytest.mark.parametrize(("interval", "coverage"), [("t", 0.95), ("bootstrap", 0.929)])
def test_intervals_cover_the_mean_as_often_as_stated(interval: str, coverage: float) -> None:
    # 500 groups of 20 normal values. The percentile interval is about mean +- 1.96 sqrt(19/20) standard errors, which
    # covers with probability P(|t_19| < 1.910) = 0.929. The count is binomial: with the seed's choice free, it would
    # leave the range below, of four standard deviations and 1 % for the approximation, with probability < 1e-4.
    rng = np.random.default_rng(11)
    frame = pd.DataFrame({"group": np.repeat(np.arange(500), 20), "accuracy": rng.normal(0.7, 0.1, size=10_000)})
    table = summarise(frame, ["group"], interval=interval)
    covered = ((table["low"] < 0.7) & (table["high"] > 0.7)).mean()
    assert abs(covered - coverage) < 4 * math.sqrt(coverage * (1 - coverage) / 500) + 0.01


def test_comparison_equals_scipy_and_arithmetic() -> None:
    ones, others = [0.81, 0.84, 0.79, 0.88, 0.83], [0.80, 0.80, 0.78, 0.82, 0.84]
    frame = paired(ones, others).sample(frac=1, random_state=4)
    found = compare(frame, ONE, OTHER)
    differences = np.subtract(ones, others)
    assert found.p_value == pytest.approx(stats.ttest_1samp(differences, 0).pvalue)
    assert (found.mean_one, found.mean_other, found.difference) == pytest.approx((0.83, 0.808, 0.022))
    # 95 %: 2.776445 is the t quantile for 4 degrees of freedom in any table.
    half = 2.776445 * differences.std(ddof=1) / math.sqrt(5)
    assert (found.low, found.high) == pytest.approx((0.022 - half, 0.022 + half), abs=1e-7)
    assert found.effect_size == pytest.approx(0.022 / differences.std(ddof=1))
    assert (found.pairs, found.left_out, found.unpaired) == (5, 0, 0)
    # By hand, of 32 sign flips: |sum| >= 0.11 for the differences 1, 4, 1, 6, -1 (in hundredths).
    flips = [abs(np.dot(signs, [1, 4, 1, 6, -1])) >= 11 for signs in itertools.product((1, -1), repeat=5)]
    assert found.permutation_p_value == pytest.approx(np.mean(flips)) == pytest.approx(8 / 32)
    swapped = compare(frame, OTHER, ONE)
    assert (swapped.difference, swapped.low) == pytest.approx((-found.difference, -found.high))
    assert (swapped.p_value, swapped.permutation_p_value) == (found.p_value, found.permutation_p_value)


def test_permutation_test_is_exact_up_to_twelve_pairs() -> None:
    rng = np.random.default_rng(2)
    others = rng.uniform(0.5, 0.6, size=13)
    ones = others + rng.uniform(0.01, 0.02, size=13)
    twelve = compare(paired(list(ones[:12]), list(others[:12])), ONE, OTHER)
    assert twelve.permutation_p_value == 2 / 2**12
    assert "exact sign-flip" in twelve.statement()
    thirteen = compare(paired(list(ones), list(others)), ONE, OTHER)
    # 9,999 random flips: at most a few reach the observed one, whose probability is 2 / 2^13.
    assert 1e-4 <= thirteen.permutation_p_value < 2e-3
    assert "random sign-flip" in thirteen.statement()


def test_seeds_are_paired_and_what_is_left_out_is_counted() -> None:
    frame = paired([0.8, 0.9, 0.7, 0.6, 0.5, 0.4], [0.75, 0.8, 0.72, 0.99, 0.1])
    frame.loc[(frame["clip_norm"] == 2) & (frame["seed"] == 3), ["status", "accuracy"]] = ["diverged", NAN]
    frame.loc[(frame["clip_norm"] == 1) & (frame["seed"] == 4), "status"] = "failed"  # Its accuracy must not count.
    found = compare(frame, ONE, OTHER)
    assert (found.pairs, found.left_out, found.unpaired) == (3, 2, 1)
    assert (found.mean_one, found.mean_other) == pytest.approx((0.8, (0.75 + 0.8 + 0.72) / 3))
    assert "(without 2 pairs with an unfinished run and 1 seed without a partner)" in found.statement()


@pytest.mark.parametrize(("gap", "p_value", "effect"), [(0.0, 1.0, 0.0), (0.1, 0.0, math.inf), (-0.1, 0.0, -math.inf)])
def test_differences_without_spread_have_plain_values_and_no_warning(gap: float, p_value: float, effect: float) -> None:
    others = [0.3, 0.55, 0.7, 0.61]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = compare(paired([value + gap for value in others], others), ONE, OTHER)
    assert (found.p_value, found.effect_size) == (p_value, effect)
    assert (found.low, found.high) == pytest.approx((gap, gap))
    assert found.permutation_p_value == (1.0 if gap == 0 else 2 / 2**4)


def test_missing_values_select_a_configuration() -> None:
    frame = paired([0.9, 0.8, 0.7], [0.5, 0.6, 0.55]).assign(epsilon=[NAN] * 3 + [1.0] * 3, note=[None] * 3 + ["b"] * 3)
    for free in ({"epsilon": None}, {"epsilon": NAN}, {"note": None}):
        found = compare(frame, free, {"epsilon": 1})
        assert found.difference == pytest.approx(0.25)
    assert compare(frame, {"epsilon": None}, {"epsilon": 1}).one == "epsilon none"


def test_statement_says_everything_in_one_sentence() -> None:
    found = compare(paired([0.81, 0.84, 0.79], [0.80, 0.80, 0.78]), ONE, OTHER)
    assert isinstance(found, Comparison)
    assert found.statement() == (
        "Over 3 paired seeds, the mean accuracy was 0.8133 at clip norm 1 and 0.7933 at clip norm 2: a difference of "
        "+0.02, 95% confidence interval [-0.02303, +0.06303] (paired t test: p = 0.184; exact sign-flip permutation "
        "test: p = 0.250; Cohen's d_z = 1.15)."
    )


def test_comparisons_that_cannot_be_made_are_refused() -> None:
    frame = paired([0.8, 0.9], [0.7, 0.6])
    with pytest.raises(dpfl.InputError, match="clip norm 3 selects no run"):
        compare(frame, {"clip_norm": 3}, OTHER)
    with pytest.raises(dpfl.InputError, match="no column 'clip'; did you mean 'clip_norm'"):
        compare(frame, {"clip": 1}, OTHER)
    with pytest.raises(dpfl.InputError, match="every run has 2 runs with seed 0: they differ in clip_norm; keep one"):
        compare(frame, {}, OTHER)
    doubled = pd.concat([frame, frame.assign(rounds=7, seconds=3.0)])
    with pytest.raises(dpfl.InputError, match="they differ in rounds; keep one"):
        compare(doubled, ONE, OTHER)
    with pytest.raises(dpfl.InputError, match="select the same run"):
        compare(frame, ONE, {"clip_norm": 1, "status": "finished"})
    with pytest.raises(dpfl.InputError, match="1 pair of finished runs"):
        compare(frame[frame.index != 3], ONE, OTHER)
    with pytest.raises(dpfl.InputError, match="level must be between 0 and 1"):
        compare(frame, ONE, OTHER, level=95)
    with pytest.raises(dpfl.InputError, match="'t' or 'bootstrap'"):
        summarise(frame, ["clip_norm"], interval="bca")


@pytest.fixture
def choices() -> pd.DataFrame:
    """At epsilon 1 clip norm 1 is best on validation data and worst on test data; without noise it is clip norm 2."""
    rows = [
        {"status": "finished", "epsilon": epsilon, "clip_norm": clip, "seed": seed}
        | {"validation_accuracy": validation + 0.01 * seed, "accuracy": test + 0.02 * seed}
        for epsilon, clip, validation, test in (
            (1.0, 0.5, 0.6, 0.9),
            (1.0, 1.0, 0.7, 0.4),
            (1.0, 2.0, 0.5, 0.8),
            (NAN, 1.0, 0.8, 0.8),
            (NAN, 2.0, 0.9, 0.95),
        )
        for seed in range(3)
    ]
    return pd.DataFrame(rows)


def test_choice_is_made_on_validation_and_reported_on_test(choices: pd.DataFrame) -> None:
    table = choose(choices, ["clip_norm"], prices={1.0: 2.5, 4.0: 9.0})
    private, free = table.itertuples()
    assert (private.epsilon, private.clip_norm, private.settings, private.seeds) == (1, 1, 3, 3)
    assert (private.mean, private.validation_accuracy, private.epsilon_with_choice) == pytest.approx((0.42, 0.71, 2.5))
    half = 4.302653 * 0.02 / math.sqrt(3)
    assert (private.low, private.high) == pytest.approx((0.42 - half, 0.42 + half), abs=1e-7)
    assert (free.clip_norm, free.settings) == (2, 2)
    assert math.isnan(free.epsilon)
    assert math.isnan(free.epsilon_with_choice)
    assert choose(choices, ["clip_norm"])["epsilon_with_choice"].isna().all()


def test_unfinished_runs_count_in_the_choice_but_not_in_the_mean(choices: pd.DataFrame) -> None:
    at = (choices["epsilon"] == 1) & (choices["clip_norm"] == 1)
    choices.loc[at & (choices["seed"] > 0), "status"] = "diverged"
    assert choose(choices, ["clip_norm"])["clip_norm"].iloc[0] == 0.5
    alone = choose(choices[at], ["clip_norm"])
    assert alone[["mean", "seeds"]].iloc[0].tolist() == pytest.approx([0.4, 1])
    nothing = choose(choices[at].assign(status="diverged", accuracy=NAN), ["clip_norm"])
    assert math.isnan(nothing["mean"].iloc[0])
    assert nothing["seeds"].iloc[0] == 0


def test_choices_that_cannot_be_made_are_refused(choices: pd.DataFrame) -> None:
    with pytest.raises(dpfl.InputError, match=r"prices lack epsilon 1\b"):
        choose(choices, ["clip_norm"], prices={4.0: 9.0})
    with pytest.raises(dpfl.InputError, match="a setting has 3 runs with seed 0: they differ in clip_norm"):
        choose(choices.assign(rounds=5), ["rounds"])
    with pytest.raises(dpfl.InputError, match="Choosing the best clip_norm needs validation_accuracy"):
        choose(choices.assign(validation_accuracy=NAN), ["clip_norm"])
    with pytest.raises(dpfl.InputError, match="no runs to choose from"):
        choose(choices.iloc[:0], ["clip_norm"])
    with pytest.raises(dpfl.InputError, match="none in both at once"):
        choose(choices, ["epsilon"])


def test_statistics_need_neither_tensorflow_nor_matplotlib() -> None:
    code = "import sys, dpfl.statistics; print({'tensorflow', 'matplotlib', 'sklearn'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
