"""Adaptive clipping, the map of clip norms, fixed noise and mechanisms, read back from the figures."""

import numpy as np
import pandas as pd
import pytest
from chart_reading import caption, check_layout, drawn, legend, mean

from dpfl import charts
from dpfl.errors import InputError

NAN = float("nan")


@pytest.fixture(scope="module")
def both(make):
    """Fixed clip norms, and adaptive clipping to two quantiles of which 0.7 is best on validation."""
    frame = make(epsilons=(1, 4, NAN), clips=(0.25, 0.5, 1), rounds=(10, 100))
    of = frame[frame["clip_norm"] == 0.5]
    parts = [
        of.assign(
            mechanism="adaptive_clipping",
            clip_quantile=quantile,
            final_clip_norm=quantile / 2 + 0.01 * of["seed"],
            accuracy=of["accuracy"] - 0.02,
            validation_accuracy=of["validation_accuracy"] + quantile / 10,
        )
        for quantile in (0.3, 0.7)
    ]
    return pd.concat([frame, *parts], ignore_index=True)


def stars(figure):
    lines = [line for line in figure.axes[0].lines if line.get_marker() == "*" and len(line.get_xdata())]
    return [(line.get_xdata()[0], line.get_ydata()[0]) for line in lines]


def test_adaptive_clipping_is_a_star_at_its_last_clip_norm(both):
    figure = charts.clipping(both)
    labels = legend(figure)
    assert labels[-1] == "adaptive"
    expected = []
    for label, epsilon in zip(labels[1:4], (None, 4, 1), strict=True):
        rounds = int(label.split("(")[1].rstrip(")"))
        expected.append(mean(both, mechanism="adaptive_clipping", clip_quantile=0.7, epsilon=epsilon, rounds=rounds))
    found = stars(figure)
    assert [x for x, _ in found] == pytest.approx([0.36] * 3)
    assert sorted(y for _, y in found) == pytest.approx(sorted(expected))
    assert "adaptive clipping to the quantile 0.7" in caption(figure)
    check_layout(figure)


def test_without_adaptive_runs_there_is_no_star(both):
    figure = charts.clipping(both[both["mechanism"] != "adaptive_clipping"])
    assert "adaptive" not in legend(figure)
    assert "Stars" not in caption(figure)


def test_the_best_clip_of_a_point_may_be_adaptive(both):
    lines = drawn(charts.epsilon(both))
    for rounds in (10, 100):
        cell = {"mechanism": "adaptive_clipping", "clip_quantile": 0.7, "rounds": rounds}
        assert lines[str(rounds)][1] == pytest.approx([mean(both, epsilon=epsilon, **cell) for epsilon in (1, 4)])
    table = charts.best_settings(both)
    assert table["mechanism"].tolist() == ["adaptive_clipping"] * 3 + ["none"]


def test_best_settings_go_by_epsilon_whatever_clips(both):
    worse = (both["mechanism"] == "adaptive_clipping") & (both["epsilon"] == 1)
    table = charts.best_settings(both.assign(validation_accuracy=both["validation_accuracy"].where(~worse, 0.0)))
    assert table["mechanism"].tolist() == ["gaussian", "adaptive_clipping", "adaptive_clipping", "none"]
    assert table["epsilon"].tolist()[:2] == [1, 4]


def test_the_map_has_each_cell_and_frames_the_best(both):
    figure = charts.clipping_map(both)
    fixed = both[both["mechanism"] != "adaptive_clipping"]
    axes = figure.axes[0]
    cells = axes.images[0].get_array()
    assert cells.shape == (3, 3)
    texts = [text.get_text() for text in axes.texts]
    for row, epsilon in enumerate((1, 4, None)):
        keys = {"epsilon": epsilon, "mechanism": "gaussian"}
        pairs = [(rounds, clip) for rounds in (10, 100) for clip in (0.25, 0.5, 1)]
        rounds, best_clip = max(
            pairs, key=lambda pair: mean(fixed, "validation_accuracy", rounds=pair[0], clip_norm=pair[1], **keys)
        )
        for column, clip in enumerate((0.25, 0.5, 1)):
            value = mean(fixed, rounds=rounds, clip_norm=clip, **keys)
            assert cells[row, column] == pytest.approx(value)
            assert texts[3 * row + column] == f"{100 * value:.1f}"
        place = (0.25, 0.5, 1).index(best_clip)
        assert any(np.allclose(patch.get_xy(), (place - 0.48, row - 0.48)) for patch in axes.patches)
    assert len(axes.patches) == 2 * 3
    assert "Runs with adaptive clipping are not in the map." in caption(figure)
    check_layout(figure)


