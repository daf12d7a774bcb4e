"""Federated datasets in folders, larger than memory if need be.

A folder holds an .npy file for each array of `FederatedData`, and dataset.json with all else: names, classes,
assumptions, the fingerprint of the content, and of each file its size and the time of its last change. Who opens the
folder maps the arrays into memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dpfl.data.arrays import HELD_OUT, Examples
from dpfl.data.checks import Role, checked_examples
from dpfl.data.federated_data import ARRAYS, FederatedData
from dpfl.errors import InputError

DESCRIPTION = "dataset.json"
"""The file by which a saved dataset is known."""
_FORMAT = 1
_NAMES = ("client_ids", "class_names", "assumptions")


def save(data: FederatedData, folder: str | Path) -> None:
    """See `FederatedData.save`."""
    with _new_folder(folder) as part:
        for name in ARRAYS:
            _save_array(part, name, getattr(data, name))
        _describe(data, part)


def write_clients(
    folder: str | Path,
    clients: Iterable[tuple[str, npt.ArrayLike, npt.ArrayLike]],
    *,
    num_classes: int,
    test: Examples,
    validation: Examples | None = None,
    name: str | None = None,
    class_names: Sequence[str] | None = None,
    assumptions: Sequence[str] = (),
) -> FederatedData:
    """Writes a dataset to a new folder client by client, so that it never has to fit into memory, and opens it.

    Each client is checked as it comes. The folder appears when it is whole; see `FederatedData.save`.

    Args:
        folder: where nothing is yet, or an empty folder.
        clients: The clients one after the other, such as a generator of them: the unique id, the training features
            (examples, *feature shape) and the labels (examples,), integers from 0.
        num_classes: Number of classes.
        test: Features and labels of the test examples.
        validation: Features and labels of the validation examples; there may be none.
        name: What charts and records call the dataset; the folder's name by default.
        class_names: Name of each class; their numbers by default.
        assumptions: Sentences that every privacy guarantee about this dataset must repeat, besides the one that
            held-out examples are public.

    Raises:
        InputError: Something is in the folder already, it cannot be written, or what a client has is not valid.
    """
    name = Path(folder).name if name is None else name
    with _new_folder(folder) as part:
        ids, sizes = [], [0]
        with _Rows(part, "x", np.float32) as xs, _Rows(part, "y", np.int32) as ys:
            for client, features, labels in clients:
                x, y = checked_examples(
                    features,
                    labels,
                    num_classes=num_classes,
                    role="training",
                    owner=f"client {client!r}",
                    shape=xs.shape,
                )
                xs.append(x)
                ys.append(y)
                ids.append(str(client))
                sizes.append(len(x))
        if not ids:
            raise InputError(f"{name!r} has no clients, but at least 2 are needed.")
        held_out: dict[Role, Examples] = {"test": test, "validation": validation or ([], [])}
        for role, (features, labels) in held_out.items():
            x, y = checked_examples(
                features, labels, num_classes=num_classes, role=role, owner=repr(name), shape=xs.shape
            )
            _save_array(part, f"x_{role}", x)
            _save_array(part, f"y_{role}", y)
        _save_array(part, "offsets", np.cumsum(sizes, dtype=np.int64))
        data = FederatedData.of_known_values(
            **{name: np.load(_file(part, name), mmap_mode="r") for name in ARRAYS},
            name=name,
            num_classes=num_classes,
            client_ids=ids,
            class_names=[str(k) for k in range(num_classes)] if class_names is None else class_names,
            assumptions=(*assumptions, HELD_OUT["given"]),
        )
        _describe(data, part)
    return open_saved(folder)


def open_saved(folder: str | Path) -> FederatedData:
    """See `FederatedData.open`."""
    folder = Path(folder).expanduser()
    described = _read_description(folder)
    try:
        known = {name: described[name] for name in ("name", "num_classes", *_NAMES)}
        fingerprint, files = described["fingerprint"], described["files"]
        arrays = {name: _map(_file(folder, name), files[name]) for name in ARRAYS}
        touched = [name for name in ARRAYS if _file(folder, name).stat().st_mtime_ns != files[name]["modified"]]
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{folder / DESCRIPTION} does not say what it said when it was written ({error!r}): save the dataset again."
        ) from None
    data = FederatedData.of_known_values(**arrays, **known, **({} if touched else {"fingerprint": fingerprint}))
    if data.fingerprint != fingerprint:
        raise InputError(
            f"the arrays {', '.join(touched)} in {folder} were changed since they were saved, for their content has "
            "another fingerprint: save the dataset again."
        )
    return data


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.npy"


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Says in a sentence what keeps a folder from being written."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror or error}.") from error


@contextlib.contextmanager
def _new_folder(folder: str | Path) -> Iterator[Path]:
    """Yields a temporary folder, for its owner alone, and moves it to where it shall be if the block ends well."""
    target = Path(folder).expanduser()
    with _writing(target):
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise InputError(f"there is something in {target} already: choose another folder, or remove it first.")
        target.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield part
        with _writing(target):
            for path in part.iterdir():
                with path.open("rb") as written:
                    os.fsync(written.fileno())
            if target.exists():
                target.rmdir()
            part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _save_array(folder: Path, name: str, array: np.ndarray) -> None:
    with _writing(folder):
        np.save(_file(folder, name), array)


class _Rows:
    """An .npy file that grows by rows.

    Args:
        folder: of the file.
        name: of the array.
        dtype: of the array.

    Attributes:
        shape: of a row; None before the first.
    """

    def __init__(self, folder: Path, name: str, dtype: npt.DTypeLike) -> None:
        self.shape: tuple[int, ...] | None = None
        self._folder, self._dtype, self._rows = folder, np.dtype(dtype), 0
        self._file = _file(folder, name).open("wb")

    def __enter__(self) -> _Rows:
        return self

    def append(self, rows: np.ndarray) -> None:
        """Writes some rows, all of one shape."""
        if self.shape is None:
            self.shape = rows.shape[1:]
            self._write_header()
        with _writing(self._folder):
            self._file.write(np.ascontiguousarray(rows).data)
        self._rows += len(rows)

    def __exit__(self, *_: object) -> None:
        with _writing(self._folder), self._file:
            if self.shape is not None:
                self._file.seek(0)
                self._write_header()

    def _write_header(self) -> None:
        # NumPy leaves room for the digits of a number of rows that grows, so that the length stays the same.
        shape = (self._rows, *(self.shape or ()))
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, header)


def _describe(data: FederatedData, folder: Path) -> None:
    """Writes all but the arrays, whose files must not be changed any more."""
    files = {}
    for name in ARRAYS:
        array, now = getattr(data, name), _file(folder, name).stat()
        kind = {"dtype": array.dtype.name, "shape": array.shape}
        files[name] = kind | {"size": now.st_size, "modified": now.st_mtime_ns}
    described = {
        "format": _FORMAT,
        "name": data.name,
        "fingerprint": data.fingerprint,
        "files": files,
        "num_classes": data.num_classes,
        **{name: getattr(data, name) for name in _NAMES},
    }
    with _writing(folder):
        (folder / DESCRIPTION).write_text(json.dumps(described, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}: check the path.")
    if not path.is_file():
        raise InputError(
            f"the folder {folder} holds no {DESCRIPTION}, as a dataset that was saved does: check the path."
        )
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {' '.join(str(error).split()).rstrip('.')}.") from None
    if not isinstance(described, dict) or described.get("format") != _FORMAT:
        raise InputError(f"{path} is not of format {_FORMAT}, the one that this version of dpfl reads: save it again.")
    return described


def _map(path: Path, described: dict[str, Any]) -> np.ndarray:
    """Maps an array into memory if it is of the size, type and shape that it had when it was saved."""
    try:
        size = path.stat().st_size
        if size != described["size"]:
            raise InputError(
                f"{path} has {size:,} bytes, but {described['size']:,} were saved: it was cut off or changed, so copy "
                "or save the dataset again."
            )
        array: np.ndarray = np.load(path, mmap_mode="r")
    except FileNotFoundError:
        raise InputError(f"there is no file {path}: copy or save the dataset again.") from None
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} cannot be read: {' '.join(str(error).split()).rstrip('.')}.") from None
    is_, was = (array.dtype.name, list(array.shape)), (described["dtype"], described["shape"])
    if is_ != was:
        raise InputError(
            f"{path} holds {is_[0]} of shape {is_[1]}, but {was[0]} of shape {was[1]} was saved: save the dataset "
            "again."
        )
    return array
