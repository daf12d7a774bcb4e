"""dpfl and its peers side by side on the same work: see the README beside this file.

uv run python experiments/benchmarks/run.py [--workload a,b,...] [--systems dpfl,...] [--json FILE] [--rounds N]
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import typer
from catalogue import MATMUL, MEMORY, ROUNDS, SYSTEMS, SYSTEMS_FOLDER, System
from environments import EnvironmentFailure, cache_folder, python_of
from figure import draw
from measuring import Row, in_turns, summary, with_ratios
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from systems.protocol import Worker, WorkerError
from systems.workloads import LETTERS, WORKLOADS, BatchWorkload, FederatedWorkload, Workload

LIBRARIES = ("tensorflow", "keras", "tensorflow-privacy", "numpy")
BUSY = 0.5
HEADINGS = ("system", "variant", "version", "median ms", "quartiles")
TEXTS = 3  # columns of a table that hold words
console = Console(width=None if sys.stdout.isatty() else 120)


@dataclass(frozen=True)
class Kind:
    """What differs between tables, and figures, of kinds of workloads.

    Attributes:
        step: what is measured.
        ratios: the columns of ratios, by their headings, as `with_ratios` calls them.
        reference: the ratio that the figure shows.
        coloured: the systems that have a colour in the figure; the others are grey.
    """

    step: str
    ratios: Mapping[str, str]
    reference: str
    coloured: tuple[str, ...]

    @property
    def headings(self) -> tuple[str, ...]:
        """Of a table's columns."""
        return (*HEADINGS, *self.ratios)


KINDS: dict[type[Workload], Kind] = {
    BatchWorkload: Kind(
        "step",
        {"x plain": "ratio_to_plain", "x dpfl": "ratio_to_dpfl", "x own plain": "ratio_to_own_plain"},
        "plain",
        tuple(name for name, system in SYSTEMS.items() if system.own_plain is not None),
    ),
    FederatedWorkload: Kind(
        "round",
        {"x dpfl": "ratio_to_dpfl", "x bound": "ratio_to_bound"},
        "dpfl",
        tuple(name for name, system in SYSTEMS.items() if system.script(ROUNDS)),
    ),
}


def kind_of(workload: str) -> Kind:
    """The kind of a workload by its name."""
    return KINDS[type(WORKLOADS[workload])]


@dataclass(frozen=True)
class Entry:
    """A worker of a workload, with what the rows say about it."""

    name: str
    system: System
    variant: str

    @property
    def label(self) -> str:
        """The name that a reader sees."""
        return f"{self.name} ({self.variant})" if self.variant else self.name


def processor() -> str:
    """The processor's model, as the system calls it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def machine(threads: int) -> dict[str, Any]:
    """What a reader must know to compare numbers with another machine's."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "processor": processor(),
        "processors": os.cpu_count(),
        "threads": threads,
        "load_at_start": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
    }


