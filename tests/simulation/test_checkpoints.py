"""Checkpoints: a run that was killed, wherever and however often, gives the numbers of the undisturbed one."""

import contextlib
import importlib.util
import io
import json
import os
import pickle
import random
import signal
import stat
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pytest

import dpfl
from dpfl.cli import main
from dpfl.data import FederatedData
from dpfl.simulation import checkpoints as module
from dpfl.simulation.checkpoints import Checkpoints, Progress
from dpfl.simulation.engine import GraphRounds
from dpfl.simulation.result import Result
from dpfl.simulation.run import run

ROUNDS = 7
PRIVATE_CLIENTS = dpfl.ClientTraining(
    optimizer="adam", learning_rate=0.05, batch_size=4, epochs=1, example_clip=1.0, example_noise=1.5
)
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "gaussian": {},
    "adaptive_clipping": {
        "mechanism": dpfl.AdaptiveClipping(clip_norm=0.5, count_noise=1.0),
        "server": dpfl.ServerOptimizer(name="momentum"),
    },
    "tree_aggregation": {
        "mechanism": dpfl.TreeAggregation(clip_norm=0.5),
        "sampler": dpfl.Cyclic(cohort=10),
        "privacy.relation": "replace_special",
    },
    "banded_matrix": {
        "mechanism": dpfl.BandedMatrix(clip_norm=0.5, bands=3),
        "sampler": dpfl.CyclicPoisson(cohort=5, groups=4),
    },
    "distributed": {
        "mechanism": dpfl.DistributedDiscreteGaussian(clip_norm=0.5),
        "sampler": dpfl.Cyclic(cohort=10),
        "privacy.relation": "replace_special",
    },
    "both_units": {
        "local": PRIVATE_CLIENTS,
        "privacy.delta": 1e-3,
        "server": dpfl.ServerOptimizer(name="adam", learning_rate=0.1),
    },
    "none": {"mechanism": dpfl.NoMechanism(), "privacy.epsilon": None, "model": "mlp"},
    "diverging": {
        "mechanism": dpfl.NoMechanism(),
        "privacy.epsilon": None,
        "model": "mlp",
        "local.learning_rate": 1e25,
    },
}


class Killed(BaseException):
    """In place of the end of the process."""


@contextlib.contextmanager
def dying_in(round_number: int | None) -> Iterator[None]:
    """While it lasts, a run dies in that round, before the round is kept; with None in no round."""
    rounds_of = GraphRounds.run

    def dying(rounds: GraphRounds, cohorts: Any) -> Any:
        measured = rounds_of(rounds, cohorts)
        if round_number is not None and int(rounds._state.round) >= round_number:
            raise Killed
        return measured

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GraphRounds, "run", dying)
        yield


class Run:
    """One run, to be killed and resumed."""

    def __init__(self, experiment: dpfl.Experiment) -> None:
        self.experiment = experiment
        self.plan = experiment.plan()
        self.client_plan = experiment.client_plan(self.plan.rounds)

    def __call__(
        self,
        folder: Path | None = None,
        every: int = 1,
        *,
        killed_in: int | None = None,
        advance: Callable[[int], None] = lambda rounds: None,
    ) -> Result:
        """Runs with checkpoints in a folder, and dies in the round `killed_in`."""
        kept = None if folder is None else Checkpoints(folder, every)
        with dying_in(killed_in):
            return run(self.experiment, self.plan, self.client_plan, 3, advance, kept)


@pytest.fixture(scope="module")
def experiment(images: FederatedData) -> dpfl.Experiment:
    return dpfl.Experiment(
        data=images,
        local=dpfl.ClientTraining(learning_rate=0.3, batch_size=4, epochs=1),
        mechanism=dpfl.Gaussian(clip_norm=0.5),
        privacy=dpfl.Privacy(epsilon=4, delta=1e-2),
        sampler=dpfl.Poisson(cohort=10),
        rounds=ROUNDS,
        evaluate_every=3,
    )


@pytest.fixture(scope="module")
def gaussian(experiment: dpfl.Experiment) -> Run:
    return Run(experiment)


@pytest.fixture(scope="module")
def undisturbed(gaussian: Run) -> str:
    return told(gaussian())