def test_a_cell_in_which_no_run_finished_is_crossed_out(both, diverge):
    frame = both[both["mechanism"] != "adaptive_clipping"]
    frame = diverge(frame, (frame["epsilon"] == 1) & (frame["clip_norm"] == 1))
    figure = charts.clipping_map(frame)
    assert "×" in [text.get_text() for text in figure.axes[0].texts]
    assert "Crossed out: no run finished." in caption(figure)


@pytest.fixture(scope="module")
def with_fixed_noise(make):
    frame = make(epsilons=(1, 4), clips=(0.25, 0.5), rounds=(10, 30, 100))
    noisy = frame[frame["epsilon"].notna()]
    noise = noisy["epsilon"].map({1: 4.0, 4: 1.0})
    fixed = noisy.assign(noise_multiplier=noise, epsilon_spent=noisy["rounds"] / 10 / noise, epsilon=NAN)
    return pd.concat([frame, fixed], ignore_index=True), fixed


def test_rounds_at_fixed_epsilon_and_at_fixed_noise_have_a_panel_each(with_fixed_noise):
    frame, fixed = with_fixed_noise
    figure = charts.round_frequency(frame)
    panels = {axes.get_title(): place for place, axes in enumerate(figure.axes)}
    left, right = drawn(figure, panels["At fixed ε"]), drawn(figure, panels["At fixed noise"])
    assert {"1", "4", "non-private"} <= set(left)
    for noise in (1, 4):
        x, y = right[f"noise {noise}"]
        assert x.tolist() == [10, 30, 100]
        for rounds, accuracy in zip(x, y, strict=True):
            cell = {"noise_multiplier": noise, "rounds": rounds}
            clip = max((0.25, 0.5), key=lambda c: mean(fixed, "validation_accuracy", clip_norm=c, **cell))
            assert accuracy == pytest.approx(mean(fixed, clip_norm=clip, **cell))
    (below,) = [axes for axes in figure.axes if axes.get_ylabel() == "ε spent"]
    spent = sorted(line.get_ydata().tolist() for line in below.lines)
    assert spent == [[0.25, 0.75, 2.5], [1, 3, 10]]
    check_layout(figure)


def test_fixed_noise_alone(with_fixed_noise):
    _, fixed = with_fixed_noise
    figure = charts.round_frequency(fixed)
    assert legend(figure) == ["noise 4", "noise 1"]
    assert "δ = 1e-3" in caption(figure)
    check_layout(figure)
    for chart in (charts.epsilon, charts.clipping):
        with pytest.raises(InputError, match="no target epsilon"):
            chart(fixed)


def test_mechanisms_each_state_their_guarantee(make):
    frame = make(epsilons=(1, 4), clips=(0.25, 0.5), rounds=(10, 30))
    noisy = frame[frame["epsilon"].notna()]
    other = noisy.assign(
        mechanism="skellam", sampler="fixed_size", relation="replace_one", accountant="rdp", cohort=30.0
    )
    figure = charts.mechanisms(pd.concat([frame, other.assign(accuracy=other["accuracy"] - 0.1)], ignore_index=True))
    lines = drawn(figure)
    assert lines["Gaussian"][1] == pytest.approx(lines["distributed Skellam"][1] + 0.1)
    said = caption(figure).replace("- ", "-")
    assert "distributed Skellam: fixed-size sampling, by replacing one user, RDP" in said
    assert "equal ε are not equal promises" in said
    assert "not equal promises" not in caption(charts.mechanisms(frame))
    with pytest.raises(InputError, match=r"runs of skellam differ in sampler \(fixed_size and poisson\)"):
        charts.mechanisms(pd.concat([other, other.assign(sampler="poisson")], ignore_index=True))
    check_layout(figure)


def test_example_level_runs_have_their_charts(make):
    frame = make(epsilons=(1, 4), clips=(0.25, 0.5), rounds=(10, 30))
    private = frame["mechanism"] != "none"
    examples = frame.assign(
        unit=frame["unit"].where(~private, "example"),
        mechanism="none",
        example_clip_norm=frame["clip_norm"],
        example_noise_multiplier=frame["noise_multiplier"].where(private),
        clip_norm=NAN,
        noise_multiplier=0.0,
    )
    for chart in (charts.epsilon, charts.clipping, charts.round_frequency):
        one, other = drawn(chart(frame)), drawn(chart(examples))
        assert one.keys() == other.keys()
        for name, (_, y) in one.items():
            assert y == pytest.approx(other[name][1])
        assert "example-level" in caption(chart(examples))
