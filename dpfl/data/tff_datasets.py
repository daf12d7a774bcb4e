"""The federated datasets of TensorFlow Federated, with its clients: images, and next-token prediction on text."""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dpfl.data.arrays import from_arrays
from dpfl.data.federated_data import FederatedData
from dpfl.data.files import scaled_images
from dpfl.data.text import SHAKESPEARE_CHARACTERS, Vocabulary, next_tokens
from dpfl.errors import InputError

if TYPE_CHECKING:
    from dpfl.tff.reading import Elements


def emnist(
    clients: int | Sequence[str] | None = None,
    seed: int = 0,
    *,
    only_digits: bool = True,
    validation_fraction: float = 0.1,
    cache_dir: str | Path | None = None,
    progress: bool = True,
) -> FederatedData:
    """EMNIST by writer, as in `tff.simulation.datasets.emnist`: images of shape (28, 28, 1), ink 1 and paper 0.

    3,383 writers with 341,873 digits to train and 40,832 to test, or with letters, 62 classes, 3,400 with 671,585 and
    77,483. TFF has ink 0 and paper 1, as has `FederatedData.from_tff` of its client data: here as in MNIST, so that
    paper adds nothing to a gradient. The test examples are those of all writers, whichever train.

    Args:
        clients: How many writers to train on, drawn with the seed, or their ids; all by default, which needs 4 GB of
            memory while they are read, 8 GB with letters.
        seed: Seed of the clients and the validation split.
        only_digits: Leave out the letters.
        validation_fraction: Share of the training examples set aside for validation; may be 0. A client whose examples
            are all set aside is left out.
        cache_dir: Folder of TFF's datasets, and where a download goes; by default the one that the environment
            variable DPFL_DATA_DIR names, where it has the dataset, else TFF's own.
        progress: Show a progress bar while clients are read.

    Raises:
        InputError: There is no TensorFlow Federated on this machine, an option is not valid, or the dataset is neither
            on this machine nor can be downloaded.
    """
    classes = string.digits if only_digits else string.digits + string.ascii_uppercase + string.ascii_lowercase
    train, test = _read(
        "emnist",
        ("pixels", "label"),
        clients,
        seed,
        cache_dir=cache_dir,
        progress=progress,
        options={"only_digits": only_digits},
    )
    for pixels in (train.columns[0], test.columns[0]):
        np.subtract(1, pixels, out=pixels)
    data = from_arrays(
        train.columns[0][..., np.newaxis],
        train.columns[1],
        train.names(train.owners),
        name="emnist" if only_digits else "emnist-62",
        num_classes=len(classes),
        test=(test.columns[0][..., np.newaxis], test.columns[1]),
        validation_fraction=validation_fraction,
        seed=seed,
    )
    return dataclasses.replace(data, class_names=tuple(classes))


def cifar100(
    clients: int | Sequence[str] | None = None,
    seed: int = 0,
    *,
    validation_fraction: float = 0.1,
    cache_dir: str | Path | None = None,
    progress: bool = True,
) -> FederatedData:
    """CIFAR-100 as in `tff.simulation.datasets.cifar100`: images of shape (32, 32, 3), pixels in [0, 1], 100 classes.

    500 clients with 100 training examples each, dealt by Pachinko allocation over the coarse labels (Reddi et al. 2021,
    2003.00295), and 10,000 test examples. The arguments and errors are those of `emnist`.
    """
    train, test = _read("cifar100", ("image", "label"), clients, seed, cache_dir=cache_dir, progress=progress)
    return from_arrays(
        scaled_images(train.columns[0]),
        train.columns[1],
        train.names(train.owners),
        name="cifar100",
        num_classes=100,
        test=(scaled_images(test.columns[0]), test.columns[1]),
        validation_fraction=validation_fraction,
        seed=seed,
    )


def shakespeare(
    clients: int | Sequence[str] | None = None,
    seed: int = 0,
    *,
    sequence_length: int = 80,
    validation_fraction: float = 0.1,
    cache_dir: str | Path | None = None,
    progress: bool = True,
) -> FederatedData:
    """Next character in Shakespeare's plays, a client for each of 715 roles: `tff.simulation.datasets.shakespeare`.

    As in LEAF (Caldas et al. 2018, 1812.01097) an example is the `sequence_length` characters before a character, and
    its class is this character. Characters are numbered as in TFF's own task: 0 is padding, at the left, then come 86
    characters, any other one, the beginning and the end of a speech, 90 classes in all; each character of a speech and
    its end are predicted once. The numbers are in `x` as floats, for a model that begins with an embedding:

        layers = tf.keras.layers
        model = lambda: tf.keras.Sequential([layers.Embedding(90, 8), layers.LSTM(256), layers.Dense(90)])

    Args:
        clients: How many roles to train on, drawn with the seed, or their ids; all by default, millions of examples.
        seed: Seed of the clients and the validation split.
        sequence_length: Characters of an example.
        validation_fraction: See `emnist`, as for all that follow, and for the errors.
        cache_dir: See `emnist`.
        progress: See `emnist`.
    """
    _check_counts(sequence_length=sequence_length)
    train, test = _read("shakespeare", ("snippets",), clients, seed, cache_dir=cache_dir, progress=progress)
    vocabulary = Vocabulary(tuple(SHAKESPEARE_CHARACTERS))
    # One character a byte, as in TFF's task.
    examples = [
        next_tokens(vocabulary.sequences(text.decode("latin-1") for text in part.columns[0]), sequence_length)
        for part in (train, test)
    ]
    return _of_text("shakespeare", vocabulary, train, examples, validation_fraction, seed)


