"""Figures on disk."""

import os
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from dpfl.charts.canvas import DPI
from dpfl.errors import InputError
from dpfl.files import written_whole

_UNDATED: dict[str, dict[str, Any]] = {
    ".png": {},
    ".svg": {"Date": None},
    ".pdf": {"CreationDate": None},
}


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure to a .png, .svg or .pdf file: whole or not at all, and without the time of day.

    Args:
        figure: What to write.
        path: Where to; an existing file is replaced, missing folders are made.

    Raises:
        InputError: If the suffix is another.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in _UNDATED:
        raise InputError(f"Cannot write a figure to {path}: the name must end in .png, .svg or .pdf.")
    with written_whole(path) as part, mpl.rc_context({"svg.hashsalt": "dpfl", "savefig.bbox": None}):
        figure.savefig(part, format=suffix[1:], dpi=DPI, metadata=_UNDATED[suffix])
