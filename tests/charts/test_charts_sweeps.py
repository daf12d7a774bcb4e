"""Accuracy against the cohort, the local work and the heterogeneity, read back and compared by hand."""

import numpy as np
import pandas as pd
import pytest
from chart_reading import best_setting, caption, check_layout, drawn, legend, mean, ticks

from dpfl.charts import sweeps
from dpfl.errors import InputError

NAN = float("nan")


def over(make, column, values, loss=0.03, **grid):
    """Runs at each value of a column, in which accuracy falls with the place of the value."""
    settings = {"epsilons": (1, 4, NAN), "clips": (0.25, 0.5), "rounds": (30, 100), **grid}
    frames = []
    for place, value in enumerate(values):
        frame = make(**settings).assign(**{column: value})
        down = ["accuracy", "validation_accuracy"]
        frames.append(frame.assign(**{name: frame[name] - loss * place for name in down}))
    return pd.concat(frames, ignore_index=True)


def disagreeing(frame):
    """The frame with a clip norm that the test set likes and validation does not."""
    liked = frame["clip_norm"] == 0.25
    validation = frame["validation_accuracy"] - 0.2 * liked
    return frame.assign(accuracy=frame["accuracy"] + 0.03 * liked, validation_accuracy=validation)


def test_cohort_has_a_point_per_cohort_at_the_setting_chosen_on_validation(make):
    frame = disagreeing(over(make, "cohort", (270.0, 90.0, 30.0)))
    figure = sweeps.cohort(frame)
    lines = drawn(figure)
    assert legend(figure) == ["non-private", "no noise", "4", "1"]
    for name, epsilon in (("1", 1), ("4", 4), ("no noise", None)):
        x, y = lines[name]
        assert x.tolist() == [30, 90, 270]
        settings = [best_setting(frame, epsilon=epsilon, cohort=cohort) for cohort in x]
        assert y == pytest.approx([mean(frame, **setting) for setting in settings])
        assert {setting["clip_norm"] for setting in settings} == {0.5}
    x, y = lines["non-private"]
    assert y == pytest.approx([mean(frame, mechanism="none", rounds=100, cohort=cohort) for cohort in x])
    check_layout(figure)


def test_cohort_says_which_fraction_of_the_clients_it_is(make):
    figure = sweeps.cohort(over(make, "cohort", (30.0, 90.0)))
    (top,) = figure.axes[0].child_axes
    assert (ticks(figure.axes[0].xaxis), ticks(top.xaxis)) == (["30", "90"], ["10%", "30%"])
    assert "300 clients, 30 to 90 expected per round." in caption(figure)
    assert "Each point has the clip norm and number of rounds with the best mean validation" in caption(figure)


def test_a_ceiling_at_one_cohort_is_a_level_and_says_where_it_was_measured(make):
    frame = over(make, "cohort", (30.0, 90.0))
    frame = frame[(frame["mechanism"] != "none") | (frame["cohort"] == 90)]
    figure = sweeps.cohort(frame)
    height = mean(frame, mechanism="none", rounds=100)
    assert drawn(figure)["non-private"][1] == pytest.approx([height, height])
    assert "The dashed line was measured at 90 on the x axis." in caption(figure)


def test_the_ceiling_has_its_own_number_of_rounds_at_each_cohort(make):
    frame = over(make, "cohort", (30.0, 90.0), epsilons=(1,), clips=(0.5,))
    short = (frame["mechanism"] == "none") & (frame["cohort"] == 30) & (frame["rounds"] == 30)
    frame.loc[short, "validation_accuracy"] = 0.99
    figure = sweeps.cohort(frame)
    expected = [mean(frame, mechanism="none", cohort=cohort, rounds=rounds) for cohort, rounds in ((30, 30), (90, 100))]
    assert drawn(figure)["non-private"][1] == pytest.approx(expected)
    assert "Dashed: federated averaging without clip and noise." in caption(figure)


def test_local_steps_that_go_with_the_rounds_are_explained(make):
    frame = make(epsilons=(1, 4), clips=(0.25, 0.5), rounds=(10, 30, 100))
    figure = sweeps.local_steps(frame)
    x, y = drawn(figure)["4"]
    assert x.tolist() == [3, 10, 30]
    settings = [best_setting(frame, epsilon=4, local_steps=steps) for steps in x]
    assert [setting["rounds"] for setting in settings] == [100, 30, 10]
    assert y == pytest.approx([mean(frame, **setting) for setting in settings])
    assert "Rounds × local steps is 300 throughout." in caption(figure)
    assert "Each point has the clip norm with the best mean" in caption(figure)
    check_layout(figure)


