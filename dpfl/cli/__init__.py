"""The command line. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from dpfl.cli import accounting
from dpfl.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

app = typer.Typer(
    name="dpfl",
    help="Differentially private federated learning: train, account, and chart the privacy-accuracy trade-off.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


class _Grid(NamedTuple):
    """What `tradeoff` varies unless it is told."""

    epsilon: str
    clip_norm: str
    rounds: str
    local_work: int


_DEFAULT_GRID = _Grid("0.5,1,2,4,8,none", "0.1,0.25,0.5,1,2", "10,30,100,300", 300)
_QUICK_GRID = _Grid("1,8,none", "0.5", "10,30", 30)


for _command in (accounting.epsilon, accounting.noise, accounting.rounds, accounting.cohort, accounting.verify):
    app.command()(_command)


def main() -> None:
    """Runs the command line; refused input becomes one sentence and exit code 2."""
    try:
        app()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _print_version(asked: bool) -> None:
    if asked:
        import dpfl

        print(dpfl.__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None: ...


@app.command()
def tradeoff(
    data: Annotated[
        str,
        typer.Option(
            help="digits, synthetic, mnist, fashion_mnist, cifar10, femnist, emnist, cifar100, a .npz, .csv or "
            ".parquet file, or the folder of a saved dataset."
        ),
    ] = "digits",
    clients: Annotated[
        int | None, typer.Option(help="Clients: simulated, or to read of a dataset's own. [digits: 300]")
    ] = None,
    partition: Annotated[
        str | None, typer.Option(help="How examples go to simulated clients: iid, dirichlet:ALPHA or shards:N. [iid]")
    ] = None,
    client_column: Annotated[str | None, typer.Option(help="Column that names the client, for files.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Column of the label, for files.")] = None,
    features: Annotated[
        str | None, typer.Option(help="Columns to learn from, separated by commas, for files. [all others]")
    ] = None,
    standardize: Annotated[
        bool,
        typer.Option(
            "--standardize", help="Scale features by their mean and deviation, for tables; not covered by epsilon."
        ),
    ] = False,
    model: Annotated[str, typer.Option(help="softmax, mlp or cnn.")] = "softmax",
    epsilon: Annotated[
        str | None,
        typer.Option(help="Epsilons; none clips without noise and adds plain averaging. [0.5,1,2,4,8,none]"),
    ] = None,
    clip_norm: Annotated[
        str | None, typer.Option(help="Clip norms: largest L2 norms of an update. [0.1,0.25,0.5,1,2]")
    ] = None,
    rounds: Annotated[
        str | None, typer.Option(help="Numbers of rounds; the more, the fewer local steps in each. [10,30,100,300]")
    ] = None,
    local_work: Annotated[
        int | None, typer.Option(help="Local steps of a client over all rounds, held fixed. [300]")
    ] = None,
    delta: Annotated[float | None, typer.Option(help="Delta. [the largest power of ten below 1 / clients]")] = None,
    relation: accounting.RelationOption = "add_or_remove_one",
    accountant: accounting.AccountantOption = "pld",
    allow_weak_delta: Annotated[
        bool, typer.Option("--allow-weak-delta", help="Accept a delta of 1 / clients and more.")
    ] = False,
    cohort: Annotated[
        int | None, typer.Option(help="Expected number of clients in a round. [30 % of the clients]")
    ] = None,
    deployment_clients: Annotated[
        int | None,
        typer.Option(help="Calibrate for this larger number of clients, which the simulation stands for. [the data's]"),
    ] = None,
    deployment_cohort: Annotated[
        int | None, typer.Option(help="Expected number of clients in a round of that deployment.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Examples in a client's minibatch.")] = 5,
    learning_rate: Annotated[float, typer.Option(help="Learning rate of the clients' SGD.")] = 0.5,
    server_optimizer: Annotated[
        Literal["sgd", "momentum", "adam"], typer.Option(help="The server's optimizer.")
    ] = "sgd",
    server_learning_rate: Annotated[float, typer.Option(help="Learning rate of the server's optimizer.")] = 1.0,
    engine: Annotated[
        Literal["graph", "tff"],
        typer.Option(
            help="What runs the rounds: dpfl's own graph, or TensorFlow Federated, slower, to the same numbers."
        ),
    ] = "graph",
    seeds: Annotated[int, typer.Option(help="Number of seeds; every configuration uses the same ones.")] = 3,
    workers: Annotated[int | None, typer.Option(min=1, help="Worker processes. [one for each core]")] = None,
    out: Annotated[Path, typer.Option(help="Folder for tables and figures; finished runs in it are kept.")] = Path(
        "runs/tradeoff"
    ),
    checkpoint_every: Annotated[
        int | None,
        typer.Option(min=1, help="Rounds after which a run that has not ended is kept too; for long runs. [never]"),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A smoke run: a small grid where no other is given.")] = False,
) -> None:
    """Train over epsilon x clip norm x number of rounds, and chart accuracy against privacy."""
    import dpfl.data
    from dpfl.mechanisms import Deployment
    from dpfl.privacy import Privacy
    from dpfl.simulation import ServerOptimizer
    from dpfl.study import tradeoff as tradeoff_study
    from dpfl.study import tuning_prices

    federated = dpfl.data.load(
        data,
        clients=clients,
        partition=partition,
        client=client_column,
        label=label_column,
        features=None if features is None else [name.strip() for name in features.split(",")],
        standardize=standardize or None,
    )
    print(federated.summary())
    grid = _QUICK_GRID if quick else _DEFAULT_GRID

    def given(option: Any, default: Any) -> Any:
        return default if option is None else option

    if (deployment_clients is None) != (deployment_cohort is None):
        raise InputError("--deployment-clients and --deployment-cohort go together: give both, or neither.")
    deployment = (
        None if deployment_clients is None else Deployment(clients=deployment_clients, cohort=deployment_cohort)
    )
    study = tradeoff_study(
        federated,
        model=model,
        epsilons=_numbers("epsilon", given(epsilon, grid.epsilon), float, none_allowed=True),
        clip_norms=_numbers("clip-norm", given(clip_norm, grid.clip_norm), float),
        rounds=_numbers("rounds", given(rounds, grid.rounds), int),
        local_work=given(local_work, grid.local_work),
        privacy=Privacy(
            epsilon=None,
            delta=given(delta, _default_delta(deployment_clients or federated.num_clients)),
            relation=relation,
            accountant=accountant,
            allow_weak_delta=allow_weak_delta,
        ),
        cohort=given(cohort, max(1, round(0.3 * federated.num_clients))),
        batch_size=batch_size,
        learning_rate=learning_rate,
        server=ServerOptimizer(name=server_optimizer, learning_rate=server_learning_rate),
        seeds=seeds,
        deployment=deployment,
        engine=engine,
    )
    total, pending = len(study.run_ids), study.pending(out)
    if pending < total:
        print(f"{total - pending} of {total} runs are finished in {out} and kept; {pending or 'none'} to do.")
    try:
        frame = study.run(out, workers=workers, checkpoint_every=checkpoint_every).frame()
    except KeyboardInterrupt:
        print(
            f"\ninterrupted: {total - study.pending(out)} of {total} finished runs are kept in {out}; "
            "the same command goes on from there.",
            file=sys.stderr,
        )
        raise typer.Exit(130) from None
    _chart(frame, out, tuning_prices(study, ["mechanism.clip_norm"]))
    _print_best(frame, tuning_prices(study, ["mechanism.clip_norm", "rounds"]))
    print(f"Tables and figures: {out}/runs.csv, history.csv, epsilon.png, clipping.png, round_frequency.png")


def _numbers(name: str, text: str, kind: type, none_allowed: bool = False) -> list[Any]:
    def parse(word: str) -> Any:
        if none_allowed and word.lower() == "none":
            return None
        try:
            return kind(word)
        except ValueError:
            expected = "whole numbers" if kind is int else "numbers"
            also = " or none" if none_allowed else ""
            raise InputError(
                f"--{name} takes {expected}{also}, separated by commas, but '{word}' is none of these."
            ) from None

    return [parse(word.strip()) for word in text.split(",")]


def _default_delta(clients: int) -> float:
    """The largest power of ten below 1 / clients."""
    return float(f"1e-{len(str(clients))}")


def _chart(frame: pd.DataFrame, folder: Path, prices: dict[float, float]) -> None:
    from dpfl import charts

    for name, more in (("epsilon", {"prices": prices}), ("clipping", {}), ("round_frequency", {"prices": prices})):
        try:
            figure = getattr(charts, name)(frame, **more)
        except InputError as error:
            print(f"no {name}.png: {error}", file=sys.stderr)
        else:
            charts.save(figure, folder / f"{name}.png")


def _print_best(frame: pd.DataFrame, prices: dict[float, float]) -> None:
    """Prints the best setting for each epsilon, and what epsilon becomes if the choice is charged."""
    import pandas as pd

    from dpfl import charts

    first = frame.iloc[0]
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"{first['dataset']}: best of the grid by validation accuracy, reported on the test split",
        caption="±: 95 % Student t over seeds. Epsilon does not cover the choice of the best. With choice: epsilon of "
        "releasing just the best of a random number of random settings, on average as many as the grid has",
    )
    if frame["deployment_clients"].notna().any():
        spent = frame.loc[frame["epsilon"].notna(), "epsilon_spent"]
        print(
            f"Extrapolated: epsilon holds for {first['deployment_clients']:,.0f} clients with "
            f"{first['deployment_cohort']:,.0f} in a round; the {first['clients']:,} simulated ones have "
            + ("no guarantee." if spent.isna().any() else f"epsilon up to {spent.max():,.4g}.")
        )
    for heading in ("epsilon", "with\nchoice", "noise\nmultiplier", "clip\nnorm", "rounds", "test\naccuracy"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in charts.best_settings(frame).to_dict("records"):
        no_noise = "plain averaging" if row["mechanism"] == "none" else "no noise"
        table.add_row(
            no_noise if pd.isna(row["epsilon"]) else f"{row['epsilon']:g}",
            "-" if pd.isna(row["epsilon"]) else f"{prices[row['epsilon']]:.3g}",
            f"{row['noise_multiplier']:g}" if row["noise_multiplier"] else "-",
            "-" if pd.isna(row["clip_norm"]) else f"{row['clip_norm']:g}",
            f"{row['rounds']}",
            f"{row['mean']:.1%}" + ("" if pd.isna(row["high"]) else f" ± {row['high'] - row['mean']:.1%}"),
        )
    Console().print(table)
    diverged = int((frame["status"] == "diverged").sum())
    if diverged:
        print(f"{diverged} of {len(frame)} runs diverged; they are recorded as such in runs.csv.")
