"""Scale: what a client costs, in time and memory, as the cohort grows over a population that is larger than memory.

Writes a synthetic population to a folder, 100,000 clients with 10 to 20 examples of 784 features each (4.7 GB), opens
it as a memory map, and trains a network of 987,210 weights under central Gaussian noise with cohorts of 100 to 10,000
clients, each in a process of its own. Beside the seconds, it measures the process' resident memory: the anonymous part,
which it alone has and which must fit the machine, and the file-backed part, which are pages of the population (and of
libraries) that the system takes back when it needs the room.

    uv run python experiments/scale.py

Writes runs/scale/{scale.json,table.md,scale.png} and prints the table.
"""

from __future__ import annotations

import concurrent.futures
import json
import math
import multiprocessing
import platform
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
import typer
from rich.console import Console

import dpfl
from dpfl.errors import InputError
from dpfl.files import written_whole
from dpfl.progress import progress_bar

if TYPE_CHECKING:
    import tensorflow as tf
    from matplotlib.figure import Figure

FEATURES, CLASSES, FEWEST_EXAMPLES, MOST_EXAMPLES = 784, 10, 10, 20
COHORTS = (100, 300, 1_000, 3_000, 10_000)
LEAST_CLIENTS = 2_000  # trained in the measured rounds of a cohort, of which there are two at least
MB = 1e6


class Measured(NamedTuple):
    """What one cohort cost, in a process of its own; memory in bytes, at its highest unless said otherwise.

    Pages of a file are mapped together with their neighbours where these are in the system's cache, so that more is
    file-backed than was read.

    Attributes:
        cohort: expected number of clients in a round.
        rounds: that were measured, after one that compiles and is not.
        clients: trained in these rounds.
        seconds_per_client: median over the rounds, with the round's noise and the evaluation on 1,000 examples.
        anonymous_at_import: anonymous memory when TensorFlow was ready, before anything was opened.
        anonymous: anonymous memory.
        file_backed: mapped pages of files, of the population and of libraries.
    """

    cohort: int
    rounds: int
    clients: int
    seconds_per_client: float
    anonymous_at_import: int
    anonymous: int
    file_backed: int


def population(clients: int) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Clients one after the other: standard normal features around a centre for each class."""
    rng = np.random.default_rng(0)
    centres = _centres()
    for k in range(clients):
        y = rng.integers(0, CLASSES, FEWEST_EXAMPLES + k % (MOST_EXAMPLES - FEWEST_EXAMPLES + 1))
        yield str(k), _around(centres[y], rng), y


def _centres() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((CLASSES, FEATURES), dtype=np.float32) * np.float32(0.1)


def _around(centres: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return centres + rng.standard_normal(centres.shape, dtype=np.float32)


def written(folder: Path, clients: int) -> dpfl.data.FederatedData:
    """The population in a folder, written there unless it is there already."""
    if folder.is_dir():
        return dpfl.data.load(folder)
    rng = np.random.default_rng(2)
    labels = rng.integers(0, CLASSES, 1_000)
    test = _around(_centres()[labels], rng), labels
    with progress_bar("writing the population", clients, "clients") as advance:

        def counted() -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
            for client in population(clients):
                yield client
                advance(1)

        assumption = "Clients and examples are synthetic, drawn at random."
        return dpfl.data.write_clients(
            folder, counted(), num_classes=CLASSES, test=test, name="population", assumptions=[assumption]
        )


def network() -> tf.keras.Model:
    """987,210 weights: two hidden layers, of 1,000 and 200 units."""
    import tensorflow as tf

    layers = tf.keras.layers
    return tf.keras.Sequential(
        [
            layers.Input((FEATURES,)),
            layers.Dense(1_000, activation="relu"),
            layers.Dense(200, activation="relu"),
            layers.Dense(CLASSES),
        ]
    )


class Memory:
    """The highest resident memory of this process while the block runs, looked at every 5 milliseconds.

    Attributes:
        anonymous: bytes.
        file_backed: bytes.
    """

    def __enter__(self) -> Memory:
        self.anonymous = self.file_backed = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while True:
            anonymous, file_backed = resident()
            self.anonymous, self.file_backed = max(self.anonymous, anonymous), max(self.file_backed, file_backed)
            if self._ended.wait(0.005):
                return


def resident() -> tuple[int, int]:
    """Anonymous and file-backed resident memory of this process in bytes, as Linux tells it."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        raise InputError(
            "this machine does not tell a process' memory in /proc/self/status: run it on Linux."
        ) from None
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith("Rss")}
    return 1_024 * kilobytes["RssAnon"], 1_024 * kilobytes["RssFile"]


