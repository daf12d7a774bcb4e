"""The commands that run studies and draw what they found."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from dpfl.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

    from dpfl.study import Store, Study

WorkersOption = Annotated[int | None, typer.Option(min=1, help="Worker processes. [one for each core]")]
RayOption = Annotated[
    str | None,
    typer.Option(
        help='Run on a Ray cluster instead: "auto" for the one of this machine, HOST:PORT, or "local" for a new one.'
    ),
]
CheckpointOption = Annotated[
    int | None,
    typer.Option(min=1, help="Rounds after which a run that has not ended is kept too; for long runs. [never]"),
]
FormatsOption = Annotated[str, typer.Option(help="File formats of the figures: png, svg, pdf.")]
_CHOICES_OF_CHARTS = ("mechanism", "local.example_clip")
_FORMATS = ("png", "svg", "pdf")


def study(
    file: Annotated[Path, typer.Argument(help="YAML file: see dpfl.study.StudyConfig for its settings.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for tables and figures; ended runs in it are kept. [runs/FILE's name]")
    ] = None,
    workers: WorkersOption = None,
    ray: RayOption = None,
    checkpoint_every: CheckpointOption = None,
    formats: FormatsOption = "png,pdf",
) -> None:
    """Run the study of a YAML file: all its experiments, with all seeds, then tables and figures."""
    from dpfl.study import StudyConfig

    wanted = _formats(formats)
    config = StudyConfig.from_yaml(file)
    planned = config.study()
    for data in {experiment.data.fingerprint: experiment.data for experiment in planned.experiments}.values():
        print(data.summary())
    folder = out or Path("runs") / file.stem
    store = run(planned, folder, workers, ray, checkpoint_every)
    config.to_yaml(folder / "study.yaml")
    prices = remember_prices(planned, store)
    draw(store, wanted, prices)
    print_best(planned.frame(), prices)
    print(f"Tables: {folder}/runs.csv, runs.parquet, history.parquet")


def chart(
    folder: Annotated[Path, typer.Argument(help="Folder of a study that has run.")],
    formats: FormatsOption = "png,pdf",
) -> None:
    """Draw all figures of a study anew from its records."""
    from dpfl.study import Store

    store = Store.existing(folder)
    if store.frame().empty:
        raise InputError(f"no run has ended in {folder} yet: run the study first.")
    prices = {float(target): price for target, price in store.description().get("tuning_prices", {}).items()}
    draw(store, _formats(formats), prices)


def export(
    folder: Annotated[Path, typer.Argument(help="Folder of a study that has run.")],
    to: Annotated[Literal["csv", "tensorboard", "mlflow"], typer.Option(help="What to write.")] = "csv",
    out: Annotated[Path | None, typer.Option(help="Where to. [FOLDER/csv, FOLDER/tensorboard, FOLDER/mlflow]")] = None,
) -> None:
    """Write a study's runs and rounds for other programs."""
    from dpfl.study import Store
    from dpfl.study.exporting import export as export_study

    target = out or folder / to
    export_study(Store.existing(folder), target, to)
    print(f"written to {target}")


def run(planned: Study, folder: Path, workers: int | None, ray: str | None, checkpoint_every: int | None) -> Store:
    """Does the runs that are missing, tells what became of them, and ends the program on Ctrl-C."""
    from dpfl.study import Store

    store = Store(folder)
    total, pending = len(planned.run_ids), planned.pending(folder)
    if pending < total:
        print(f"{total - pending} of {total} runs are finished in {folder} and kept; {pending or 'none'} to do.")
    try:
        frame = planned.run(folder, workers=workers, ray=ray, checkpoint_every=checkpoint_every).frame()
    except KeyboardInterrupt:
        print(
            f"\ninterrupted: {total - planned.pending(folder)} of {total} finished runs are kept in {folder}; "
            "the same command goes on from there.",
            file=sys.stderr,
        )
        raise typer.Exit(130) from None
    if diverged := int((frame["status"] == "diverged").sum()):
        print(f"{diverged} of {len(frame)} runs diverged; they are recorded as such in runs.csv.")
    failed = frame[frame["status"] == "failed"]
    for reason, count in failed["reason"].value_counts().items():
        print(f"{count} of {len(frame)} runs failed twice ({reason}); the same command tries them again.")
    return store


def remember_prices(planned: Study, store: Store) -> dict[float, float]:
    """What each target epsilon becomes where the best clip is released; kept with the study, for `dpfl chart`."""
    from dpfl.study import tuning_prices

    try:
        prices = tuning_prices(planned, _CHOICES_OF_CHARTS)
    except InputError:  # of mechanisms for which no price is known
        prices = {}
    store.describe({**store.description(), "tuning_prices": prices})
    return prices


def draw(store: Store, formats: tuple[str, ...], prices: dict[float, float]) -> None:
    """Draws every figure that the runs support, and says which these are and why others are not."""
    from dpfl import charts

    figures = store.folder / "figures"
    drawn = charts.draw_all(
        store.frame(), store.history(), store.client_epsilons(), figures, formats=formats, prices=prices or None
    )
    made = [name for name, found in drawn.items() if Path(found).suffix[1:] in formats]
    print(f"Figures in {figures}: {', '.join(made) or 'none'}")
    for name in drawn:
        if name not in made:
            print(f"  no {name}: {drawn[name]}")


def print_best(frame: pd.DataFrame, prices: dict[float, float]) -> None:
    """Prints the best setting for each epsilon, and what epsilon becomes if the choice is charged."""
    import pandas as pd

    from dpfl import charts

    try:
        best = charts.best_settings(frame)
    except InputError as error:
        print(f"no table of the best settings: {error}", file=sys.stderr)
        return
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
    for row in best.to_dict("records"):
        no_noise = "plain averaging" if row["mechanism"] == "none" and pd.isna(row["clip_norm"]) else "no noise"
        price = prices.get(row["epsilon"])
        table.add_row(
            no_noise if pd.isna(row["epsilon"]) else f"{row['epsilon']:g}",
            "-" if price is None else f"{price:.3g}",
            f"{row['noise_multiplier']:g}" if row["noise_multiplier"] else "-",
            "-" if pd.isna(row["clip_norm"]) else f"{row['clip_norm']:g}",
            f"{row['rounds']}",
            f"{row['mean']:.1%}" + ("" if pd.isna(row["high"]) else f" ± {row['high'] - row['mean']:.1%}"),
        )
    Console().print(table)


def _formats(text: str) -> tuple[str, ...]:
    formats = tuple(word.strip() for word in text.split(","))
    if wrong := [word for word in formats if word not in _FORMATS]:
        raise InputError(f"--formats takes png, svg and pdf, separated by commas, but '{wrong[0]}' is none of these.")
    return formats
