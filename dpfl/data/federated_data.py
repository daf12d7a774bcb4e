"""One federated dataset: training examples grouped by client, and central held-out examples."""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dpfl.errors import InputError

if TYPE_CHECKING:
    import tensorflow as tf
    import tensorflow_federated as tff

_ARRAYS = ("x", "y", "offsets", "x_validation", "y_validation", "x_test", "y_test")


@dataclass(frozen=True, eq=False, repr=False)
class FederatedData:
    """Training examples of many clients in two arrays, with held-out examples for evaluation.

    Client k owns rows `offsets[k]:offsets[k + 1]`, so that 100,000 clients cost two arrays and not 100,000
    objects. The training examples are private; names, sizes of the held-out sets and `num_classes` are not
    treated as private. The arrays are taken over without a copy where their type already fits, and made
    read-only. Two datasets are equal in content if their `fingerprint` is.

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

    def __post_init__(self) -> None:
        if self.num_classes < 2:
            raise InputError(f"{self.name!r} has {self.num_classes} classes, but at least 2 are needed.")
        for field in ("client_ids", "class_names", "assumptions"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        if len(self.class_names) != self.num_classes:
            raise InputError(
                f"{self.name!r} has {len(self.class_names)} class names for {self.num_classes} classes, "
                "but needs one name per class."
            )
        self._set_offsets()
        self._set_examples("x", "y", "training")
        self._set_examples("x_validation", "y_validation", "validation")
        self._set_examples("x_test", "y_test", "test")
        if self.offsets[-1] != len(self.x):
            raise InputError(
                f"offsets of {self.name!r} end at {self.offsets[-1]}, but there are {len(self.x)} training "
                "examples: the last offset must be their number."
            )
        if not len(self.x_test):
            raise InputError(f"{self.name!r} has no test example, but at least 1 is needed for the accuracy.")
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
        empty = np.flatnonzero(np.diff(offsets.astype(np.int64)) < 1)
        if len(empty):
            raise InputError(f"client {self.client_ids[empty[0]]!r} of {self.name!r} has no training example: drop it.")
        object.__setattr__(self, "offsets", np.ascontiguousarray(offsets, dtype=np.int64))

    def _set_examples(self, x_field: str, y_field: str, role: str) -> None:
        """Converts and checks one pair of features and labels."""
        labels = np.asarray(getattr(self, y_field))
        try:
            with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite and is named below
                x = np.ascontiguousarray(getattr(self, x_field), dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise InputError(f"{role} features of {self.name!r} are not all numbers: {error}.") from None
        if not x.size and role != "training":
            x = np.empty((0, *self.example_shape), np.float32)
        if x.ndim < 2 or (x.size == 0 and role == "training"):
            raise InputError(
                f"{role} features of {self.name!r} have shape {x.shape}, but (examples, *feature shape) "
                "with at least one example and one feature axis is needed."
            )
        if role != "training" and x.shape[1:] != self.example_shape:
            raise InputError(
                f"{role} examples of {self.name!r} have shape {x.shape[1:]}, but training examples have "
                f"{self.example_shape}: they must agree."
            )
        if labels.shape != (len(x),):
            raise InputError(
                f"{role} labels of {self.name!r} have shape {labels.shape}, but ({len(x)},) is needed: "
                "one class per example."
            )
        if len(labels) and labels.dtype.kind not in "iu":
            raise InputError(
                f"{role} labels of {self.name!r} have type {labels.dtype}, but integers from 0 to "
                f"{self.num_classes - 1} are needed."
            )
        wrong = np.flatnonzero((labels < 0) | (labels >= self.num_classes))
        if len(wrong):
            raise InputError(
                f"{role} label {labels[wrong[0]]} at row {wrong[0]} of {self.name!r} is not a class: labels "
                f"must be integers from 0 to {self.num_classes - 1}."
            )
        finite = np.isfinite(x)
        if not finite.all():
            row, *feature = np.argwhere(~finite)[0].tolist()
            raise InputError(
                f"{role} example {row} of {self.name!r} has the value {x[(row, *feature)]} at feature "
                f"{', '.join(map(str, feature))}: every feature must be finite, so fill or drop it."
            )
        object.__setattr__(self, x_field, x)
        object.__setattr__(self, y_field, np.ascontiguousarray(labels, dtype=np.int32))

    def _lock(self) -> None:
        for field in _ARRAYS:
            getattr(self, field).flags.writeable = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock()  # pickle does not keep the flag

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
        for field in _ARRAYS:
            array: np.ndarray = getattr(self, field)
            digest.update(f"{field}{array.dtype.str}{array.shape}".encode())
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
