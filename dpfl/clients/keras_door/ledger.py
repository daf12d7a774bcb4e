"""The ledger of a model's training as variables, which are saved and restored with its weights."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from dpfl.clients.keras_door.releases import Entry, Release
from dpfl.errors import InputError

_ROWS = 64  # different settings that one model may be trained with


class _Table(NamedTuple):
    """One row for all steps with the same settings; rows without steps are free.

    Attributes:
        settings: `Release.row`s, (rows, columns), float64.
        counts: charges and steps, (rows, 2), int64.
        last: the row that counted the last step, int32 scalar; where to look first.
    """

    settings: tf.Variable
    counts: tf.Variable
    last: tf.Variable

    @classmethod
    def made_by(cls, make: Callable[[str, tuple[int, ...], tf.DType], tf.Variable]) -> _Table:
        settings, counts = (
            make("settings", (_ROWS, Release.columns()), tf.float64),
            make("counts", (_ROWS, 2), tf.int64),
        )
        return cls(settings, counts, last=tf.Variable(0, trainable=False))

    def entries(self) -> list[Entry]:
        return [
            Entry(Release.from_row(settings), int(charges), int(steps))
            for settings, (charges, steps) in zip(self.settings.numpy(), self.counts.numpy(), strict=True)
            if steps
        ]

    def write(self, entries: Sequence[Entry]) -> None:
        settings, counts = np.zeros(self.settings.shape), np.zeros(self.counts.shape, np.int64)
        for row, entry in enumerate(entries):
            settings[row], counts[row] = entry.release.row(), (entry.charges, entry.steps)
        self.settings.assign(settings)
        self.counts.assign(counts)

    def note(self, wanted: tf.Tensor, charge: tf.Tensor) -> None:
        is_last = tf.reduce_all(tf.equal(tf.gather(self.settings, self.last), wanted))
        with tf.control_dependencies([tf.cond(is_last, lambda: tf.identity(self.last), lambda: self._find(wanted))]):
            self.counts.scatter_nd_add(self.last[None, None], tf.stack([charge, 1])[None])

    def _find(self, wanted: tf.Tensor) -> tf.Tensor:
        """Makes the row with these settings, or a free one, the last."""
        taken = self.counts[:, 1] > 0
        same = taken & tf.reduce_all(tf.equal(self.settings, wanted), axis=1)
        fitness = tf.where(same, 2, tf.where(taken, 0, 1))
        tf.debugging.assert_positive(tf.reduce_max(fitness), "the model's ledger is full: make a new DPModel.")
        row = tf.argmax(fitness, output_type=tf.int32)
        self.settings.scatter_nd_update(row[None, None], wanted[None])
        return self.last.assign(row, read_value=True)


# What was done with a Keras model in this process, whoever wrapped it and whatever was restored since.
_DONE: weakref.WeakKeyDictionary[tf.keras.Model, _Table] = weakref.WeakKeyDictionary()


class TrainingLedger:
    """Counts what has been released, and forgets nothing of it.

    It is kept twice: with the weights, from which another process takes it up, and beside them, where no restoring of
    earlier weights reaches it. Of each settings' counts the larger ones are true.

    Args:
        model: the Keras model that is trained; all its ledgers share what is beside the weights.
        add_variable: makes a non-trainable variable from its name, shape and type.
    """

    def __init__(
        self, model: tf.keras.Model, add_variable: Callable[[str, tuple[int, ...], tf.DType], tf.Variable]
    ) -> None:
        self._saved = _Table.made_by(lambda name, *shape: add_variable(f"ledger_{name}", *shape))
        if model not in _DONE:
            _DONE[model] = _Table.made_by(lambda _, *shape: tf.Variable(tf.zeros(*shape), trainable=False))
        self._done = _DONE[model]
        self.reconcile()

    def entries(self) -> list[Entry]:
        """What has been released so far; may be released, as it depends on no data but the number of examples."""
        merged: dict[Release, Entry] = {}
        for entry in (*self._done.entries(), *self._saved.entries()):
            known = merged.get(entry.release, entry)
            merged[entry.release] = dataclasses.replace(
                entry, charges=max(entry.charges, known.charges), steps=max(entry.steps, known.steps)
            )
        return list(merged.values())

    def steps(self) -> tf.Tensor:
        """A number that grows with every step, whatever is restored: int64 scalar, in graph."""
        return tf.maximum(*(tf.reduce_sum(table.counts[:, 1]) for table in (self._saved, self._done)))

    def note(self, settings: tf.Tensor, charge: tf.Tensor) -> None:
        """Counts a step, in graph. The row is looked for in every step, since restoring may have moved it.

        Args:
            settings: `Release.row` of the step, (columns,), float64.
            charge: how many noisy sums it is charged as, int64 scalar.

        Raises:
            tf.errors.InvalidArgumentError: too many different settings, of weights that were restored within fit.
        """
        for table in (self._saved, self._done):
            table.note(settings, charge)

    def check_room(self, release: Release) -> None:
        """Refuses a call of fit whose settings have no room.

        Raises:
            InputError: too many different settings.
        """
        _check_rows({release, *(entry.release for entry in self.entries())})

    def reconcile(self) -> None:
        """Sees to it that weights that were restored, and this ledger with them, forget nothing.

        Raises:
            InputError: too many different settings.
        """
        entries = self.entries()
        _check_rows(entries)
        for table in (self._saved, self._done):
            if table.entries() != entries:
                table.write(entries)


def _check_rows(settings: Iterable[object]) -> None:
    if len(list(settings)) > _ROWS:
        raise InputError(
            f"a model's ledger holds {_ROWS} different settings (of noise, clip norm, examples and batch size), and "
            "all are taken: train with one of those again, or begin with a new Keras model."
        )