def stackoverflow(
    clients: int | Sequence[str] | None = 1000,
    seed: int = 0,
    *,
    words: int = 10_000,
    sequence_length: int = 20,
    max_sentences_per_client: int = 1000,
    test_clients: int = 100,
    validation_fraction: float = 0.1,
    cache_dir: str | Path | None = None,
    progress: bool = True,
) -> FederatedData:
    """Next word in questions and answers on Stack Overflow, by user: `tff.simulation.datasets.stackoverflow`.

    An example is the words before a word, in the first `sequence_length` words of a sentence, and its class is this
    word, with the defaults of TFF's own task (Reddi et al. 2021, 2003.00295). Tokens are numbered as there: 0 is
    padding, at the left, then come the `words` that most users wrote, any other word, the beginning and the end of a
    sentence, 10,004 classes. Other words and ends are seen but never predicted, so that the accuracy is the one that
    the literature gives, without either. `x` and models are as for `shakespeare`.

    The guarantee cannot cover the vocabulary, which comes from all 342,477 users, and says so. Examples to validate are
    set aside from the training clients; TFF's held-out users are not used.

    Args:
        clients: How many users to train on, drawn with the seed, or their ids; None for all of 342,477, whose 136
            million sentences no usual machine holds.
        seed: Seed of the clients, of the test clients and of the validation split.
        words: Size of the vocabulary.
        sequence_length: Tokens of an example, and words that are kept of a sentence.
        max_sentences_per_client: Sentences that are kept of a user, the first ones.
        test_clients: How many users of TFF's test set, sentences of 2018 and later, to test on.
        validation_fraction: See `emnist`, as for all that follow, and for the errors.
        cache_dir: See `emnist`.
        progress: See `emnist`.
    """
    from dpfl.tff.downloads import word_counts

    _check_counts(
        words=words,
        sequence_length=sequence_length,
        max_sentences_per_client=max_sentences_per_client,
        test_clients=test_clients,
    )
    train, test = _read(
        "stackoverflow",
        ("tokens",),
        clients,
        seed,
        test_clients=test_clients,
        at_most=max_sentences_per_client,
        cache_dir=cache_dir,
        progress=progress,
    )
    vocabulary = Vocabulary(tuple(word_counts(words, cache_dir)))
    never_predicted = (vocabulary.unknown, vocabulary.end)
    examples = []
    for part in (train, test):
        texts = (sentence.decode(errors="replace").split(" ") for sentence in part.columns[0])
        examples.append(next_tokens(vocabulary.sequences(texts, sequence_length), sequence_length, never_predicted))
    public = f"The vocabulary, the {words:,} words that most users wrote, is taken from the data and treated as public."
    return _of_text("stackoverflow", vocabulary, train, examples, validation_fraction, seed, public)


def _read(
    name: str,
    features: tuple[str, ...],
    clients: int | Sequence[str] | None,
    seed: int,
    *,
    test_clients: int | None = None,
    at_most: int | None = None,
    cache_dir: str | Path | None,
    progress: bool,
    options: dict[str, bool] | None = None,
) -> tuple[Elements, Elements]:
    """Reads these features of TFF's training set, of these clients, and of its test set."""
    from dpfl.tff.downloads import client_data
    from dpfl.tff.reading import chosen_clients, read_clients

    train, *_, test = client_data(name, cache_dir, **(options or {}))
    train_elements, test_elements = (
        read_clients(
            part,
            chosen_clients(part, chosen, seed, what),
            lambda element: tuple(element[feature] for feature in features),
            name=what,
            at_most=at_most,
            progress=progress,
        )
        for part, chosen, what in ((train, clients, name), (test, test_clients, f"{name} (test)"))
    )
    return train_elements, test_elements


def _of_text(
    name: str,
    vocabulary: Vocabulary,
    train: Elements,
    examples: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    validation_fraction: float,
    seed: int,
    *assumptions: str,
) -> FederatedData:
    (x, y, text), (x_test, y_test, _) = examples
    data = from_arrays(
        x,
        y,
        train.names(train.owners[text]),
        name=name,
        num_classes=len(vocabulary.names),
        test=(x_test, y_test),
        validation_fraction=validation_fraction,
        seed=seed,
    )
    return dataclasses.replace(data, class_names=vocabulary.names, assumptions=(*assumptions, *data.assumptions))


def _check_counts(**counts: int) -> None:
    for option, count in counts.items():
        if not isinstance(count, int) or count < 1:
            raise InputError(f"{option} is {count!r}, but a whole number of at least 1 is needed.")
