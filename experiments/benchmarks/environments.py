"""The peers' Python environments: made by uv at their first use, kept in the user's cache folder."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import platformdirs
from filelock import FileLock

WHEELS_VARIABLE = "DPFL_BENCHMARK_WHEELS"
WHEELS = "/opt/wheels"
PYTHON = "3.11"


class EnvironmentFailure(Exception):
    """An environment could not be made; the message says why in one sentence."""


def cache_folder() -> Path:
    """The folder of the environments and of the workers' logs."""
    folder = platformdirs.user_cache_path("dpfl") / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def python_of(requirements: Sequence[str]) -> Path:
    """Returns the Python of the environment with these packages, which is made unless it is there.

    Wheels in the folder that the environment variable `DPFL_BENCHMARK_WHEELS` names (/opt/wheels if it names none) come
    before the registry's of the same version: PyTorch's builds for CPUs are not in the registry.

    Args:
        requirements: as pip writes them; none stands for dpfl's own environment.

    Raises:
        EnvironmentFailure: if uv is missing or cannot install them.
    """
    if not requirements:
        return Path(sys.executable)
    wheels = Path(os.environ.get(WHEELS_VARIABLE, WHEELS))
    found = ["--find-links", str(wheels)] if wheels.is_dir() else []
    identity = hashlib.sha256("\n".join([PYTHON, *sorted(requirements), *found]).encode()).hexdigest()[:12]
    folder = cache_folder() / identity
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    done = folder / "complete"
    with FileLock(f"{folder}.lock"):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            _uv("venv", "--no-project", "--python", PYTHON, str(folder))
            _uv("pip", "install", "--python", str(python), *found, *requirements)
            done.write_text("\n".join(requirements) + "\n")
    return python


def _uv(*arguments: str) -> None:
    """Runs uv away from any project, whose settings (dpfl overrides JAX' version) would count for the peers too."""
    try:
        done = subprocess.run(
            ["uv", "--no-config", "--quiet", *arguments],
            cwd=cache_folder(),
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        raise EnvironmentFailure("uv, which makes the environment, is not installed") from None
    if done.returncode:
        said = [line.strip(" ×╰─▶│") for line in done.stderr.splitlines() if line.strip()]
        raise EnvironmentFailure(f"uv could not make the environment: {' '.join(said)[:300]}")
