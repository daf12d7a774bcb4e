"""The explorer of a finished study: what the sliders choose is what the figure and the sentences say."""

import html
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import dpfl
from dpfl.study import Store

NAN = float("nan")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    experiment = dpfl.Experiment(
        data=dpfl.data.digits(clients=40),
        local=dpfl.ClientTraining(learning_rate=0.3, batch_size=5, steps=2),
        privacy=dpfl.Privacy(epsilon=8, delta=1e-2),
        sampler=dpfl.Poisson(cohort=20),
        rounds=4,
        evaluate_every=1,
    )
    axes = {"privacy.epsilon": [2, 8, None], "mechanism.clip_norm": [0.5, 1], "rounds": [2, 4]}
    folder = tmp_path_factory.mktemp("explored")
    dpfl.Study(experiment, axes, seeds=2, ceiling=True).run(folder, workers=1, progress=False)
    return Store(folder)


def test_sliders_have_the_values_of_the_study(store: Store) -> None:
    values = dpfl.explore.settings(store.frame())
    assert values["clip_norm"] == [0.5, 1]
    assert values["rounds"] == [2, 4]
    assert values["epsilon"][:2] == [2, 8]
    assert np.isnan(values["epsilon"][2])


def test_figure_and_sentences_are_of_the_setting(store: Store) -> None:
    frame, history = store.frame(), store.history()
    for epsilon in (2, NAN):
        setting = {"epsilon": epsilon, "clip_norm": 1, "rounds": 4}
        chosen = dpfl.explore.matching(frame, **setting)
        assert len(chosen) == 2
        left, right = dpfl.explore.figure(frame, history, **setting).axes
        (ring,) = [line for line in left.lines if line.get_markersize() == 13]
        assert ring.get_ydata()[0] == pytest.approx(chosen["accuracy"].mean())
        rounds = history[history["run_id"].isin(chosen["run_id"])].groupby("round")["accuracy"].mean()
        assert right.lines[0].get_ydata() == pytest.approx(rounds.to_numpy())
        said = dpfl.explore.in_words(store, frame, **setting)
        assert f"Test accuracy {chosen['accuracy'].mean():.1%}" in said
        assert ("differential privacy at user level" if epsilon == 2 else "No differential privacy") in said
    assert "no run at this setting" in dpfl.explore.in_words(store, frame, epsilon=3, clip_norm=1, rounds=4)


def test_the_figure_follows_the_sliders(store: Store) -> None:
    box = dpfl.explore.tradeoffs(store)
    epsilon, clip_norm, rounds, image, text = box.children
    seen = {image.value: text.value}
    for slider, value in ((epsilon, 2), (clip_norm, 0.5), (rounds, 2)):
        slider.value = value
        seen[image.value] = text.value
    assert len(seen) == len(set(seen.values())) == 4
    assert all(bytes(png).startswith(b"\x89PNG") for png in seen)
    expected = dpfl.explore.in_words(store, store.frame(), epsilon=2, clip_norm=0.5, rounds=2)
    assert html.unescape(text.value) == expected


def test_adaptive_clipping_beside_fixed_norms_is_left_out(store: Store) -> None:
    frame = store.frame()
    adaptive = frame["mechanism"].where(frame["clip_norm"] != 1, "adaptive_clipping")
    both = frame.assign(mechanism=adaptive, clip_quantile=np.where(frame["clip_norm"] == 1, 0.5, NAN))
    assert dpfl.explore.settings(both)["clip_norm"] == [0.5]
    assert dpfl.explore.settings(both[both["clip_quantile"].notna()])["clip_norm"] == [1]


def test_what_cannot_be_explored(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(dpfl.InputError, match="no run has ended"):
        dpfl.explore.tradeoffs(Store(tmp_path))
    with pytest.raises(dpfl.InputError, match="The frame lacks"):
        dpfl.explore.settings(pd.DataFrame({"a": [1]}))
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(dpfl.InputError, match="sliders need ipywidgets"):
        dpfl.explore.tradeoffs(store)
