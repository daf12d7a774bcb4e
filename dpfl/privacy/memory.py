"""Accounting takes seconds and is a pure function: its answers are kept on disk."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import joblib
import platformdirs

Function = TypeVar("Function", bound=Callable[..., Any])


def remembered(function: Function) -> Function:
    """Keeps a function's answers in this process and in the user's cache folder.

    An answer is found again only for the same arguments and the same source code of the function;
    what else it depends on, such as a library's version, must be among the arguments.
    """
    kept_on_disk: list[Callable[..., Any]] = []

    @functools.cache
    def remembering(*arguments: Any) -> Any:
        if not kept_on_disk:
            kept_on_disk.append(_on_disk(function))
        try:
            return kept_on_disk[0](*arguments)
        except OSError:  # A full disk must not stop the accountant.
            return function(*arguments)

    return functools.wraps(function)(remembering)  # type: ignore[return-value]


def _on_disk(function: Callable[..., Any]) -> Callable[..., Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return joblib.Memory(platformdirs.user_cache_dir("dpfl"), verbose=0).cache(function)
    except (OSError, UserWarning):
        return function  # No folder to keep answers in: they are computed again in each process.
