"""Exports of a study's tables, read back."""

import sys
import types
from pathlib import Path

import pandas as pd
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import api_pb2, metadata
from tensorboard.util import tensor_util

import dpfl
from dpfl.study.exporting import export

NAN = float("nan")


class Tables:
    """A run that finished, one that diverged and one that failed."""

    def __init__(self) -> None:
        self.runs = pd.DataFrame(
            {
                "run_id": ["aa", "bb", "cc"],
                "status": ["finished", "diverged", "failed"],
                "reason": [None, None, "out of memory"],
                "mechanism": ["gaussian", "none", "gaussian"],
                "mechanism_settings": ["{}", "{}", "{}"],
                "epsilon": [1.5, NAN, 4.0],
                "rounds": [2, 2, 2],
                "seed": [0, 0, 1],
                "accuracy": [0.75, NAN, NAN],
                "loss": [0.5, NAN, NAN],
                "seconds": [3.5, 2.0, NAN],
            }
        )
        self.rounds = pd.DataFrame(
            {
                "run_id": ["aa", "aa", "bb", "bb"],
                "round": [2, 1, 1, 2],
                "cohort": [9, 8, 7, 6],
                "accuracy": [0.75, NAN, 0.25, NAN],
            }
        )

    def frame(self) -> pd.DataFrame:
        return self.runs

    def history(self) -> pd.DataFrame:
        return self.rounds