def use_processors(threads: int) -> None:
    """Keeps this process and its workers on so many processors, where that can be done: JAX has no other setting."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def start(system: System, workload: str, variant: str, threads: int) -> Worker:
    """Starts a worker.

    Raises:
        EnvironmentFailure: if its environment cannot be made.
    """
    python = python_of(system.requirements)
    left_out = ("VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME")
    environment = {name: value for name, value in os.environ.items() if name not in left_out} | {
        "CUDA_VISIBLE_DEVICES": "",
        "JAX_PLATFORMS": "cpu",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads)),
    }
    logs = cache_folder() / "logs"
    logs.mkdir(exist_ok=True)
    script = SYSTEMS_FOLDER / str(system.script(workload))
    log = logs / f"{workload}-{script.stem}-{variant or 'only'}.log"
    command = [python, script, "--workload", workload, "--variant", variant, "--threads", str(threads)]
    return Worker(command, environment=environment, log=log)


@contextlib.contextmanager
def closing_all() -> Iterator[list[Worker]]:
    """A list of workers that are ended at the end of the block."""
    workers: list[Worker] = []
    try:
        yield workers
    finally:
        for each in workers:
            each.close()


def measure(
    workload: str, entries: Sequence[Entry], *, rounds: int, seconds: float, threads: int, timeout: float, bar: Progress
) -> tuple[list[Row], float]:
    """Measures one workload.

    Returns:
        A row for each entry, and the machine's GFLOP/s in matrix products, measured in turns with them.
    """
    task = bar.add_task(workload, total=len(entries) + 1)
    matmul = Entry("matmul", MATMUL, "")
    work = WORKLOADS[workload]
    with closing_all() as workers:
        facts: dict[str, dict[str, Any]] = {}
        ready: dict[str, Worker] = {}
        failures: dict[str, str] = {}
        for entry in (matmul, *entries):
            bar.update(task, description=f"{workload}: {entry.label} gets ready")
            try:
                worker = start(entry.system, workload, entry.variant, threads)
                workers.append(worker)
                facts[entry.label] = worker.facts(timeout)
                ready[entry.label] = worker
            except (EnvironmentFailure, WorkerError) as error:
                failures[entry.label] = str(error)
            bar.advance(task)
        bar.update(task, description=f"{workload}: {rounds} rounds", completed=0, total=rounds * len(ready))
        timings = dict(
            zip(
                ready,
                in_turns(
                    list(ready.values()),
                    rounds=rounds,
                    seconds=seconds,
                    timeout=timeout,
                    after_turn=lambda: bar.advance(task),
                ),
                strict=True,
            )
        )
    bar.remove_task(task)
    if matmul.label not in ready or not timings[matmul.label].seconds:
        raise typer.BadParameter(f"the matrix product failed: {failures.get(matmul.label) or 'see its log'}")
    rate = facts[matmul.label]["flops"] / statistics.median(timings[matmul.label].seconds) / 1e9
    rows = []
    own_plain = {entry.name: _own_plain(entry.system, workload) for entry in entries}
    for entry in entries:
        row: Row = {
            "workload": workload,
            "system": entry.name,
            "variant": entry.variant,
            **facts.get(entry.label, {}),
            **work.facts,
            "bound_ms": work.flops / rate / 1e6,
            "own_plain": own_plain[entry.name],
        }
        failure = failures.get(entry.label) or (timings[entry.label].failure if entry.label in timings else None)
        if failure is None:
            row |= summary(timings[entry.label].seconds) | {"steps_in_a_round": timings[entry.label].steps}
        else:
            row["failure"] = failure
        rows.append(row)
    return with_ratios(rows, own_plain), rate


def _own_plain(system: System, workload: str) -> str | None:
    """The system that does the workload without privacy in the same framework, if there is one."""
    name = system.own_plain
    return name if name is not None and SYSTEMS[name].script(workload) else None


def _number(value: float | None, unit: str = "") -> str:
    if value is None:
        return ""
    return (f"{value:,.0f}" if value >= 1_000 else f"{value:.3g}") + unit


def cells(row: Row) -> list[str]:
    """A measured row as a reader sees it, under its kind's headings."""
    ratios = (row[name] for name in kind_of(row["workload"]).ratios.values())
    return [
        row["system"],
        row["variant"],
        row["version"],
        _number(row["median_ms"]),
        " - ".join(_number(each) for each in row["spread"]),
        *(_number(each) for each in ratios),
    ]


def measured_rows(rows: Sequence[Row]) -> list[Row]:
    """The rows that have times, fastest first."""
    return sorted((row for row in rows if "median_ms" in row), key=lambda row: row["median_ms"])


def caption(workload: str, rate: float) -> str:
    """What stands under a workload's table."""
    work = WORKLOADS[workload]
    return (
        f"{work.parameters:,} parameters; the {kind_of(workload).step}'s matrix products at this machine's "
        f"{rate:.0f} GFLOP/s: {_number(work.flops / rate / 1e6)} ms"
    )


def table(workload: str, rows: Sequence[Row], rate: float) -> Table:
    """The rows of one workload for the terminal."""
    title = f"{WORKLOADS[workload].title} ({workload})"
    result = Table(title=title, caption=caption(workload, rate), title_justify="left", caption_justify="left")
    for place, heading in enumerate(kind_of(workload).headings):
        result.add_column(heading, justify="left" if place < TEXTS else "right", no_wrap=True)
    for row in measured_rows(rows):
        result.add_row(*cells(row), style="bold" if row["system"] == "dpfl" else None if row["best"] else "dim")
    return result


def markdown(rows: Sequence[Row], rates: dict[str, float]) -> str:
    """The rows of all workloads for a document."""
    parts = []
    for workload, rate in rates.items():
        own = [row for row in rows if row["workload"] == workload]
        headings = kind_of(workload).headings
        lines = [headings, ["---" if place < TEXTS else "---:" for place in range(len(headings))]]
        lines += [cells(row) for row in measured_rows(own)]
        parts.append(f"### {WORKLOADS[workload].title} (`{workload}`)\n")
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n")
        parts.append(caption(workload, rate) + ".\n")
        parts += [f"Left out: {label(row)} ({row['failure']}).\n" for row in own if "failure" in row]
    return "\n".join(parts)


def label(row: Row) -> str:
    """System and variant."""
    return " ".join(filter(None, (row["system"], row["variant"])))


