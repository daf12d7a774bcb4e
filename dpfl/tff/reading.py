"""Reading `tff.simulation.datasets.ClientData` into NumPy arrays, one client at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dpfl.data.wording import instead
from dpfl.errors import InputError
from dpfl.progress import progress_bar
from dpfl.randomness import Purpose, generator
from dpfl.tff.runtime import tensorflow_federated

if TYPE_CHECKING:
    import pandas as pd
    import tensorflow as tf
    import tensorflow_federated as tff

Select = Callable[[Any], tuple[Any, ...]]
"""Takes the tensors that are wanted out of one element of a client's dataset."""

_ELEMENTS_AT_ONCE = 256
# How TensorFlow begins when elements of one batch differ in shape; it goes on with the two shapes.
_UNEQUAL = ("Cannot batch tensors with different shapes", "Cannot add tensor to the batch")


@dataclass(frozen=True, eq=False)
class Elements:
    """What the datasets of some clients hold, in the clients' order.

    Attributes:
        columns: for each tensor that was selected, an array (elements, *shape).
        owners: int64 (elements,), position of each element's client in `client_ids`.
        client_ids: names of the clients, also of those that have no element.
    """

    columns: tuple[np.ndarray, ...]
    owners: np.ndarray
    client_ids: tuple[str, ...]

    @property
    def without_elements(self) -> list[str]:
        """Names of the clients that have no element."""
        has_some = np.zeros(len(self.client_ids), bool)
        has_some[self.owners] = True
        return [name for name, has in zip(self.client_ids, has_some, strict=True) if not has]

    def names(self, owners: np.ndarray) -> pd.Series:
        """Returns the names of these owners, (examples,), whose sorted order is that of `client_ids`."""
        import pandas as pd

        return pd.Series(pd.Categorical.from_codes(owners, categories=pd.Index(self.client_ids)))


def chosen_clients(
    client_data: tff.simulation.datasets.ClientData, clients: int | Sequence[str] | None, seed: int, name: str
) -> list[str]:
    """Returns the ids of the clients to read, in the order of `client_data.client_ids`.

    Args:
        client_data: where the clients are.
        clients: how many, drawn at random without replacement; or their ids; None for all.
        seed: seed of the draw.
        name: what the error sentences call the data.

    Raises:
        InputError: there are not so many clients, or not these, or two have the same id.
    """
    known = list(client_data.client_ids)
    if len(set(known)) < len(known):
        raise InputError(
            f"{name} has {len(known)} clients, but only {len(set(known))} different ids: make them unique."
        )
    if clients is None:
        return known
    if isinstance(clients, bool) or not isinstance(clients, int | np.integer | str | Sequence):
        raise InputError(f"clients must be a number of clients or a list of their ids, but it was {clients!r}.")
    if isinstance(clients, int | np.integer):
        if not 1 <= clients <= len(known):
            raise InputError(f"clients is {clients}, but {name} has {len(known)} clients: ask for 1 to {len(known)}.")
        drawn = generator(seed, Purpose.CHOOSING_CLIENTS).choice(len(known), clients, replace=False)
        return [known[position] for position in sorted(drawn)]
    wanted = {clients} if isinstance(clients, str) else set(clients)
    if not wanted:
        raise InputError(f"clients is empty, but {name} needs at least 2: give ids, or leave it out for all.")
    if unknown := sorted(wanted.difference(known), key=str):
        raise InputError(f"{name} has no client {unknown[0]!r}: {instead(unknown[0], known)}")
    return [client for client in known if client in wanted]


