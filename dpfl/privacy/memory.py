"""Accounting takes seconds and is a pure function: its answers are kept on disk."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import joblib
import platformdirs

Function = TypeVar("Function", bound=Callable[..., Any])


def remembered(function: Function) -> Function:
    """Keeps a function's answers in this process and in the user's cache folder.

    An answer is found again only for the same arguments, by the same sources of this package and the
    same version of dp-accounting: an upgrade computes anew.
    """
    kept_on_disk: list[Callable[..., Any]] = []

    @functools.cache
    def remembering(*arguments: Any) -> Any:
        if not kept_on_disk:
            kept_on_disk.append(_on_disk(function))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # A damaged answer is computed again, and needs no words.
                return kept_on_disk[0](*arguments)
        except OSError:  # A full disk must not stop the accountant.
            return function(*arguments)

    return functools.wraps(function)(remembering)  # type: ignore[return-value]


def _on_disk(function: Callable[..., Any]) -> Callable[..., Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return joblib.Memory(_folder(), verbose=0).cache(function)
    except (OSError, UserWarning):
        return function  # No folder to keep answers in: they are computed again in each process.


def _folder() -> Path:
    """The folder for answers of just this accounting: named by its sources and dp-accounting's version."""
    digest = hashlib.sha256(importlib.metadata.version("dp-accounting").encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return Path(platformdirs.user_cache_dir("dpfl")) / digest.hexdigest()[:16]
