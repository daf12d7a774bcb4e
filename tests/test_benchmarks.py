"""The machinery of experiments/benchmarks: the protocol with a fake system, turns and statistics; no peers."""

import json
import os
import re
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "experiments" / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import catalogue  # noqa: E402
import environments  # noqa: E402
import figure  # noqa: E402
import measuring  # noqa: E402
from systems.protocol import Worker, WorkerError, in_one_line  # noqa: E402
from systems.workloads import WORKLOADS  # noqa: E402

FAKE = """
import time
from protocol import Work, serve

def prepare(workload, variant, threads):
    print("libraries print what they like")
    if variant == "broken":
        raise ValueError("no such variant\\nand more")
    if variant == "vanishes":
        import os
        os._exit(3)
    if variant == "sleeps":
        time.sleep(60)
    steps = []
    def step():
        print("here too")
        steps.append(1)
        if variant == "fails later" and len(steps) > 3:
            raise RuntimeError("out of steps")
        time.sleep(0.002)
    return Work(step, {"workload": workload, "threads": threads})

serve(prepare)
"""


@pytest.fixture
def fake(tmp_path: Path):
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    workers = []

    def start(variant: str = "") -> Worker:
        command = [sys.executable, script, "--workload", "w", "--variant", variant, "--threads", "2"]
        environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS / "systems")}
        workers.append(Worker(command, environment=environment, log=tmp_path / "log"))
        return workers[-1]

    yield start
    for worker in workers:
        worker.close()


def test_a_worker_says_its_facts_and_measures(fake) -> None:
    worker = fake()
    assert worker.facts(30) == {"workload": "w", "threads": 2}
    for steps in (1, 5):
        seconds = worker.measure(steps, 30)
        assert len(seconds) == steps
        assert min(seconds) >= 0.002


@pytest.mark.parametrize(
    ("variant", "timeout", "message"),
    [
        ("broken", 30, "^ValueError: no such variant$"),
        ("vanishes", 30, "ended with code 3"),
        ("sleeps", 0.5, "not done after"),
    ],
)
def test_a_worker_that_cannot_get_ready_says_why(fake, variant: str, timeout: float, message: str) -> None:
    with pytest.raises(WorkerError, match=message):
        fake(variant).facts(timeout)


def test_a_worker_that_fails_later_is_left_out_of_the_turns(fake) -> None:
    sound, failing = fake(), fake("fails later")
    sound.facts(30)
    failing.facts(30)
    good, bad = measuring.in_turns([sound, failing], rounds=2, seconds=0.01, timeout=30)
    assert good.failure is None
    assert len(good.seconds) == 2
    assert bad.failure == "RuntimeError: out of steps"


class Clock:
    """A worker that takes the same time for each step, and writes down what it was asked."""

    def __init__(self, name: str, seconds: float, asked: list[tuple[str, int]]) -> None:
        self.name, self.seconds, self.asked = name, seconds, asked

    def measure(self, steps: int, timeout: float) -> list[float]:
        self.asked.append((self.name, steps))
        return [self.seconds] * steps


def test_workers_take_turns_and_slow_ones_take_fewer() -> None:
    asked: list[tuple[str, int]] = []
    workers = [Clock("quick", 0.01, asked), Clock("slow", 8.0, asked)]
    turns = []
    quick, slow = measuring.in_turns(workers, rounds=5, seconds=0.1, timeout=60, after_turn=lambda: turns.append(1))
    assert asked[:3] == [("quick", 1), ("quick", 3), ("slow", 1)]
    assert asked[3:] == [
        *(("quick", 11), ("slow", 1)),
        *(("slow", 1), ("quick", 11)),
        *(("quick", 11), ("slow", 1)),
        *(("quick", 11), ("quick", 11)),
    ]
    assert quick.seconds == pytest.approx([0.01] * 5)
    assert slow.seconds == [8.0] * 3
    assert len(turns) == 10


