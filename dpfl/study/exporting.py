"""A study's tables in the formats of other tools: CSV, TensorBoard and MLflow."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from dpfl.compression.config import LITE_COLUMNS
from dpfl.errors import InputError
from dpfl.files import written_whole
from dpfl.progress import progress_bar

if TYPE_CHECKING:
    import pandas as pd

Format = Literal["csv", "tensorboard", "mlflow"]

MEASURED = (
    "accuracy",
    "loss",
    "validation_accuracy",
    "validation_loss",
    "epsilon_spent",
    "epsilon_extrapolated",
    "user_epsilon",
    "example_epsilon",
    "example_epsilon_worst",
    "example_epsilon_median",
    "rounds_done",
    "final_clip_norm",
    "signal_to_noise",
    "bytes_up",
    "bytes_down",
    *LITE_COLUMNS,
    "seconds",
)
"""Columns of runs that are results; all others, but for the identity and the reason of a failure, are settings."""

_NO_SETTINGS = (*MEASURED, "run_id", "reason")
_NO_HPARAMS = (
    "configuration",
    "data_fingerprint",
    "mechanism_settings",
    "client_settings",
    "compression_settings",
)  # hashes, and JSON
_EVENTS = "events.out.tfevents.0000000000.dpfl"
_FINAL = "final/"
_MLFLOW_METRICS = 1_000  # In one request, as MLflow allows.
_MLFLOW_PARAMS = 100


class Tables(Protocol):
    """What is exported: the tables of a `Study` that has run, or of its `Store`."""

    def frame(self) -> pd.DataFrame:
        """One row a run, with the columns run_id and status."""
        ...

    def history(self) -> pd.DataFrame:
        """One row for each round of a run, with the columns run_id and round."""
        ...


def export(store: Tables, folder: str | Path, to: Format, *, name: str = "dpfl", progress: bool = True) -> None:
    """Writes all runs in the format of another tool; runs of an export before are replaced.

    - "csv": `runs.csv` (one row a run) and `history.csv` (one row a round).
    - "tensorboard": a folder for each run, named by its id, with a scalar per round for each column of the history,
      the results as `final/...`, and its settings for the HParams tab. See `tensorboard --logdir FOLDER`.
    - "mlflow": an MLflow run for each run, with its settings as parameters, the history as metrics by round, and the
      results as `final/...`, in `FOLDER/mlflow.db` or on a tracking server. Runs of the same id are deleted first.
      See `mlflow ui --backend-store-uri sqlite:///FOLDER/mlflow.db`.

    Settings, results and history go out as they are: what is measured on the data, such as accuracies and the history,
    is not covered by the guarantees. Numbers that are missing or not finite are left out.

    Args:
        store: a study that has run, or its store.
        folder: where to write; for MLflow also the address of a tracking server, such as "http://localhost:5000".
        to: the format.
        name: of the experiment in MLflow.
        progress: whether to show a progress bar.

    Raises:
        InputError: the format is not known, there are no runs, the folder cannot be made, or MLflow is not installed.
    """
    if to not in get_args(Format):
        raise InputError(f"a study can be exported to {', '.join(get_args(Format))}, but the format was {to!r}.")
    runs, history = store.frame(), store.history()
    if runs.empty:
        raise InputError("the study has no runs to export: run it first.")
    remote = to == "mlflow" and "://" in str(folder)
    if not remote:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"the folder {folder} cannot be made ({error.strerror}): choose another one to export to."
            ) from None
    if to == "csv":
        with progress_bar("exporting", 2, "tables", shown=progress) as advance:
            for table, file in ((runs, "runs.csv"), (history, "history.csv")):
                with written_whole(Path(folder) / file) as path:
                    table.to_csv(path, index=False)
                advance(1)
        return
    with progress_bar("exporting", len(runs), "runs", shown=progress) as advance:
        if to == "tensorboard":
            _to_tensorboard(runs, history, Path(folder), advance)
        else:
            _to_mlflow(runs, history, str(folder) if remote else Path(folder).absolute(), name, advance)


def _to_tensorboard(runs: pd.DataFrame, history: pd.DataFrame, folder: Path, advance: Callable[[int], None]) -> None:
    """Writes a file of events for each run, and one that tells the HParams tab of settings and results."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import api, api_pb2
    from tensorboard.plugins.hparams.summary import session_end_pb
    from tensorboard.plugins.scalar.summary_v2 import scalar_pb

    now = time.time()

    def scalars(step: int, values: dict[str, float]) -> Event:
        summary = Summary()
        for name, value in values.items():
            summary.value.extend(scalar_pb(name, value).value)
        return Event(wall_time=now, step=step, summary=summary)

    settings = [name for name in _settings_of(runs) if name not in _NO_HPARAMS]
    results = [name for name in MEASURED if name in runs and runs[name].notna().any()]
    domains = [api.HParam(name, _domain(runs[name].dropna())) for name in settings]
    metrics = [api.Metric(f"{_FINAL}{name}", display_name=name.replace("_", " ")) for name in results]
    overview = api.hparams_config_pb(domains, metrics, time_created_secs=now)
    _write_events(folder, [Event(wall_time=now, summary=overview)], now)
    for row, rounds in _per_run(runs, history):
        chosen = {name: _hparam(row[name]) for name in settings if not _is_missing(row[name])}
        start = api.hparams_pb(chosen, trial_id=row["run_id"], start_time_secs=now)
        ok = api_pb2.STATUS_FAILURE if row["status"] == "failed" else api_pb2.STATUS_SUCCESS
        seconds = _finite(row.get("seconds")) or 0.0
        end = Summary.FromString(session_end_pb(ok, end_time_secs=now + seconds).SerializeToString())
        steps = [scalars(step, values) for step, values in rounds]
        last = rounds[-1][0] if rounds else 0
        final = scalars(last, {f"{_FINAL}{name}": value for name, value in _results_of(row).items()})
        start_event, end_event = (Event(wall_time=now, summary=summary) for summary in (start, end))
        _write_events(folder / row["run_id"], [start_event, *steps, final, end_event], now)
        advance(1)


