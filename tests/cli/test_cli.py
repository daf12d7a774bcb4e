"""The command line: what it prints, what it refuses, and that it answers before TensorFlow is imported."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dpfl import privacy


def test_help_needs_nothing_heavy() -> None:
    heavy = "{'tensorflow', 'numpy', 'pandas', 'matplotlib', 'scipy', 'dp_accounting'}"
    program = (
        "import sys; sys.argv = ['dpfl', 'tradeoff', '--help']\n"
        "from dpfl.cli import main\n"
        "try: main()\n"
        f"except SystemExit: assert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--clip-norm" in done.stdout


def test_version(dpfl: Callable) -> None:
    code, out, _ = dpfl("--version")
    assert code == 0
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", out)


def test_epsilon_states_the_guarantee(dpfl: Callable) -> None:
    arguments = ("epsilon", "--noise-multiplier", 1.2, "--sampling-rate", 0.0355, "--steps", 100, "--delta", 1e-5)
    code, out, _ = dpfl(*arguments)
    statement = " ".join(out.split())
    assert code == 0
    for words in (
        "(1.709, 1e-05)",
        "user level",
        "is added to the training data or removed from it",
        "noise multiplier 1.2",
        "100 rounds",
        "PLD",
    ):
        assert words in statement
    code, out, _ = dpfl(*arguments, "--json", "--relation", "replace_one", "--unit", "example")
    values = json.loads(out)
    assert values["epsilon"] == pytest.approx(2.565, abs=1e-3)
    assert (values["noise_multiplier"], values["unit"], values["relation"]) == (1.2, "example", "replace_one")
    _, out, _ = dpfl(*arguments, "--json", "--accountant", "rdp")
    assert json.loads(out)["epsilon"] > 1.9


def test_noise_is_the_inverse_of_epsilon(dpfl: Callable) -> None:
    code, out, _ = dpfl("noise", "--epsilon", 2, "--sampling-rate", 0.1, "--steps", 50, "--delta", 1e-5, "--json")
    values = json.loads(out)
    assert code == 0
    assert 1.998 <= values["epsilon"] <= 2
    event = privacy.poisson_gaussian(values["noise_multiplier"], 0.1, 50)
    assert privacy.epsilon(event, 1e-5) == values["epsilon"]


def test_without_noise_nothing_is_guaranteed(dpfl: Callable) -> None:
    arguments = ("epsilon", "--noise-multiplier", 0, "--sampling-rate", 0.1, "--steps", 5, "--delta", 1e-5)
    code, out, _ = dpfl(*arguments)
    assert code == 0
    assert "No differential privacy" in out
    assert json.loads(dpfl(*arguments, "--json")[1])["epsilon"] is None


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "scores.csv"
    pd.DataFrame({"school": ["a", "a", "b", "b"], "hours": [1, 2, np.nan, 4], "score": [0, 1, 0, 1]}).to_csv(
        path, index=False
    )
    return path


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--epsilon -1", "epsilon must be a positive number"),
        ("--epsilon 0,1", "epsilon must be a positive number"),
        ("--epsilon nan", "epsilon must be a positive number"),
        ("--epsilon 1,two", "'two'"),
        ("--epsilon 101", "101"),
        ("--quick --epsilon -5", "epsilon must be a positive number"),
        ("--quick --clip-norm 0", "clip norm must be a positive"),
        ("--quick --seeds 0", "at least one seed"),
        ("--local-work -300", "the local work must be at least 1"),
        ("--delta 0.1", "no privacy for 300 clients"),
        ("--delta 0", "delta must lie between 0 and 1"),
        ("--clip-norm 0", "clip norm must be a positive"),
        ("--clip-norm 0.5,-1", "clip norm must be a positive"),
        ("--clients 5000", "5000 clients cannot share 1247 examples"),
        ("--clients 1", "client"),
        ("--data digist", "did you mean 'digits'"),
        ("--data nothing.csv", "there is no file nothing.csv"),
        ("--data TABLE --label-column score --client-column shcool", "did you mean 'school'"),
        ("--data TABLE --label-column score --client-column school", "column 'hours' has missing values in 1 of 4"),
        ("--data TABLE --client-column school", "label"),
        ("--client-column school", "takes no option 'client'"),
        ("--partition sorted", "there is no partition 'sorted'"),
        ("--model resnet", "there is no model 'resnet'"),
        ("--rounds 7", "cannot be split evenly"),
        ("--rounds 2.5", "whole numbers"),
        ("--cohort 301", "exceeds the 300 clients"),
        ("--learning-rate 0", "learning rate"),
        ("--seeds 0", "at least one seed"),
        ("--deployment-clients 1000000", "go together"),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_code_2(
    words: str, said: str, dpfl: Callable, table: Path, tmp_path: Path
) -> None:
    out_folder = tmp_path / "out"
    code, _, err = dpfl("tradeoff", "--out", out_folder, *words.replace("TABLE", str(table)).split())
    message = err.strip().splitlines()[-1]
    assert code == 2
    assert message.startswith("error: ")
    assert said in message
    assert not re.search(r"[.!?] \S", message.removeprefix("error: ")), "more than one sentence"
    assert "Traceback" not in err
    assert not list(out_folder.glob("records/*"))


@pytest.mark.parametrize(
    "words",
    [
        "noise --epsilon 0 --sampling-rate 0.1 --steps 5 --delta 1e-5",
        "noise --epsilon 1e-9 --sampling-rate 0.5 --steps 1000 --delta 1e-9",
        "epsilon --noise-multiplier -1 --sampling-rate 0.1 --steps 5 --delta 1e-5",
        "epsilon --noise-multiplier 1 --sampling-rate 1.5 --steps 5 --delta 1e-5",
        "epsilon --noise-multiplier 1 --sampling-rate 0.1 --steps 0 --delta 1e-5",
        "epsilon --noise-multiplier 1 --sampling-rate 0.1 --steps 5 --delta 1",
    ],
)
def test_wrong_accounting_is_refused(words: str, dpfl: Callable) -> None:
    code, out, err = dpfl(*words.split())
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_tradeoff_on_a_users_table_from_file_to_figures(dpfl: Callable, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(rng.normal(size=(600, 3)), columns=["hours", "age", "income"])
    frame["passed"] = np.where(frame["hours"] + frame["age"] > 0, "yes", "no")
    frame["school"] = rng.integers(0, 60, 600)
    frame.to_parquet(tmp_path / "scores.parquet")
    out = tmp_path / "out"
    arguments = f"tradeoff --data {tmp_path}/scores.parquet --client-column school --label-column passed --standardize"
    arguments += f" --epsilon 8,none --clip-norm 1 --rounds 5 --local-work 10 --seeds 2 --workers 1 --out {out}"
    code, printed, _ = dpfl(*arguments.split())
    assert code == 0
    assert "plain averaging" in printed
    runs = pd.read_csv(out / "runs.csv")
    assert len(runs) == 6
    assert set(runs["delta"].dropna()) == {0.01}
    assert runs.groupby("mechanism")["accuracy"].mean()["none"] > 0.8
    for name in ("epsilon", "convergence", "signal_to_noise"):
        assert (out / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    columns = """run_id status dataset clients mechanism unit relation epsilon delta noise_multiplier clip_norm rounds
        local_steps cohort sampling_rate seed accuracy loss seconds"""
    assert set(columns.split()) <= set(runs.columns)
    record = json.loads((out / "records" / f"{runs['run_id'][0]}.json").read_text())
    assert any("standardised" in sentence for sentence in record["guarantee"]["assumptions"])
    before = (out / "runs.csv").read_bytes()
    code, printed, _ = dpfl(*arguments.split())
    assert code == 0
    assert "6 of 6 runs are finished" in printed
    assert (out / "runs.csv").read_bytes() == before
