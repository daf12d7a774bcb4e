"""Federated data from a file: CSV, TSV, Parquet or NumPy's npz."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, TypeVar

import numpy as np

from dpfl.data.arrays import Options, Split, from_arrays
from dpfl.data.federated_data import FederatedData
from dpfl.data.tables import Missing, from_dataframe
from dpfl.data.wording import instead
from dpfl.errors import InputError
from dpfl.files import read_parquet

if TYPE_CHECKING:
    import pandas as pd

_T = TypeVar("_T")

SUFFIXES = (".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet", ".npz")


def from_file(
    path: str | Path,
    *,
    client: str | None = None,
    label: str | None = None,
    features: Sequence[str] | None = None,
    standardize: bool = False,
    label_bins: int | None = None,
    missing: Missing = "refuse",
    name: str | None = None,
    clients: int | None = None,
    partition: str | None = None,
    test_fraction: float = 0.2,
    validation_fraction: float = 0.1,
    split: Split = "examples",
    seed: int = 0,
) -> FederatedData:
    """Reads federated data from a file; its suffix says how.

    Tables (.csv, .tsv, both also with .gz, and .parquet) are read as in `from_dataframe`. An .npz holds the
    arrays `x` and `y`, or `x_train` and `y_train`, and optionally `x_test` with `y_test`, `x_validation` with
    `y_validation`, and `client_ids`; see `from_arrays`. Images of type uint8 are scaled to [0, 1], and a
    channel axis is added where they have none.

    Args:
        path: The file.
        client: Column, or array in the .npz ("client_ids" by default), that says who owns each example.
        label: Column with the class; not for .npz.
        features: Columns to learn from; not for .npz.
        standardize: See `from_dataframe`; not for .npz.
        label_bins: See `from_dataframe`; not for .npz.
        missing: See `from_dataframe`; not for .npz.
        name: What charts and records call the dataset; the file's name by default.
        clients: See `from_arrays`, as for all that follow.
        partition: See `from_arrays`.
        test_fraction: See `from_arrays`.
        validation_fraction: See `from_arrays`.
        split: See `from_arrays`.
        seed: See `from_arrays`.

    Raises:
        InputError: The file is not there, has another suffix or cannot be read, or what it holds or an option
            is not valid.
    """
    path = Path(path).expanduser()
    suffix = next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), None)
    if suffix is None:
        raise InputError(f"{path} has an unknown suffix: a file must end in one of {', '.join(SUFFIXES)}.")
    options = Options(
        name=name or path.name[: -len(suffix)],
        clients=clients,
        partition=partition,
        test_fraction=test_fraction,
        validation_fraction=validation_fraction,
        split=split,
        seed=seed,
    )
    if suffix == ".npz":
        if label is not None or features is not None or standardize or label_bins is not None or missing != "refuse":
            raise InputError(
                f"label, features, standardize, label_bins and missing are for tables: leave them out for {path}."
            )
        x, y, client_ids, held_out = read_npz(path, client)
        return from_arrays(x, y, client_ids, **held_out, **options)
    frame = _read(path, partial(_read_table, suffix=suffix))
    if label is None:
        raise InputError(f"nothing says which column of {path} is the label: {instead(None, frame.columns)}")
    return from_dataframe(
        frame, client, label, features, standardize=standardize, label_bins=label_bins, missing=missing, **options
    )


class HeldOut(TypedDict, total=False):
    """Held-out examples that a file may bring, as features and labels."""

    test: tuple[np.ndarray, np.ndarray]
    validation: tuple[np.ndarray, np.ndarray]


def read_npz(path: Path, client: str | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, HeldOut]:
    """Reads features, labels, client ids (None if there are none) and held-out examples from an .npz.

    Args:
        path: The file.
        client: Name of the array of client ids, which must then be there; "client_ids" by default, which may
            not.

    Raises:
        InputError: The file is not there, cannot be read or lacks an array.
    """
    arrays: dict[str, np.ndarray] = _read(path, _load_npz)

    def array(key: str) -> np.ndarray:
        if key not in arrays:
            raise InputError(f"{path} holds the arrays {', '.join(arrays)}, but {key!r} is needed.")
        return arrays[key]

    training = "_train" if "x_train" in arrays else ""
    held_out: HeldOut = {}
    if "x_test" in arrays:
        held_out["test"] = scaled_images(array("x_test")), array("y_test")
    if "x_validation" in arrays:
        held_out["validation"] = scaled_images(array("x_validation")), array("y_validation")
    client_ids = arrays.get("client_ids") if client is None else array(client)
    return scaled_images(array(f"x{training}")), array(f"y{training}"), client_ids, held_out


def scaled_images(x: np.ndarray) -> np.ndarray:
    """Returns uint8 images as float32 in [0, 1] of shape (n, h, w, channels), and all else as it is.

    Args:
        x: Images have shape (n, h, w) or (n, h, w, channels).
    """
    if x.dtype != np.uint8 or x.ndim not in (3, 4):
        return x
    return (x if x.ndim == 4 else x[..., np.newaxis]).astype(np.float32) / np.float32(255)


def _read(path: Path, reader: Callable[[Path], _T]) -> _T:
    if not path.is_file():
        raise InputError(f"there is no file {path}: check the path.")
    try:
        return reader(path)
    except Exception as error:  # readers raise whatever their parsers and decompressors do
        reason = " ".join(str(error).split()).rstrip(".").replace(". ", "; ")
        raise InputError(f"{path} is not a valid file of its type: {reason}.") from error


def _load_npz(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as archive:
        return dict(archive)


def _read_table(path: Path, suffix: str) -> pd.DataFrame:
    import pandas as pd

    if suffix == ".parquet":
        return read_parquet(path)
    # low_memory reads in pieces, each with its own types, and would make the clients 1 and "1" of one person
    return pd.read_csv(path, sep="\t" if suffix.startswith(".tsv") else ",", low_memory=False)
