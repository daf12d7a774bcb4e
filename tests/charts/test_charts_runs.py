import numpy as np
import pandas as pd
import pytest

from dpfl.charts import words
from dpfl.charts.runs import at_fixed_noise, best, clipped, finished, prepare, prepare_clips
from dpfl.errors import InputError

NAN = float("nan")


def refused(frame):
    with pytest.raises(InputError) as caught:
        prepare(frame)
    sentence = str(caught.value)
    assert sentence.endswith(".")
    assert sentence.count(". ") == 0
    return sentence


def small(make):
    return make(epsilons=(1, NAN), clips=(0.5, 1), rounds=(10, 30), seeds=2)


def test_missing_columns_are_named(runs):
    sentence = refused(runs.drop(columns=["accuracy", "delta"]))
    assert "lacks delta and accuracy" in sentence


def test_nothing_finished_is_refused(make):
    frame = small(make)
    assert "None of the 20 runs" in refused(frame.assign(status="diverged"))
    assert "None of the 0 runs" in refused(frame.iloc[:0])


@pytest.mark.parametrize("column", ["dataset", "model", "clients", "cohort"])
def test_runs_that_differ_in_their_task_are_not_averaged(make, column):
    frame = small(make)
    values = frame[column].astype(object)
    values.iloc[0] = 7
    assert f"differ in {column} (" in refused(frame.assign(**{column: values}))


@pytest.mark.parametrize("column", ["mechanism", "unit", "relation", "sampler", "accountant"])
def test_runs_under_different_guarantees_are_not_averaged(make, column):
    frame = small(make)
    frame.loc[0, column] = "other"
    assert f"differ in {column} (" in refused(frame)


def test_a_plain_run_may_differ_from_the_guarantee(make):
    frame = small(make)
    frame.loc[frame["epsilon"].isna(), ["unit", "relation", "sampler", "accountant"]] = "other"
    assert len(prepare(frame)) == len(frame)


def test_noise_without_epsilon_is_left_out_unless_the_chart_knows_it(make):
    frame = small(make)
    at_noise = frame["epsilon"].isna() & (frame["mechanism"] != "none")
    frame.loc[at_noise, "noise_multiplier"] = 0.3
    runs = prepare(frame)
    assert len(runs) == len(frame) - at_noise.sum()
    assert f"{at_noise.sum()} runs at fixed noise" in words.left_out(runs)
    assert len(at_fixed_noise(prepare(frame, fixed_noise=True))) == at_noise.sum()
    assert "have noise but no target epsilon" in refused(frame[at_noise])


def test_failed_runs_are_left_out_and_counted(make):
    frame = small(make)
    frame.loc[:1, "status"] = "failed"
    runs = prepare(frame)
    assert len(runs) == len(frame) - 2
    assert words.left_out(runs) == f"2 of {len(frame)} runs failed: left out."


def test_under_the_unit_example_clip_and_noise_are_those_of_gradients(make):
    frame = small(make)
    private = frame["mechanism"] != "none"
    examples = frame.assign(
        unit="example",
        mechanism="none",
        example_clip_norm=frame["clip_norm"],
        example_noise_multiplier=frame["noise_multiplier"].where(private),
        clip_norm=np.nan,
        noise_multiplier=0.0,
    )
    runs = prepare(examples)
    assert runs["clip_norm"].equals(frame["clip_norm"].reset_index(drop=True))
    assert len(clipped(runs)) == private.sum()
    assert "Some runs clip both" in refused(examples.assign(unit="user"))
    assert "Some runs clip both" in refused(examples.assign(mechanism="gaussian"))


def test_adaptive_clipping_may_stand_beside_fixed_clip_norms(make):
    frame = small(make)
    adaptive = frame[frame["mechanism"] == "gaussian"].assign(mechanism="adaptive_clipping", clip_quantile=0.5)
    both = pd.concat([frame, adaptive], ignore_index=True)
    assert len(prepare_clips(both)) == len(both)
    assert "differ in mechanism (adaptive_clipping and gaussian)" in refused(both)
    two = pd.concat([adaptive, adaptive.assign(clip_quantile=0.3)], ignore_index=True)
    assert "differ in clip_quantile (0.3 and 0.5)" in refused(two)
    with pytest.raises(InputError, match="differ in mechanism"):
        prepare_clips(both.replace("adaptive_clipping", "tree_aggregation"))


def test_a_seed_that_counts_twice_is_refused(make):
    frame = small(make)
    frame.loc[1, "seed"] = 0
    assert "share seed 0, epsilon 1, clip norm 0.5 and 10 rounds" in refused(frame)


def test_epsilon_may_be_none_and_the_frame_is_not_changed(make):
    frame = small(make)
    given = frame.assign(epsilon=frame["epsilon"].astype(object).where(frame["epsilon"].notna(), None))
    before = given.copy()
    assert prepare(given)["epsilon"].isna().sum() == frame["epsilon"].isna().sum()
    assert given.equals(before)


def test_best_is_chosen_on_validation(make):
    frame = make(epsilons=(1,), clips=(0.5, 1, 2), rounds=(10,), plain=False)
    frame["validation_accuracy"] = frame["clip_norm"].map({0.5: 0.8, 1: 0.9, 2: 0.7})
    frame["accuracy"] = frame["clip_norm"].map({0.5: 0.9, 1: 0.6, 2: 0.95})
    assert set(best(frame, ["epsilon"], ["clip_norm"])["clip_norm"]) == {1}


def test_a_diverged_seed_counts_as_nothing_in_the_choice(make, diverge):
    frame = make(epsilons=(1,), clips=(0.5, 1), rounds=(10,), plain=False)
    frame["validation_accuracy"] = frame["clip_norm"].map({0.5: 0.8, 1: 0.99})
    lucky = diverge(frame, (frame["clip_norm"] == 1) & (frame["seed"] > 0))
    assert set(best(lucky, ["epsilon"], ["clip_norm"])["clip_norm"]) == {0.5}


def test_a_choice_needs_validation_accuracy_and_a_lone_value_does_not(make):
    frame = make(epsilons=(1,), clips=(0.5, 1), rounds=(10,), plain=False).assign(validation_accuracy=np.nan)
    with pytest.raises(InputError, match="best clip_norm needs validation_accuracy"):
        best(frame, ["epsilon"], ["clip_norm"])
    alone = frame[frame["clip_norm"] == 1]
    assert len(best(alone, ["epsilon"], ["clip_norm"])) == len(finished(clipped(alone))) == 3
