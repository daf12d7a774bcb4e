"""The repository keeps its own promises: the README's code runs, and the linters are content."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jupytext
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
README = (ROOT / "README.md").read_text()


def test_code_in_the_readme_runs_as_it_stands(tmp_path: Path) -> None:
    program = "\n".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL))
    (tmp_path / "readme.py").write_text(program + "\nexperiment.plan()\n")
    done = subprocess.run(
        [sys.executable, "readme.py"], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert re.match(r"\((3\.99\d|4), 0\.001\)-differential privacy at user level", done.stdout)
    accuracy = re.search(r"Test accuracy: ([\d.]+)%", done.stdout)
    assert accuracy is not None
    assert float(accuracy[1]) > 88
    assert (tmp_path / "runs" / "mine" / "round_frequency.png").exists()


def test_accountant_in_the_readme() -> None:
    commands = re.findall(r"^uv run dpfl ((?:noise|epsilon|rounds) .*)", README, re.MULTILINE)
    assert len(commands) == 4
    noise, epsilon, rounds, tree = (
        subprocess.run(
            [sys.executable, "-c", "from dpfl.cli import main; main()", *shlex.split(command)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for command in commands
    )
    assert re.search(r"--noise-multiplier (\S+)", commands[1])[1] in noise
    assert re.search(r"epsilon by PLD: 3\.99\d+\nepsilon by RDP: 4\.", epsilon)
    assert re.search(r"in each of 1[2-9]\d rounds", rounds)
    assert "tree aggregation" in tree


def test_files_that_the_documents_name_exist() -> None:
    for document in (ROOT / "README.md", ROOT / "experiments" / "README.md"):
        links = re.findall(r"\]\((?!https?:)([^)#]+)\)", document.read_text())
        assert links
        for link in links:
            assert (document.parent / link).exists(), f"{document.name} names {link}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_have_been_run_and_agree_with_their_text(path: Path) -> None:
    notebook, text = jupytext.read(path), jupytext.read(path.with_suffix(".py"), fmt="py:percent")
    cells, lines = ([(cell.cell_type, cell.source) for cell in one.cells] for one in (notebook, text))
    assert cells == lines, f"run jupytext --sync {path.name}"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run it from top to bottom"
    outputs = [output for cell in code for output in cell.outputs]
    assert outputs
    for output in outputs:
        assert output.output_type in ("display_data", "execute_result") or output.name == "stdout", output
    assert path.stat().st_size < 250_000


@pytest.mark.parametrize("command", ["ruff check .", "ruff format --check .", "mypy dpfl"])
def test_linters_are_content(command: str) -> None:
    program = Path(sys.executable).parent / command.split()[0]
    done = subprocess.run(
        [program, *command.split()[1:]], cwd=ROOT, capture_output=True, text=True, check=False, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stdout + done.stderr
