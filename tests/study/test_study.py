"""Studies: grids, what is kept, and what a crash or a second worker may not change."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import dpfl
from dpfl.cli import main
from dpfl.privacy import Privacy
from dpfl.study import grid, tradeoff, tuning_prices
from dpfl.study.store import Store
from dpfl.study.workers import Planned, tasks_of


def test_grid_is_a_product_and_tuples_change_together(base: dpfl.Experiment) -> None:
    axes = {"privacy.epsilon": [1, None], ("rounds", "local.steps"): [(2, 6), (4, 3)], "mechanism.clip_norm": [1.0]}
    points = [(one.privacy.epsilon, one.rounds, one.local.steps, one.mechanism.clip_norm) for one in grid(base, axes)]
    assert points == [(1, 2, 6, 1), (1, 4, 3, 1), (None, 2, 6, 1), (None, 4, 3, 1)]
    with pytest.raises(dpfl.InputError, match="did you mean 'epsilon'"):
        grid(base, {"privacy.epsilom": [1]})


def test_same_experiments_are_run_once(base: dpfl.Experiment) -> None:
    study = dpfl.Study([base, base.replace(rounds=4), base.replace(rounds=5)], seeds=[3, 7])
    assert len(study.experiments) == 2
    assert len(set(study.run_ids)) == 4


def test_runs_that_differ_in_numbers_alone_share_a_task(base: dpfl.Experiment) -> None:
    axes = {"privacy.epsilon": [4, None], "mechanism.clip_norm": [0.1, 0.5, 2], "rounds": [4, 6]}
    experiments = [*grid(base, axes), base.replace(model="cnn")]
    planned = {index: Planned(each, each.plan(), None) for index, each in enumerate(experiments)}
    runs = [(index, seed) for index in planned for seed in (0, 1)]
    tasks = tasks_of(planned, runs, workers=2, together=True)
    assert sorted((index, task.seed) for task in tasks for index in task.experiments) == runs
    assert sorted(len(task.experiments) for task in tasks) == [1, 1, 6, 6, 6, 6]
    for task in tasks:
        assert len({experiments[index].rounds for index in task.experiments}) == 1
    # No worker goes without work, and runs that are kept while they go on train alone.
    assert max(len(task.experiments) for task in tasks_of(planned, runs, workers=13, together=True)) == 2
    assert all(len(task.experiments) == 1 for task in tasks_of(planned, runs, workers=2, together=False))


def test_tuning_costs_more_the_more_there_is_to_choose(base: dpfl.Experiment) -> None:
    axes = {"privacy.epsilon": [1, 4, None], "mechanism.clip_norm": [0.1, 0.5, 2], "rounds": [4, 6]}
    study = dpfl.Study(base, axes)
    clips = tuning_prices(study, ["mechanism.clip_norm"])
    everything = tuning_prices(study, ["mechanism.clip_norm", "rounds"])
    nothing = tuning_prices(study, ["local.steps"])
    assert list(clips) == list(everything) == list(nothing) == [1, 4]
    for epsilon in (1, 4):
        assert epsilon < nothing[epsilon] < clips[epsilon] < everything[epsilon] < 6 * epsilon
    # Only the dearest number of rounds matters, at each Renyi order.
    plans = [base.replace(**{"privacy.epsilon": 1, "rounds": count}).plan() for count in (4, 6)]
    alone = [dpfl.privacy.best_of(plan.event(), 1e-2, trials=6) for plan in plans]
    assert max(alone) <= everything[1] <= 1.05 * max(alone)


@pytest.mark.parametrize("seeds", [0, [], [-1]])
def test_seeds_are_checked(base: dpfl.Experiment, seeds: object) -> None:
    with pytest.raises(dpfl.InputError, match="seed"):
        dpfl.Study(base, seeds=seeds)


def test_tradeoff_holds_local_work_fixed_and_adds_plain_averaging() -> None:
    options: dict = {
        "epsilons": [1, None],
        "clip_norms": [0.5, 1],
        "rounds": [2, 6],
        "privacy": Privacy(epsilon=None, delta=1e-3),
        "cohort": 10,
        "batch_size": 5,
        "learning_rate": 0.1,
        "server": dpfl.ServerOptimizer(),
        "seeds": 2,
    }
    study = tradeoff(dpfl.data.digits(), local_work=6, **options)
    assert {one.rounds * one.local.steps for one in study.experiments} == {6}
    plain = [one for one in study.experiments if one.mechanism.name == "none"]
    assert [one.rounds for one in plain] == [2, 6]
    assert len(study.experiments) == 2 * 2 * 2 + 2
    with pytest.raises(dpfl.InputError, match="cannot be split evenly into 6 rounds"):
        tradeoff(dpfl.data.digits(), local_work=10, **options)
    with pytest.raises(dpfl.InputError, match="at least one clip norm"):
        tradeoff(dpfl.data.digits(), local_work=6, **{**options, "clip_norms": []})


def test_study_keeps_runs_and_goes_on(base: dpfl.Experiment, tmp_path: Path) -> None:
    study = dpfl.Study(base, {"privacy.epsilon": [4, None]}, seeds=2)
    assert study.pending(tmp_path) == 4
    frame = study.run(tmp_path, workers=2, progress=False).frame()
    assert study.pending(tmp_path) == 0
    assert list(frame["run_id"]) == study.run_ids
    direct = base.replace(**{"privacy.epsilon": 4}).run(1, progress=False)
    row = frame[(frame["epsilon"] == 4) & (frame["seed"] == 1)].iloc[0]
    assert row["accuracy"] == direct.accuracy
    np.testing.assert_allclose(row["loss"], direct.loss, rtol=1e-6)
    assert study.history().groupby("run_id")["round"].max().tolist() == [4] * 4

    records = tmp_path / "records"
    kept = {path.name: path.stat().st_mtime_ns for path in records.iterdir()}
    broken, empty, gone = sorted(kept)[:3]
    (records / broken).write_text('{"record": {"run_id"')
    (records / empty).write_text("{}")
    (records / gone).unlink()
    assert study.pending(tmp_path) == 3
    again = study.run(tmp_path, workers=1, progress=False).frame()
    pd.testing.assert_frame_equal(again.drop(columns="seconds"), frame.drop(columns="seconds"))
    untouched = set(kept) - {broken, empty, gone}
    assert all((records / name).stat().st_mtime_ns == kept[name] for name in untouched)
    csv = pd.read_csv(tmp_path / "runs.csv")
    pd.testing.assert_frame_equal(csv, again.astype({"local_epochs": float}), check_dtype=False)
    guarantee = json.loads((records / broken).read_text())["guarantee"]
    assert {"epsilon", "delta", "unit", "relation", "sampler", "accountant", "assumptions"} <= set(guarantee)


def test_both_guarantees_travel_through_workers_and_are_verified(
    base: dpfl.Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    users = base.replace(**{"local.example_clip": 1.0, "local.example_noise": 2.0, "privacy.delta": 1e-4})
    private = dpfl.ClientTraining(learning_rate=0.3, batch_size=5, steps=2, example_clip=1.0, optimizer="adam")
    examples = users.replace(mechanism=dpfl.NoMechanism(), local=private, **{"privacy.unit": "example"})
    study = dpfl.Study([users, examples], seeds=1).run(tmp_path, workers=2, progress=False)
    frame = study.frame()
    assert frame["unit"].tolist() == ["user", "example"]
    assert frame["client_optimizer"].tolist() == ["sgd", "adam"]
    assert frame["example_noise_multiplier"].tolist() == [2.0, examples.client_plan().noise_multiplier]
    assert (frame["epsilon_spent"] <= 8).all()
    assert frame["example_epsilon"][1] == frame["epsilon_spent"][1] != frame["example_epsilon"][0]
    assert frame["user_epsilon"][0] == frame["epsilon_spent"][0]
    assert np.isnan(frame["user_epsilon"][1])
    for experiment, column in ((users, "user_epsilon"), (users, "example_epsilon"), (examples, "example_epsilon")):
        path = tmp_path / "records" / f"{experiment.run_id(0)}.json"
        content = json.loads(path.read_text())
        assert content["guarantee"]["unit"] == experiment.privacy.unit
        assert content["example_guarantee"] == experiment.client_plan().guarantee.as_dict()
        monkeypatch.setattr(sys, "argv", ["dpfl", "verify", str(path)])
        with contextlib.suppress(SystemExit):
            main()
        assert capsys.readouterr().out.count("confirmed") == (2 if experiment is users else 1)
        content["record"][column] /= 2
        path.write_text(json.dumps(content))
        with pytest.raises(SystemExit) as refused:
            main()
        content["record"][column] *= 2
        path.write_text(json.dumps(content))
        assert refused.value.code == 2
        assert "do not rely on it" in capsys.readouterr().err


def test_tuning_prices_of_example_level_targets(base: dpfl.Experiment) -> None:
    private = dpfl.ClientTraining(learning_rate=0.3, batch_size=5, steps=2, example_clip=1.0)
    privacy = dpfl.Privacy(unit="example", epsilon=2.0, delta=1e-4)
    examples = base.replace(mechanism=dpfl.NoMechanism(), local=private, privacy=privacy)
    study = dpfl.Study(examples, {"local.learning_rate": [0.1, 0.2, 0.3]})
    event = examples.client_plan().guarantee.privacy_event()
    assert tuning_prices(study, ["local.learning_rate"]) == {2.0: dpfl.privacy.best_of(event, 1e-4, trials=3)}


def test_models_made_in_a_notebook_reach_the_workers(base: dpfl.Experiment, tmp_path: Path) -> None:
    import tensorflow as tf

    units = 4
    experiment = base.replace(
        model=lambda: tf.keras.Sequential(
            [tf.keras.layers.Flatten(), tf.keras.layers.Dense(units), tf.keras.layers.Dense(10)]
        )
    )
    frame = dpfl.Study(experiment, seeds=1).run(tmp_path, workers=1, progress=False).frame()
    assert frame["parameters"].tolist() == [64 * 4 + 4 + 4 * 10 + 10]
    assert frame["status"].tolist() == ["finished"]


def test_axes_are_lists_of_values(base: dpfl.Experiment) -> None:
    for axes in ({"server.name": "sgd"}, {("rounds", "local.steps"): [(2,)]}):
        with pytest.raises(dpfl.InputError, match="must be a list"):
            dpfl.Study(base, axes)


def test_seeds_may_come_from_numpy_and_count_once(base: dpfl.Experiment) -> None:
    assert dpfl.Study(base, seeds=np.array([3, 5, 3])).seeds == (3, 5)
    assert dpfl.Study(base, seeds=np.int64(2)).seeds == (0, 1)


def test_modules_that_tensorflow_loads_lazily_reach_the_workers(base: dpfl.Experiment, tmp_path: Path) -> None:
    # As a script's or a notebook's own: its functions travel with the globals that they mention.
    program = f"""
