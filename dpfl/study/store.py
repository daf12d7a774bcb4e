"""The folder of a study: one file a run, written whole, and tables collected from them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock

from dpfl.errors import InputError
from dpfl.files import written_whole

if TYPE_CHECKING:
    import pandas as pd


class Store:
    """Runs of a study in a folder that can be read without dpfl.

    `records/<run id>.json` holds a run's record, its guarantees and its per-round history;
    `runs.csv` and `history.csv` are collected from the records, one row a run and one row a round.

    Args:
        folder: where to keep them; made if absent.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._records = folder / "records"
        try:
            self._records.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"the folder {folder} cannot be made ({error.strerror}): choose another one with --out."
            ) from None

    def lock(self) -> filelock.BaseFileLock:
        """A lock that one study holds while it runs; the system frees it when the process dies."""
        return filelock.FileLock(self.folder / ".lock", blocking=False)

    def write(
        self,
        record: dict[str, Any],
        history: Sequence[dict[str, Any]],
        guarantees: Mapping[str, dict[str, Any] | None],
    ) -> None:
        """Keeps a run that has ended.

        Args:
            record: the run's row.
            history: one row for each round.
            guarantees: as plain values by name, "guarantee" among them.
        """
        columns = {name: [row.get(name) for row in history] for name in _names(history)}
        content = {"record": record, **guarantees, "history": columns}
        with written_whole(self._path(record["run_id"])) as path:
            path.write_text(json.dumps(_plain(content), indent=1, allow_nan=False))

    def has(self, run_id: str) -> bool:
        """Whether a run has ended and can be read; a file that cannot be read counts as absent."""
        return self._read(run_id) is not None

    def frame(self, run_ids: Sequence[str]) -> pd.DataFrame:
        """The records of the runs that have ended, in the order of `run_ids`, one row a run."""
        import pandas as pd

        return pd.DataFrame([content["record"] for content in self._contents(run_ids)])

    def history(self, run_ids: Sequence[str]) -> pd.DataFrame:
        """One row for every round of the runs that have ended; not covered by the guarantees."""
        import pandas as pd

        parts = []
        for content in self._contents(run_ids):
            part = pd.DataFrame(content["history"], dtype=float)  # so that columns of None are missing numbers
            part = part.astype({"round": int, "cohort": int})
            part.insert(0, "run_id", content["record"]["run_id"])
            parts.append(part)
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()

    def collect(self, run_ids: Sequence[str]) -> None:
        """Writes `runs.csv` and `history.csv` anew."""
        for name, frame in (("runs.csv", self.frame(run_ids)), ("history.csv", self.history(run_ids))):
            with written_whole(self.folder / name) as path:
                frame.to_csv(path, index=False)

    def _path(self, run_id: str) -> Path:
        return self._records / f"{run_id}.json"

    def _read(self, run_id: str) -> dict[str, Any] | None:
        """What was kept of a run, or None where no whole record of it can be read."""
        try:
            content = json.loads(self._path(run_id).read_text())
            whole = content["record"]["run_id"] == run_id and {"guarantee", "history"} <= set(content)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return content if whole else None

    def _contents(self, run_ids: Sequence[str]) -> list[dict[str, Any]]:
        contents = (self._read(run_id) for run_id in run_ids)
        return [content for content in contents if content is not None]


def _names(history: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in history for name in row))


def _plain(value: Any) -> Any:
    """The same value with None in the place of NaN and infinities, which JSON does not know."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
