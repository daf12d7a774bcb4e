"""Panels side by side, read back and compared with the frame by hand."""

import pandas as pd
import pytest
from chart_reading import best_setting, caption, check_layout, legend, mean, ticks

from dpfl.charts.multiples import small_multiples
from dpfl.errors import InputError

NAN = float("nan")
NAMES = ("digits", "femnist", "mnist", "shakespeare", "synthetic(1,1)")


@pytest.fixture(scope="module")
def sets(make):
    """Five datasets, of which the second has another delta, fewer epsilons and no noise-free runs."""
    parts = []
    for place, dataset in enumerate(NAMES):
        epsilons, delta = ((1, 4), 1e-5) if place == 1 else ((1, 2, 4, NAN), 1e-3)
        part = make(epsilons=epsilons, clips=(0.25, 0.5, 1), rounds=(10, 30, 100), delta=delta)
        lower = {name: part[name] - 0.05 * place for name in ("accuracy", "validation_accuracy")}
        parts.append(part.assign(dataset=dataset, clients=300 + place, **lower))
    return pd.concat(parts, ignore_index=True)


def panels(figure):
    return {axes.get_title(): axes for axes in figure.axes}


def lines(axes):
    """The lines with data, as (x, y)."""
    return [(line.get_xdata(), line.get_ydata()) for line in axes.lines if len(line.get_xdata())]


def test_each_panel_has_the_best_of_its_grid_and_its_ceiling(sets):
    figure = small_multiples(sets)
    assert tuple(panels(figure)) == NAMES
    assert legend(figure) == ["non-private", "private"]
    for name, axes in panels(figure).items():
        frame = sets[sets["dataset"] == name]
        ceiling, noisy, *free = lines(axes)
        epsilons = [1, 4] if name == "femnist" else [1, 2, 4]
        assert list(noisy[0]) == epsilons
        assert noisy[1] == pytest.approx([mean(frame, **best_setting(frame, epsilon=value)) for value in epsilons])
        assert list(ceiling[1]) == pytest.approx([mean(frame, mechanism="none", rounds=100)] * 2)
        assert ticks(axes.xaxis)[-1] == ("4" if name == "femnist" else "no\nnoise")
        if name != "femnist":
            ((x, y),) = free
            assert x[0] > 4
            assert y[0] == pytest.approx(mean(frame, **best_setting(frame, epsilon=None)))
    check_layout(figure)


def test_the_panels_share_their_accuracy_axis(sets):
    figure = small_multiples(sets)
    limits = {axes.get_ylim() for axes in figure.axes}
    assert len(limits) == 1
    (low, high) = limits.pop()
    assert low < 0.7
    assert high > 0.94


def test_guarantees_that_differ_are_stated_for_their_datasets(sets):
    text = caption(small_multiples(sets))
    first, second = text.split("femnist: Guarantee: ")
    assert "digits, mnist, shakespeare and synthetic(1,1): Guarantee: user-level" in first
    assert "δ = 1e-3" in first
    assert "δ = 1e-5" in second
    assert "Dataset femnist, model softmax, 301 clients" in second
    alike = caption(small_multiples(sets[sets["dataset"] != "femnist"]))
    assert alike.count("Guarantee") == 1
    assert "digits, mnist" not in alike
    assert "means over 3 seeds; bands and bars: 95% Student-t intervals" in alike


@pytest.mark.parametrize(("chart", "column"), [("clipping", "clip_norm"), ("round_frequency", "rounds")])
def test_other_charts_have_a_line_per_epsilon_in_the_same_colours(sets, chart, column):
    figure = small_multiples(sets, chart=chart)
    assert legend(figure) == ["non-private", "no noise", "4", "2", "1"]
    for name, axes in panels(figure).items():
        frame = sets[sets["dataset"] == name]
        drawn = lines(axes)[1:]
        epsilons = [4, 1] if name == "femnist" else [None, 4, 2, 1]
        for epsilon, (x, y) in zip(epsilons, drawn, strict=True):
            assert list(x) == sorted(frame[column].dropna().unique())
            assert y == pytest.approx([mean(frame, **best_setting(frame, epsilon=epsilon, **{column: v})) for v in x])
    colors = [[tuple(line.get_color()) for line in axes.lines if line.get_linestyle() == "-"] for axes in figure.axes]
    assert colors[1] == [colors[2][1], colors[2][3]]
    check_layout(figure)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_any_number_of_panels_is_laid_out(sets, count):
    figure = small_multiples(sets[sets["dataset"].isin(NAMES[:count])])
    assert len(figure.axes) == count
    check_layout(figure)


def test_many_epsilons_have_room_in_narrow_panels(make):
    many = make(epsilons=(0.5, 1, 2, 4, 8, NAN), clips=(0.5,), rounds=(30,))
    check_layout(small_multiples(pd.concat([many.assign(dataset=name) for name in NAMES])))


def test_another_column_can_have_the_panels(sets):
    frame = sets[sets["dataset"] == "digits"]
    frame = pd.concat([frame, frame.assign(model="mlp")])
    figure = small_multiples(frame, by="model")
    assert list(panels(figure)) == ["mlp", "softmax"]


def test_what_cannot_be_drawn_is_said_with_its_panel(sets):
    with pytest.raises(InputError, match=r"^There is no chart 'pie': choose epsilon, clipping and round_frequency\.$"):
        small_multiples(sets, chart="pie")
    with pytest.raises(InputError, match=r"^The frame lacks school: .*\.$"):
        small_multiples(sets, by="school")
    mixed = sets.assign(cohort=sets["cohort"].where(sets.index != len(sets) - 1, 7.0))
    with pytest.raises(InputError, match=r"^synthetic\(1,1\): The runs differ in cohort .*\.$"):
        small_multiples(mixed)
    plain = sets[(sets["dataset"] != "mnist") | (sets["mechanism"] == "none")]
    with pytest.raises(InputError, match=r"^mnist: No finished run has a value of epsilon, .*\.$"):
        small_multiples(plain)