def show_memory(workloads: Sequence[str], threads: int, timeout: float) -> list[Row]:
    """Measures and prints dpfl's peak memory, each size in a process of its own.

    Raises:
        WorkerError: if it cannot be measured.
    """
    rows: list[Row] = []
    for workload in workloads:
        test, compared = MEMORY[workload], []
        for variant in test.variants:
            with closing_all() as workers:
                workers.append(start(test, workload, variant, threads))
                facts = workers[0].facts(timeout)
            rows.append({"workload": f"memory-{workload}", "system": "dpfl", "variant": variant, **facts})
            compared.append(facts[test.compared])
            numbers = (f"{name.replace('_', ' ')} {_number(facts[name])}" for name in facts if name != "version")
            console.print(f"{workload}, {variant}: {', '.join(numbers)}", highlight=False, soft_wrap=True)
        small, large = compared
        what = test.compared.replace("_", " ")
        console.print(f"Ratio of {what}: {large / small:.3f} (target: at most {test.target})")
    return rows


def draw_all(rows: Sequence[Row], workloads: Sequence[str], note: str, file: Path) -> None:
    """Draws a figure for each kind of workload; where there are two, their names end in what is measured."""
    kinds = [kind for kind in KINDS.values() if any(kind_of(name) is kind for name in workloads)]
    for kind in kinds:
        titles = {name: WORKLOADS[name].title for name in workloads if kind_of(name) is kind}
        of_kind = file if len(kinds) == 1 else file.with_stem(f"{file.stem}_{kind.step}s")
        draw(rows, titles, kind.coloured, of_kind, note=note, step=kind.step, reference=kind.reference)


def save(file: Path | None, about: dict[str, Any], rows: Sequence[Row]) -> None:
    """Writes the machine and the rows, unless there is no file."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"machine": about, "rows": list(rows)}, indent=1) + "\n")


def _chosen(
    asked: str | None, known: Sequence[str], what: str, letters: Mapping[str, str] = MappingProxyType({})
) -> list[str]:
    if asked is None:
        return list(known)
    names = [letters.get(name.strip(), name.strip()) for name in asked.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"there is no {what} {name!r}: choose among {', '.join(known)}")
    return names


def main(
    workload: Annotated[
        str | None, typer.Option(help="Workloads (or letters, a to e), separated by commas; all if left out.")
    ] = None,
    systems: Annotated[str | None, typer.Option(help="Systems, separated by commas; all if left out.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often each has its turn.")] = 7,
    seconds: Annotated[float, typer.Option(min=0.001, help="How long a turn should take.")] = 1.0,
    threads: Annotated[int, typer.Option(min=1, help="Threads (and processors) that each may use.")] = 2,
    timeout: Annotated[float, typer.Option(min=1, help="The most seconds to get ready, and for a step.")] = 300.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Writes the rows and the machine here.")] = None,
    figure: Annotated[
        Path | None, typer.Option(help="Draws the figure here; if left out, beside the JSON file, if there is one.")
    ] = None,
    memory: Annotated[bool, typer.Option("--memory", help="Measures peak memory instead of time.")] = False,
) -> None:
    """Runs dpfl and its peers side by side on the same work."""
    workloads = _chosen(workload, list(MEMORY if memory else WORKLOADS), "workload", LETTERS)
    names = _chosen(systems, list(SYSTEMS), "system")
    use_processors(threads)
    about = machine(threads)
    if (about["load_at_start"] or 0.0) > BUSY:
        console.print(
            f"Other processes are using this machine (load {about['load_at_start']:.1f}): times will be wrong."
        )
    if memory:
        try:
            rows = show_memory(workloads, threads, timeout)
        except WorkerError as error:
            console.print(f"Peak memory could not be measured: {error}", highlight=False, markup=False)
            raise typer.Exit(1) from None
        save(json_file, about, rows)
        return
    rows, rates = [], {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        for name in workloads:
            entries = [
                Entry(system, SYSTEMS[system], variant)
                for system in names
                if SYSTEMS[system].script(name)
                for variant in SYSTEMS[system].variants
            ]
            settings = {"rounds": rounds, "seconds": seconds, "threads": threads, "timeout": timeout}
            measured, rates[name] = measure(name, entries, bar=bar, **settings)
            rows += measured
            save(json_file, about | {"matmul_gflops": rates}, rows)
            console.print(table(name, measured, rates[name]))
            for row in measured:
                if "failure" in row:
                    console.print(f"{label(row)} is left out: {row['failure']}", highlight=False, markup=False)
    if json_file is not None:
        json_file.with_suffix(".md").write_text(markdown(rows, rates))
        figure = figure or json_file.with_suffix(".png")
    if figure is not None:
        note = f"{about['processor']}, {threads} threads, {about['date'][:10]}"
        draw_all(rows, workloads, note, figure)


if __name__ == "__main__":
    typer.run(main)