import dpfl
from tensorflow import keras
experiment = dpfl.Experiment(
    data="digits",
    model=lambda: keras.Sequential([keras.layers.Flatten(), keras.layers.Dense(10)]),
    privacy=dpfl.Privacy(epsilon=8, delta=1e-3), sampler=dpfl.Poisson(cohort=30), rounds=2,
)
print(dpfl.Study(experiment, seeds=1).run({str(tmp_path)!r}, workers=1, progress=False).frame()["status"][0])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "finished", done.stderr


def test_what_cannot_be_met_stops_the_study_before_any_run(base: dpfl.Experiment, tmp_path: Path) -> None:
    study = dpfl.Study(base.replace(**{"privacy.delta": 1e-12}), {"privacy.epsilon": [8, 1e-8]}, seeds=1)
    with pytest.raises(dpfl.InputError, match=r"^with epsilon 1e-08, .*cannot be met"):
        study.run(tmp_path, progress=False)
    assert list((tmp_path / "records").iterdir()) == []


def test_one_study_at_a_time_in_a_folder(base: dpfl.Experiment, tmp_path: Path) -> None:
    with Store(tmp_path).lock(), pytest.raises(dpfl.InputError, match="another process"):
        dpfl.Study(base, seeds=1).run(tmp_path, progress=False)