def _write_events(folder: Path, events: list[Any], now: float) -> None:
    """Writes TensorBoard's file of events anew; its name is always the same."""
    import tensorflow as tf
    from tensorboard.compat.proto.event_pb2 import Event

    with written_whole(folder / _EVENTS) as path, tf.io.TFRecordWriter(str(path)) as writer:
        for event in (Event(wall_time=now, file_version="brain.Event:2"), *events):
            writer.write(event.SerializeToString())


def _domain(values: pd.Series) -> Any:
    """The values of a setting, as the HParams tab filters by them: a range of numbers, or all texts."""
    from pandas.api.types import is_bool_dtype, is_numeric_dtype
    from tensorboard.plugins.hparams import api

    if is_numeric_dtype(values) and not is_bool_dtype(values):
        return api.RealInterval(float(values.min()), float(values.max()))
    return api.Discrete(sorted({_hparam(value) for value in values}))


def _to_mlflow(
    runs: pd.DataFrame, history: pd.DataFrame, place: str | Path, name: str, advance: Callable[[int], None]
) -> None:
    """Logs each run to MLflow, in a database in a folder or on a tracking server."""
    try:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        address = place if isinstance(place, str) else f"sqlite:///{place / 'mlflow.db'}"
        client = MlflowClient(tracking_uri=address)
        experiment = client.get_experiment_by_name(name)
    except ImportError as error:
        raise InputError(
            f"exporting to MLflow needs MLflow, which is not installed (no module {error.name}): run pip install "
            "mlflow, or for a tracking server alone pip install mlflow-skinny."
        ) from None
    if experiment is None:
        artifacts = None if isinstance(place, str) else (place / "artifacts").as_uri()
        number = client.create_experiment(name, artifact_location=artifacts)
    else:
        number = experiment.experiment_id
    settings, now = _settings_of(runs), int(1_000 * time.time())
    for row, rounds in _per_run(runs, history):
        for old in client.search_runs([number], filter_string=f"tags.`dpfl.run_id` = '{row['run_id']}'"):
            client.delete_run(old.info.run_id)
        tags = {"dpfl.run_id": row["run_id"], "dpfl.status": row["status"]}
        if not _is_missing(row.get("reason")):
            tags["dpfl.reason"] = str(row["reason"])
        run = client.create_run(number, start_time=now, tags=tags, run_name=row["run_id"]).info.run_id
        params = [Param(key, str(_hparam(row[key]))) for key in settings if not _is_missing(row[key])]
        last = rounds[-1][0] if rounds else 0
        final = {f"{_FINAL}{key}": value for key, value in _results_of(row).items()}
        metrics = [
            Metric(key, value, now, step) for step, values in (*rounds, (last, final)) for key, value in values.items()
        ]
        for first in range(0, len(params), _MLFLOW_PARAMS):
            client.log_batch(run, params=params[first : first + _MLFLOW_PARAMS])
        for first in range(0, len(metrics), _MLFLOW_METRICS):
            client.log_batch(run, metrics=metrics[first : first + _MLFLOW_METRICS])
        seconds = _finite(row.get("seconds")) or 0.0
        status = "FAILED" if row["status"] == "failed" else "FINISHED"
        client.set_terminated(run, status=status, end_time=now + int(1_000 * seconds))
        advance(1)


def _per_run(
    runs: pd.DataFrame, history: pd.DataFrame
) -> Iterator[tuple[dict[str, Any], list[tuple[int, dict[str, float]]]]]:
    """Each run's row with its rounds: the number of a round, and its finite values by column."""
    rounds = {run_id: rows for run_id, rows in history.groupby("run_id")} if len(history) else {}
    for row in runs.to_dict("records"):
        steps = []
        for entry in rounds[row["run_id"]].sort_values("round").to_dict("records") if row["run_id"] in rounds else ():
            values = {str(key): _finite(value) for key, value in entry.items() if key not in ("run_id", "round")}
            steps.append((int(entry["round"]), {key: value for key, value in values.items() if value is not None}))
        yield {str(key): value for key, value in row.items()}, steps


def _settings_of(runs: pd.DataFrame) -> list[str]:
    """The columns that are settings and known for some run."""
    return [str(name) for name in runs if name not in _NO_SETTINGS and runs[name].notna().any()]


def _results_of(row: dict[str, Any]) -> dict[str, float]:
    """The results of a run that are known and finite."""
    values = {name: _finite(row.get(name)) for name in MEASURED}
    return {name: value for name, value in values.items() if value is not None}


def _finite(value: Any) -> float | None:
    """A number as float; None where it is missing, not finite or no number."""
    if value is None or isinstance(value, str) or _is_missing(value) or not math.isfinite(value):
        return None
    return float(value)


def _is_missing(value: Any) -> bool:
    import pandas as pd

    return bool(pd.isna(value))


def _hparam(value: Any) -> bool | int | float | str:
    """A setting as a plain value; numbers of NumPy become Python's."""
    plain = value.item() if hasattr(value, "item") else value
    return plain if isinstance(plain, bool | int | float | str) else str(plain)
