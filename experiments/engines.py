"""FEMNIST on both engines: the same experiments in dpfl's own graph and under genuine TensorFlow Federated.

Trains a hidden layer of 100 units (84,762 parameters) on LEAF's writers: by plain averaging, under user-level privacy,
and under example-level privacy in the clients (DP-SGD). Then it compares what the engines measured on the way, and the
weights that they end with. A third run of each setting says how much of a difference rounding makes: in the graph
again, from initial weights that are larger by one unit in the last place of float32. Each run is kept in a file as soon
as it ends, and its checkpoints before; a second start, or one after a crash, does what is missing.

    DPFL_DATA_DIR=folder-with-femnist_leaf_writers.npz uv run python experiments/engines.py

Writes runs/engines/{runs.csv,rounds.csv,table.md,engines.png} and prints the table.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
import pandas as pd
import typer
from rich.console import Console

import dpfl
from dpfl.errors import InputError
from dpfl.files import written_whole
from dpfl.models.functional import FunctionalModel

if TYPE_CHECKING:
    import tensorflow as tf
    from matplotlib.figure import Figure

ENGINES = {"graph": "in-graph engine", "tff": "TensorFlow Federated"}


def network() -> tf.keras.Model:
    """The model "mlp" with tanh in the place of ReLU, in whose kink rounding grows."""
    import tensorflow as tf

    layers = tf.keras.layers
    return tf.keras.Sequential(
        [layers.Input((28, 28, 1)), layers.Flatten(), layers.Dense(100, activation="tanh"), layers.Dense(62)]
    )


class Setting(NamedTuple):
    """One experiment, as it is trained on both engines.

    Attributes:
        settings: of `dpfl.Experiment`, besides those that all have.
        colour: in the figure.
        model: of the experiment.
        least_examples: writers with fewer training examples are left out.
    """

    settings: dict[str, Any]
    colour: str
    model: Any = network
    least_examples: int = 1


PLAIN = dpfl.ClientTraining(learning_rate=0.3, epochs=1, batch_size=20)
# Learning rates, clip norms and batch sizes were chosen in two dozen runs of the in-graph engine by the accuracy on the
# validation split; the choice is not charged to epsilon. At example level a writer adds the more noise to its update
# the fewer examples it has: those with fewer than 100 are left out, whose updates would drown all others.
AVERAGING = {"local": PLAIN, "mechanism": dpfl.NoMechanism(), "privacy": dpfl.Privacy(epsilon=None)}
SETTINGS = {
    "plain averaging": Setting(AVERAGING, "#000000"),
    "user level, epsilon 8": Setting(
        {
            "local": PLAIN,
            "mechanism": dpfl.Gaussian(clip_norm=1.0),
            "privacy": dpfl.Privacy(unit="user", epsilon=8, delta=1e-3),
        },
        "#0072B2",
    ),
    "example level, epsilon 8": Setting(
        {
            "local": dpfl.ClientTraining(learning_rate=1.0, steps=1, batch_size=100, example_clip=1.0),
            "mechanism": dpfl.NoMechanism(),
            "privacy": dpfl.Privacy(unit="example", epsilon=8, delta=1e-5),
        },
        "#D55E00",
        least_examples=100,
    ),
    "plain averaging, ReLU": Setting(AVERAGING, "#009E73", model="mlp"),
}


class Run(NamedTuple):
    """One finished run.

    Attributes:
        record: its settings and measurements, as in the runs.csv of a study.
        history: one row a round.
        weights: of the last model.
    """

    record: dict[str, Any]
    history: list[dict[str, Any]]
    weights: list[np.ndarray]


def writers_with(data: dpfl.data.FederatedData, examples: int) -> dpfl.data.FederatedData:
    """The data without the writers who have fewer training examples."""
    kept = np.flatnonzero(data.client_sizes >= examples)
    rows = np.isin(np.repeat(np.arange(data.num_clients), data.client_sizes), kept)
    return dataclasses.replace(
        data,
        x=data.x[rows],
        y=data.y[rows],
        offsets=np.concatenate([[0], np.cumsum(data.client_sizes[kept])]),
        client_ids=tuple(data.client_ids[client] for client in kept),
    )


def finished(experiment: dpfl.Experiment, seed: int, out: Path) -> Run:
    """Trains one model, unless its file is there, and keeps it."""
    path = out / "records" / f"{experiment.run_id(seed)}.npz"
    if not path.is_file():
        result = experiment.run(seed, checkpoints=out / "checkpoints")
        text = np.array(json.dumps({"record": result.record, "history": result.history}))
        with written_whole(path) as part:
            np.savez(part, *result.weights, run=text)
    with np.load(path) as file:
        weights = [file[name] for name in file.files if name != "run"]
        return Run(**json.loads(str(file["run"])), weights=weights)


def nudged(experiment: dpfl.Experiment, seed: int) -> dpfl.Experiment:
    """The experiment from initial weights that are larger by one unit in the last place."""
    model = experiment.model
    if isinstance(model, str):
        model = FunctionalModel(model, experiment.data.example_shape, experiment.data.num_classes)
    start = [np.nextafter(weight, np.float32(np.inf)) for weight in model.initial_weights(seed)]
    return experiment.replace(model=model.to_keras(start))


def evaluated(name: str, seed: int, runs: dict[str, Run]) -> pd.DataFrame:
    """What both engines measured in a setting: a row for each engine and evaluated round."""
    columns = ["round", "update_norm", "accuracy", "loss", "validation_accuracy", "validation_loss"]
    frames = [
        pd.DataFrame(run.history).dropna(subset="accuracy")[columns].assign(setting=name, seed=seed, engine=engine)
        for engine, run in runs.items()
    ]
    return pd.concat(frames, ignore_index=True)


def differences(measured: pd.DataFrame, column: str) -> pd.DataFrame:
    """How far the engines are apart in a column, positive: a row for each setting, seed and evaluated round."""
    by_engine = measured.pivot_table(index=["setting", "seed", "round"], columns="engine", values=column)
    return (by_engine["graph"] - by_engine["tff"]).abs().rename(column).reset_index()


def apart(one: Run, other: Run) -> float:
    """The largest difference between the weights that two runs end with."""
    return max(float(np.abs(a - b).max()) for a, b in zip(one.weights, other.weights, strict=True))


HEADER = (
    "| setting | writers | seed | graph | TFF | images apart | weights apart | rounding | graph | TFF |\n"
    "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
)


def row(name: str, seed: int, runs: dict[str, Run], start_nudged: Run, test_examples: int) -> str:
    """A setting's row of the Markdown table: see the text beside it in README.md."""
    graph, tff = runs["graph"], runs["tff"]
    images = differences(evaluated(name, seed, runs), "accuracy")["accuracy"].max() * test_examples
    accuracies = " | ".join(f"{run.record['accuracy']:.2%}".replace("%", " %") for run in runs.values())
    seconds = " | ".join(f"{run.record['seconds'] / run.record['rounds_done']:.2f} s" for run in runs.values())
    return (
        f"| {name} | {graph.record['clients']} | {seed} | {accuracies} | {images:.0f} | {apart(graph, tff):.1e} "
        f"| {apart(graph, start_nudged):.1e} | {seconds} |"
    )


