"""Accuracy against bytes: which points there are, where, which of them nothing beats, and what is left out."""

import numpy as np
import pandas as pd
import pytest
from chart_reading import caption, check_layout, drawn, legend, mean

from dpfl import charts
from dpfl.errors import InputError

NAN = float("nan")
WHOLE = 2600.0
# Name in the column compression: its settings, bytes up, bytes down, and what it costs in accuracy.
WAYS = {
    "none": ({}, WHOLE, WHOLE, 0.0),
    "4 bits": ({"bits": 4.0}, 352.0, WHOLE, 0.01),
    "1 bit rotated": ({"bits": 1.0, "rotation": True}, 120.0, WHOLE, 0.3),
    "random k 0.125": ({"random_k": 0.125}, 324.0, WHOLE, 0.05),
    "random k 0.5, 4 bits": ({"random_k": 0.5, "bits": 4.0}, 176.0, WHOLE, 0.0),
    "rank 4": ({"rank": 4.0}, 200.0, WHOLE, 0.2),
    "sparsity 0.8": ({"sparsity": 0.8}, 1018.0, 1089.0, 0.1),
    "top k 0.1 with feedback": ({"top_k": 0.1, "error_feedback": True}, WHOLE, 1097.0, 0.0),
}
PLAIN = {
    "bits": NAN,
    "rotation": False,
    "random_k": NAN,
    "rank": NAN,
    "sparsity": 0.0,
    "top_k": NAN,
    "error_feedback": False,
}


@pytest.fixture(scope="module")
def frame(make):
    parts = []
    for name, (settings, up, down, lost) in WAYS.items():
        part = make(epsilons=(1, NAN), clips=(0.25, 0.5), rounds=(100,), plain=False)
        part = part.assign(**{**PLAIN, **settings}, compression=name, update_bytes=up, model_bytes=down)
        for column in ("accuracy", "validation_accuracy"):
            part[column] -= lost
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def test_every_way_that_saves_bytes_up_has_a_point_where_its_bytes_and_accuracy_are(frame):
    figure = charts.compression(frame)
    assert [axes.get_title() for axes in figure.axes] == ["ε = 1", "no noise"]
    ways = ["quantised", "quantised, rotated", "random k", "random k + quantised", "low rank", "pruned"]
    assert sorted(legend(figure)) == sorted(["not compressed", *ways])
    for axes, epsilon in zip(figure.axes, (1, None), strict=True):
        points = {
            float(x[0]): float(y[0])
            for line in axes.lines
            if len(x := np.atleast_1d(line.get_xdata())) == 1 and len(y := np.atleast_1d(line.get_ydata())) == 1
        }
        saving = {name: up for name, (_, up, _, _) in WAYS.items() if not name.startswith("top")}
        assert set(points) == set(saving.values())
        for name, up in saving.items():
            means = [mean(frame, compression=name, epsilon=epsilon, clip_norm=clip) for clip in (0.25, 0.5)]
            liked = [
                mean(frame, "validation_accuracy", compression=name, epsilon=epsilon, clip_norm=clip)
                for clip in (0.25, 0.5)
            ]
            assert points[up] == pytest.approx(means[int(np.argmax(liked))])
    texts = {text.get_text() for text in figure.axes[0].texts}
    assert {"4 bits", "1 bit", "12.5%", "50%, 4 bits", "rank 4", "80%"} <= texts
    assert "user-level (ε, δ)-differential privacy" in caption(figure)
    assert "Bytes that a client sends: in a round" in caption(figure)
    check_layout(figure)


def test_points_are_full_if_nothing_has_their_accuracy_for_fewer_bytes(frame):
    figure = charts.compression(frame)
    full = {
        float(line.get_xdata()[0])
        for line in figure.axes[0].lines
        if line.get_marker() not in ("None", "h")
        and len(line.get_xdata()) == 1
        and line.get_markerfacecolor() != "white"
    }
    # 1 bit is cheapest; random k with 4 bits is as good as all, and cheaper than the others; rank 4 is worse.
    assert {120.0, 176.0} <= full
    assert not full & {200.0, 324.0, 1018.0}


def test_bytes_down_show_what_makes_the_model_smaller(frame):
    figure = charts.compression(frame, "down")
    assert sorted(legend(figure)) == ["not compressed", "pruned", "top k with feedback"]
    assert figure.axes[0].get_xlabel() == "Bytes that a client receives"
    assert {1089.0, 1097.0, WHOLE} <= {float(x[0]) for x, _ in drawn(figure).values() if len(x) == 1} | {
        float(line.get_xdata()[0]) for line in figure.axes[0].lines if len(line.get_xdata()) == 1
    }


def test_other_charts_take_the_commonest_compression_and_name_it(frame, tmp_path):
    made = charts.draw_all(frame, None, None, tmp_path, formats=("png",))
    assert made["compression"].endswith("compression.png")
    assert made["compression_down"].endswith("compression_down.png")
    assert made["clipping"].endswith(".png")
    only = frame[frame["compression"] == "4 bits"]
    assert "Compression: 4 bits." in caption(charts.clipping(only))
    with pytest.raises(InputError, match="differ in compression"):
        charts.clipping(frame)


def test_pareto_settings_are_told_apart_by_their_compression(frame):
    counted = frame.assign(bytes_up=frame["update_bytes"] * 9000)
    front = charts.pareto_front(counted)
    assert "random k 0.5, 4 bits" in set(front["compression"])
    assert "rank 4" not in set(front["compression"])


def test_what_cannot_be_drawn_is_said(frame):
    with pytest.raises(InputError, match="There is no traffic 'sideways': choose up and down"):
        charts.compression(frame, "sideways")
    with pytest.raises(InputError, match="No finished run saves bytes"):
        charts.compression(frame[frame["compression"] == "none"])
    with pytest.raises(InputError, match="lacks update_bytes"):
        charts.compression(frame.drop(columns="update_bytes"))
