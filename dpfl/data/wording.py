"""Words shared by the error sentences of this package."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def instead(given: object, valid: Iterable[object], shown: int = 12) -> str:
    """Returns the valid names nearest to `given`, or else the first of all, as the end of a sentence."""
    names = [str(name) for name in valid]
    if near := difflib.get_close_matches(str(given), names, n=3):
        return "did you mean " + " or ".join(map(repr, near)) + "?"
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return "valid are " + ", ".join(map(repr, names[:shown])) + more + "."
