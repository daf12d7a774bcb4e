"""What the charts draw, read back from the figures and compared with the frame by hand."""

import os
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import FillBetweenPolyCollection, LineCollection
from matplotlib.figure import Figure
from scipy import stats

from dpfl import charts
from dpfl.errors import InputError

NAN = float("nan")

CHARTS = [charts.epsilon, charts.clipping, charts.round_frequency]


def drawn(figure):
    """Return {label: (x, y)} of all lines that the legend names."""
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    return {name: (np.asarray(line.get_xdata()), np.asarray(line.get_ydata())) for name, line in lines.items()}


def legend(figure):
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def caption(figure):
    text = next(text for text in figure.texts if "Guarantee" in text.get_text() or "No run" in text.get_text())
    return " ".join(text.get_text().replace("\u00a0", " ").split())


def ticks(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def mean(frame, column="accuracy", **where):
    for name, value in where.items():
        frame = frame[frame[name].isna() if value is None else frame[name] == value]
    assert len(frame)
    return frame.loc[frame["status"] == "finished", column].mean()


def best_clip(frame, **where):
    """The clip norm with the best mean validation accuracy, by brute force."""
    clips = sorted(frame["clip_norm"].dropna().unique())
    return max(clips, key=lambda clip: mean(frame, "validation_accuracy", clip_norm=clip, **where))


@pytest.fixture(scope="module")
def noisy(runs):
    """Runs without the diverged ones, in which validation and test disagree on the best clip norm."""
    frame = runs[runs["clip_norm"] != 2].copy()
    frame.loc[frame["clip_norm"] == 0.1, "accuracy"] += 0.04
    frame.loc[frame["clip_norm"] == 0.1, "validation_accuracy"] -= 0.2
    return frame.reset_index(drop=True)


def test_epsilon_draws_a_line_per_number_of_rounds_at_the_clip_chosen_on_validation(noisy):
    figure = charts.epsilon(noisy)
    lines = drawn(figure)
    assert legend(figure) == ["non-private", "10", "30", "100", "300"]
    chosen_on_test = 0
    for rounds in (10, 30, 100, 300):
        x, y = lines[str(rounds)]
        assert x.tolist() == [0.5, 1, 2, 4, 8]
        for value, accuracy in zip(x, y, strict=True):
            cell = {"epsilon": value, "rounds": rounds}
            assert accuracy == pytest.approx(mean(noisy, clip_norm=best_clip(noisy, **cell), **cell))
            chosen_on_test += accuracy >= max(mean(noisy, clip_norm=c, **cell) for c in (0.1, 0.25, 0.5, 1))
    assert chosen_on_test < 20


def test_epsilon_shows_the_runs_without_noise_apart(noisy):
    figure = charts.epsilon(noisy)
    axes = figure.axes[0]
    assert ticks(axes.xaxis) == ["0.5", "1", "2", "4", "8", "no noise"]
    apart = [line for line in axes.lines if len(line.get_xdata()) == 1]
    assert [line.get_xdata()[0] for line in apart] == [16] * 4
    for line, rounds in zip(apart, (10, 30, 100, 300), strict=True):
        cell = {"epsilon": None, "rounds": rounds, "mechanism": "gaussian"}
        assert line.get_ydata()[0] == pytest.approx(mean(noisy, clip_norm=best_clip(noisy, **cell), **cell))
    assert ticks(charts.epsilon(noisy[noisy["epsilon"].notna()]).axes[0].xaxis) == ["0.5", "1", "2", "4", "8"]


def test_bands_are_student_t_intervals_over_the_seeds(runs):
    frame = runs[(runs["clip_norm"] == 0.5) & (runs["rounds"] == 30) & runs["epsilon"].notna()]
    (band,) = [c for c in charts.epsilon(frame).axes[0].collections if isinstance(c, FillBetweenPolyCollection)]
    corners = {(round(x, 6), round(y, 6)) for x, y in band.get_paths()[0].vertices}
    for value, seeds in frame.groupby("epsilon")["accuracy"]:
        for bound in stats.t.interval(0.95, 2, loc=seeds.mean(), scale=stats.sem(seeds)):
            assert (value, round(bound, 6)) in corners


@pytest.mark.parametrize("chart", [charts.epsilon, charts.clipping])
def test_the_ceiling_is_plain_averaging_at_the_rounds_chosen_on_validation(runs, chart):
    frame = runs.copy()
    plain = frame["mechanism"] == "none"
    frame.loc[plain & (frame["rounds"] == 30), "validation_accuracy"] = 0.99
    figure = chart(frame)
    height = mean(frame, mechanism="none", rounds=30)
    assert height < mean(frame, mechanism="none", rounds=300)
    assert drawn(figure)["non-private"][1] == pytest.approx([height, height])
    (line,) = [line for line in figure.axes[0].lines if line.get_label() == "non-private"]
    assert line.get_linestyle() == "--"
    (band,) = figure.axes[0].patches
    seeds = frame.loc[plain & (frame["rounds"] == 30), "accuracy"]
    interval = stats.t.interval(0.95, 2, loc=seeds.mean(), scale=stats.sem(seeds))
    assert (band.get_y(), band.get_y() + band.get_height()) == pytest.approx(interval)
    assert "federated averaging without clip and noise (30 rounds)" in caption(figure)


def test_clipping_draws_a_line_per_epsilon_at_its_best_number_of_rounds(noisy):
    figure = charts.clipping(noisy)
    lines = drawn(figure)
    names = []
    for value in (None, 8, 4, 2, 1, 0.5):
        cells = [{"epsilon": value, "rounds": rounds, "mechanism": "gaussian"} for rounds in (10, 30, 100, 300)]
        best = max(cells, key=lambda c: mean(noisy, "validation_accuracy", clip_norm=best_clip(noisy, **c), **c))
        names.append(f"{'no noise' if value is None else f'{value:g}'} ({best['rounds']})")
        x, y = lines[names[-1]]
        assert x.tolist() == [0.1, 0.25, 0.5, 1]
        assert y == pytest.approx([mean(noisy, clip_norm=clip, **best) for clip in x])
    assert legend(figure) == ["non-private", *names]
    assert ticks(figure.axes[0].xaxis) == ["0.1", "0.25", "0.5", "1"]
    assert figure.axes[0].get_xlabel() == "Clip norm (L2)"


def test_round_frequency_draws_a_line_per_epsilon_and_the_local_steps_on_top(noisy):
    figure = charts.round_frequency(noisy)
    lines = drawn(figure)
    assert legend(figure) == ["non-private", "no noise", "8", "4", "2", "1", "0.5"]
    for value in (0.5, 1, 2, 4, 8):
        x, y = lines[f"{value:g}"]
        assert x.tolist() == [10, 30, 100, 300]
        for rounds, accuracy in zip(x, y, strict=True):
            cell = {"epsilon": value, "rounds": rounds}
            assert accuracy == pytest.approx(mean(noisy, clip_norm=best_clip(noisy, **cell), **cell))
    x, y = lines["non-private"]
    assert y == pytest.approx([mean(noisy, mechanism="none", rounds=rounds) for rounds in x])
    (top,) = figure.axes[0].child_axes
    assert ticks(top.xaxis) == ["30", "10", "3", "1"]
    assert top.get_xlabel() == "Local steps per round"
    assert "Rounds × local steps is 300 throughout." in caption(figure)


def test_the_top_axis_is_left_out_where_local_work_is_not_fixed_or_not_known(runs):
    varies = charts.round_frequency(runs.assign(local_steps=5))
    assert not varies.axes[0].child_axes
    assert "Rounds × local steps varies from 50 to 1,500." in caption(varies)
    for unknown in (runs.assign(local_steps=NAN), runs.drop(columns="local_steps")):
        figure = charts.round_frequency(unknown)
        assert not figure.axes[0].child_axes
        assert "local steps" not in caption(figure)


@pytest.mark.parametrize("chart", CHARTS)
def test_the_caption_states_the_guarantee_and_the_setting(runs, chart):
    text = caption(chart(runs))
    for part in (
        "user-level (ε, δ)-differential privacy, δ = 1e-3",
        "neighbours differ by adding or removing one user",
        "Gaussian mechanism; Poisson sampling; PLD accountant.",
        "Dataset digits, model softmax, 300 clients, 90 expected per round.",
        "means over 3 seeds; bands and bars: 95% Student-t intervals",
        "that choice is not charged to ε.",
        "No noise: clipping alone, without a guarantee.",
        "6 of 372 runs diverged",
    ):
        assert part in text


@pytest.mark.parametrize("chart", [charts.epsilon, charts.round_frequency])
def test_the_price_of_choosing_the_clip_norm_is_stated(runs, chart):
    text = caption(chart(runs, {0.5: 1.447, 8: 14.34}))
    assert "of random clip norms, 5 on average, would cost ε = 1.447 and 14.34 instead of 0.5 and 8." in text


@pytest.mark.parametrize("chart", CHARTS)
def test_an_extrapolated_epsilon_is_labelled(runs, chart):
    deployed = runs.assign(deployment_clients=1e6, deployment_cohort=1000.0, epsilon_spent=77.7)
    text = caption(chart(deployed))
    assert "ε is extrapolated: it holds for 1,000,000 clients, 1,000 per round" in text
    assert "the simulated clients have up to ε = 77.7." in text
    assert "the simulated clients have no guarantee." in caption(chart(deployed.assign(epsilon_spent=NAN)))
    half = deployed.assign(deployment_clients=deployed["deployment_clients"].where(deployed["seed"] == 0))
    with pytest.raises(InputError, match="differ in deployment_clients"):
        chart(half)


@pytest.mark.parametrize("chart", CHARTS)
def test_axes_are_labelled_and_in_percent(runs, chart):
    axes = chart(runs).axes[0]
    assert axes.get_xscale() == "log"
    assert axes.get_ylabel() == "Test accuracy"
    for label in axes.get_yticklabels():
        assert label.get_text() == f"{100 * label.get_position()[1]:g}%"
    title = axes.get_legend().get_title().get_text()
    assert "ε at δ = 1e-3, user-level" in axes.get_xlabel() or title.startswith("User-level ε\nat δ = 1e-3")


def test_percentages_are_not_rounded_to_wrong_ones(make):
    frame = make(epsilons=(1, 2), clips=(0.5,), rounds=(10,), seeds=1, plain=False)
    labels = charts.epsilon(frame.assign(accuracy=[0.9412, 0.9437])).axes[0].get_yticklabels()
    values = np.array([float(label.get_text().removesuffix("%")) for label in labels])
    assert np.ptp(np.diff(values)) < 1e-9
    assert values == pytest.approx([100 * label.get_position()[1] for label in labels])


def test_clipping_looks_for_the_peak_of_each_number_of_rounds_not_for_its_average(make):
    frame = make(epsilons=(1,), clips=(0.5, 1), rounds=(10, 30), plain=False)
    peak = (frame["rounds"] == 30) & (frame["clip_norm"] == 0.5)
    frame["validation_accuracy"] = np.where(peak, 0.9, np.where(frame["rounds"] == 30, 0.2, 0.8))
    assert legend(charts.clipping(frame)) == ["1 (30)"]


def test_the_runs_that_diverged_are_left_out_of_the_means(make, diverge):
    frame = make(epsilons=(1, 2), clips=(0.5,), rounds=(10, 30), plain=False)
    lost = (frame["epsilon"] == 1) & (frame["rounds"] == 10) & (frame["seed"] == 0)
    frame = diverge(frame, lost | ((frame["epsilon"] == 2) & (frame["rounds"] == 30)))
    figure = charts.epsilon(frame)
    two_seeds = frame.loc[lost.shift(1, fill_value=False) | lost.shift(2, fill_value=False), "accuracy"]
    assert drawn(figure)["10"][1][0] == pytest.approx(two_seeds.mean())
    assert drawn(figure)["30"][0].tolist() == [1]
    assert "4 of 12 runs diverged" in caption(figure)
    assert "means over 2 to 3 seeds" in caption(figure)
    assert "diverged" not in caption(charts.epsilon(make(epsilons=(1,), clips=(0.5,), rounds=(10,))))


GRIDS = {
    "one of each": {"epsilons": (2,), "clips": (0.5,), "rounds": (30,), "seeds": 1, "plain": False},
    "one clip": {"clips": (0.5,)},
    "one number of rounds": {"rounds": (30,)},
    "one epsilon": {"epsilons": (2,)},
    "no plain runs": {"plain": False},
    "no noise-free runs": {"epsilons": (1, 2)},
    "many": {
        "epsilons": (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 4, 6, 8),
        "clips": (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1, 10),
        "rounds": (10, 20, 30, 50, 60, 100, 150, 300),
        "seeds": 2,
    },
}


def overlapping(boxes):
    return [(a, b) for i, a in enumerate(boxes) for b in boxes[i + 1 :] if a.overlaps(b)]


def check_layout(figure):
    """Nothing is cut, nothing covers anything else."""
    figure.draw_without_rendering()
    axes = figure.axes[0]
    (text,) = [t for t in figure.texts if t.get_text()]
    parts = {
        "axes": axes.get_window_extent(),
        "legend": axes.get_legend().get_window_extent(),
        "x label": axes.xaxis.label.get_window_extent(),
        "y label": axes.yaxis.label.get_window_extent(),
        "caption": text.get_window_extent(),
    }
    for name, box in parts.items():
        assert box.x0 >= 0, name
        assert box.y0 >= 0, name
        assert box.x1 <= figure.bbox.x1, name
        assert box.y1 <= figure.bbox.y1, name
    assert not overlapping(list(parts.values()))
    assert parts["axes"].height > 0.4 * figure.bbox.height
    for axis in (axes.xaxis, axes.yaxis, *(child.xaxis for child in axes.child_axes)):
        assert not overlapping([t.get_window_extent() for t in axis.get_ticklabels() if t.get_text()])


@pytest.mark.parametrize("chart", CHARTS)
@pytest.mark.parametrize("grid", GRIDS)
def test_every_grid_is_drawn_and_laid_out(make, chart, grid):
    figure = chart(make(**GRIDS[grid]))
    assert isinstance(figure, Figure)
    assert ("non-private" in legend(figure)) == (grid not in ("one of each", "no plain runs"))
    if grid == "one of each":
        assert len(drawn(figure)) == 1
        assert not [c for c in figure.axes[0].collections if isinstance(c, FillBetweenPolyCollection)]
        assert "One seed per point" in caption(figure)
    check_layout(figure)


def test_a_lone_point_has_its_interval_as_a_bar_and_stays_where_it_is(make):
    frame = make(epsilons=(1, 2), clips=(0.5,), rounds=(30,), plain=False)
    figure = charts.clipping(frame)
    axes = figure.axes[0]
    assert [len(c.get_segments()) for c in axes.collections if isinstance(c, LineCollection)] == [1, 1]
    assert [line.get_xdata()[0] for line in axes.lines] == [0.5, 0.5]
    places = [line.get_transform().transform(line.get_xydata())[0] for line in axes.lines]
    assert abs(places[0][0] - places[1][0]) > 5
    low, high = axes.get_ylim()
    assert low < frame["accuracy"].min()
    assert high < 1.03


@pytest.mark.parametrize("chart", CHARTS)
def test_runs_of_several_deltas_are_kept_apart(make, chart):
    loose = make(epsilons=(1, 2, NAN), rounds=(10, 30))
    strict = make(epsilons=(1, 2), rounds=(10, 30), delta=1e-5, plain=False)
    figure = chart(pd.concat([loose, strict]))
    names = [name for name in legend(figure) if "δ" in name]
    assert len(names) == 4
    assert sum(name.endswith("δ = 1e-5") for name in names) == 2
    assert "δ = 1e-5 and 1e-3" in caption(figure)
    styles = {line.get_label(): line.get_linestyle() for line in figure.axes[0].lines}
    assert {styles[name] for name in names} == {"-", ":"}
    name = next(name for name in names if name.endswith("1e-5"))
    alone = drawn(chart(strict))
    assert drawn(figure)[name][1] == pytest.approx(alone[name.removesuffix(", δ = 1e-5")][1])
    check_layout(figure)


def test_plain_runs_alone_show_the_frequency_and_nothing_else(make):
    frame = make()
    frame = frame[frame["mechanism"] == "none"]
    figure = charts.round_frequency(frame)
    assert legend(figure) == ["non-private"]
    assert "No run has a privacy guarantee." in caption(figure)
    with pytest.raises(InputError, match=r"^No finished run has a target epsilon, .*it\.$"):
        charts.epsilon(frame)
    with pytest.raises(InputError, match=r"^No finished run has a fixed clip norm, .*it\.$"):
        charts.clipping(frame)


@pytest.mark.parametrize("chart", CHARTS)
def test_a_frame_that_no_study_returns_is_refused(runs, chart):
    with pytest.raises(InputError, match=r"^The frame lacks rounds: "):
        chart(runs.drop(columns="rounds"))


def test_colours_are_ordered_dark_enough_and_markers_distinct(runs):
    lines = [line for line in charts.clipping(runs).axes[0].lines if line.get_label() != "non-private"]
    light = [np.dot([0.2126, 0.7152, 0.0722], np.asarray(line.get_color())[:3]) for line in lines]
    assert light == sorted(light)
    assert light[-1] < 0.75
    assert len({line.get_marker() for line in lines}) == len(lines) == 6


def test_a_users_style_is_neither_used_nor_changed(runs):
    with mpl.rc_context({"font.size": 30, "axes.labelsize": 40, "xtick.labelsize": 30}):
        figure = charts.clipping(runs)
        assert mpl.rcParams["font.size"] == 30
    check_layout(figure)


def test_the_charts_need_no_tensorflow_no_pyplot_and_no_display():
    code = (
        "import sys, dpfl.charts; "
        "print(sorted({'tensorflow', 'keras', 'sklearn'} & sys.modules.keys()), "
        "'matplotlib.pyplot' in sys.modules)"
    )
    environment = {key: value for key, value in os.environ.items() if key not in ("DISPLAY", "MPLBACKEND")}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n")[0] == "[] False"
