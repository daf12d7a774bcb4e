"""The machinery of experiments/benchmarks: the protocol with a fake system, turns and statistics; no peers."""

import functools
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from rich.console import Console
from rich.progress import Progress

BENCHMARKS = Path(__file__).parents[1] / "experiments" / "benchmarks"
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS / "systems")]

import catalogue  # noqa: E402
import checks  # noqa: E402
import environments  # noqa: E402
import figure  # noqa: E402
import measuring  # noqa: E402
import run  # noqa: E402
import workloads  # noqa: E402
from systems.protocol import Worker, WorkerError, in_one_line  # noqa: E402
from systems.workloads import LETTERS, WORKLOADS, BatchWorkload  # noqa: E402

STEPS = [name for name, work in WORKLOADS.items() if isinstance(work, BatchWorkload)]
ROUNDS = [name for name in WORKLOADS if name not in STEPS]

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
        time.sleep(60 if variant == "takes minutes" and len(steps) > 2 else 0.002)
    return Work(step, {"workload": workload, "threads": threads, "flops": 1e6, "version": "1"})

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
    assert worker.facts(30) == {"workload": "w", "threads": 2, "flops": 1e6, "version": "1"}
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


def test_systems_that_take_too_long_are_left_out_and_the_others_measured(fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "start", lambda system, workload, variant, threads: fake(variant))
    names = {"dpfl": "", "never ready": "sleeps", "peer": "takes minutes"}
    entries = [run.Entry(name, catalogue.SYSTEMS["dpfl"], variant) for name, variant in names.items()]
    with Progress(disable=True) as bar:
        rows, rate = run.measure("fedavg-softmax", entries, rounds=2, seconds=0.01, threads=2, timeout=2.0, bar=bar)
    # The fake product takes 2 ms and says that it is a million operations.
    assert 0 < rate <= 0.5
    measured, *failed = rows
    assert [row["failure"] for row in failed] == ["not done after 2 seconds"] * 2
    assert measured["median_ms"] >= 2
    assert measured["clients"] == 300
    assert measured["ratio_to_bound"] == pytest.approx(measured["median_ms"] / measured["bound_ms"])
    assert {"workload", "system", "version", "median_ms", "spread", "bound_ms"} <= measured.keys()


def rows_of(workload: str = "w") -> list[measuring.Row]:
    medians = [("plain", "", 10.0), ("dpfl", "", 20.0), ("peer", "a", 60.0), ("peer", "b", 40.0), ("other", "", 5.0)]
    common = {"workload": workload, "version": "1", "bound_ms": 4.0}
    rows = [
        common
        | {
            "system": system,
            "variant": variant,
            "median_ms": median,
            "range": [median, median],
            "spread": [median, median],
        }
        for system, variant, median in medians
    ]
    rows.append(common | {"system": "peer", "variant": "c", "failure": "RuntimeError"})
    return measuring.with_ratios(rows, {"dpfl": "plain", "peer": "other", "plain": None, "other": None})


def test_ratios_are_to_the_best_variant() -> None:
    rows = rows_of()
    assert [row["best"] for row in rows] == [True, True, False, True, True, False]
    assert [row["ratio_to_plain"] for row in rows] == [1, 2, 6, 4, 0.5, None]
    assert [row["ratio_to_dpfl"] for row in rows] == [0.5, 1, 3, 2, 0.25, None]
    assert [row["ratio_to_own_plain"] for row in rows] == [None, 2, 12, 8, None, None]
    assert [row["ratio_to_bound"] for row in rows] == [2.5, 5, 15, 10, 1.25, None]
    json.dumps(rows)


def test_ratios_without_dpfl_are_none() -> None:
    rows = measuring.with_ratios([{"system": "plain", "median_ms": 1.0, "bound_ms": 0.5}], {"plain": None})
    assert rows[0]["ratio_to_dpfl"] is None
    assert rows[0]["ratio_to_plain"] == 1


def test_tables_of_rounds_compare_with_dpfl_and_the_bound() -> None:
    of_steps, of_rounds = (run.markdown(rows_of(name), {name: 100.0}) for name in ("dpsgd-cnn", "fedavg-mlp"))
    assert "| median ms | quartiles | x plain | x dpfl | x own plain |" in of_steps
    assert "| median ms | quartiles | x dpfl | x bound |" in of_rounds
    assert "| peer | b | 1 | 40 | 40 - 40 | 2 | 10 |" in of_rounds
    assert "Left out: peer c (RuntimeError)." in of_rounds
    assert "the round's matrix products at this machine's 100 GFLOP/s: 19.2 ms" in of_rounds
    assert run.table("fedavg-mlp", rows_of("fedavg-mlp"), 100.0).row_count == 5