def test_local_steps_beside_a_free_number_of_rounds_choose_both(make):
    frame = over(make, "local_steps", (1, 3, 9), loss=-0.01)
    figure = sweeps.local_steps(frame)
    x, y = drawn(figure)["1"]
    assert x.tolist() == [1, 3, 9]
    assert y == pytest.approx([mean(frame, **best_setting(frame, epsilon=1, local_steps=steps)) for steps in x])


def test_epochs_stand_in_for_steps_and_both_together_are_refused(make):
    frame = over(make, "local_epochs", (1, 2)).assign(local_steps=NAN)
    figure = sweeps.local_steps(frame)
    assert figure.axes[0].get_xlabel() == "Local epochs of a client in a round"
    assert drawn(figure)["1"][0].tolist() == [1, 2]
    frame.loc[frame["local_epochs"] == 1, ["local_steps", "local_epochs"]] = [5, NAN]
    with pytest.raises(InputError, match=r"^The frame has neither local_steps nor local_epochs for all .*\.$"):
        sweeps.local_steps(frame)


def test_heterogeneity_ends_with_iid_and_has_plain_averaging_at_each_alpha(make):
    frame = over(make, "dirichlet_alpha", (np.inf, 1, 0.1))
    figure = sweeps.heterogeneity(frame)
    assert ticks(figure.axes[0].xaxis) == ["0.1", "1", "iid"]
    lines = drawn(figure)
    for name, where in (("4", {"epsilon": 4}), ("1", {"epsilon": 1})):
        x, y = lines[name]
        assert x.tolist() == sorted(x)
        settings = [best_setting(frame, dirichlet_alpha=alpha, **where) for alpha in (0.1, 1, np.inf)]
        assert y == pytest.approx([mean(frame, **setting) for setting in settings])
    plain = [mean(frame, mechanism="none", rounds=100, dirichlet_alpha=alpha) for alpha in (0.1, 1, np.inf)]
    assert lines["non-private"][1] == pytest.approx(plain)
    assert "iid: examples dealt at random." in caption(figure)
    check_layout(figure)


def test_heterogeneity_without_iid_does_not_speak_of_it(make):
    figure = sweeps.heterogeneity(over(make, "dirichlet_alpha", (1, 0.1)))
    assert ticks(figure.axes[0].xaxis) == ["0.1", "1"]
    assert "iid" not in caption(figure)


@pytest.mark.parametrize("alpha", [0.0, -1.0, NAN])
def test_a_concentration_that_is_none_is_refused(make, alpha):
    frame = over(make, "dirichlet_alpha", (1.0, 0.1))
    with pytest.raises(InputError, match=r"^The frame lacks dirichlet_alpha: .*\.$"):
        sweeps.heterogeneity(frame.drop(columns="dirichlet_alpha"))
    frame.loc[0, "dirichlet_alpha"] = alpha
    with pytest.raises(InputError, match=r"^Some runs have a dirichlet_alpha that is not above 0: .*\.$"):
        sweeps.heterogeneity(frame)


def test_diverged_runs_are_left_out_of_the_means_and_counted(make, diverge):
    frame = over(make, "cohort", (30.0, 90.0), clips=(0.5,), rounds=(30,))
    lost = (frame["cohort"] == 30) & (frame["epsilon"] == 1) & (frame["seed"] == 0)
    figure = sweeps.cohort(diverge(frame, lost))
    rest = frame[(frame["cohort"] == 30) & (frame["epsilon"] == 1) & (frame["seed"] > 0)]
    assert drawn(figure)["1"][1][0] == pytest.approx(rest["accuracy"].mean())
    assert "1 of 24 runs diverged" in caption(figure)
    assert "All clipped runs have clip norm 0.5 and 30 rounds." in caption(figure)


@pytest.mark.parametrize("chart", [sweeps.cohort, sweeps.local_steps])
def test_the_guarantee_is_stated(make, chart):
    text = caption(chart(make(epsilons=(1, 4), clips=(0.5,), rounds=(10, 30))))
    assert "user-level (ε, δ)-differential privacy, δ = 1e-3" in text
    assert "bands and bars: 95% Student-t intervals" in text
