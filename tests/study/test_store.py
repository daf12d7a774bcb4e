"""The folder of a study: copied, merged, read without dpfl, broken, and done again by a later version."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

import dpfl
from dpfl.simulation.experiment import Experiment
from dpfl.study import Store, Study

SameRuns = Callable[[pd.DataFrame, pd.DataFrame], None]


@pytest.fixture(scope="module")
def study(base: Experiment) -> Study:
    return Study(base, {"privacy.epsilon": [4, None], "mechanism.clip_norm": [0.5, 1]}, seeds=2, ceiling=True)


@pytest.fixture(scope="module")
def ended(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ended")
    study.run(folder, workers=1, progress=False)
    return folder


def change(path: Path, **record: object) -> None:
    content = json.loads(path.read_text())
    content["record"] |= record
    path.write_text(json.dumps(content))


def test_tables_can_be_read_without_dpfl(ended: Path, study: Study) -> None:
    runs, rounds = pd.read_parquet(ended / "runs.parquet"), pd.read_parquet(ended / "history.parquet")
    assert sorted(study.run_ids) == runs["run_id"].tolist()
    assert len(rounds) == 4 * len(runs)
    assert {"epsilon_spent", "clip_norm", "update_norm", "clipped_fraction"} <= set(rounds)
    described = json.loads((ended / "study.json").read_text())
    assert described["run_ids"] == study.run_ids
    assert [one["privacy"]["epsilon"] for one in described["experiments"]] == [4, 4, None, None, None]
    assert pd.read_csv(ended / "runs.csv")["run_id"].tolist() == study.run_ids
    assert len({tuple(row) for row in runs[["configuration", "seed"]].to_numpy()}) == 10


def test_frame_is_the_same_from_tables_and_from_records(ended: Path, study: Study, tmp_path: Path) -> None:
    shutil.copytree(ended / "records", tmp_path / "bare" / "records")
    bare, collected = Store(tmp_path / "bare"), Store(ended)
    pd.testing.assert_frame_equal(bare.frame(study.run_ids), collected.frame())
    pd.testing.assert_frame_equal(bare.history(study.run_ids), collected.history())
    assert bare.frame()["run_id"].tolist() == sorted(study.run_ids)
    # Partly collected: two runs changed since, and the tables are written anew.
    shutil.copytree(ended, tmp_path / "partly")
    for run_id in study.run_ids[:2]:
        change(tmp_path / "partly" / "records" / f"{run_id}.json", accuracy=0.125)
    partly = Store(tmp_path / "partly")
    assert partly.frame()["accuracy"].tolist()[:2] == [0.125, 0.125]
    partly.collect()
    changed = partly.frame()
    pd.testing.assert_frame_equal(changed.drop(columns="accuracy"), collected.frame().drop(columns="accuracy"))


def test_folders_are_merged_by_copying(base: Experiment, same_runs: SameRuns, study: Study, tmp_path: Path) -> None:
    both = [base.replace(rounds=rounds) for rounds in (3, 4)]
    for place, experiment in zip(("one", "other"), both, strict=True):
        Study(experiment, seeds=2).run(tmp_path / place, workers=1, progress=False)
    for record in (tmp_path / "other" / "records").iterdir():
        shutil.copy(record, tmp_path / "one" / "records")
    merged = Study(both, seeds=2)
    assert merged.pending(tmp_path / "one") == 0
    assert len(Store(tmp_path / "one").frame()) == 4
    whole = merged.run(tmp_path / "whole", workers=1, progress=False).frame()
    same_runs(merged.run(tmp_path / "one", progress=False).frame(), whole)


@pytest.mark.parametrize("broken", ["", "{}", '{"record": {"run_id"', '{"record": 3}', "\x00", "history"])
def test_a_record_that_is_no_whole_one_counts_as_absent(ended: Path, study: Study, tmp_path: Path, broken: str) -> None:
    shutil.copytree(ended, tmp_path / "copy")
    store = Store(tmp_path / "copy")
    path = store.folder / "records" / f"{study.run_ids[3]}.json"
    if broken == "history":
        content = json.loads(path.read_text())
        content["history"]["loss"].pop()
        broken = json.dumps(content)
    path.write_text(path.read_text()[:200] if broken == "\x00" else broken)
    assert study.pending(store.folder) == 1
    assert store.frame()["run_id"].tolist() == [one for one in study.run_ids if one != study.run_ids[3]]


@pytest.mark.parametrize("name", ["runs.parquet", "history.parquet", ".collected.json"])
def test_tables_that_are_broken_or_gone_are_made_anew(ended: Path, study: Study, tmp_path: Path, name: str) -> None:
    expected = Store(ended).frame()
    for damage in (lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:50])):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(ended, folder)
        damage(folder / name)
        store = Store(folder)
        pd.testing.assert_frame_equal(store.frame(), expected)
        store.collect()
        assert (folder / name).stat().st_size > 50


def test_the_latest_version_of_a_run_counts(ended: Path, study: Study, tmp_path: Path) -> None:
    shutil.copytree(ended / "records", tmp_path / "records")
    store, run_id = Store(tmp_path), study.run_ids[0]
    record = store.folder / "records" / f"{run_id}.json"
    for version, accuracy in (("0.9.0", 0.1), ("0.10.1", 0.2), ("0.1.0", 0.3)):
        other = store.folder / "records" / f"other{version}.json"
        other.write_text(record.read_text())
        change(other, run_id=other.stem, dpfl_version=version, accuracy=accuracy)
    frame = store.frame()
    assert len(frame) == len(study.run_ids)
    row = frame[(frame["configuration"] == study.experiments[0].configuration) & (frame["seed"] == 0)]
    assert row["accuracy"].tolist() == [0.2]
    # What the latest study in the folder did itself counts before all others.
    store.describe({"run_ids": study.run_ids})
    assert store.frame()["run_id"].tolist() == study.run_ids


def test_ceiling_is_plain_averaging_once_for_each_number_of_rounds(base: Experiment) -> None:
    private = dpfl.ClientTraining(learning_rate=0.3, batch_size=5, steps=2, example_clip=1.0)
    privacy = dpfl.Privacy(unit="example", epsilon=2.0, delta=1e-4)
    examples = base.replace(mechanism=dpfl.NoMechanism(), local=private, privacy=privacy)
    study = Study([base, examples], {"privacy.epsilon": [1, 2], "rounds": [3, 4]}, ceiling=True)
    plain = [one for one in study.experiments if one.privacy.epsilon is None]
    assert [one.rounds for one in plain] == [3, 4]
    assert all(one.mechanism.name == "none" and not one.local.is_private for one in plain)
    assert len(study.experiments) == 2 * 2 * 2 + 2


def test_client_epsilons_and_guarantees(base: Experiment, tmp_path: Path) -> None:
    private = dpfl.ClientTraining(learning_rate=0.3, batch_size=5, steps=2, example_clip=1.0)
    privacy = dpfl.Privacy(unit="example", epsilon=2.0, delta=1e-4)
    examples = base.replace(mechanism=dpfl.NoMechanism(), local=private, privacy=privacy)
    study = Study([examples, base], seeds=1).run(tmp_path, workers=1, progress=False)
    epsilons = study.client_epsilons()
    assert epsilons["client"].tolist() == list(range(40))
    assert set(epsilons["run_id"]) == {study.run_ids[0]}
    result = examples.run(0, progress=False)
    assert epsilons["epsilon"].tolist() == result.client_epsilons.epsilons.tolist()
    store = Store(tmp_path)
    assert store.guarantee(study.run_ids[0]) == result.guarantee
    with pytest.raises(dpfl.InputError, match="no guarantee"):
        store.guarantee("nothing")


def test_a_folder_without_a_study(tmp_path: Path) -> None:
    with pytest.raises(dpfl.InputError, match="is not the folder of a study"):
        Store.existing(tmp_path)
    assert Store(tmp_path).frame().empty
    assert Store(tmp_path).history().empty
    assert Store(tmp_path).client_epsilons().empty