def read_clients(
    client_data: tff.simulation.datasets.ClientData,
    clients: Sequence[str],
    select: Select,
    *,
    name: str,
    batched: bool = False,
    at_most: int | None = None,
    progress: bool = False,
) -> Elements:
    """Reads the datasets of these clients.

    Args:
        client_data: where the clients are.
        clients: ids of the clients to read.
        select: what is wanted of an element.
        name: what the error sentences and the progress bar call the data.
        batched: the datasets hold batches of elements already.
        at_most: how many elements of a client are read, the first ones; None for all. Not for batches.
        progress: show a progress bar.

    Raises:
        InputError: elements differ in shape, cannot be read, or there is none.
    """
    import tensorflow as tf

    tff = tensorflow_federated()

    def columns_of(dataset: tf.data.Dataset) -> tf.data.Dataset:
        return _columns(dataset, select, batched=batched, at_most=at_most)

    def pieces() -> Iterator[tuple[int, tuple[np.ndarray, ...]]]:
        if isinstance(client_data, tff.simulation.datasets.TestClientData):
            # In graph it would look through all clients, with all their data, for each client.
            for number, client in enumerate(clients):
                dataset = columns_of(client_data.create_tf_dataset_for_client(client))
                yield from ((number, columns) for columns in dataset.as_numpy_iterator())
        else:
            # One graph for all clients: opening a dataset for each costs more than reading it.
            numbered = tf.data.Dataset.from_tensor_slices((np.arange(len(clients)), list(clients)))
            yield from numbered.flat_map(
                lambda number, client: columns_of(client_data.serializable_dataset_fn(client)).map(
                    lambda *columns: (number, columns)
                )
            ).as_numpy_iterator()

    return _gathered(pieces(), tuple(map(str, clients)), name, progress)


def read_dataset(dataset: tf.data.Dataset, select: Select, *, name: str, batched: bool = False) -> Elements:
    """Reads one dataset that belongs to no client; else as `read_clients`."""
    columns = _columns(dataset, select, batched=batched, at_most=None)
    return _gathered(((0, piece) for piece in columns.as_numpy_iterator()), ("",), name, False)


def _columns(dataset: tf.data.Dataset, select: Select, *, batched: bool, at_most: int | None) -> tf.data.Dataset:
    if at_most is not None:
        dataset = dataset.take(at_most)
    dataset = dataset.map(lambda *parts: select(parts if len(parts) > 1 else parts[0]))
    return dataset if batched else dataset.batch(_ELEMENTS_AT_ONCE)


def _gathered(
    pieces: Iterator[tuple[int, tuple[np.ndarray, ...]]], clients: tuple[str, ...], name: str, progress: bool
) -> Elements:
    import tensorflow as tf

    read: list[tuple[np.ndarray, ...]] = []
    owners: list[np.ndarray] = []
    done = 0
    with progress_bar(f"reading {name}", len(clients), "clients", shown=progress) as advance:
        try:
            for number, columns in pieces:
                advance(int(number) - done)
                done = int(number)
                if read:
                    for one, another in zip(read[0], columns, strict=True):
                        _check_same_shape(one.shape[1:], another.shape[1:], name)
                read.append(columns)
                owners.append(np.full(len(columns[0]), number, np.int64))
        except tf.errors.OpError as error:
            if any(words in str(error) for words in _UNEQUAL):
                shapes = re.findall(r"\[([\d,]*)\]", str(error))
                first, other = (tuple(map(int, filter(None, shape.split(",")))) for shape in shapes[:2])
                _check_same_shape(first, other, name)
            text = re.sub(r"\{\{.*?\}\}|\[Op:.*", "", str(error).split("\n")[0])
            reason = text.strip(" .").replace(". ", "; ")
            raise InputError(f"{name} could not be read: {reason}.") from error
        advance(len(clients) - done)
    if not sum(map(len, owners)):
        raise InputError(f"{name} has no example, but at least 1 is needed: give clients that have examples.")
    return Elements(tuple(np.concatenate(parts) for parts in zip(*read, strict=True)), np.concatenate(owners), clients)


def _check_same_shape(first: tuple[int, ...], other: tuple[int, ...], name: str) -> None:
    if first != other:
        raise InputError(
            f"{name} has features of shape {first} and {other}, but all examples must have the same shape: pad or crop "
            "them with ClientData.preprocess."
        )
