"""TFF's own federated datasets: found on this machine, or downloaded whole."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpfl.data.images import DATA_DIR
from dpfl.errors import InputError
from dpfl.tff.runtime import tensorflow_federated

if TYPE_CHECKING:
    import tensorflow_federated as tff

_DATABASES = {
    "emnist": "emnist_all.sqlite",
    "cifar100": "cifar100.sqlite",
    "shakespeare": "shakespeare.sqlite",
    "stackoverflow": "stackoverflow.sqlite",
}
_WORD_COUNTS = "stackoverflow.word_count.tar.bz2"
_ORIGIN = "https://storage.googleapis.com/tff-datasets-public/"
_SECONDS_TO_ANSWER = 20.0
_SECONDS_OF_SILENCE = 60.0  # in the middle of a download


def client_data(
    name: str, cache_dir: str | Path | None, **options: Any
) -> tuple[tff.simulation.datasets.ClientData, ...]:
    """Returns what `tff.simulation.datasets.NAME.load_data(**options)` returns.

    Args:
        name: emnist, cifar100, shakespeare or stackoverflow.
        cache_dir: the folder of TFF's datasets, and where a download goes. None for the folder that the environment
            variable DPFL_DATA_DIR names, where it has the dataset, else for those that TFF itself uses.
        options: of `load_data`.

    Raises:
        InputError: there is no TensorFlow Federated on this machine, or the dataset is neither there nor can be
            downloaded, or is damaged.
    """
    load = getattr(tensorflow_federated().simulation.datasets, name).load_data
    folder = _folder(name, cache_dir) or Path.home() / ".tff"
    database = folder / _DATABASES[name]
    if not database.is_file():
        with _download(name, database.name):
            folder.mkdir(parents=True, exist_ok=True)
            # TFF writes to the final place at once, and takes the rest of a broken download for the dataset.
            with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as unfinished:
                load(cache_dir=unfinished, **options)
                (Path(unfinished) / database.name).replace(database)
    try:
        return load(cache_dir=str(folder), **options)
    except Exception as error:  # SQLite's errors, TFF's own, and StopIteration where a part has no clients
        raise InputError(
            f"{database} is not TFF's dataset {name} ({_reason(error)}): delete it, so that it is downloaded again."
        ) from error


def word_counts(size: int, cache_dir: str | Path | None) -> dict[str, int]:
    """Returns the most frequent words of stackoverflow, and how many of its training clients used each.

    Args:
        size: how many words.
        cache_dir: as in `client_data`.

    Raises:
        InputError: as `client_data`.
    """
    load = tensorflow_federated().simulation.datasets.stackoverflow.load_word_counts
    folder = _folder("stackoverflow", cache_dir)
    options = {"cache_dir": None if folder is None else str(folder), "vocab_size": size}
    if ((folder or Path.home() / ".keras") / "datasets" / _WORD_COUNTS).is_file():
        return load(**options)
    with _download("stackoverflow", f"datasets/{_WORD_COUNTS}"):
        return load(**options)


def _folder(name: str, cache_dir: str | Path | None) -> Path | None:
    """The folder that was given, or that has the dataset; None for TFF's own."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    if named := os.environ.get(DATA_DIR):
        folder = Path(named).expanduser()
        return folder if (folder / _DATABASES[name]).is_file() else None
    return None


@contextlib.contextmanager
def _download(name: str, file: str) -> Iterator[None]:
    """Turns what goes wrong into a sentence, and gives up on a network that does not answer."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_SECONDS_OF_SILENCE)  # TFF and Keras set none
    try:
        _check_answer()
        yield
    except Exception as error:  # of the network, the disk, LZMA, SQLite or Keras
        raise InputError(
            f"{name} is not on this machine and TFF could not download it ({_reason(error)}): put {file} in a folder "
            f"and set {DATA_DIR} to it, or give the folder as cache_dir=; TFF's load_data writes the file on a machine "
            "that has a network."
        ) from error
    finally:
        socket.setdefaulttimeout(before)


def _check_answer() -> None:
    """Asks for an answer of any kind; connecting alone would try every address of the host, one after the other."""
    failures: list[Exception] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(_ORIGIN, method="HEAD"), timeout=_SECONDS_TO_ANSWER):
                pass
        except urllib.error.HTTPError:
            pass  # an answer
        except Exception as error:
            failures.append(error)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_SECONDS_TO_ANSWER)
    if asking.is_alive():
        raise TimeoutError(f"no answer within {_SECONDS_TO_ANSWER:g} seconds")
    if failures:
        raise failures[0]


def _reason(error: BaseException) -> str:
    """What went wrong, as a part of a sentence."""
    text = " ".join(str(error).split()).strip("<>.").replace(". ", "; ")
    return text or type(error).__name__
