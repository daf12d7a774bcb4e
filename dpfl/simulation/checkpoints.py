"""Checkpoints: what a run is between two rounds, kept in a file from which it goes on bit for bit.

A checkpoint holds the seeds of the noise, and past noise where rounds share it: whoever has it can take the noise off
what is released. It is as secret as the run's seed, and only its owner may read the file.

To go back to an older checkpoint, or to the beginning, releases nothing new: every draw is a function of (seed,
purpose, round, client), so the rounds done again give the same models. Only what clients of local and distributed
mechanisms draw in TensorFlow Federated is fresh every time: there, rounds done again are a second release, and the
guarantee covers one of the two.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import operator
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from dpfl.errors import InputError
from dpfl.files import remove_parts, written_whole

# The workers of a study that was killed let go of their runs soon, but not at once.
_SECONDS_TO_WAIT_FOR_A_RUN = 10.0
# Machines round differently in the last digits; what two plans differ in is far larger.
_SAME = 1e-9


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a run has to show for its rounds so far, beside the engine's state.

    Attributes:
        participations: in how many rounds each client took part so far, int64 (clients,). Private.
        history: one row of plain values for each round done.
        seconds: that the rounds took, over all processes that worked at the run.
    """

    participations: np.ndarray
    history: list[dict[str, Any]]
    seconds: float


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """A folder with a file `<run id>.npz` for each run, and how often it is written.

    Args:
        folder: where to keep them; made if absent.
        every: rounds from one checkpoint to the next, at least 1; the last round always gives one.

    Raises:
        InputError: the folder cannot be made or written, or `every` is no number of rounds.
    """

    folder: Path
    every: int = 10

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "every", operator.index(self.every))
        except TypeError:
            raise InputError(
                f"checkpoints are made every so many rounds, a whole number, but it was {self.every!r}."
            ) from None
        if self.every < 1:
            raise InputError(f"checkpoints are made every so many rounds, at least 1, but it was {self.every}.")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()
        except OSError as error:
            raise InputError(
                f"the folder {self.folder} cannot take checkpoints ({error.strerror}): choose another one."
            ) from None

    @contextlib.contextmanager
    def of(self, run_id: str) -> Iterator[Checkpoint]:
        """The checkpoint of a run, which no other process has while the block runs.

        Raises:
            InputError: another process has it.
        """
        lock = filelock.FileLock(self._lock(run_id), timeout=_SECONDS_TO_WAIT_FOR_A_RUN)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise InputError(
                f"another process is at the same run with checkpoints in {self.folder}: wait for it, or choose another "
                "folder."
            ) from None
        try:
            remove_parts(self._path(run_id))
            yield Checkpoint(self._path(run_id), run_id, self.every)
        finally:
            lock.release()

    def remove(self, run_id: str) -> None:
        """Removes a run's checkpoint and all that goes with it; for runs at which no process is."""
        remove_parts(self._path(run_id))
        for path in (self._path(run_id), self._lock(run_id)):
            path.unlink(missing_ok=True)

    def clear(self, run_ids: Sequence[str]) -> None:
        """Removes these runs' checkpoints, and the folder if it is empty then."""
        for run_id in run_ids:
            self.remove(run_id)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _path(self, run_id: str) -> Path:
        return self.folder / f"{run_id}.npz"

    def _lock(self, run_id: str) -> Path:
        return self.folder / f".{run_id}.lock"


