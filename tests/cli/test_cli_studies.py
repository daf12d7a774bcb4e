"""The commands that run a study from YAML, draw it anew and export it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

STUDY = """
experiment:
  data: {source: scores.csv, client: school, label: score, label_bins: 2}
  local: {learning_rate: 0.3, batch_size: 5, steps: 2}
  privacy: {epsilon: 4, delta: 1e-2}
  sampler: {name: poisson, cohort: 10}
  rounds: 4
grid:
  privacy.epsilon: [2, 8]
  clipping: {clip_norms: [0.5, 1], quantiles: [0.5], start: 0.5}
ceiling: true
seeds: 2
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    rows = [f"{row % 40},{(7 * row) % 11},{(7 * row) % 11 + row / 1000}" for row in range(400)]
    (folder / "scores.csv").write_text("\n".join(["school,age,score", *rows]))
    (folder / "study.yaml").write_text(STUDY)
    return folder


def test_from_a_table_to_figures_by_yaml_alone(
    dpfl: Callable, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = folder / "out"
    code, printed, err = dpfl("study", str(folder / "study.yaml"), "--out", str(out), "--workers", "1")
    assert code == 0, err
    assert "40 clients" in printed
    assert "plain averaging" in printed
    frame = pd.read_parquet(out / "runs.parquet")
    assert len(frame) == 2 * (2 * 3 + 1)
    for name in ("epsilon", "clipping", "clipping_map", "convergence"):
        assert (out / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (out / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    assert json.loads((out / "study.json").read_text())["tuning_prices"].keys() == {"2.0", "8.0"}

    # The written YAML is the study again, and its runs are all there.
    shutil.copy(folder / "scores.csv", out)
    code, printed, _ = dpfl("study", str(out / "study.yaml"), "--out", str(out), "--formats", "svg")
    assert code == 0
    assert "14 of 14 runs are finished" in printed
    assert (out / "figures" / "epsilon.svg").exists()

    for path in (out / "figures").iterdir():
        path.unlink()
    code, printed, _ = dpfl("chart", str(out), "--formats", "png")
    assert code == 0
    assert (out / "figures" / "epsilon.png").exists()

    code, printed, _ = dpfl("export", str(out), "--to", "csv")
    assert code == 0
    assert len(pd.read_csv(out / "csv" / "history.csv")) == 14 * 4


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("chart nowhere", "is not the folder of a study"),
        ("export nowhere", "is not the folder of a study"),
        ("study nothing.yaml", "cannot be read"),
        ("study {folder}/study.yaml --out {folder}/x --formats gif", "png, svg and pdf"),
        ("study {folder}/study.yaml --out {folder}/x --ray local --workers 2", "leave workers and checkpoint_every"),
    ],
)
def test_wrong_words_are_one_sentence(words: str, complaint: str, dpfl: Callable, folder: Path) -> None:
    code, _, err = dpfl(*words.format(folder=folder).split())
    assert code == 2
    assert complaint in err
    assert err.count("\n") == 1
    assert not (folder / "x" / "records").exists() or not list((folder / "x" / "records").iterdir())
