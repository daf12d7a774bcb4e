"""Calibrating is a pure function that takes a while: its answers are kept on disk."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import platformdirs

Function = TypeVar("Function", bound=Callable[..., float])


def remembered(function: Function) -> Function:
    """Keeps a function's answers, which must be numbers, in this process and in the user's cache folder.

    An answer is found again only for arguments that are written the same (`repr`), by the same sources of this
    package and the same version of dp-accounting: an upgrade computes anew. All answers are in one file, since one
    file for each would take longer to read than some answers to compute.
    """
    answers: dict[str, float] = {}
    file: list[Path] = []

    @functools.wraps(function)
    def remembering(*arguments: Any) -> float:
        if not file:
            file.append(_folder() / f"{function.__name__}.jsonl")
            answers.update(_read(file[0]))
        question = ", ".join(map(repr, arguments))
        if question not in answers:
            answers[question] = function(*arguments)
            _append(file[0], question, answers[question])
        return answers[question]

    return remembering  # type: ignore[return-value]


def _read(file: Path) -> dict[str, float]:
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    return dict(answer for line in lines if (answer := _parsed(line)) is not None)


def _parsed(line: str) -> tuple[str, float] | None:
    """The question and the answer of a line; None if it is damaged, so that the answer is computed again."""
    try:
        question, answer = json.loads(line)
    except (TypeError, ValueError):
        return None
    return (question, answer) if isinstance(question, str) and isinstance(answer, float) else None


def _append(file: Path, question: str, answer: float) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as lines:
            # The line break comes first, in case that the last line was cut off.
            lines.write(f"\n{json.dumps([question, answer])}")
    except OSError:
        return  # A full or a read-only disk must not stop the accountant.


def _folder() -> Path:
    """The folder for answers of just this accounting: named by its sources and dp-accounting's version."""
    digest = hashlib.sha256(importlib.metadata.version("dp-accounting").encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return Path(platformdirs.user_cache_dir("dpfl")) / digest.hexdigest()[:16]