def told(result: Result) -> str:
    """All that a run says of itself but for how long it took, to the last bit."""
    record = {**result.record, "seconds": None}
    clients = result.client_epsilons
    return json.dumps(
        {
            "record": record,
            "history": result.history,
            "guarantees": result.guarantees(),
            "weights": [weight.tobytes().hex() for weight in result.weights],
            "clients": None if clients is None else [clients.steps.tolist(), clients.epsilons.tolist()],
        }
    )


def rounds_in(path: Path) -> int:
    """How many rounds a checkpoint holds; 0 where there is none."""
    with contextlib.suppress(FileNotFoundError), np.load(path) as file:
        return json.loads(file["run"].tobytes())["ledger"]["rounds"]
    return 0


def rewritten(path: Path, change: Callable[[dict[str, Any], dict[str, np.ndarray]], None]) -> None:
    """Changes what a checkpoint says."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    content = json.loads(arrays.pop("run").tobytes())
    change(content, arrays)
    np.savez(path, run=np.frombuffer(json.dumps(content).encode(), np.uint8), **arrays)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_killed_in_every_round_it_gives_the_undisturbed_numbers(
    name: str, experiment: dpfl.Experiment, tmp_path: Path
) -> None:
    one = Run(experiment.replace(**CONFIGURATIONS[name]))
    undisturbed = one()
    path = tmp_path / f"{undisturbed.record['run_id']}.npz"
    for number in range(1, ROUNDS + 1):
        with pytest.raises(Killed):
            one(tmp_path, killed_in=number)
        assert rounds_in(path) == number - 1
    assert told(one(tmp_path)) == told(undisturbed)
    # Another seed gives other numbers, or the comparison would see nothing.
    other = run(one.experiment, one.plan, one.client_plan, 4)
    assert json.loads(told(other))["history"] != json.loads(told(undisturbed))["history"]
    assert (undisturbed.record["status"] == "diverged") == (name == "diverging")


@hypothesis.settings(max_examples=20, deadline=None, derandomize=True)
@hypothesis.given(
    periods=st.lists(st.integers(1, ROUNDS + 2), min_size=2, max_size=4), kills=st.lists(st.integers(1, ROUNDS))
)
def test_nothing_depends_on_how_often_it_is_kept_or_killed(
    gaussian: Run, undisturbed: str, tmp_path_factory: pytest.TempPathFactory, periods: list[int], kills: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("checkpoints")
    for every, killed_in in zip(periods, kills, strict=False):
        with contextlib.suppress(Killed):  # A checkpoint of all rounds leaves none to be killed in.
            gaussian(folder, every, killed_in=killed_in)
    assert told(gaussian(folder, periods[-1])) == undisturbed


def test_evaluations_stay_where_they_were_asked_for(gaussian: Run, tmp_path: Path) -> None:
    result = gaussian(tmp_path, 2)
    assert [row["round"] for row in result.history if "accuracy" in row] == [3, 6, 7]


def test_how_far_it_is(gaussian: Run, tmp_path: Path) -> None:
    shown: list[int] = []
    with pytest.raises(Killed):
        gaussian(tmp_path, 2, killed_in=5, advance=shown.append)
    assert shown == [0, 2, 1, 1]
    shown.clear()
    gaussian(tmp_path, 100, advance=shown.append)
    assert shown == [4, 2, 1]
    shown.clear()
    gaussian(tmp_path, advance=shown.append)
    assert shown == [7]


def test_a_run_that_has_ended_is_not_done_again(experiment: dpfl.Experiment, tmp_path: Path) -> None:
    first = experiment.run(3, progress=False, checkpoints=tmp_path, checkpoint_every=4)
    path = tmp_path / f"{experiment.run_id(3)}.npz"
    written = path.stat().st_mtime_ns
    rewritten(path, lambda run, _: run.update(seconds=1000.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(GraphRounds, "run")
        again = experiment.run(3, progress=False, checkpoints=str(tmp_path), checkpoint_every=1)
    assert told(again) == told(first)
    assert 1000 < again.record["seconds"] < 1100
    assert path.stat().st_mtime_ns > written
    assert told(experiment.run(3, progress=False)) == told(first)


def test_what_a_checkpoint_says(experiment: dpfl.Experiment, tmp_path: Path) -> None:
    one = Run(experiment.replace(**CONFIGURATIONS["both_units"]))
    with pytest.raises(Killed):
        one(tmp_path, 2, killed_in=6)
    (path,) = tmp_path.glob("*.npz")
    assert path.stem == one.experiment.run_id(3)
    # It has the seed of the noise in it.
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with np.load(path, allow_pickle=False) as file:
        said = json.loads(file["run"].tobytes())
        assert file["participations"].sum() == sum(row["cohort"] for row in said["history"])
    ledger = said["ledger"]
    assert ledger["rounds"] == len(said["history"]) == 4
    assert ledger["planned_rounds"] == 7
    assert ledger["noise_multiplier"] == one.plan.noise_multiplier
    assert ledger["example_noise_multiplier"] == 1.5
    assert ledger["guarantees"] == json.loads(
        json.dumps({"user": one.plan.guarantee.as_dict(), "example": one.client_plan.guarantee.as_dict()})
    )
    spent = ledger["epsilon_spent"]
    assert spent["user"] == said["history"][-1]["epsilon_spent"] < one.plan.guarantee.epsilon
    assert 0 < spent["example"] < one.client_plan.guarantee.epsilon


def test_without_a_folder_nothing_is_kept(gaussian: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delattr(GraphRounds, "state")
    gaussian()
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def kept(gaussian: Run, tmp_path: Path) -> Path:
    """The checkpoint of four rounds."""
    with pytest.raises(Killed):
        gaussian(tmp_path, 2, killed_in=5)
    (path,) = tmp_path.glob("*.npz")
    return path


def test_a_damaged_checkpoint_is_left_out_with_a_sentence(
    gaussian: Run, undisturbed: str, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = kept.read_bytes()
    array, pickled = io.BytesIO(), io.BytesIO()
    np.save(array, np.zeros(3))
    np.savez(pickled, run=np.array([{}], object))
    for damaged in (b"", b"PK", whole[:-1], whole[: len(whole) // 2], b"\0" * len(whole), array.getvalue()):
        kept.write_bytes(damaged)
        with pytest.warns(UserWarning, match=r"is damaged and left out: the run starts anew\.$"):
            assert told(gaussian(kept.parent)) == undisturbed
    kept.write_bytes(pickled.getvalue())
    monkeypatch.delattr(pickle, "loads")
    with pytest.warns(UserWarning, match="is damaged"):
        gaussian(kept.parent)


def test_a_damaged_size_is_not_believed(tmp_path: Path) -> None:
    """NumPy alone would read the first 40,000 of 50,000 weights, and not see that more follow."""
    state = [np.ones(50_000, np.float32)]
    with Checkpoints(tmp_path).of("big") as checkpoint:
        checkpoint.write(state, Progress(np.zeros(3, np.int64), [], 0.0), {})
        path = tmp_path / "big.npz"
        whole = path.read_bytes()
        assert whole.count(b"(50000,)") == 1
        path.write_bytes(whole.replace(b"(50000,)", b"(40000,)"))
        with pytest.warns(UserWarning, match="is damaged"):
            assert checkpoint.read(state, 3, lambda rounds: {}) is None


def test_no_wrong_byte_passes(gaussian: Run, kept: Path) -> None:
    """A checkpoint with a wrong byte is that of before, or left out, or refused; at 300 places, drawn with seed 0."""
    whole, rng = kept.read_bytes(), random.Random(0)
    with np.load(kept) as file:
        state = [file[f"state_{index}"] for index in range(len(file.files) - 2)]
        said = json.loads(file["run"].tobytes())
    with Checkpoints(kept.parent).of(kept.stem) as checkpoint:
        seen = set()
        # The end, where the table of contents is, and everywhere.
        for place in [*rng.sample(range(len(whole) - 1500, len(whole)), 150), *rng.sample(range(len(whole)), 150)]:
            wrong = bytearray(whole)
            wrong[place] ^= 1 << rng.randrange(8)
            kept.write_bytes(wrong)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    found = checkpoint.read(state, 30, lambda rounds: said["ledger"])
                except dpfl.InputError:
                    seen.add("refused")
                    continue
            if found is None:
                assert "damaged" in str(caught[0].message)
                seen.add("left out")
                continue
            seen.add("that of before")
            assert found[1].history == said["history"]
            assert all(map(np.array_equal, found[0], state))
        assert {"left out", "that of before"} <= seen


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda run, _: run.update(run_id="0123456789abcdef"), "is that of the run 0123456789abcdef"),
        (lambda run, _: run["ledger"].update(noise_multiplier=1.25), "another plan (of its ledger, noise_multiplier"),
        (lambda run, _: run["ledger"]["guarantees"]["user"].update(epsilon=3.9), "guarantees differ"),
        (lambda run, _: run["ledger"]["guarantees"]["user"].update(delta=1e-3), "guarantees differ"),
        (lambda run, _: run["ledger"]["epsilon_spent"].update(user=0.5), "epsilon_spent differ"),
        (lambda run, _: run["ledger"].update(rounds=3), "rounds differ"),
        (lambda run, _: run["history"].pop(), "rounds, epsilon_spent differ"),
        (lambda run, _: run.update(arrays=3), "does not hold the state of this run"),
        (lambda _, arrays: arrays.update(state_0=arrays["state_0"][:-1]), "does not hold the state of this run"),
        (lambda _, arrays: arrays.update(state_0=arrays["state_0"].astype(float)), "does not hold the state"),
        (lambda _, arrays: arrays.update(participations=np.zeros(31, np.int64)), "does not hold the state"),
    ],
)
def test_another_plan_or_state_is_refused_in_one_sentence(
    gaussian: Run, kept: Path, change: Callable[[dict, dict], None], words: str
) -> None:
    rewritten(kept, change)
    before = kept.read_bytes()
    with pytest.raises(dpfl.InputError) as refused:
        gaussian(kept.parent)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)
    assert kept.read_bytes() == before


def test_a_plan_that_comes_out_otherwise_is_refused(
    experiment: dpfl.Experiment, gaussian: Run, undisturbed: str, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if another accountant had answered: same settings and seed, less noise."""
    other = experiment.replace(**{"privacy.epsilon": 5})
    monkeypatch.setattr(dpfl.Experiment, "run_id", lambda *_: kept.stem)
    with pytest.raises(dpfl.InputError, match=r"noise_multiplier, guarantees differ.*another seed"):
        other.run(3, progress=False, checkpoints=kept.parent)
    # What only rounds otherwise, on another machine, is the same plan.
    rewritten(kept, lambda run, _: run["ledger"].update(noise_multiplier=gaussian.plan.noise_multiplier * (1 + 1e-15)))
    assert told(gaussian(kept.parent)) == undisturbed


