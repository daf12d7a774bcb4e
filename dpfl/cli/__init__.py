"""The command line. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import typer

from dpfl.cli import accounting, studies
from dpfl.errors import InputError

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


_COMMANDS: tuple[Callable[..., None], ...] = (
    *(studies.study, studies.chart, studies.export),
    *(accounting.epsilon, accounting.noise, accounting.rounds, accounting.cohort, accounting.verify),
)
for _command in _COMMANDS:
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
    label_bins: Annotated[
        int | None, typer.Option(help="Cut a numeric label into so many classes at its quantiles, for tables.")
    ] = None,
    standardize: Annotated[
        bool,
        typer.Option(
            "--standardize", help="Scale features by their mean and deviation, for tables; not covered by epsilon."
        ),
    ] = False,
    missing: Annotated[
        Literal["refuse", "drop", "fill"] | None,
        typer.Option(
            help="What becomes of rows with missing values, for tables: see dpfl.data.from_dataframe. [refuse]"
        ),
    ] = None,
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
    bits: Annotated[int | None, typer.Option(help="Quantise updates to so many bits a coordinate, 1 to 8.")] = None,
    rotation: Annotated[bool, typer.Option("--rotation", help="Rotate updates at random before that.")] = False,
    random_k: Annotated[
        float | None, typer.Option(help="Train and send so many random coordinates, or this fraction of them.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Train and send kernels' updates as factors of this rank.")] = None,
    sparsity: Annotated[float, typer.Option(help="Prune this fraction of each kernel's weights.")] = 0.0,
    top_k: Annotated[
        float | None, typer.Option(help="Release a round's largest changes alone: so many, or this fraction.")
    ] = None,
    error_feedback: Annotated[
        bool, typer.Option("--error-feedback", help="Add what top-k left out to the next change.")
    ] = False,
    engine: Annotated[
        Literal["graph", "tff"],
        typer.Option(
            help="What runs the rounds: dpfl's own graph, or TensorFlow Federated, slower, to the same numbers."
        ),
    ] = "graph",
    seeds: Annotated[int, typer.Option(help="Number of seeds; every configuration uses the same ones.")] = 3,
    workers: studies.WorkersOption = None,
    ray: studies.RayOption = None,
    out: Annotated[Path, typer.Option(help="Folder for tables and figures; finished runs in it are kept.")] = Path(
        "runs/tradeoff"
    ),
    checkpoint_every: studies.CheckpointOption = None,
    quick: Annotated[bool, typer.Option("--quick", help="A smoke run: a small grid where no other is given.")] = False,
) -> None:
    """Train over epsilon x clip norm x number of rounds, and chart accuracy against privacy."""
    import dpfl.data
    from dpfl.compression import Compression
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
        label_bins=label_bins,
        missing=missing,
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
        compression=Compression(
            bits=bits,
            rotation=rotation,
            random_k=random_k,
            rank=rank,
            sparsity=sparsity,
            top_k=top_k,
            error_feedback=error_feedback,
        ),
        engine=engine,
    )
    store = studies.run(study, out, workers, ray, checkpoint_every)
    studies.draw(store, ("png",), studies.remember_prices(study, store))
    studies.print_best(study.frame(), tuning_prices(study, ["mechanism.clip_norm", "rounds"]))
    print(f"Tables: {out}/runs.csv, runs.parquet, history.parquet")


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
