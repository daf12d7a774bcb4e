"""The scripts of experiments/ that answer one question each, as somebody starts them."""

import subprocess
import sys
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parents[1] / "experiments"

FIGURES = {
    "epsilon": ["epsilon", "convergence", "signal_to_noise"],
    "clipping": ["clipping", "clipping_map"],
    "round_frequency": ["round_frequency_user", "round_frequency_example"],
    "local_steps_and_cohort": ["cohort", "local_steps"],
    "mechanisms": ["mechanisms"],
    "heterogeneity": ["heterogeneity"],
    "compression": ["compression"],
}
TABLES = {
    "round_frequency": ["user", "example"],
    "local_steps_and_cohort": ["cohort", "local_steps"],
    "compression": ["table", "lite"],
}


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Starts a script in a process of its own."""
    command = [sys.executable, str(EXPERIMENTS / f"{script}.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("script", FIGURES)
def test_a_smoke_run_leaves_figures_and_a_table(script: str, tmp_path: Path):
    ended = run(script, "--quick", "--workers", "1", "--out", str(tmp_path))
    assert ended.returncode == 0, ended.stderr
    for name in FIGURES[script]:
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    for name in TABLES.get(script, ["table"]):
        table = (tmp_path / f"{name}.md").read_text()
        assert table.startswith("| ")
        assert table.splitlines()[0] in ended.stdout
        assert "nan" not in table


def test_wrong_data_is_refused_in_one_sentence(tmp_path: Path):
    ended = run("epsilon", "--quick", "--data", "digitz", "--out", str(tmp_path))
    assert ended.returncode == 1
    assert "there is no dataset 'digitz'" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_every_script_that_asks_a_question_is_tested():
    scripts = {path.stem for path in EXPERIMENTS.glob("*.py") if "settings.command(" in path.read_text()}
    assert scripts == set(FIGURES)
