"""One federated dataset: training examples grouped by client, and central held-out examples."""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dpfl.data.alignment import aligned
from dpfl.data.checks import Role, checked_examples
from dpfl.data.mapped import MappedFile, mapped_file
from dpfl.errors import InputError

if TYPE_CHECKING:
    import tensorflow as tf
    import tensorflow_federated as tff

ARRAYS = ("x", "y", "offsets", "x_validation", "y_validation", "x_test", "y_test")


@dataclass(frozen=True, eq=False, repr=False)
class FederatedData:
    """Training examples of many clients in two arrays, with held-out examples for evaluation.

    Client k owns rows `offsets[k]:offsets[k + 1]`, so that 100,000 clients cost two arrays and not 100,000
    objects. The training examples are private; names, sizes of the held-out sets and `num_classes` are not
    treated as private. Two datasets are equal in content if their `fingerprint` is.

    The arrays are made read-only. One is taken over without a copy where it is of the type below and begins at a
    multiple of 64 bytes, so that tensors can share its memory: those of `np.load(..., mmap_mode="r")` do, most others
    are copied once. Memory maps stay on disk: they are checked block by block, and the pickle of a dataset says where
    the files are, so that processes on a machine share one copy in memory. `save` and `open` keep a dataset as files.

    Attributes:
        name: What charts and records call the dataset.
        x: float32 (examples, *feature shape), training examples in client order.
        y: int32 (examples,), classes from 0 to num_classes - 1.
        offsets: int64 (clients + 1,), strictly increasing from 0 to the number of examples.
        x_validation: float32 (validation examples, *feature shape); may hold no examples.
        y_validation: int32 (validation examples,).
        x_test: float32 (test examples, *feature shape).
        y_test: int32 (test examples,).
        num_classes: Number of classes, at least 2.
        client_ids: Unique name of each client.
        class_names: Name of each class.
        assumptions: Sentences that every privacy guarantee about this dataset must repeat.

    Raises:
        InputError: Shapes, labels or offsets disagree, a feature is not finite, a client has no example,
            there are fewer than 2 clients or classes, or the test set is empty.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    offsets: np.ndarray
    x_validation: np.ndarray
    y_validation: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    num_classes: int
    client_ids: tuple[str, ...]
    class_names: tuple[str, ...]
    assumptions: tuple[str, ...] = ()
    _files: dict[str, MappedFile] = field(init=False)

    def __post_init__(self) -> None:
        self._adopt()

    def _adopt(self, *, known: bool = False) -> None:
        """Converts and checks all fields.

        Args:
            known: whether the values of examples and labels were checked before, when they were saved.
        """
        files = {name: mapped_file(getattr(self, name)) for name in ARRAYS}
        if self.num_classes < 2:
            raise InputError(f"{self.name!r} has {self.num_classes} classes, but at least 2 are needed.")
        for names in ("client_ids", "class_names", "assumptions"):
            object.__setattr__(self, names, tuple(getattr(self, names)))
        if len(self.class_names) != self.num_classes:
            raise InputError(
                f"{self.name!r} has {len(self.class_names)} class names for {self.num_classes} classes, "
                "but needs one name per class."
            )
        self._set_offsets()
        self._set_examples("x", "y", "training", known)
        self._set_examples("x_validation", "y_validation", "validation", known)
        self._set_examples("x_test", "y_test", "test", known)
        if self.offsets[-1] != len(self.x):
            raise InputError(
                f"offsets of {self.name!r} end at {self.offsets[-1]}, but there are {len(self.x)} training "
                "examples: the last offset must be their number."
            )
        if not len(self.x_test):
            raise InputError(f"{self.name!r} has no test example, but at least 1 is needed for the accuracy.")
        # Of those arrays that are still the memory maps that were given.
        still = {name: file for name, file in files.items() if file and file.holds(getattr(self, name))}
        object.__setattr__(self, "_files", still)
        self._lock()

    def _set_offsets(self) -> None:
        offsets = np.asarray(self.offsets)
        if offsets.ndim != 1 or offsets.dtype.kind not in "iu" or len(offsets) < 1 or offsets[0] != 0:
            raise InputError(
                f"offsets of {self.name!r} must be a row of integers that starts at 0, one more than clients."
            )
        clients = len(offsets) - 1
        if clients < 2:
            raise InputError(f"{self.name!r} has {clients} clients with training examples, but at least 2 are needed.")
        if len(self.client_ids) != clients or len(set(self.client_ids)) != clients:
            raise InputError(
                f"{self.name!r} has {clients} clients and {len(set(self.client_ids))} different client_ids, "
                "but needs one unique name per client."
            )
        offsets = aligned(offsets, np.int64)
        empty = np.flatnonzero(np.diff(offsets) < 1)
        if len(empty):
            raise InputError(f"client {self.client_ids[empty[0]]!r} of {self.name!r} has no training example: drop it.")
        object.__setattr__(self, "offsets", offsets)

    def _set_examples(self, x_field: str, y_field: str, role: Role, known: bool) -> None:
        """Converts and checks one pair of features and labels, whose values may be known to be valid."""
        x, y = checked_examples(
            getattr(self, x_field),
            getattr(self, y_field),
            num_classes=self.num_classes,
            role=role,
            owner=repr(self.name),
            shape=None if role == "training" else self.example_shape,
            known=known,
        )
        object.__setattr__(self, x_field, x)
        object.__setattr__(self, y_field, y)

    def _lock(self) -> None:
        for name in ARRAYS:
            getattr(self, name).flags.writeable = False

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | self._files  # instead of their contents

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name in ARRAYS:
            value = state[name]
            array = value.open() if isinstance(value, MappedFile) else aligned(value, value.dtype)
            array.flags.writeable = False  # pickle does not keep the flag
            state[name] = array
        self.__dict__.update(state)

    def save(self, folder: str | Path) -> None:
        """Writes the dataset to a new folder: seven .npy files and dataset.json, from which `open` maps it.

        The folder appears when it is whole. Keep its times when you copy it (`cp -a`, `rsync -a`): then `open` need
        not read it. It holds the training examples, which are private.

        Args:
            folder: where nothing is yet, or an empty folder.

        Raises:
            InputError: Something is there already, or the folder cannot be written.
        """
        from dpfl.data.stored import save

        save(self, folder)

    @classmethod
    def open(cls, folder: str | Path) -> FederatedData:
        """Maps a dataset that `save` or `dpfl.data.write_clients` wrote into memory, without reading its examples.

        The data may be larger than memory. A file is taken to be as it was saved if its size and the time of its last
        change are; if a time is another, as in most copies, all is read once and must have the fingerprint that was
        saved. What this cannot see: a change that sets the time back, and one that is made later on. Leave the folder
        alone while it is in use.

        Raises:
            InputError: There is no such folder, a file in it is missing, damaged or was changed since it was saved.
        """
        from dpfl.data.stored import open_saved

        return open_saved(folder)

    @classmethod
    def of_known_values(cls, **fields: Any) -> FederatedData:
        """The dataset of fields whose values were checked before; types, shapes and names are checked again.

        Args:
            fields: All fields, and the `fingerprint` if it is known.
        """
        data = cls.__new__(cls)
        data.__dict__.update(fields)
        data._adopt(known=True)
        return data

    @classmethod
    def from_tff(
        cls,
        train: tff.simulation.datasets.ClientData,
        *,
        test: tff.simulation.datasets.ClientData | tf.data.Dataset | None = None,
        validation: tff.simulation.datasets.ClientData | tf.data.Dataset | None = None,
        x: str | Sequence[str] | None = None,
        y: str | None = None,
        name: str = "tff",
        clients: int | Sequence[str] | None = None,
        num_classes: int | None = None,
        test_fraction: float = 0.2,
        validation_fraction: float = 0.1,
        split: Literal["examples", "clients"] = "examples",
        seed: int = 0,
        progress: bool = True,
    ) -> FederatedData:
        """Reads TensorFlow Federated's client data; its client ids and their order are kept.

        Each element is one example: a pair (x, y) or named features, single or in batches of any number. Give client
        data before it is repeated or shuffled. As elsewhere in dpfl, uint8 images are scaled to [0, 1] and get a
        channel axis where they have none; all else is used as it is, in float32.

        Args:
            train: the training examples, of any subclass of `tff.simulation.datasets.ClientData`.
            test: Test examples, of all clients together; then none are set aside.
            validation: Validation examples, as `test`.
            x: The feature to learn from, or several, which are then strung together as one vector. By default "x", or
                else the only feature beside `y` that is neither a single value nor text.
            y: The feature that is the class, one integer or string each; by default whichever of "y" and "label"
                there is.
            name: What charts and records call the dataset.
            clients: How many clients to read, drawn at random with the seed, or the ids of those to read; all by
                default. One client after the other is read, and memory is needed for three copies of what is kept.
            progress: Show a progress bar while clients are read.
            num_classes, test_fraction, validation_fraction, split, seed: See `dpfl.data.from_arrays`.

        Raises:
            InputError: There is no TensorFlow Federated on this machine, the features are not clear or not of equal
                shape, a client has no example, or an option is not valid.
        """
        from dpfl.tff.client_data import from_client_data

        return from_client_data(
            train,
            test=test,
            validation=validation,
            x=x,
            y=y,
            name=name,
            clients=clients,
            num_classes=num_classes,
            test_fraction=test_fraction,
            validation_fraction=validation_fraction,
            split=split,
            seed=seed,
            progress=progress,
        )

    def to_tff(self) -> tff.simulation.datasets.ClientData:
        """Returns the training examples as TensorFlow Federated's client data, for anything that takes it.

        The client ids are kept; the elements are `OrderedDict(x=, y=)`, one example each: float32 of `example_shape`
        and int32. `create_tf_dataset_for_client` reads one client's rows; TFF's own `dataset_computation` puts all
        training examples into the graph that it sends to its worker, which protocol buffers bound at 2 GB.

        Raises:
            InputError: There is no TensorFlow Federated on this machine.
        """
        from dpfl.tff.client_data import to_client_data

        return to_client_data(self)

    def held_out(self, part: Literal["test", "validation"] = "test") -> tf.data.Dataset:
        """Returns held-out examples as a `tf.data.Dataset` of elements as `to_tff` has them, not batched.

        Raises:
            InputError: There is no such part.
        """
        import tensorflow as tf

        if part not in ("test", "validation"):
            raise InputError(f"part is {part!r}, but 'test' or 'validation' is needed.")
        x, y = (self.x_test, self.y_test) if part == "test" else (self.x_validation, self.y_validation)
        return tf.data.Dataset.from_tensor_slices(collections.OrderedDict(x=x, y=y))

    @property
    def num_clients(self) -> int:
        """Number of clients that can take part in training."""
        return len(self.offsets) - 1

    @property
    def num_examples(self) -> int:
        """Number of training examples over all clients."""
        return len(self.x)

    @property
    def example_shape(self) -> tuple[int, ...]:
        """Shape of one example's features, without the batch axis."""
        return self.x.shape[1:]

    @property
    def client_sizes(self) -> np.ndarray:
        """int64 (clients,), training examples of each client."""
        return np.diff(self.offsets)

    @cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the content: all arrays and `num_classes`, and no names."""
        digest = hashlib.sha256(str(self.num_classes).encode())
        for name in ARRAYS:
            array: np.ndarray = getattr(self, name)
            digest.update(f"{name}{array.dtype.str}{array.shape}".encode())
            digest.update(array.data if array.size else b"")
        return digest.hexdigest()

    def client(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the features and labels of client number k as views.

        Raises:
            InputError: There is no such client.
        """
        if not 0 <= k < self.num_clients:
            raise InputError(f"there is no client {k} in {self.name!r}: it has 0 to {self.num_clients - 1}.")
        rows = slice(self.offsets[k], self.offsets[k + 1])
        return self.x[rows], self.y[rows]

    def summary(self) -> str:
        """Returns one line for people: clients, examples, classes, features."""
        smallest, largest = self.client_sizes.min(), self.client_sizes.max()
        per_client = f"{smallest:,}" if smallest == largest else f"{smallest:,} to {largest:,}"
        return (
            f"{self.name}: {self.num_clients:,} clients with {per_client} of {self.num_examples:,} training "
            f"examples, {len(self.x_validation):,} validation and {len(self.x_test):,} test examples, "
            f"{self.num_classes} classes, features {self.example_shape}"
        )

    def __repr__(self) -> str:
        return f"<FederatedData {self.summary()}>"
