"""Rounds drawn one after the other, read back and compared with the history by hand."""

import numpy as np
import pandas as pd
import pytest
from chart_reading import best_setting, caption, check_layout, drawn, legend
from matplotlib.collections import FillBetweenPolyCollection

from dpfl.charts.convergence import convergence, signal_to_noise
from dpfl.errors import InputError

NAN = float("nan")


@pytest.fixture(scope="module")
def frame(make):
    runs = make(epsilons=(1, 4, NAN), clips=(0.25, 0.5), rounds=(10, 30))
    return runs.assign(run_id=[f"run{place}" for place in range(len(runs))])


@pytest.fixture(scope="module")
def history(frame):
    rng = np.random.default_rng(3)
    parts = []
    for run in frame.itertuples():
        number = np.arange(1, run.rounds + 1)
        evaluated = (number % 5 == 0) | (number == run.rounds)
        noise = not np.isnan(run.epsilon)
        rounds = {
            "run_id": run.run_id,
            "round": number,
            "epsilon_spent": run.epsilon * np.sqrt(number / run.rounds) if noise else NAN,
            "accuracy": np.where(evaluated, run.accuracy * number / run.rounds, NAN),
            "signal_to_noise": run.epsilon / number * rng.uniform(0.8, 1.2, run.rounds) if noise else NAN,
        }
        parts.append(pd.DataFrame(rounds))
    return pd.concat(parts, ignore_index=True)


def rounds_of(frame, history, **setting):
    for name, value in setting.items():
        frame = frame[frame[name].isna() if value is None else frame[name] == value]
    return history[history["run_id"].isin(frame["run_id"])]


def test_accuracy_over_the_evaluated_rounds_of_the_best_setting(frame, history):
    figure = convergence(frame, history)
    lines = drawn(figure)
    assert legend(figure) == ["non-private", "no noise", "4", "1"]
    for name, epsilon in (("1", 1), ("4", 4), ("no noise", None)):
        setting = best_setting(frame, epsilon=epsilon)
        expected = rounds_of(frame, history, **setting).dropna(subset="accuracy").groupby("round")["accuracy"].mean()
        x, y = lines[name]
        assert x.tolist() == list(range(5, setting["rounds"] + 1, 5))
        assert y == pytest.approx(expected.to_numpy())
    plain = rounds_of(frame, history, mechanism="none", rounds=30).groupby("round")["accuracy"].mean().dropna()
    assert lines["non-private"][1] == pytest.approx(plain.to_numpy())
    check_layout(figure)


def test_the_epsilon_spent_has_its_own_panel_in_the_same_colours(frame, history):
    figure = convergence(frame, history)
    upper, lower = figure.axes
    lines = drawn(figure, 1)
    for name, epsilon in (("1", 1), ("4", 4)):
        x, y = lines[name]
        rounds = best_setting(frame, epsilon=epsilon)["rounds"]
        assert x.tolist() == list(range(1, rounds + 1))
        assert y == pytest.approx(epsilon * np.sqrt(x / rounds))
    assert np.isnan(lines["no noise"][1]).all()
    colors = [{line.get_label(): tuple(line.get_color()) for line in axes.lines} for axes in (upper, lower)]
    assert colors[1].items() <= colors[0].items()
    assert lower.get_ylabel() == "ε spent"
    assert "Below: ε after each round" in caption(figure)


def test_without_a_guarantee_there_is_one_panel(frame, history):
    bare = frame[frame["epsilon"].isna()]
    figure = convergence(bare, history)
    assert len(figure.axes) == 1
    assert figure.axes[0].get_xlabel() == "Round"
    assert "No run has a privacy guarantee." in caption(figure)


def test_diverged_runs_have_no_rounds_in_the_lines(frame, history, diverge):
    setting = best_setting(frame, epsilon=1)
    same = (frame["epsilon"] == 1) & (frame["clip_norm"] == setting["clip_norm"])
    lone = frame[~(frame["epsilon"] == 1) | (same & (frame["rounds"] == setting["rounds"]))]
    lost = diverge(lone, (lone["epsilon"] == 1) & (lone["seed"] == 0))
    figure = convergence(lost, history)
    kept = lone[(lone["epsilon"] == 1) & (lone["seed"] > 0)]
    expected = rounds_of(kept, history).groupby("round")["accuracy"].mean().dropna()
    assert drawn(figure)["1"][1] == pytest.approx(expected.to_numpy())
    assert "1 of" in caption(figure)
    assert "runs diverged" in caption(figure)


def test_signal_to_noise_is_the_median_over_seeds_with_its_range(frame, history):
    figure = signal_to_noise(frame, history)
    axes = figure.axes[0]
    lines = drawn(figure)
    assert axes.get_yscale() == "log"
    assert legend(figure) == ["signal = noise", "4", "1"]
    assert set(lines["signal = noise"][1]) == {1}
    by = rounds_of(frame, history, **best_setting(frame, epsilon=4)).groupby("round")["signal_to_noise"]
    assert lines["4"][1] == pytest.approx(by.median().to_numpy())
    bands = [c for c in axes.collections if isinstance(c, FillBetweenPolyCollection)]
    corners = {(x, round(y, 9)) for band in bands for x, y in band.get_paths()[0].vertices}
    for extreme in (by.min(), by.max()):
        assert {(number, round(value, 9)) for number, value in extreme.items()} <= corners
    assert "Lines: medians over 3 seeds; bands: from lowest to highest." in caption(figure)
    assert "1 the noise is as long as the signal" in caption(figure)
    check_layout(figure)


def test_a_history_that_does_not_fit_is_refused(frame, history):
    with pytest.raises(InputError, match=r"^The history lacks accuracy: .*\.$"):
        convergence(frame, history.drop(columns="accuracy"))
    with pytest.raises(InputError, match=r"^The frame lacks run_id: .*\.$"):
        convergence(frame.drop(columns="run_id"), history)
    with pytest.raises(InputError, match=r"^No finished run has evaluated rounds .*\.$"):
        convergence(frame, history.assign(accuracy=NAN))
    with pytest.raises(InputError, match=r"^No finished run has noise .*\.$"):
        signal_to_noise(frame[frame["epsilon"].isna()], history)