class Checkpoint:
    """The checkpoint of one run, which `numpy.load` can read too: the state, and JSON in `run`.

    Args:
        path: of the file.
        run_id: of the run.
        every: rounds from one checkpoint to the next.

    Attributes:
        every: rounds from one checkpoint to the next.
    """

    def __init__(self, path: Path, run_id: str, every: int) -> None:
        self._path, self._run_id, self.every = path, run_id, every

    def write(self, state: Sequence[np.ndarray], progress: Progress, ledger: dict[str, Any]) -> None:
        """Takes the place of the checkpoint before.

        Where the file cannot be written (a full disk), that is a warning: the run loses nothing by going on.

        Args:
            state: of the engine after some rounds (`Rounds.state`), numbers and words. Secret.
            progress: the run after these rounds.
            ledger: as plain values what these rounds cost, and by which plan.
        """
        run = {
            "run_id": self._run_id,
            "arrays": len(state),
            "ledger": ledger,
            "seconds": progress.seconds,
            "history": progress.history,
        }
        arrays = {_name(index): array for index, array in enumerate(state)}
        text = np.frombuffer(json.dumps(run).encode(), np.uint8)
        try:
            with written_whole(self._path, mode=0o600) as path, path.open("wb") as file:
                np.savez(file, run=text, participations=progress.participations, **arrays)
        except OSError as error:
            warnings.warn(
                f"the checkpoint {self._path} cannot be written ({error.strerror}): the run goes on without it, and "
                "the one before stays.",
                stacklevel=2,
            )

    def read(
        self, state: Sequence[np.ndarray], population: int, ledger: Callable[[int], dict[str, Any]]
    ) -> tuple[list[np.ndarray], Progress] | None:
        """The state and the progress that were kept; None where none were, or the file is damaged, which is a warning.

        Args:
            state: the engine's, before the first round.
            population: the number of clients.
            ledger: gives, for a number of rounds, what `write` was given after them.

        Raises:
            InputError: the file cannot be opened, is another run's, or was written under another plan.
        """
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise InputError(
                f"the checkpoint {self._path} cannot be read ({error.strerror}): see to it that it can, or choose "
                "another folder."
            ) from None
        try:
            run, arrays = _parsed(content)
            kept = [arrays[_name(index)] for index in range(run["arrays"])]
            progress = Progress(arrays["participations"], list(run["history"]), float(run["seconds"]))
            run_id, before = run["run_id"], dict(run["ledger"])
        except _DAMAGED:
            warnings.warn(
                f"the checkpoint {self._path} is damaged and left out: the run starts anew.",
                stacklevel=2,
            )
            return None
        if run_id != self._run_id:
            raise InputError(
                f"the checkpoint {self._path} is that of the run {run_id}: give it back its name, or move it away."
            )
        now = ledger(len(progress.history))
        if different := [name for name in {**now, **before} if not _same(before.get(name), now.get(name))]:
            raise InputError(
                f"the checkpoint {self._path} was written under another plan (of its ledger, "
                f"{', '.join(different)} differ): go on with the software that wrote it, or train with another seed, "
                "as two releases that share their noise protect nobody."
            )
        expected = [*state, np.zeros(population, np.int64)]
        if [_kind(array) for array in (*kept, progress.participations)] != [_kind(array) for array in expected]:
            raise InputError(
                f"the checkpoint {self._path} does not hold the state of this run: move it away, and the run starts "
                "anew."
            )
        return kept, progress


# What a file that was cut off or overwritten makes `zipfile`, `numpy` and `json` raise.
_DAMAGED = (ValueError, KeyError, TypeError, AttributeError, EOFError, RuntimeError, zipfile.BadZipFile)


def _parsed(content: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        # First, as NumPy would believe what a damaged header says of an array's size.
        if file.testzip() is not None:
            raise ValueError
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    if not all(isinstance(array, np.ndarray) for array in arrays.values()):  # NumPy gives other members as bytes.
        raise ValueError
    return json.loads(arrays.pop("run").tobytes()), arrays


def _name(index: int) -> str:
    return f"state_{index}"


def _kind(array: np.ndarray) -> tuple[Any, ...]:
    # The words in TFF's states (names of events) differ in length.
    return "words" if array.dtype.kind in "SU" else array.dtype, array.shape


def _same(left: Any, right: Any) -> bool:
    """Whether two plain values are the same but for the rounding of their numbers."""
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_same(value, right[name]) for name, value in left.items())
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(map(_same, left, right))
    if isinstance(left, float) and isinstance(right, float):
        return math.isclose(left, right, rel_tol=_SAME)
    return left == right