def test_csv_has_the_same_tables(tmp_path: Path) -> None:
    tables = Tables()
    for _ in range(2):
        export(tables, tmp_path / "new" / "csv", "csv", progress=False)
    read = pd.read_csv(tmp_path / "new/csv/runs.csv")
    pd.testing.assert_frame_equal(read, tables.frame().fillna({"reason": NAN}), check_dtype=False)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "new/csv/history.csv"), tables.history())
    assert sorted(path.name for path in (tmp_path / "new/csv").iterdir()) == ["history.csv", "runs.csv"]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Step and value of all scalars in a folder of events."""
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0}).Reload()
    return {
        tag: [(event.step, tensor_util.make_ndarray(event.tensor_proto).item()) for event in events.Tensors(tag)]
        for tag in events.Tags()["tensors"]
        if not tag.startswith("_hparams_")
    }


def hparams(folder: Path, tag: str) -> bytes:
    events = EventAccumulator(str(folder)).Reload()
    return events.SummaryMetadata(tag).plugin_data.content


def test_tensorboard_has_the_rounds_the_results_and_the_settings(tmp_path: Path) -> None:
    tables = Tables()
    export(tables, tmp_path, "tensorboard", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["aa", "bb", "cc"]
    assert scalars(tmp_path / "aa") == {
        "cohort": [(1, 8), (2, 9)],
        "accuracy": [(2, 0.75)],
        "final/accuracy": [(2, 0.75)],
        "final/loss": [(2, 0.5)],
        "final/seconds": [(2, 3.5)],
    }
    # Of a run that diverged the last accuracy that was measured is no result.
    assert scalars(tmp_path / "bb") == {
        "cohort": [(1, 7), (2, 6)],
        "accuracy": [(1, 0.25)],
        "final/seconds": [(2, 2.0)],
    }
    assert scalars(tmp_path / "cc") == {}
    found = {}
    for run_id in ("aa", "bb", "cc"):
        start = metadata.parse_session_start_info_plugin_data(
            hparams(tmp_path / run_id, metadata.SESSION_START_INFO_TAG)
        )
        found[run_id] = {name: getattr(value, value.WhichOneof("kind")) for name, value in start.hparams.items()}
    assert found["aa"] == {"status": "finished", "mechanism": "gaussian", "epsilon": 1.5, "rounds": 2, "seed": 0}
    assert found["bb"] == {"status": "diverged", "mechanism": "none", "rounds": 2, "seed": 0}
    ends = [
        metadata.parse_session_end_info_plugin_data(hparams(tmp_path / run_id, metadata.SESSION_END_INFO_TAG)).status
        for run_id in ("aa", "bb", "cc")
    ]
    assert ends == [api_pb2.STATUS_SUCCESS, api_pb2.STATUS_SUCCESS, api_pb2.STATUS_FAILURE]
    overview = metadata.parse_experiment_plugin_data(hparams(tmp_path, metadata.EXPERIMENT_TAG))
    assert [metric.name.tag for metric in overview.metric_infos] == ["final/accuracy", "final/loss", "final/seconds"]
    (epsilon,) = (info for info in overview.hparam_infos if info.name == "epsilon")
    assert (epsilon.domain_interval.min_value, epsilon.domain_interval.max_value) == (1.5, 4)


def test_an_export_anew_replaces_the_runs(tmp_path: Path) -> None:
    tables = Tables()
    export(tables, tmp_path, "tensorboard", progress=False)
    tables.rounds.loc[0, "accuracy"] = 0.875
    export(tables, tmp_path, "tensorboard", progress=False)
    assert scalars(tmp_path / "aa")["accuracy"] == [(2, 0.875)]
    assert len(list((tmp_path / "aa").iterdir())) == 1


def test_runs_without_any_history_are_exported(tmp_path: Path) -> None:
    tables = Tables()
    tables.rounds = pd.DataFrame({"run_id": []})
    export(tables, tmp_path, "tensorboard", progress=False)
    assert scalars(tmp_path / "aa")["final/accuracy"] == [(0, 0.75)]


class FakeClient:
    """What of `mlflow.MlflowClient` is used, in memory."""

    runs: dict[str, types.SimpleNamespace] = {}  # noqa: RUF012
    names: dict[str, str] = {}  # noqa: RUF012

    def __init__(self, tracking_uri: str) -> None:
        self.address = tracking_uri

    def get_experiment_by_name(self, name: str) -> types.SimpleNamespace | None:
        number = self.names.get(name)
        return None if number is None else types.SimpleNamespace(experiment_id=number)

    def create_experiment(self, name: str, artifact_location: str | None) -> str:
        self.names[name] = str(len(self.names))
        return self.names[name]

    def search_runs(self, experiment_ids: list[str], filter_string: str) -> list[types.SimpleNamespace]:
        (wanted,) = filter_string.split("'")[1:2]
        return [run for run in self.runs.values() if run.tags["dpfl.run_id"] == wanted]

    def delete_run(self, run_id: str) -> None:
        del self.runs[run_id]

    def create_run(
        self, experiment_id: str, start_time: int, tags: dict[str, str], run_name: str
    ) -> types.SimpleNamespace:
        number = f"run {len(self.runs)} at {start_time} of {run_name}"
        info = types.SimpleNamespace(run_id=number)
        self.runs[number] = types.SimpleNamespace(info=info, tags=tags, params={}, metrics=[], status="RUNNING")
        return self.runs[number]

    def log_batch(self, run_id: str, metrics: tuple = (), params: tuple = ()) -> None:
        assert len(metrics) <= 1000
        assert len(params) <= 100
        self.runs[run_id].metrics += metrics
        self.runs[run_id].params.update(params)

    def set_terminated(self, run_id: str, status: str, end_time: int) -> None:
        self.runs[run_id].status = status


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> type[FakeClient]:
    module, entities = types.ModuleType("mlflow"), types.ModuleType("mlflow.entities")
    entities.Metric = lambda key, value, timestamp, step: (key, value, step)
    entities.Param = lambda key, value: (key, value)
    module.MlflowClient, module.entities = FakeClient, entities
    monkeypatch.setitem(sys.modules, "mlflow", module)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    monkeypatch.setattr(FakeClient, "runs", {})
    monkeypatch.setattr(FakeClient, "names", {})
    return FakeClient


def test_mlflow_has_a_run_for_each_run_once(tmp_path: Path, client: type[FakeClient]) -> None:
    tables = Tables()
    for _ in range(2):
        export(tables, tmp_path, "mlflow", name="clip norms", progress=False)
    assert list(client.names) == ["clip norms"]
    found = {run.tags["dpfl.run_id"]: run for run in client.runs.values()}
    assert len(client.runs) == len(found) == 3
    assert {run_id: run.status for run_id, run in found.items()} == {
        "aa": "FINISHED",
        "bb": "FINISHED",
        "cc": "FAILED",
    }
    assert found["aa"].params["epsilon"] == "1.5"
    assert "epsilon" not in found["bb"].params
    assert found["aa"].metrics == [
        ("cohort", 8.0, 1),
        ("cohort", 9.0, 2),
        ("accuracy", 0.75, 2),
        ("final/accuracy", 0.75, 2),
        ("final/loss", 0.5, 2),
        ("final/seconds", 3.5, 2),
    ]
    assert found["cc"].tags["dpfl.reason"] == "out of memory"


def test_long_histories_go_to_mlflow_in_parts(tmp_path: Path, client: type[FakeClient]) -> None:
    tables = Tables()
    tables.rounds = pd.DataFrame({"run_id": "aa", "round": range(1, 1201), "cohort": 5, "accuracy": 0.5})
    export(tables, tmp_path, "mlflow", progress=False)
    (run,) = (run for run in client.runs.values() if run.tags["dpfl.run_id"] == "aa")
    assert len(run.metrics) == 2 * 1200 + 3


def test_exports_that_cannot_be_made_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = Tables()
    with pytest.raises(dpfl.InputError, match="csv, tensorboard, mlflow, but the format was 'excel'"):
        export(tables, tmp_path, "excel", progress=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(dpfl.InputError, match="cannot be made"):
        export(tables, tmp_path / "file" / "within", "csv", progress=False)
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(dpfl.InputError, match="pip install mlflow"):
        export(tables, tmp_path, "mlflow", progress=False)
    tables.runs = tables.runs.iloc[:0]
    with pytest.raises(dpfl.InputError, match="no runs to export"):
        export(tables, tmp_path, "csv", progress=False)
