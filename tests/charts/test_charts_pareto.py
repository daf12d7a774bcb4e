"""Which settings are efficient, by brute force, and how they are drawn."""

import numpy as np
import pandas as pd
import pytest
from chart_reading import caption, check_layout, drawn, legend, ticks

from dpfl import charts
from dpfl.charts.pareto import pareto, pareto_front
from dpfl.errors import InputError

NAN = float("nan")


@pytest.fixture(scope="module")
def frame(make):
    parts = []
    for cohort in (30.0, 90.0):
        part = make(epsilons=(1, 4, NAN), clips=(0.25, 0.5), rounds=(10, 30, 100)).assign(cohort=cohort)
        lost = 0.05 * (90 / cohort - 1)
        parts.append(
            part.assign(accuracy=part["accuracy"] - lost, validation_accuracy=part["validation_accuracy"] - lost)
        )
    frame = pd.concat(parts, ignore_index=True)
    return frame.assign(bytes_up=frame["cohort"] * frame["rounds"] * 2600.0)


KEYS = ["mechanism", "epsilon", "clip_norm", "rounds", "cohort"]


def efficient(frame):
    """The efficient settings, by comparing each with each."""
    means = frame.groupby(KEYS, dropna=False)[["validation_accuracy", "bytes_up"]].mean().reset_index()
    rows = [
        (row, (-row.validation_accuracy, row.bytes_up, np.nan_to_num(row.epsilon, nan=np.inf)))
        for row in means.itertuples()
    ]
    kept = []
    for row, cost in rows:
        worse = [all(a <= b for a, b in zip(other, cost, strict=True)) and other != cost for _, other in rows]
        if not any(worse):
            kept.append(tuple(str(getattr(row, key)) for key in KEYS))
    return set(kept)


def test_the_front_is_what_no_other_setting_beats(frame):
    front = pareto_front(frame)
    found = {tuple(str(getattr(row, key)) for key in KEYS) for row in front.itertuples()}
    assert found == efficient(frame)
    assert 3 < len(found) < frame.groupby(KEYS, dropna=False).ngroups
    assert len(found) == len(front)
    assert {"bytes_up", "validation_accuracy", "mean", "low", "high", "seeds"} <= set(front)


def test_the_choice_is_made_on_validation_and_the_test_accuracy_is_shown(make):
    frame = make(epsilons=(1,), clips=(0.25, 0.5), rounds=(10,), plain=False).assign(bytes_up=100.0)
    liked = frame["clip_norm"] == 0.25
    frame = frame.assign(accuracy=np.where(liked, 0.9, 0.6), validation_accuracy=np.where(liked, 0.5, 0.8))
    (row,) = pareto_front(frame).to_dict("records")
    assert (row["clip_norm"], row["mean"], row["validation_accuracy"]) == pytest.approx((0.5, 0.6, 0.8))


def test_a_smaller_epsilon_beats_a_larger_one_that_is_no_better(make):
    frame = make(epsilons=(1, 4), clips=(0.5,), rounds=(10,), plain=False)
    frame = frame.assign(bytes_up=100.0, validation_accuracy=0.7)
    assert pareto_front(frame)["epsilon"].tolist() == [1]
    better = frame.assign(validation_accuracy=frame["epsilon"].map({1: 0.7, 4: 0.71}))
    assert pareto_front(better)["epsilon"].tolist() == [1, 4]


def test_a_setting_whose_lucky_seed_survived_is_not_efficient(make, diverge):
    frame = make(epsilons=(1,), clips=(0.25, 0.5), rounds=(10,), plain=False)
    frame["bytes_up"] = frame["clip_norm"].map({0.25: 200.0, 0.5: 100.0})
    frame["validation_accuracy"] = frame["clip_norm"].map({0.25: 0.9, 0.5: 0.7})
    lucky = diverge(frame, (frame["clip_norm"] == 0.25) & (frame["seed"] > 0))
    assert pareto_front(lucky)["clip_norm"].tolist() == [0.5]
    assert "2 of 6 runs diverged" in caption(pareto(lucky))
    with pytest.raises(InputError, match=r"All settings send about as much \(100 B\)"):
        pareto(lucky.assign(bytes_up=100.0))


def test_efficient_settings_are_joined_and_the_others_faint(frame):
    figure = pareto(frame)
    front = pareto_front(frame)
    lines = drawn(figure)
    assert legend(figure) == ["non-private", "no noise", "4", "1"]
    for epsilon in (1, 4):
        own = front[front["epsilon"] == epsilon]
        x, y = lines[str(epsilon)]
        assert x.tolist() == own["bytes_up"].tolist() == sorted(x)
        assert y == pytest.approx(own["mean"].to_numpy())
    faint = [line for line in figure.axes[0].lines if line.get_alpha()]
    settings = frame.groupby(KEYS, dropna=False).ngroups
    assert sum(len(line.get_xdata()) for line in faint) == settings - len(front)
    assert f"the {len(front)} Pareto-efficient of {settings} settings" in caption(figure)
    assert any(label.endswith(" MB") for label in ticks(figure.axes[0].xaxis))
    check_layout(figure)


def test_what_is_missing_is_said(frame):
    with pytest.raises(InputError, match=r"^The frame lacks bytes_up: .*\.$"):
        pareto(frame.drop(columns="bytes_up"))
    with pytest.raises(InputError, match=r"^No finished run has bytes_up, .*\.$"):
        pareto(frame.assign(bytes_up=NAN))
    with pytest.raises(InputError, match=r"validation_accuracy, which some finished runs lack: .*\.$"):
        pareto_front(frame.assign(validation_accuracy=NAN))


@pytest.mark.parametrize(("count", "text"), [(800, "800 B"), (1000, "1 kB"), (2_500_000, "2.5 MB"), (4e13, "40 TB")])
def test_bytes_have_units(count, text):
    assert charts.words.size(count) == text
