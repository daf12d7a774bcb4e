"""The door of the command line and of configuration files: a dataset by its name or path."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dpfl.data.embedded import digits, synthetic
from dpfl.data.federated_data import FederatedData
from dpfl.data.files import SUFFIXES, from_file
from dpfl.data.images import cifar10, fashion_mnist, femnist, mnist
from dpfl.data.tff_datasets import cifar100, emnist, shakespeare, stackoverflow
from dpfl.data.wording import instead
from dpfl.errors import InputError

SOURCES: dict[str, Callable[..., FederatedData]] = {
    source.__name__: source
    for source in (
        *(digits, synthetic, mnist, fashion_mnist, cifar10, femnist),
        *(emnist, cifar100, shakespeare, stackoverflow),
    )
}
"""Datasets that `load` knows by name."""


def load(
    source: str | Path,
    *,
    clients: int | None = None,
    partition: str | None = None,
    client: str | None = None,
    label: str | None = None,
    features: Sequence[str] | None = None,
    seed: int = 0,
    **options: Any,
) -> FederatedData:
    """Loads a dataset by name ("digits", "synthetic", "mnist", ...), from a file, or from the folder of a saved one.

    Args:
        source: A name in `SOURCES`, the path of a file as in `from_file`, or that of a folder as in
            `FederatedData.open`, which takes no options and in which nothing is random.
        clients: Number of clients where clients are simulated, or to read where a dataset has more of its own.
        partition: How examples are dealt to them.
        client: Column of the client, for files.
        label: Column of the label, for files.
        features: Columns to learn from, for files.
        seed: Seed of all that is random.
        options: Other options of the source, such as `alpha` for synthetic or `split` for files. An option
            that is None counts as not given.

    Raises:
        InputError: There is no such source, it does not take an option that was given, or what it finds is
            not valid.
    """
    options |= {"clients": clients, "partition": partition}
    options |= {"client": client, "label": label, "features": features}
    given = {option: value for option, value in options.items() if value is not None} | {"seed": seed}
    loader = SOURCES.get(str(source))
    if loader is None and Path(source).expanduser().is_dir():
        given.pop("seed")
        if given:
            raise InputError(f"{str(source)!r} is a dataset in a folder, which takes no option {next(iter(given))!r}.")
        return FederatedData.open(source)
    if loader is None:
        if not str(source).lower().endswith(SUFFIXES):
            raise InputError(
                f"there is no dataset {str(source)!r}, nor is it a folder, nor a file that ends in one of "
                f"{', '.join(SUFFIXES)}: {instead(source, SOURCES)}"
            )
        loader = partial(from_file, source)
    valid = inspect.signature(loader).parameters
    for option in given:
        if option not in valid:
            raise InputError(f"{str(source)!r} takes no option {option!r}: {instead(option, valid, len(valid))}")
    return loader(**given)
