"""`tff.simulation.datasets.ClientData` in and out: what `FederatedData.from_tff` and `to_tff` do."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dpfl.data.arrays import from_arrays
from dpfl.data.files import scaled_images
from dpfl.data.wording import instead
from dpfl.errors import InputError
from dpfl.tff.reading import Elements, chosen_clients, read_clients, read_dataset
from dpfl.tff.runtime import tensorflow_federated

if TYPE_CHECKING:
    import tensorflow as tf
    import tensorflow_federated as tff

    from dpfl.data.federated_data import FederatedData

_LABELS = ("y", "label")


@dataclass(frozen=True)
class Features:
    """Which features of an element are the example and its class.

    Attributes:
        specs: name -> `tf.TensorSpec` of every feature; a pair has the names "x" and "y".
        x: names of the features that make the example.
        y: name of the class.
        batched: the elements are batches of examples.
        name: what the error sentences call the data.
    """

    specs: Mapping[str, Any]
    x: tuple[str, ...]
    y: str
    batched: bool
    name: str

    @classmethod
    def of(cls, element_spec: Any, x: str | Sequence[str] | None, y: str | None, name: str) -> Features:
        """Finds example and class as `FederatedData.from_tff` describes it."""
        specs = _specs(element_spec, name)
        batched = all(spec.shape.rank and spec.shape[0] is None for spec in specs.values())
        if batched:
            specs = {feature: type(spec)(spec.shape[1:], spec.dtype) for feature, spec in specs.items()}
        listed = ", ".join(f"{feature!r} ({_described(spec)})" for feature, spec in specs.items())
        if not (x is None or isinstance(x, str | Sequence)):
            raise InputError(f"x must be the name of a feature of {name}, or a list of names, but it was {x!r}.")
        given = [] if x is None else [x] if isinstance(x, str) else list(x)
        for feature in [*given, *([] if y is None else [y])]:
            if feature not in specs:
                raise InputError(f"{name} has no feature {feature!r}: {instead(feature, specs)}")
        if y is None:
            labels = [feature for feature in _LABELS if feature in specs and feature not in given]
            if len(labels) != 1:
                raise InputError(f"{name} has the features {listed}: say with y= which one is the class.")
            y = labels[0]
        if not given:
            shaped = [feature for feature in specs if feature != y and _is_array(specs[feature])]
            given = ["x"] if "x" in specs and y != "x" else shaped
            if len(given) != 1:
                raise InputError(f"{name} has the features {listed}: say with x= which one, or which, to learn from.")
        features = cls(specs, tuple(given), y, batched, name)
        features._check()
        return features

    def _check(self) -> None:
        for feature in self.x:
            if self.specs[feature].dtype.name == "string":
                raise InputError(
                    f"the feature {feature!r} of {self.name} is text, but numbers are needed: make them in "
                    "ClientData.preprocess."
                )
        if self.y in self.x or len(set(self.x)) < len(self.x):
            raise InputError(f"x is {list(self.x)} and y {self.y!r}, but no feature of {self.name} may be used twice.")
        shape = self.specs[self.y].shape
        if shape.rank is None or shape.rank > 1 or (shape.rank == 1 and shape[0] != 1):
            raise InputError(
                f"the feature {self.y!r} of {self.name} has shape {shape}, but one class per example is needed: turn "
                "one-hot labels into classes with tf.argmax, or batches of a fixed size into examples with unbatch, in "
                "ClientData.preprocess."
            )

    def select(self, element: Any) -> tuple[Any, ...]:
        """Takes the example's features and the class out of an element."""
        if hasattr(element, "_asdict"):
            element = element._asdict()
        elif not isinstance(element, Mapping):
            element = dict(zip(("x", "y"), element, strict=True))
        return (*(element[feature] for feature in self.x), element[self.y])

    def pair(self, columns: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Returns features and labels for `from_arrays` from the columns that `select` chose."""
        *features, labels = columns
        if labels.dtype == object:
            labels = np.array([label.decode(errors="replace") for label in labels.ravel()])
        if len(features) > 1:
            return np.column_stack([feature.reshape(len(feature), -1) for feature in features]), labels
        x = features[0]
        return scaled_images(x if x.ndim > 1 else x[:, np.newaxis]), labels


def from_client_data(
    train: tff.simulation.datasets.ClientData,
    *,
    test: tff.simulation.datasets.ClientData | tf.data.Dataset | None,
    validation: tff.simulation.datasets.ClientData | tf.data.Dataset | None,
    x: str | Sequence[str] | None,
    y: str | None,
    clients: int | Sequence[str] | None,
    name: str,
    seed: int,
    progress: bool,
    **options: Any,
) -> FederatedData:
    """What `FederatedData.from_tff` does; it describes the arguments. The options are those of `from_arrays`."""
    tff = tensorflow_federated()
    if not isinstance(train, tff.simulation.datasets.ClientData):
        raise InputError(
            "from_tff takes a tff.simulation.datasets.ClientData, and held-out ones as test= and validation=, but it "
            f"was given a {type(train).__name__}: for arrays there is dpfl.data.from_arrays."
        )
    features = Features.of(train.element_type_structure, x, y, repr(name))
    ids = chosen_clients(train, clients, seed, repr(name))
    elements = read_clients(train, ids, features.select, name=repr(name), batched=features.batched, progress=progress)
    if empty := elements.without_elements:
        raise InputError(
            f"{len(empty)} of the {len(ids)} clients of {name!r} have no example, first {empty[0]!r}: leave them out, "
            "by giving the ids of the others as clients=."
        )
    held_out = {}
    for role, source in (("test", test), ("validation", validation)):
        if source is not None:
            held_out[role] = _held_out(source, x, y, f"{name!r} ({role})", role, progress)
    return from_arrays(
        *features.pair(elements.columns),
        elements.names(elements.owners),
        name=name,
        seed=seed,
        test=held_out.get("test"),
        validation=held_out.get("validation"),
        **options,
    )


def to_client_data(data: FederatedData) -> tff.simulation.datasets.ClientData:
    """What `FederatedData.to_tff` does."""
    tff = tensorflow_federated()
    import tensorflow as tf

    numbers = {name: k for k, name in enumerate(data.client_ids)}

    def examples(client_id: Any) -> tf.data.Dataset:
        if tf.executing_eagerly():
            client = client_id if isinstance(client_id, str) else tf.get_static_value(client_id).decode()
            x, y = data.client(numbers[client])
        else:
            # As constants of the graph, which is all that TFF sends to its worker process.
            is_client = tf.equal(tf.constant(data.client_ids), client_id)
            known = tf.debugging.Assert(tf.reduce_any(is_client), ["there is no client", client_id])
            with tf.control_dependencies([known]):
                k = tf.argmax(tf.cast(is_client, tf.int32))
            offsets = tf.constant(data.offsets)
            x, y = (tf.constant(array)[offsets[k] : offsets[k + 1]] for array in (data.x, data.y))
        return tf.data.Dataset.from_tensor_slices(collections.OrderedDict(x=x, y=y))

    return tff.simulation.datasets.ClientData.from_clients_and_tf_fn(list(data.client_ids), examples)


def _held_out(
    source: Any, x: str | Sequence[str] | None, y: str | None, name: str, role: str, progress: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Reads held-out examples, of all clients together."""
    import tensorflow as tf

    if isinstance(source, tf.data.Dataset):
        features = Features.of(source.element_spec, x, y, name)
        elements = read_dataset(source, features.select, name=name, batched=features.batched)
    elif isinstance(source, tensorflow_federated().simulation.datasets.ClientData):
        features = Features.of(source.element_type_structure, x, y, name)
        elements = _all_clients(source, features, progress)
    else:
        raise InputError(
            f"{role} must be a tff.simulation.datasets.ClientData or a tf.data.Dataset, but it was a "
            f"{type(source).__name__}."
        )
    return features.pair(elements.columns)


def _all_clients(source: tff.simulation.datasets.ClientData, features: Features, progress: bool) -> Elements:
    ids = chosen_clients(source, None, 0, features.name)
    return read_clients(source, ids, features.select, name=features.name, batched=features.batched, progress=progress)


def _specs(element_spec: Any, name: str) -> dict[str, Any]:
    """Names and `tf.TensorSpec`s of the features of an element."""
    import tensorflow as tf

    if isinstance(element_spec, tf.TensorSpec) and element_spec.dtype == tf.string:
        raise InputError(
            f"the elements of {name} are strings: serialised examples, as tff.simulation.datasets.SqlClientData has "
            "them, are read with tff.simulation.datasets.load_and_parse_sql_client_data."
        )
    if hasattr(element_spec, "_asdict"):
        element_spec = element_spec._asdict()
    elif isinstance(element_spec, tuple) and len(element_spec) == 2:
        element_spec = dict(zip(("x", "y"), element_spec, strict=True))
    wrong = (
        [
            f"the feature {key!r} is a {type(spec).__name__}"
            for key, spec in element_spec.items()
            if not isinstance(spec, tf.TensorSpec)
        ]
        if isinstance(element_spec, Mapping)
        else [f"they are a {type(element_spec).__name__}"]
    )
    if wrong:
        raise InputError(
            f"the elements of {name} must be OrderedDicts of tensors, or pairs (x, y) of tensors, neither nested nor "
            f"ragged nor sparse, but {wrong[0]}: change them with ClientData.preprocess."
        )
    return dict(element_spec)


def _is_array(spec: Any) -> bool:
    return spec.dtype.name != "string" and spec.shape.rank != 0


def _described(spec: Any) -> str:
    return f"{spec.dtype.name} {spec.shape}"