def test_summary_has_median_and_spread_over_rounds() -> None:
    assert measuring.summary([0.001, 0.002, 0.003, 0.004, 0.010]) == {
        "median_ms": pytest.approx(3),
        "spread": pytest.approx([2, 4]),
        "range": pytest.approx([1, 10]),
        "rounds": 5,
    }
    assert measuring.summary([0.5])["spread"] == [500, 500]


def rows_of(workload: str = "w") -> list[measuring.Row]:
    medians = [("plain", "", 10.0), ("dpfl", "", 20.0), ("peer", "a", 60.0), ("peer", "b", 40.0), ("other", "", 5.0)]
    rows = [
        {"workload": workload, "system": system, "variant": variant, "median_ms": median, "range": [median, median]}
        for system, variant, median in medians
    ]
    rows.append({"workload": workload, "system": "peer", "variant": "c", "failure": "RuntimeError"})
    return measuring.with_ratios(rows, {"dpfl": "plain", "peer": "other", "plain": None, "other": None})


def test_ratios_are_to_the_best_variant() -> None:
    rows = rows_of()
    assert [row["best"] for row in rows] == [True, True, False, True, True, False]
    assert [row["ratio_to_plain"] for row in rows] == [1, 2, 6, 4, 0.5, None]
    assert [row["ratio_to_dpfl"] for row in rows] == [0.5, 1, 3, 2, 0.25, None]
    assert [row["ratio_to_own_plain"] for row in rows] == [None, 2, 12, 8, None, None]
    json.dumps(rows)


def test_ratios_without_dpfl_are_none() -> None:
    rows = measuring.with_ratios([{"system": "plain", "median_ms": 1.0}], {"plain": None})
    assert rows[0]["ratio_to_dpfl"] is None
    assert rows[0]["ratio_to_plain"] == 1


def test_the_figure_leaves_out_what_failed(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "figure.svg"
    figure.draw([*rows_of("w"), *rows_of("v")], {"w": "One", "v": "Other", "missing": "None"}, ["dpfl"], "note", file)
    assert file.stat().st_size > 1_000


def test_every_system_has_its_script_and_a_workload() -> None:
    for system in (*catalogue.SYSTEMS.values(), catalogue.MATMUL, catalogue.MEMORY):
        assert (catalogue.SYSTEMS_FOLDER / system.script).exists()
        assert any(system.can_do(workload) for workload in WORKLOADS)
        assert system.own_plain is None or system.own_plain in catalogue.SYSTEMS
        # Peers are pinned, so that a run can be repeated.
        assert all(re.fullmatch(r"[a-z-]+==[\d.]+", each) for each in system.requirements)


@pytest.mark.parametrize("workload", WORKLOADS)
def test_examples_are_the_same_at_every_call(workload: str) -> None:
    x, y = WORKLOADS[workload].examples()
    again = WORKLOADS[workload].examples()
    assert (x == again[0]).all()
    assert (y == again[1]).all()
    assert len(x) == len(y) == WORKLOADS[workload].facts["batch"]
    alike, labels = WORKLOADS[workload].examples(alike=True)
    assert (alike == x[0]).all()
    assert (labels == y[0]).all()
    assert alike.shape == x.shape


def test_errors_are_told_in_one_line() -> None:
    assert in_one_line(ValueError("one\ntwo")) == "ValueError: one"
    assert in_one_line(ValueError("in user code:\n\n  File\n  KeyError: 'x'\n")) == "ValueError: KeyError: 'x'"
    assert in_one_line(ValueError()) == "ValueError"
    assert len(in_one_line(ValueError("x" * 500))) == 160


def test_an_environment_that_cannot_be_made_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "cache_folder", lambda: tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environments.python_of(()) == Path(sys.executable)
    with pytest.raises(environments.EnvironmentFailure, match="uv"):
        environments.python_of(("nothing==1",))
