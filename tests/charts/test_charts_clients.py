"""The distribution of the clients' own epsilons, read back and compared by hand."""

import numpy as np
import pandas as pd
import pytest
from chart_reading import caption, check_layout, drawn, legend

from dpfl.charts.clients import client_epsilons
from dpfl.errors import InputError

NAN = float("nan")


@pytest.fixture(scope="module")
def frame():
    rows = [
        {
            "run_id": f"{epsilon}-{seed}",
            "status": "finished",
            "seed": seed,
            "unit": "example",
            "epsilon": float(epsilon),
            "example_epsilon": epsilon * 0.9996,
            "delta": 1e-4,
            "dataset": "digits",
            "model": "softmax",
            "clients": 40,
            "cohort": 10.0,
            "relation": "add_or_remove_one",
            "mechanism": "none",
        }
        for epsilon in (1, 8)
        for seed in (0, 1)
    ]
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def epsilons(frame):
    rng = np.random.default_rng(5)
    parts = []
    for run in frame.itertuples():
        values = run.example_epsilon * rng.uniform(0.3, 1, 40)
        values[:4] = 0
        parts.append(pd.DataFrame({"run_id": run.run_id, "client": range(40), "epsilon": values}))
    return pd.concat(parts, ignore_index=True)


def test_each_line_counts_the_clients_charged_at_most_so_much(frame, epsilons):
    figure = client_epsilons(epsilons, frame)
    assert legend(figure) == ["8", "1"]
    lines = drawn(figure)
    for epsilon in (1, 8):
        values = epsilons.loc[epsilons["run_id"].str.startswith(f"{epsilon}-"), "epsilon"].to_numpy()
        x, y = lines[str(epsilon)]
        assert (np.diff(x) >= 0).all()
        assert (np.diff(y) >= 0).all()
        for value, share in zip(x[1:], y[1:], strict=True):
            assert share == pytest.approx((values <= value).mean())
        assert y[0] == pytest.approx(0.1)
        assert (x[-1], y[-1]) == (epsilon, 1)
    check_layout(figure)


def test_the_promises_are_dotted_in_the_colour_of_their_line(frame, epsilons):
    axes = client_epsilons(epsilons, frame).axes[0]
    dotted = {line.get_xdata()[0]: tuple(line.get_color()) for line in axes.lines if line.get_linestyle() == ":"}
    solid = {float(line.get_label()): tuple(line.get_color()) for line in axes.lines if line.get_linestyle() == "-"}
    assert dotted == solid
    assert set(dotted) == {1, 8}


def test_the_caption_says_what_may_not_be_released(frame, epsilons):
    text = caption(client_epsilons(epsilons, frame))
    assert "the clients of all runs with that promise, 2 runs a line" in text
    assert "10% of the clients never took part and were charged nothing." in text
    assert "depends on its number of examples and the rounds in which it took part" in text
    assert "not for release" in text
    assert (
        "example-level (ε, δ)-differential privacy, δ = 1e-4; neighbours differ by adding or removing one example"
        in text
    )
    busy = caption(client_epsilons(epsilons[epsilons["epsilon"] > 0], frame[frame["seed"] == 0]))
    assert "never took part" not in busy
    assert "one run a line" in busy


def test_under_a_target_of_users_the_promise_to_examples_is_drawn(frame, epsilons):
    users = frame.assign(unit="user", epsilon=3.0)
    figure = client_epsilons(epsilons, users)
    assert legend(figure) == ["7.997", "0.9996"]


def test_diverged_runs_are_left_out(frame, epsilons):
    lost = frame.assign(status=frame["status"].where(frame["run_id"] != "8-0", "diverged"))
    figure = client_epsilons(epsilons, lost)
    assert len(drawn(figure)["8"][0]) == 36 + 2
    assert "1 of 4 runs diverged" in caption(figure)


def test_what_is_missing_or_mixed_is_said(frame, epsilons):
    with pytest.raises(InputError, match=r"^The frame lacks example_epsilon: .*\.$"):
        client_epsilons(epsilons, frame.drop(columns="example_epsilon"))
    with pytest.raises(InputError, match=r"^The table of clients' epsilons lacks client: .*\.$"):
        client_epsilons(epsilons.drop(columns="client"), frame)
    for none in (frame.assign(example_epsilon=NAN), frame.assign(run_id="other")):
        with pytest.raises(InputError, match=r"^No finished run has epsilons .*\.$"):
            client_epsilons(epsilons, none)
    mixed = frame.assign(dataset=["digits", "mnist", "digits", "digits"])
    with pytest.raises(InputError, match=r"^The runs differ in dataset \(digits and mnist\): .*\.$"):
        client_epsilons(epsilons, mixed)
