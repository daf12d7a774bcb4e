"""Which charts a frame supports, what becomes of the others, and where files go."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from chart_reading import caption

from dpfl.charts import everything, tradeoffs
from dpfl.errors import InputError

NAN = float("nan")
ALL = {
    *("epsilon", "clipping", "clipping_map", "round_frequency", "mechanisms", "cohort", "local_steps", "compression"),
    *("convergence", "signal_to_noise", "pareto", "client_epsilons", "small_multiples", "compression_down"),
}


def with_rounds(frame):
    """The frame with the columns that a study adds, and its history."""
    frame = frame.reset_index(drop=True)
    frame = frame.assign(
        run_id=[f"run{i}" for i in range(len(frame))], bytes_up=frame["cohort"] * frame["rounds"] * 2e3
    )
    parts = []
    for run in frame.itertuples():
        number = np.arange(1, run.rounds + 1)
        spent = run.epsilon * number / run.rounds
        values = {"run_id": run.run_id, "round": number, "epsilon_spent": spent, "signal_to_noise": spent}
        parts.append(pd.DataFrame(values | {"accuracy": np.where(number % 5 == 0, 0.5, NAN)}))
    return frame, pd.concat(parts, ignore_index=True)


@pytest.fixture(scope="module")
def tables(make):
    return with_rounds(make(epsilons=(1, 4, NAN), clips=(0.25, 0.5), rounds=(10, 30), seeds=2))


def drawn(results):
    return {name for name, result in results.items() if not result.endswith(".")}


def check(results, folder, formats):
    """Each chart has its files or a sentence, and there is no other file."""
    files = {path for path in Path(folder).rglob("*") if path.is_file()}
    expected = set()
    for name, result in results.items():
        if result.endswith("."):
            assert result.count(". ") == 0, result
        else:
            assert result == str(folder / f"{name}.{formats[0]}")
            expected |= {folder / f"{name}.{suffix}" for suffix in formats}
    assert files == expected


def test_a_trade_off_gets_its_charts_and_the_others_a_reason(tables, tmp_path):
    frame, history = tables
    results = everything.draw_all(frame, history, None, tmp_path, formats=("png",))
    assert set(results) == ALL
    unsupported = {"mechanisms", "cohort", "client_epsilons", "small_multiples", "compression", "compression_down"}
    assert ALL - drawn(results) == unsupported | {"clipping_map"} - set(vars(tradeoffs))
    check(results, tmp_path, ("png",))
    same = "All finished runs have the same {} ({}), so there is nothing to draw against it."
    assert results["cohort"] == same.format("cohort", "90")
    assert results["mechanisms"] == same.format("mechanism", "gaussian")
    assert results["small_multiples"] == same.format("dataset", "digits")
    assert results["client_epsilons"].startswith("There is no table of clients' epsilons")


def test_axes_with_one_value_are_not_drawn(make, tmp_path):
    frame, history = with_rounds(make(epsilons=(1,), clips=(0.5,), rounds=(10,), seeds=2, plain=False))
    results = everything.draw_all(frame, history, None, tmp_path, formats=("svg",))
    assert drawn(results) == {"convergence", "signal_to_noise"}
    assert "the same epsilon (1)" in results["epsilon"]
    assert "the same clip_norm (0.5)" in results["clipping"]
    assert "the same rounds (10)" in results["round_frequency"]
    check(results, tmp_path, ("svg",))


def test_without_a_history_its_charts_have_a_reason(tables, tmp_path):
    results = everything.draw_all(tables[0], None, None, tmp_path, formats=("svg",))
    assert (
        results["convergence"] == results["signal_to_noise"] == "There is no history, which this chart is drawn from."
    )
    assert "epsilon" in drawn(results)


def test_each_dataset_has_its_folder_and_all_share_the_panels(tables, tmp_path):
    frame, history = tables
    other = frame.assign(dataset="synthetic(1,1)", run_id="other" + frame["run_id"], clients=500)
    others = history.assign(run_id="other" + history["run_id"])
    results = everything.draw_all(
        pd.concat([frame, other]), pd.concat([history, others]), None, tmp_path, formats=("svg", "pdf")
    )
    parts = {"digits-300", "synthetic(1,1)-500"}
    assert set(results) == {f"{part}/{chart}" for part in parts for chart in ALL - {"small_multiples"}} | {
        "small_multiples"
    }
    assert {"small_multiples", "digits-300/epsilon", "synthetic(1,1)-500/convergence"} <= drawn(results)
    check(results, tmp_path, ("svg", "pdf"))


def test_runs_under_two_guarantees_are_drawn_apart_each_with_the_ceiling(tables, tmp_path, monkeypatch):
    frame, history = tables
    strict = frame[frame["epsilon"].notna()].assign(relation="replace_one", run_id=lambda rows: "r" + rows["run_id"])
    seen = {}
    monkeypatch.setattr(everything, "save", lambda figure, path: seen.update({str(path.relative_to(tmp_path)): figure}))
    results = everything.draw_all(pd.concat([frame, strict]), history, None, tmp_path, formats=("svg",))
    assert "by replacing one user" in caption(seen["replace_one/epsilon.svg"])
    assert "by adding or removing one user" in caption(seen["add_or_remove_one/epsilon.svg"])
    for name in ("replace_one", "add_or_remove_one"):
        assert "Dashed: federated averaging" in caption(seen[f"{name}/epsilon.svg"])
        assert f"{name}/epsilon" in drawn(results)


def test_charts_over_something_else_show_the_commonest_cohort(make, tmp_path, monkeypatch):
    usual = make(epsilons=(1, 4), clips=(0.25, 0.5), rounds=(10, 30), seeds=2)
    rare = make(epsilons=(1,), clips=(0.25, 0.5), rounds=(10,), seeds=2).assign(cohort=30.0)
    frame, history = with_rounds(pd.concat([rare, usual]))
    seen = {}
    monkeypatch.setattr(everything, "save", lambda figure, path: seen.update({path.stem: figure}))
    results = everything.draw_all(frame, history, None, tmp_path, formats=("svg",))
    assert {"epsilon", "cohort", "pareto"} <= drawn(results)
    assert "300 clients, 90 expected per round." in caption(seen["epsilon"])
    assert "30 to 90 expected per round." in caption(seen["cohort"])
    assert "30 to 90 expected per round." in caption(seen["pareto"])


def test_captions_name_the_value_that_was_kept(tables, tmp_path, monkeypatch):
    frame, history = tables
    usual = frame.assign(local_steps=7, dirichlet_alpha=0.3)
    rare = usual[usual["rounds"] == 10].assign(local_steps=3, run_id=lambda rows: "r" + rows["run_id"])
    alike = usual[usual["rounds"] == 30].assign(dirichlet_alpha=np.inf, run_id=lambda rows: "i" + rows["run_id"])
    seen = {}
    monkeypatch.setattr(everything, "save", lambda figure, path: seen.update({path.stem: figure}))
    results = everything.draw_all(pd.concat([rare, usual, alike]), history, None, tmp_path, formats=("svg",))
    assert {"epsilon", "local_steps", "heterogeneity"} <= drawn(results)
    assert "Local steps in a round: 7. Dirichlet α: 0.3." in caption(seen["epsilon"])
    assert "Local steps in a round" not in caption(seen["local_steps"])
    assert "Local steps in a round: 7." in caption(seen["heterogeneity"])
    assert "Dirichlet α: " not in caption(seen["heterogeneity"])


def test_heterogeneity_is_drawn_where_its_column_is(tables, tmp_path):
    frame, history = tables
    alike = frame.assign(dirichlet_alpha=np.inf, run_id="iid" + frame["run_id"])
    both = pd.concat([frame.assign(dirichlet_alpha=0.3), alike])
    results = everything.draw_all(both, history, None, tmp_path, formats=("svg",))
    assert set(results) == ALL | {"heterogeneity"}
    assert {"heterogeneity", "epsilon"} <= drawn(results)
    one = everything.draw_all(alike, history, None, tmp_path, formats=("svg",))
    assert "the same dirichlet_alpha (inf)" in one["heterogeneity"]


def test_prices_are_stated_where_the_clip_norm_is_chosen(tables, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(everything, "save", lambda figure, path: seen.update({path.stem: figure}))
    everything.draw_all(*tables, None, tmp_path, formats=("svg",), prices={1: 2.5, 4: 7.5})
    for name in ("epsilon", "round_frequency"):
        assert "would cost ε = 2.5 and 7.5 instead of 1 and 4." in caption(seen[name])


def test_wrong_formats_and_frames_are_refused_before_anything_is_drawn(tables, tmp_path):
    for formats in ((), ("gif",), ("png", "gif")):
        with pytest.raises(InputError, match=r"^Figures can be written as png, svg and pdf, .*\.$"):
            everything.draw_all(*tables, None, tmp_path, formats=formats)
    with pytest.raises(InputError, match=r"^The frame lacks dataset: .*\.$"):
        everything.draw_all(tables[0].drop(columns="dataset"), None, None, tmp_path)
    assert not list(tmp_path.iterdir())
