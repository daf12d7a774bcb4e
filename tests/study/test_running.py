"""What becomes of a study whose workers are killed, whose runs raise, and whose disk is full."""

import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tensorflow as tf

import dpfl
from dpfl.simulation.experiment import Experiment
from dpfl.study import Store
from dpfl.study.running import run_names
from dpfl.study.workers import tasks_of

SameRuns = Callable[[pd.DataFrame, pd.DataFrame], None]


class Fatal(tf.keras.layers.Layer):
    """A layer that ends its process, or raises, when a graph with it is traced in a worker of this test."""

    def __init__(self, how: str, folder: str, driver: int) -> None:
        super().__init__(name="fatal")
        self._how, self._folder, self._driver = how, folder, driver

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        attempt = Path(self._folder) / f"{os.getpid()}-{time.monotonic_ns()}"
        if os.getpid() != self._driver and not (Path(self._folder) / "mended").exists():
            attempt.touch()
            if self._how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise MemoryError("no room for the weights")
        return inputs


def fatal(base: Experiment, how: str, folder: Path) -> Experiment:
    """An experiment whose model is fine here and fatal in a worker."""
    place, driver = str(folder), os.getpid()
    return base.replace(
        model=lambda: tf.keras.Sequential(
            [tf.keras.layers.Flatten(), Fatal(how, place, driver), tf.keras.layers.Dense(10)]
        )
    )


@pytest.mark.parametrize("how", ["kill", "raise"])
def test_a_run_that_is_lost_twice_is_recorded_and_the_rest_goes_on(
    base: Experiment, same_runs: SameRuns, tmp_path: Path, how: str
) -> None:
    attempts = tmp_path / "attempts"
    attempts.mkdir()
    bad = fatal(base, how, attempts)
    good = [base.replace(**{"mechanism.clip_norm": clip}) for clip in (0.25, 0.5, 1.0)]
    study = dpfl.Study([good[0], bad, *good[1:]], seeds=2)
    frame = study.run(tmp_path / "study", workers=2, progress=False).frame()
    assert list(frame["run_id"]) == study.run_ids
    assert frame["status"].tolist() == ["finished"] * 2 + ["failed"] * 2 + ["finished"] * 4
    (reason,) = set(frame.loc[frame["status"] == "failed", "reason"])
    assert ("was killed (signal 9)" if how == "kill" else "no room for the weights") in reason
    assert frame["reason"].isna().sum() == 6
    if how == "kill":  # Each of the two runs was tried twice: once, and once more.
        assert len(list(attempts.iterdir())) == 4
    undisturbed = dpfl.Study(good, seeds=2).run(tmp_path / "undisturbed", workers=1, progress=False).frame()
    same_runs(
        frame[frame["status"] == "finished"].dropna(axis=1, how="all").reset_index(drop=True),
        undisturbed.dropna(axis=1, how="all"),
    )

    (attempts / "mended").touch()
    assert study.pending(tmp_path / "study") == 2
    again = study.run(tmp_path / "study", workers=2, progress=False).frame()
    assert set(again["status"]) == {"finished"}
    assert again["reason"].isna().all()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_worker_costs_no_run(base: Experiment, same_runs: SameRuns, tmp_path: Path) -> None:
    study = dpfl.Study(base.replace(model="cnn", rounds=40), {"mechanism.clip_norm": [0.25, 0.5, 1.0]}, seeds=2)
    killed: list[int] = []

    def kill_one() -> None:
        # Once a first run is kept, so that the workers are at the next ones.
        deadline = time.monotonic() + 60
        while not list((tmp_path / "killed").glob("records/*.json")) and time.monotonic() < deadline:
            time.sleep(0.01)
        for status in Path("/proc").glob("[0-9]*/stat"):
            fields = status.read_text().rsplit(")", 1)[1].split()
            command = (status.parent / "cmdline").read_bytes()
            if int(fields[1]) == os.getpid() and b"loky" in command and b"resource_tracker" not in command:
                killed.append(int(status.parent.name))
                os.kill(killed[0], signal.SIGKILL)
                return

    thread = threading.Thread(target=kill_one)
    thread.start()
    frame = study.run(tmp_path / "killed", workers=2, progress=False).frame()
    thread.join()
    assert killed
    undisturbed = study.run(tmp_path / "undisturbed", workers=2, progress=False).frame()
    assert frame["run_id"].is_unique
    same_runs(frame, undisturbed)


def test_a_full_disk_ends_the_study_in_one_sentence_and_keeps_what_has_ended(
    base: Experiment, same_runs: SameRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = dpfl.Study(base.replace(model="cnn"), seeds=6)
    folder = tmp_path / "full"
    fsync, writes = os.fsync, []

    def without_room(handle: int) -> None:
        writes.append(handle)
        if len(writes) > 4:  # study.json and three records
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", without_room)
        with pytest.raises(dpfl.InputError, match=r"the disk of .*full is full: .*make room"):
            study.run(folder, workers=2, progress=False)
    assert study.pending(folder) == 3
    assert [path.name for path in (folder / "records").iterdir() if path.name.startswith(".")] == []
    frame = study.run(folder, workers=2, progress=False).frame()
    same_runs(frame, study.run(tmp_path / "undisturbed", workers=1, progress=False).frame())


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_disk_that_is_really_full(base: Experiment, tmp_path: Path) -> None:
    import subprocess

    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("this machine mounts nothing")
    try:
        study = dpfl.Study(base, {"mechanism.clip_norm": [0.1, 0.2, 0.3, 0.4]}, seeds=10)
        with pytest.raises(dpfl.InputError, match="is full"):
            study.run(folder, workers=1, progress=False)
        kept = len(Store(folder).frame())
        assert 0 < kept < 40
        assert study.pending(folder) == 40 - kept
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_runs_are_called_by_what_differs(base: Experiment) -> None:
    one = base.replace(**{"privacy.epsilon": 1, "mechanism.clip_norm": 0.25})
    adaptive = base.replace(mechanism=dpfl.AdaptiveClipping(clip_norm=0.25))
    names = run_names([base, one, adaptive])
    assert names[0] == "mechanism gaussian, clip norm 0.5, epsilon 8"
    assert names[1] == "mechanism gaussian, clip norm 0.25, epsilon 1"
    assert names[2].startswith("mechanism adaptive_clipping, clip norm 0.25")
    assert run_names([base]) == [""]


def test_checkpoints_of_ended_runs_are_gone(base: Experiment, tmp_path: Path) -> None:
    study = dpfl.Study(base, seeds=2)
    study.run(tmp_path, workers=2, progress=False, checkpoint_every=2)
    assert not (tmp_path / "checkpoints").exists()
    assert np.array_equal(study.history().groupby("run_id")["round"].max(), [4, 4])


def test_ray_excludes_what_it_cannot_do(base: Experiment, tmp_path: Path) -> None:
    for more in ({"workers": 2}, {"checkpoint_every": 1}):
        with pytest.raises(dpfl.InputError, match="leave workers and checkpoint_every out"):
            dpfl.Study(base).run(tmp_path, ray="local", **more)
    assert tasks_of({}, [], 2, together=True) == []
