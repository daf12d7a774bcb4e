"""The folder of a study: one file a run, written whole, and tables collected from them."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock

from dpfl.errors import InputError
from dpfl.files import read_parquet, written_whole
from dpfl.privacy import Guarantee

if TYPE_CHECKING:
    import pandas as pd

_Stamp = list[int]
_ENDED = ("finished", "diverged")
_FULL = (errno.ENOSPC, errno.EDQUOT)


class Store:
    """Runs of studies in a folder, which can be copied, merged by copying, and read without dpfl.

    `records/<run id>.json` holds a run: its record, its guarantees, its history round by round and, where clients
    train by DP-SGD, what each client's examples were charged. `study.json` says what was asked for. `runs.parquet`
    (one row a run) and `history.parquet` (one row a round) are collected from the records, as is `runs.csv` for people;
    they follow the records and may be deleted. Two folders are merged by copying the records of one into the other.

    Of runs that differ in the versions of dpfl and its libraries alone, the tables have the latest.

    Args:
        folder: where to keep them; made if absent.

    Raises:
        InputError: the folder cannot be made.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._records = self.folder / "records"
        try:
            self._records.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"the folder {folder} cannot be made ({error.strerror}): choose another one with --out."
            ) from None

    @classmethod
    def existing(cls, folder: str | Path) -> Store:
        """Opens the folder of a study that has run.

        Args:
            folder: of the study.

        Raises:
            InputError: there is none.
        """
        if not (Path(folder) / "records").is_dir():
            raise InputError(f"{folder} is not the folder of a study: give one in which a study has run.")
        return cls(folder)

    def lock(self) -> filelock.BaseFileLock:
        """A lock that one study holds while it runs; the system frees it when the process dies."""
        return filelock.FileLock(self.folder / ".lock", blocking=False)

    def write(
        self,
        record: dict[str, Any],
        history: Sequence[dict[str, Any]] = (),
        guarantees: Mapping[str, dict[str, Any] | None] | None = None,
        client_epsilons: Sequence[float] | None = None,
    ) -> None:
        """Keeps a run that has ended.

        Args:
            record: the run's row.
            history: one row for each round.
            guarantees: as plain values by name, "guarantee" among them.
            client_epsilons: what each client's examples were charged.

        Raises:
            InputError: the disk is full.
        """
        columns = {name: [row.get(name) for row in history] for name in _names(history)}
        content = {
            "record": record,
            **(guarantees or {"guarantee": None}),
            "history": columns,
            "client_epsilons": client_epsilons,
        }
        self._write_text(self._path(record["run_id"]), json.dumps(_plain(content), allow_nan=False))

    def describe(self, description: Mapping[str, Any]) -> None:
        """Keeps in `study.json` what a study asks for.

        Args:
            description: plain values; "run_ids" gives the order in which tables have the runs.

        Raises:
            InputError: the disk is full.
        """
        self._write_text(self.folder / "study.json", json.dumps(_plain(dict(description)), indent=1))

    def description(self) -> dict[str, Any]:
        """What the latest study in the folder asked for; empty if that cannot be read."""
        try:
            return dict(json.loads((self.folder / "study.json").read_text()))
        except (OSError, ValueError, TypeError):
            return {}

    def ended(self) -> set[str]:
        """The ids of the runs that need not be done again: neither failed nor in a file that cannot be read."""
        runs = self._runs()
        return set(runs.loc[runs["status"].isin(_ENDED), "run_id"]) if len(runs) else set()

    def frame(self, run_ids: Sequence[str] | None = None) -> pd.DataFrame:
        """The records, one row a run.

        Args:
            run_ids: which runs, and in which order; None for all in the folder.
        """
        return self._of(self._runs(), run_ids)

    def history(self, run_ids: Sequence[str] | None = None) -> pd.DataFrame:
        """One row for every round of runs that have ended; not covered by the guarantees.

        Args:
            run_ids: as of `frame`.
        """
        return self._of(self._tables()[1], run_ids)

    def guarantee(self, run_id: str) -> Guarantee:
        """The guarantee of a run.

        Args:
            run_id: of a run that has ended.

        Raises:
            InputError: there is none.
        """
        content = self._read(run_id)
        if content is None or content["guarantee"] is None:
            raise InputError(f"the run {run_id} has no guarantee in {self.folder}: see the column run_id of its table.")
        return Guarantee.from_dict(content["guarantee"])

    def client_epsilons(self, run_ids: Sequence[str] | None = None) -> pd.DataFrame:
        """What the examples of each client were charged: columns run_id, client and epsilon. Not for release.

        Args:
            run_ids: as of `frame`; runs whose clients do not train by DP-SGD have no rows.
        """
        import pandas as pd

        runs = self.frame(run_ids)
        private = runs[runs["example_epsilon"].notna()] if "example_epsilon" in runs else runs[:0]
        parts = []
        for run_id in private["run_id"]:
            values = (self._read(run_id) or {}).get("client_epsilons") or []
            parts.append(pd.DataFrame({"run_id": run_id, "client": range(len(values)), "epsilon": values}))
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["run_id", "client", "epsilon"])

    def collect(self) -> None:
        """Writes `runs.parquet`, `history.parquet` and `runs.csv` anew.

        Raises:
            InputError: the disk is full.
        """
        stamps = self._stamps()
        runs, history = self._tables()
        try:
            for name, table in (("runs.parquet", runs), ("history.parquet", history)):
                with written_whole(self.folder / name) as path:
                    table.to_parquet(path, index=False)
            with written_whole(self.folder / "runs.csv") as path:
                self._of(runs, None).to_csv(path, index=False)
            known = {run_id: stamps[run_id] for run_id in (runs["run_id"] if len(runs) else [])}
            with written_whole(self.folder / ".collected.json") as path:
                path.write_text(json.dumps(known))
        except OSError as error:
            raise self._full(error) from None

    def _runs(self) -> pd.DataFrame:
        """The records of all runs that can be read, from the collected table where it is up to date."""
        known, stamps = self._collected(), self._stamps()
        if known == stamps and known:
            return read_parquet(self.folder / "runs.parquet")
        return self._tables()[0]

    def _tables(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """The records and the rounds of all runs that can be read, collected or not."""
        import pandas as pd

        known, stamps = self._collected(), self._stamps()
        same = {run_id for run_id, stamp in known.items() if stamps.get(run_id) == stamp}
        runs: list[pd.DataFrame] = []
        rounds: list[pd.DataFrame] = []
        if same:
            old_runs, old_rounds = (read_parquet(self.folder / f"{name}.parquet") for name in ("runs", "history"))
            runs.append(old_runs[old_runs["run_id"].isin(same)])
            rounds.append(old_rounds[old_rounds["run_id"].isin(same)] if len(old_rounds) else old_rounds)
        contents = [content for run_id in stamps if run_id not in same if (content := self._read(run_id)) is not None]
        if contents:
            records = [content["record"] for content in contents]
            names = dict.fromkeys(name for record in sorted(records, key=len, reverse=True) for name in record)
            runs.append(pd.DataFrame(records, columns=list(names)))
            rounds.append(_rounds(contents))
        if not runs:
            return pd.DataFrame({"run_id": [], "status": []}), pd.DataFrame({"run_id": []})
        # By object, so that a column's type comes from all of its values.
        return _tidy(_joined([part.astype(object) for part in runs])), _joined(rounds)

    def _of(self, table: pd.DataFrame, run_ids: Sequence[str] | None) -> pd.DataFrame:
        """The rows of some runs in their order; of all runs those that no later version has done again."""
        if table.empty:
            return table
        if run_ids is None:
            run_ids = self._current()
        places = {run_id: place for place, run_id in enumerate(run_ids)}
        chosen = table[table["run_id"].isin(places)]
        order = chosen["run_id"].map(places).sort_values(kind="stable").index
        return chosen.loc[order].reset_index(drop=True)

    def _current(self) -> list[str]:
        """The ids of all runs, but for those that a later version has done again: the latest study's come first."""
        runs = self._runs()
        first = {run_id: place for place, run_id in enumerate(self.description().get("run_ids", ()))}
        version = runs["dpfl_version"].map(_as_numbers)
        place = runs["run_id"].map(lambda run_id: first.get(run_id, len(first)))
        # The latest study's own run is current, whichever version it has.
        latest = runs.assign(_version=version, _place=place, _own=place < len(first))
        latest = latest.sort_values(["_own", "_version", "run_id"], kind="stable")
        latest = latest.drop_duplicates(["configuration", "seed"], keep="last")
        return list(latest.sort_values(["_place", "run_id"], kind="stable")["run_id"])

    def _stamps(self) -> dict[str, _Stamp]:
        """Size and time of the last change of each record's file, by run id."""
        found = {}
        with os.scandir(self._records) as entries:
            for entry in entries:
                if entry.name.endswith(".json") and not entry.name.startswith("."):
                    status = entry.stat()
                    found[entry.name.removesuffix(".json")] = [status.st_size, status.st_mtime_ns]
        return dict(sorted(found.items()))

    def _collected(self) -> dict[str, _Stamp]:
        """What `_stamps` was of the runs in the collected tables; empty where these cannot be used."""
        try:
            known = json.loads((self.folder / ".collected.json").read_text())
            _check_parquet(self.folder / "runs.parquet")
            _check_parquet(self.folder / "history.parquet")
        except (OSError, ValueError):
            return {}
        return dict(known)

    def _write_text(self, path: Path, text: str) -> None:
        try:
            with written_whole(path) as part:
                part.write_text(text)
        except OSError as error:
            raise self._full(error) from None

    def _full(self, error: OSError) -> Exception:
        """The error in words where there is no room; else itself."""
        if error.errno not in _FULL:
            return error
        return InputError(
            f"the disk of {self.folder} is full: all runs that have ended are kept; make room, then start the study "
            "again."
        )

    def _path(self, run_id: str) -> Path:
        return self._records / f"{run_id}.json"

    def _read(self, run_id: str) -> dict[str, Any] | None:
        """What was kept of a run, or None where no whole record of it can be read."""
        try:
            content = json.loads(self._path(run_id).read_bytes())
            record = content["record"]
            whole = record["run_id"] == run_id and {"guarantee", "history"} <= set(content)
            whole = whole and len({len(column) for column in content["history"].values()}) <= 1
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return content if whole and {"status", "configuration", "seed", "dpfl_version"} <= set(record) else None


def _rounds(contents: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """One row for every round of some runs."""
    import numpy as np
    import pandas as pd

    lengths = [len(content["history"].get("round", ())) for content in contents]
    names = dict.fromkeys(name for content in contents for name in content["history"])
    table: dict[str, Any] = {"run_id": np.repeat([content["record"]["run_id"] for content in contents], lengths)}
    for name in names:
        parts = [
            np.array(content["history"].get(name, [None] * length), np.float64)  # None becomes NaN
            for content, length in zip(contents, lengths, strict=True)
        ]
        column = np.concatenate(parts) if parts else np.zeros(0)
        table[name] = column.astype(np.int64) if name in ("round", "cohort") else column
    return pd.DataFrame(table)


def _joined(parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Tables one below the other, in the order of the run ids."""
    import pandas as pd

    widest_first = sorted(parts, key=lambda part: -part.shape[1])  # whose columns come in the right order
    return pd.concat(widest_first, ignore_index=True).sort_values("run_id", kind="stable", ignore_index=True)


def _tidy(table: pd.DataFrame) -> pd.DataFrame:
    """The same with one type a column: whole numbers, numbers (missing ones NaN), or text (missing ones None)."""
    import pandas as pd

    for name, column in table.items():
        if column.dtype == object:
            known = column.dropna()
            if not len(known):
                table[name] = pd.Series(float("nan"), table.index)
            elif not isinstance(known.iloc[0], str):
                table[name] = pd.to_numeric(column)
    return table


def _check_parquet(path: Path) -> None:
    """Raises ValueError where a file is no whole Parquet file, OSError where it is not there."""
    with path.open("rb") as file:
        file.seek(-4, os.SEEK_END)
        if file.read() != b"PAR1":
            raise ValueError(path)


def _as_numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) if part.isdigit() else -1 for part in version.split("."))


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