def test_the_figure_leaves_out_what_failed(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "figure.svg"
    titles = {"w": "One", "v": "Other", "missing": "None"}
    figure.draw([*rows_of("w"), *rows_of("v")], titles, ["dpfl"], file, note="note")
    assert file.stat().st_size > 1_000


def test_a_figure_higher_than_a_page_shows_the_best_variants(tmp_path: Path) -> None:
    drawn = []
    for panels in (1, 7):
        rows = [row for number in range(panels) for row in rows_of(f"w{number}")]
        file = tmp_path / f"{panels}.svg"
        figure.draw(rows, {f"w{number}": "One" for number in range(panels)}, ["dpfl"], file, note="note")
        drawn.append(file.read_text())
    assert [text.count("<!-- peer · a -->") for text in drawn] == [1, 0]
    assert [text.count("<!-- peer · b -->") for text in drawn] == [1, 7]
    assert "Each system in its best variant." in drawn[1]


def test_each_kind_of_workload_has_its_figure(tmp_path: Path) -> None:
    rows = [*rows_of("dpsgd-cnn"), *rows_of("fedavg-mlp")]
    run.draw_all(rows, ["dpsgd-cnn", "fedavg-mlp"], "note", tmp_path / "both.svg")
    run.draw_all(rows, ["fedavg-mlp"], "note", tmp_path / "one.svg")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["both_rounds.svg", "both_steps.svg", "one.svg"]


def test_every_system_has_its_scripts_and_a_workload() -> None:
    for system in (*catalogue.SYSTEMS.values(), catalogue.MATMUL, *catalogue.MEMORY.values()):
        found = {system.script(workload) for workload in WORKLOADS} - {None}
        assert found == set(system.scripts.values())
        assert all((catalogue.SYSTEMS_FOLDER / script).exists() for script in found)
        assert system.own_plain is None or system.own_plain in catalogue.SYSTEMS
        # Peers are pinned, so that a run can be repeated.
        assert all(re.fullmatch(r"[a-z-]+(\[[a-z,]+\])?==[\d.]+", each) for each in system.requirements)
    assert all(catalogue.SYSTEMS["dpfl"].script(workload) for workload in WORKLOADS)


def test_workloads_are_chosen_by_name_or_letter() -> None:
    assert run._chosen("a, dpsgd-cnn,e", list(WORKLOADS), "workload", LETTERS) == [
        "fedavg-mlp",
        "dpsgd-cnn",
        "fedavg-large",
    ]
    assert run._chosen(None, ["x", "y"], "system") == ["x", "y"]
    with pytest.raises(typer.BadParameter, match="there is no workload 'f'"):
        run._chosen("a,f", list(WORKLOADS), "workload", LETTERS)


def test_peak_memories_are_compared_with_their_target(fake, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    class Ready:
        def __init__(self, variant: str) -> None:
            self.variant = variant

        def facts(self, timeout: float) -> dict[str, object]:
            cohort = int(self.variant)
            return {"version": "1", "cohort": cohort, "peak_megabytes": 900, "beyond_megabytes": 100 + cohort / 1_000}

        def close(self) -> None:
            pass

    monkeypatch.setattr(run, "console", Console(width=120, file=sys.stdout))
    monkeypatch.setattr(run, "start", lambda test, workload, variant, threads: Ready(variant))
    rows = run.show_memory(["fedavg-large"], 2, 10)
    assert [row["cohort"] for row in rows] == [100, 10_000]
    said = capsys.readouterr().out
    assert "fedavg-large, 10000: cohort 10,000, peak megabytes 900, beyond megabytes 110" in said
    assert "Ratio of beyond megabytes: 1.099 (target: at most 1.2)" in said


@pytest.mark.parametrize("workload", STEPS)
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


@pytest.mark.parametrize("workload", ROUNDS)
def test_clients_and_weights_are_the_same_at_every_call(workload: str) -> None:
    work = WORKLOADS[workload]
    assert work.examples_per_client == work.batch * work.local_steps
    assert work.facts["clients"] == work.clients
    x, y = work.client_examples(7)
    assert x.dtype == (np.int32 if work.words else np.float32)
    assert y.dtype == np.int32
    assert x.shape == (7, work.examples_per_client, *work.example)
    assert y.shape == (7, work.examples_per_client)
    assert 0 <= y.min() < y.max() < work.classes
    fewer = work.client_examples(3)
    assert (x[:3] == fewer[0]).all()
    assert (y[:3] == fewer[1]).all()
    alike, labels = work.client_examples(3, alike=True)
    assert (alike == x[:3, :1]).all()
    assert (labels == y[:3, :1]).all()
    assert not (alike[0] == alike[1]).all()
    weights = work.first_weights()
    assert [weight.shape for weight in weights] == list(work.shapes)
    assert all((one == other).all() for one, other in zip(weights, work.first_weights(), strict=True))
    assert sum(weight.size for weight in weights) == work.parameters


def test_federated_workloads_are_those_of_the_targets() -> None:
    assert {letter: WORKLOADS[name].parameters for letter, name in LETTERS.items()} == {
        "a": 79_510,
        "b": 650,
        "c": 1_626_442,
        "d": 82_474,
        "e": 987_210,
    }
    # The forward product and the gradient of the weights; the data needs none.
    assert WORKLOADS["fedavg-softmax"].flops == 2 * 1_500 * 2 * 640


TINY = workloads._federated(
    "tiny", clients=9, batch=2, local_steps=2, example=(200,), shapes=workloads._dense(200, 3), products=600
)


def softmax_gradient(weights: list[np.ndarray], x: np.ndarray, y: np.ndarray) -> list[np.ndarray]:
    logits = x @ weights[0] + weights[1]
    errors = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True) - np.eye(3)[y]
    return [x.T @ errors / len(y), errors.mean(axis=0)]


def averaging(fault: str = ""):
    """A system under test, with or without a fault: federated averaging of a softmax regression."""
    generator = np.random.default_rng(0)

    def one_round(noise_multiplier: float, clip_norm: float, x: np.ndarray, y: np.ndarray) -> list[np.ndarray]:
        first = TINY.first_weights()
        total = [np.zeros(shape) for shape in TINY.shapes]
        for inputs, labels in zip(x, y, strict=True):
            weights = first
            for rows in (slice(0, 2), slice(2, 4))[: 1 if fault == "a local step too few" else 2]:
                gradients = softmax_gradient(weights, inputs[rows], labels[rows])
                weights = [weight - 0.1 * each for weight, each in zip(weights, gradients, strict=True)]
            update = [new - old for new, old in zip(weights, first, strict=True)]
            norms = [np.sqrt(sum((part**2).sum() for part in update))] * 2
            if fault == "clips each tensor":
                norms = [np.linalg.norm(part) for part in update]
            if fault != "does not clip":
                update = [part * min(1.0, clip_norm / norm) for part, norm in zip(update, norms, strict=True)]
            total = [part + more for part, more in zip(total, update, strict=True)]
        scale = noise_multiplier * clip_norm * (1.5 if fault == "too much noise" else 1.0)
        total = [part + generator.normal(0.0, scale, part.shape) for part in total]
        clients = TINY.clients if fault == "divides by others" else len(x)
        new = [weight + part / clients for weight, part in zip(first, total, strict=True)]
        return [new[0].T, new[1]] if fault == "another layout" else new

    return one_round


def test_a_round_of_federated_averaging_passes() -> None:
    checks.check_round(averaging(), softmax_gradient, TINY)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("a local step too few", "round without noise differs"),
        ("clips each tensor", "round without noise differs"),
        ("does not clip", "round without noise differs"),
        ("divides by others", "round without noise differs"),
        ("too much noise", r"noise of the round is 1\.[456]"),
        ("another layout", "shapes"),
    ],
)
def test_a_round_of_something_else_is_refused(fault: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checks.check_round(averaging(fault), softmax_gradient, TINY)


def test_dpfl_does_a_round_of_federated_averaging() -> None:
    import dpfl_rounds
    import keras_models

    name = "fedavg-softmax"
    one_round = functools.partial(dpfl_rounds.after_one_round, name)
    checks.check_round(one_round, keras_models.gradient_of(name), workloads.WORKLOADS[name])


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
