"""What the studies in this folder share: their options, their dataset and the experiment from which they start.

Each of them answers one question: it says which settings vary, and this module does the rest. The defaults are for
scikit-learn's digits, which are always there.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import pandas as pd
import typer
from rich.console import Console

import dpfl
from dpfl.errors import InputError
from dpfl.files import written_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Value = TypeVar("Value")


@dataclasses.dataclass(frozen=True)
class Setting:
    """What the command line said.

    Attributes:
        source: name of the dataset, or path of a file or folder.
        columns: what `dpfl.data.load` is told about the columns of a table.
        model: as `dpfl.Experiment` takes it.
        learning_rate: of the clients' SGD.
        batch_size: examples in a client's minibatch.
        seeds: number of seeds.
        workers: number of processes; None for one a core.
        out: folder of the runs, the table and the figures.
        quick: whether this is a smoke run.
    """

    source: str
    columns: dict[str, Any]
    model: str
    learning_rate: float
    batch_size: int
    seeds: int
    workers: int | None
    out: Path
    quick: bool

    def load(self, **options: Any) -> dpfl.data.FederatedData:
        """The dataset, with options such as `partition="dirichlet:0.1"`."""
        return dpfl.data.load(self.source, **self.columns, **options)

    @functools.cached_property
    def data(self) -> dpfl.data.FederatedData:
        """The dataset as it comes."""
        return self.load()

    def some(self, values: Sequence[Value], count: int = 2) -> list[Value]:
        """The values of an axis; in a smoke run the last few."""
        return list(values[-count:] if self.quick else values)

    def experiment(self, **changes: Any) -> dpfl.Experiment:
        """User-level privacy by the Gaussian mechanism: 100 rounds, 3 local steps, 30 % of the clients a round.

        Args:
            changes: other values of `dpfl.Experiment`'s settings.
        """
        data = changes.get("data") or self.data
        clients = data.num_clients
        settings = {
            "data": data,
            "model": self.model,
            "local": self.local(steps=3),
            "mechanism": dpfl.Gaussian(clip_norm=0.5),
            "privacy": dpfl.Privacy(epsilon=4, delta=delta(clients)),
            "sampler": dpfl.Poisson(cohort=max(1, round(0.3 * clients))),
            "rounds": 10 if self.quick else 100,
        }
        return dpfl.Experiment(**{**settings, **changes})

    def local(self, steps: int, **more: Any) -> dpfl.ClientTraining:
        """What clients do in a round: local steps of SGD."""
        return dpfl.ClientTraining(
            **{"learning_rate": self.learning_rate, "batch_size": self.batch_size, "steps": steps, **more}
        )

    def run(self, study: dpfl.Study, folder: str = "") -> pd.DataFrame:
        """Does the runs that are missing and returns all of them, one row a run.

        Args:
            study: with its runs.
            folder: inside the folder of results, where a script has several studies.
        """
        frame = study.run(self.out / folder, workers=self.workers).frame()
        for status, count in frame["status"].value_counts().items():
            if status != "finished":
                Console().print(f"{count} of {len(frame)} runs {status}: see runs.csv.")
        return frame

    def save(self, figure: Figure, name: str) -> None:
        """Writes a figure into the folder."""
        dpfl.charts.save(figure, self.out / f"{name}.png")

    def show(self, table: pd.DataFrame, *sentences: str, name: str = "table") -> None:
        """Prints means over the seeds with their intervals, and sentences about them; keeps both as Markdown.

        Args:
            table: as `dpfl.statistics.summarise` returns it.
            sentences: what is said below the table.
            name: of the file.
        """
        text = "\n".join([markdown(table), *(f"\n{sentence}" for sentence in sentences)])
        with written_whole(self.out / f"{name}.md") as part:
            part.write_text(text + "\n")
        Console().print(text, soft_wrap=True, markup=False)


def delta(records: int) -> float:
    """The largest power of ten below 1 / records: 1e-3 for 300 clients."""
    return float(f"1e-{len(str(records))}")


def markdown(table: pd.DataFrame) -> str:
    """A table of means and their intervals as Markdown, accuracies in percent."""
    half = table["high"] - table["mean"]
    accuracy = [
        f"{100 * mean:.1f} %" + (f" ± {100 * width:.1f}" if pd.notna(width) else "")
        for mean, width in zip(table["mean"], half, strict=True)
    ]
    shown = table.drop(columns=["mean", "low", "high"]).assign(**{"test accuracy": accuracy})
    lines = [shown.columns.str.replace("_", " "), ["---:"] * shown.shape[1]]
    lines += [[_cell(value) for value in row] for row in shown.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return value.replace("_", " ")
    return "" if pd.isna(value) else f"{value:,.6g}"


def command(answer: Callable[[Setting], None], name: str, seeds: int = 5) -> None:
    """Runs a script: reads the command line, and has the question answered.

    Args:
        answer: does the study, draws its figures and prints its table.
        name: of the script, and of its folder.
        seeds: how many there are unless the command line says otherwise.
    """

    def main(
        data: Annotated[
            str,
            typer.Option(
                help="digits, femnist, mnist, ... (see dpfl.data.load; files are found by DPFL_DATA_DIR), a table "
                "(.csv, .tsv, .parquet, also compressed), an .npz file, or a folder."
            ),
        ] = "digits",
        client_column: Annotated[str | None, typer.Option(help="Of a table: whose row it is.")] = None,
        label_column: Annotated[str | None, typer.Option(help="Of a table: what to predict.")] = None,
        features: Annotated[str | None, typer.Option(help="Of a table: columns to learn from. [all others]")] = None,
        model: Annotated[str, typer.Option(help="softmax, mlp or cnn.")] = "softmax",
        learning_rate: Annotated[float, typer.Option(help="Of the clients' SGD.")] = 0.5,
        batch_size: Annotated[int, typer.Option(help="Examples in a client's minibatch.", min=1)] = 5,
        seeds: Annotated[int, typer.Option(help="Seeds 0, 1, ... of each configuration.", min=1)] = seeds,
        workers: Annotated[int | None, typer.Option(help="Worker processes. [one for each core]", min=1)] = None,
        out: Annotated[
            Path, typer.Option(help="Folder of the runs, which are kept, the table and the figures.")
        ] = Path(f"runs/{name}"),
        quick: Annotated[bool, typer.Option("--quick", help="A smoke run: few values, 10 rounds, 2 seeds.")] = False,
    ) -> None:
        columns = {
            "client": client_column,
            "label": label_column,
            "features": None if features is None else features.split(","),
            "standardize": None if label_column is None else True,
        }
        seeds = min(seeds, 2) if quick else seeds
        answer(Setting(data, columns, model, learning_rate, batch_size, seeds, workers, out, quick))

    main.__doc__ = answer.__doc__
    try:
        typer.run(main)
    except InputError as error:
        raise SystemExit(str(error)) from None