def test_workers_and_results_are_checked(base: dpfl.Experiment, tmp_path: Path) -> None:
    with pytest.raises(dpfl.InputError, match="at least 1 worker"):
        dpfl.Study(base).run(tmp_path, workers=0)
    with pytest.raises(dpfl.InputError, match="call run"):
        dpfl.Study(base).frame()
    (tmp_path / "file").write_text("")
    with pytest.raises(dpfl.InputError, match="cannot be made"):
        dpfl.Study(base).run(tmp_path / "file" / "below")


def _children(parent: int) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True, check=False)
    return [int(line) for line in listed.stdout.split()]


def _alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_kill_9_in_the_middle_loses_no_run_and_leaves_no_worker(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from dpfl.cli import main; main()", "tradeoff"]
    command += ["--epsilon", "2,none", "--clip-norm", "0.5", "--rounds", "150,300", "--local-work", "300"]
    command += ["--seeds", "4", "--out"]
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    subprocess.run([*command, undisturbed, "--workers", "1"], check=True, capture_output=True)

    process = subprocess.Popen([*command, killed], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(killed.glob("records/*.json"))) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    workers = _children(process.pid)
    assert workers
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    finished = len(list(killed.glob("records/*.json")))
    assert finished < 24
    while any(_alive(worker) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)

    again = subprocess.run([*command, killed], check=True, capture_output=True, text=True)
    assert "runs are finished" in again.stdout
    one, other = (pd.read_csv(folder / "runs.csv").drop(columns="seconds") for folder in (undisturbed, killed))
    assert len(one) == 24
    pd.testing.assert_frame_equal(one, other, check_exact=True)
    rounds = (pd.read_parquet(folder / "history.parquet") for folder in (undisturbed, killed))
    pd.testing.assert_frame_equal(*rounds, check_exact=True)