def figure(measured: pd.DataFrame) -> Figure:
    """Above, the accuracies of both engines over the rounds; below, how far their losses are apart."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import PercentFormatter

    from dpfl.charts.canvas import style

    with style:
        made = Figure(figsize=(5.5, 4.4), layout="constrained")
        above, below = made.subplots(2, sharex=True, height_ratios=[2, 1])
        marked = {"linestyle": "none", "markerfacecolor": "none", "markersize": 5}
        for (name, _), rows in measured.groupby(["setting", "seed"]):
            colour = SETTINGS[str(name)].colour
            graph, tff = (rows[rows["engine"] == engine] for engine in ENGINES)
            above.plot(graph["round"], graph["accuracy"], color=colour, linewidth=1)
            above.plot(tff["round"], tff["accuracy"], marker="o", color=colour, **marked)
            losses = differences(rows, "loss")
            below.plot(losses["round"], losses["loss"].clip(lower=1e-9), marker=".", color=colour, linewidth=0.7)
        above.set_ylabel("test accuracy")
        above.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        below.set_yscale("log")
        below.set_ylabel("losses apart (nats)")
        below.set_xlabel("round")
        settings = [Line2D([], [], color=setting.colour, label=name) for name, setting in SETTINGS.items()]
        engines = [
            Line2D([], [], color="0.4", linewidth=1, label=ENGINES["graph"]),
            Line2D([], [], color="0.4", marker="o", label=ENGINES["tff"], **marked),
        ]
        made.legend(handles=settings + engines, loc="outside upper center", ncols=3)
    return made


def main(
    data: Annotated[
        Path | None,
        typer.Option(help="LEAF's writers: x_train, y_train, u_train, x_test, y_test. [found by DPFL_DATA_DIR]"),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Seeds 0, 1, ... of each setting.", min=1)] = 2,
    rounds: Annotated[int, typer.Option(help="Rounds of each run.", min=1)] = 100,
    cohort: Annotated[int, typer.Option(help="Expected number of writers in a round.", min=1)] = 50,
    out: Annotated[Path, typer.Option(help="Folder of the runs, the tables and the figure.")] = Path("runs/engines"),
) -> None:
    """Trains what is missing and writes the tables."""
    console = Console()
    femnist = dpfl.data.femnist(data)
    rows, records, measured = [HEADER], [], []
    for name, setting in SETTINGS.items():
        experiment = dpfl.Experiment(
            data=writers_with(femnist, setting.least_examples),
            model=setting.model,
            sampler=dpfl.Poisson(cohort=cohort),
            rounds=rounds,
            evaluate_every=5,
            **setting.settings,
        )
        for seed in range(seeds):
            runs = {}
            for engine, described in ENGINES.items():
                console.print(f"{name}, seed {seed}, {described}")
                runs[engine] = finished(experiment.replace(engine=engine), seed, out)
                records.append({"setting": name, **runs[engine].record})
            console.print(f"{name}, seed {seed}, {ENGINES['graph']} from nudged weights")
            start_nudged = finished(nudged(experiment, seed), seed, out)
            rows.append(row(name, seed, runs, start_nudged, len(femnist.y_test)))
            measured.append(evaluated(name, seed, runs))
    frame = pd.concat(measured, ignore_index=True)
    for file, content in (("runs.csv", pd.DataFrame(records)), ("rounds.csv", frame)):
        with written_whole(out / file) as part:
            content.to_csv(part, index=False)
    with written_whole(out / "table.md") as part:
        part.write_text("\n".join(rows) + "\n")
    dpfl.charts.save(figure(frame), out / "engines.png")
    console.print("\n".join(rows), soft_wrap=True, markup=False)


if __name__ == "__main__":
    try:
        typer.run(main)
    except InputError as error:
        raise SystemExit(str(error)) from None