def test_renamed_checkpoints_are_refused(experiment: dpfl.Experiment, kept: Path) -> None:
    kept.rename(kept.with_stem(experiment.run_id(8)))
    with pytest.raises(dpfl.InputError, match=f"that of the run {kept.stem}"):
        experiment.run(8, progress=False, checkpoints=kept.parent)


@pytest.mark.parametrize("every", [0, -1, 2.5, "3", None])
def test_periods_are_checked(experiment: dpfl.Experiment, tmp_path: Path, every: Any) -> None:
    with pytest.raises(dpfl.InputError, match="every so many rounds"):
        experiment.run(3, progress=False, checkpoints=tmp_path / "new", checkpoint_every=every)
    assert not (tmp_path / "new").exists()


def test_folders_are_checked(experiment: dpfl.Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.delattr(dpfl.Experiment, "plan")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", "/proc/dpfl", "/proc"):
        with pytest.raises(dpfl.InputError, match="cannot take checkpoints"):
            experiment.run(3, progress=False, checkpoints=folder)
    for folder in ("", 5):
        with pytest.raises(dpfl.InputError, match="must be the path of a folder"):
            experiment.run(3, progress=False, checkpoints=folder)


def test_a_checkpoint_that_cannot_be_opened_is_refused(gaussian: Run, kept: Path) -> None:
    kept.unlink()
    kept.mkdir()
    with pytest.raises(dpfl.InputError, match="cannot be read"):
        gaussian(kept.parent)


def test_a_full_disk_does_not_end_a_run(
    gaussian: Run, undisturbed: str, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = kept.read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.warns(UserWarning, match="cannot be written .No space left on device.: the run goes on"):
        result = gaussian(kept.parent)
    assert kept.read_bytes() == before
    assert [path.suffix for path in kept.parent.iterdir() if path != kept] == [".lock"]
    assert told(result) == undisturbed


def test_one_process_at_a_time_at_a_run(
    gaussian: Run, undisturbed: str, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SECONDS_TO_WAIT_FOR_A_RUN", 0.05)
    part = kept.with_name(f".{kept.stem}-cut.npz")
    part.write_bytes(b"PK")
    with Checkpoints(kept.parent).of(kept.stem):
        assert not part.exists()
        part.write_bytes(b"PK")
        with pytest.raises(dpfl.InputError, match="another process is at the same run"):
            gaussian(kept.parent)
        # Another run in the same folder has its own, and leaves this one's alone.
        run(gaussian.experiment, gaussian.plan, None, 5, checkpoints=Checkpoints(kept.parent))
        assert part.exists()
    assert told(gaussian(kept.parent)) == undisturbed
    assert not part.exists()


# A run in a process of its own: what it says of itself goes to a file when it has ended.
PROGRAM = """
import sys
from pathlib import Path
import numpy as np
import dpfl
sys.path.insert(0, {tests!r})
from test_checkpoints import told

rng = np.random.default_rng(0)
y = np.repeat(np.arange(3), 40)
x = rng.normal(size=(120, 6)).astype(np.float32) + np.eye(3, 6, dtype=np.float32)[y]
order = rng.permutation(120)
data = dpfl.data.from_arrays(x[order], y[order], clients=12)
experiment = dpfl.Experiment(
    data=data, local=dpfl.ClientTraining(learning_rate=0.3, batch_size=4, steps=2),
    mechanism=dpfl.AdaptiveClipping(clip_norm=0.5, count_noise=1.0, noise_multiplier=1.0),
    server=dpfl.ServerOptimizer(name="adam", learning_rate=0.1),
    privacy=dpfl.Privacy(epsilon=None, delta=1e-2), sampler=dpfl.Poisson(cohort=6),
    rounds={rounds}, evaluate_every=7, engine={engine!r},
)
folder, every = sys.argv[1:3]
for name, more in (("resumed", dict(checkpoints=folder, checkpoint_every=int(every))), ("undisturbed", {{}})):
    if name in sys.argv[3:]:
        Path(folder, name + ".json").write_text(told(experiment.run(3, progress=False, **more)))
"""


@contextlib.contextmanager
def process(arguments: list[str], log: Path) -> Iterator[subprocess.Popen]:
    """A Python process in a group of its own, which is killed in the end."""
    with log.open("a") as out:
        started = subprocess.Popen(
            [sys.executable, "-c", *arguments], stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        )
    try:
        yield started
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "rounds", "every", "kills"), [("graph", 400, 3, 2), ("tff", 12, 1, 1)])
def test_kill_9_at_random_rounds_then_resume_equals_the_undisturbed_run(
    engine: str, rounds: int, every: int, kills: int, tmp_path: Path
) -> None:
    if engine == "tff" and importlib.util.find_spec("tensorflow_federated") is None:
        pytest.skip("there is no TensorFlow Federated for this machine")
    program = PROGRAM.format(tests=str(Path(__file__).parent), rounds=rounds, engine=engine)
    folder, log, rng = tmp_path / "kept", tmp_path / "log", random.Random(20)
    # At any moment of a round: between a checkpoint and the next, or while one is written.
    for at in sorted(rng.sample(range(1, rounds // 2), kills)):
        with process([program, str(folder), str(every), "resumed"], log) as training:
            deadline = time.monotonic() + 240
            while not (found := sorted(folder.glob("[!.]*.npz"))) or rounds_in(found[0]) < at:
                assert training.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.002)
            time.sleep(rng.random() * 0.01)
            training.send_signal(signal.SIGKILL)
            assert training.wait() == -signal.SIGKILL
        assert at <= rounds_in(found[0]) < rounds
    with process([program, str(folder), str(every), "resumed", "undisturbed"], log) as training:
        assert training.wait(timeout=240) == 0, log.read_text()
    resumed, undisturbed = (json.loads((folder / f"{name}.json").read_text()) for name in ("resumed", "undisturbed"))
    assert resumed == undisturbed
    assert len(resumed["history"]) == rounds
    assert [path.name for path in folder.glob(".*")] == [f".{found[0].stem}.lock"]


@pytest.mark.slow
def test_a_study_keeps_checkpoints_until_it_has_the_record(experiment: dpfl.Experiment, tmp_path: Path) -> None:
    study = dpfl.Study(experiment, seeds=[3, 4])
    # A run that a killed study had kept already, one in the middle, and somebody else's.
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2)
    for seed, killed_in in ((3, 5), (4, None), (5, 3)):
        with contextlib.suppress(Killed), dying_in(killed_in):
            run(experiment, experiment.plan(), None, seed, checkpoints=checkpoints)
    for seed in (3, 4):
        path = checkpoints.folder / f"{experiment.run_id(seed)}.npz"
        rewritten(path, lambda run, _: run.update(seconds=1000.0))
    first, second = (checkpoints.folder / f"{experiment.run_id(seed)}.npz" for seed in (3, 4))
    moved = second.rename(second.with_stem("moved"))
    second.write_bytes((checkpoints.folder / f"{experiment.run_id(5)}.npz").read_bytes())
    with pytest.raises(dpfl.InputError, match=f"is that of the run {experiment.run_id(5)}"):
        study.run(tmp_path, workers=1, progress=False, checkpoint_every=1)
    assert (study.pending(tmp_path), first.exists()) == (1, False)
    moved.rename(second)
    frame = study.run(tmp_path, workers=1, progress=False, checkpoint_every=1).frame()
    assert (frame["seconds"] > 1000).all()
    assert frame["loss"].tolist() == [experiment.run(seed, progress=False).loss for seed in (3, 4)]
    foreign = experiment.run_id(5)
    assert {path.name for path in checkpoints.folder.iterdir()} == {f"{foreign}.npz", f".{foreign}.lock"}
    # Left over by a kill between record and removal: gone at the next start, whatever that is told.
    (checkpoints.folder / f"{experiment.run_id(3)}.npz").write_bytes(b"")
    checkpoints.remove(foreign)
    study.run(tmp_path, workers=1, progress=False)
    assert not checkpoints.folder.exists()
    with pytest.raises(dpfl.InputError, match="at least 1"):
        study.run(tmp_path, checkpoint_every=0)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="kills processes")
def test_kill_9_of_a_study_goes_on_inside_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = "from dpfl.cli import main; main()"
    command = ["tradeoff", "--epsilon", "none", "--clip-norm", "0.5", "--rounds", "400", "--local-work", "2000"]
    command += ["--seeds", "1", "--workers", "1"]
    killed, undisturbed, log = tmp_path / "killed", tmp_path / "undisturbed", tmp_path / "log"
    with process([program, *command, "--checkpoint-every", "7", "--out", str(killed)], log) as study:
        deadline = time.monotonic() + 240
        while not (found := sorted(killed.glob("checkpoints/[!.]*.npz"))) or rounds_in(found[0]) < 50:
            assert study.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.002)
        os.kill(study.pid, signal.SIGKILL)
        study.wait()
        assert list(killed.glob("records/*.json")) == []
        # At once: the worker may still be at its run, which the next start waits for.
        monkeypatch.setattr(sys, "argv", ["dpfl", *command, "--checkpoint-every", "20", "--out", str(killed)])
        with Checkpoints(found[0].parent).of(found[0].stem):
            assert 50 <= rounds_in(found[0]) < 400
            rewritten(found[0], lambda run, _: run.update(seconds=1000.0))
        with contextlib.suppress(SystemExit):
            main()
    monkeypatch.setattr(sys, "argv", ["dpfl", *command, "--out", str(undisturbed)])
    with contextlib.suppress(SystemExit):
        main()
    one, other = (pd.read_csv(folder / "runs.csv") for folder in (killed, undisturbed))
    assert one.loc[one["run_id"] == found[0].stem, "seconds"].item() > 1000
    pd.testing.assert_frame_equal(one.drop(columns="seconds"), other.drop(columns="seconds"), check_exact=True)
    one, other = (pd.read_parquet(folder / "history.parquet") for folder in (killed, undisturbed))
    pd.testing.assert_frame_equal(one, other, check_exact=True)
    assert not (killed / "checkpoints").exists()
    assert not (undisturbed / "checkpoints").exists()