def measure(folder: Path, cohort: int) -> Measured:
    """Trains with a cohort, in a process that has done nothing before."""
    import tensorflow as tf

    from dpfl.simulation.run import run

    tf.linalg.matmul(tf.zeros((2, 2)), tf.zeros((2, 2)))  # starts TensorFlow's threads
    at_import, _ = resident()
    rounds = max(2, math.ceil(LEAST_CLIENTS / cohort))
    ended = []
    with Memory() as memory:
        experiment = dpfl.Experiment(
            data=dpfl.data.load(folder),
            model=network,
            local=dpfl.ClientTraining(learning_rate=0.1, epochs=1, batch_size=10),
            mechanism=dpfl.Gaussian(clip_norm=1.0, noise_multiplier=1.1),
            # An accountant whose own memory is small beside the model's.
            privacy=dpfl.Privacy(epsilon=None, delta=1e-6, accountant="rdp"),
            sampler=dpfl.Poisson(cohort=cohort),
            rounds=1 + rounds,
            evaluate_every=1,
        )
        result = run(experiment, experiment.plan(), None, 0, lambda _: ended.append(time.perf_counter()))
    sizes = [row["cohort"] for row in result.history[1:]]
    # The last calls are those after each round; the first round compiles.
    seconds = np.diff(ended[-1 - rounds :])
    return Measured(
        cohort=cohort,
        rounds=rounds,
        clients=sum(sizes),
        seconds_per_client=statistics.median(seconds / sizes),
        anonymous_at_import=at_import,
        anonymous=memory.anonymous,
        file_backed=memory.file_backed,
    )


def measured_apart(folder: Path, cohort: int) -> Measured:
    """`measure` in a new process."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as executor:
        return executor.submit(measure, folder, cohort).result()


HEADER = (
    "| cohort | rounds | clients | ms per client | anonymous memory | beyond TensorFlow's own | file-backed |\n"
    "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
)


def row(measured: Measured) -> str:
    """A cohort's row of the Markdown table."""
    beyond = measured.anonymous - measured.anonymous_at_import
    return (
        f"| {measured.cohort:,} | {measured.rounds} | {measured.clients:,} | {1e3 * measured.seconds_per_client:.2f} "
        f"| {measured.anonymous / MB:,.0f} MB | {beyond / MB:,.0f} MB | {measured.file_backed / MB:,.0f} MB |"
    )


def figure(rows: list[Measured], population_bytes: int) -> Figure:
    """Time and memory over the cohort, both from zero."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    from dpfl.charts.canvas import style

    cohorts = [each.cohort for each in rows]
    with style:
        made = Figure(figsize=(5.5, 2.7), layout="constrained")
        left, right = made.subplots(1, 2)
        left.plot(cohorts, [1e3 * each.seconds_per_client for each in rows], marker="o", color="#0072B2")
        left.set_ylabel("ms per client")
        memory = {
            "pages of files, which the system may drop": ("#999999", "^", [each.file_backed for each in rows]),
            "of the process alone (anonymous)": ("#D55E00", "o", [each.anonymous for each in rows]),
            "the same after importing TensorFlow": ("0.25", "", [each.anonymous_at_import for each in rows]),
        }
        for label, (colour, marker, values) in memory.items():
            linestyle = "-" if marker else "--"
            right.plot(
                cohorts,
                [value / 1e9 for value in values],
                marker=marker,
                color=colour,
                linestyle=linestyle,
                label=label,
            )
        right.axhline(population_bytes / 1e9, color="#009E73", linestyle=":", label="the population's size")
        right.set_ylabel("peak memory (GB)")
        for axes in (left, right):
            axes.set_xscale("log")
            axes.set_xticks(cohorts)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda cohort, _: f"{cohort:,.0f}"))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xlabel("clients in a round")
            axes.set_ylim(bottom=0, top=1.15 * axes.get_ylim()[1])
        made.legend(loc="outside upper right", ncols=2)
    return made


def main(
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of the population, which is written if it is not there, and kept. [none is kept]"),
    ] = None,
    clients: Annotated[int, typer.Option(help="Clients of a population that is written.", min=20_000)] = 100_000,
    quick: Annotated[bool, typer.Option("--quick", help="20,000 clients, and cohorts up to 1,000.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of the numbers, the table and the figure.")] = Path("runs/scale"),
) -> None:
    """Measures each cohort and writes the table and the figure."""
    console = Console()
    cohorts = COHORTS[:3] if quick else COHORTS
    scratch = None
    if data is None:
        out.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".population-", dir=out))  # /tmp may be in memory
    folder = data or scratch / "population"
    try:
        described = written(folder, 20_000 if quick else clients)
        console.print(described.summary())
        size = described.x.nbytes
        rows = []
        console.print(HEADER, soft_wrap=True, markup=False)
        with progress_bar("training", len(cohorts), "cohorts") as advance:
            for cohort in cohorts:
                rows.append(measured_apart(folder, cohort))
                console.print(row(rows[-1]), soft_wrap=True, markup=False)
                advance(1)
    finally:
        if scratch is not None:
            shutil.rmtree(scratch)
    machine: dict[str, Any] = {"cpu_count": multiprocessing.cpu_count(), "platform": platform.platform()}
    numbers = {
        "machine": machine,
        "clients": described.num_clients,
        "population_bytes": size,
        "cohorts": [each._asdict() for each in rows],
    }
    table = "\n".join([HEADER, *map(row, rows)])
    for name, text in (("scale.json", json.dumps(numbers, indent=2)), ("table.md", table)):
        with written_whole(out / name) as part:
            part.write_text(text + "\n")
    dpfl.charts.save(figure(rows, size), out / "scale.png")


if __name__ == "__main__":
    try:
        typer.run(main)
    except InputError as error:
        raise SystemExit(str(error)) from None
