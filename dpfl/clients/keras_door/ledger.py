"""The ledger of a model's training as two variables, which are saved and restored with its weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

from dpfl.clients.keras_door.releases import Entry, Release
from dpfl.errors import InputError

_ROWS = 64  # different settings that one model may be trained with


class TrainingLedger:
    """Counts what has been released, row by row: one row for all steps with the same settings.

    Args:
        add_variable: makes a non-trainable variable from its name, shape and type.
    """

    def __init__(self, add_variable: Callable[[str, tuple[int, ...], tf.DType], tf.Variable]) -> None:
        self._settings = add_variable("ledger_settings", (_ROWS, Release.columns()), tf.float64)
        self._counts = add_variable("ledger_counts", (_ROWS, 2), tf.int64)

    def entries(self) -> list[Entry]:
        """What has been released so far; may be released, as it depends on no data but the number of examples."""
        return [
            Entry(Release.from_row(settings), int(charges), int(steps))
            for settings, (charges, steps) in zip(self._settings.numpy(), self._counts.numpy(), strict=True)
            if steps
        ]

    def steps(self) -> tf.Tensor:
        """How many steps there were, whatever their settings: int64 scalar."""
        return tf.reduce_sum(self._counts[:, 1])

    def note(self, row: tf.Tensor, charge: tf.Tensor) -> None:
        """Counts a step, in graph.

        Args:
            row: the step's settings, from `row_of`, int32 scalar.
            charge: how many noisy sums it is charged as, int64 scalar.
        """
        self._counts.scatter_nd_add(row[None, None], tf.stack([charge, 1])[None])

    def row_of(self, release: Release) -> int:
        """The row of a call of fit's settings, written if it is new.

        Raises:
            InputError: too many different settings.
        """
        settings, counts = self._settings.numpy(), self._counts.numpy()
        wanted = release.row()
        for row in range(_ROWS):
            if not counts[row, 1] or np.array_equal(settings[row], wanted):
                settings[row] = wanted
                self._settings.assign(settings)
                return row
        raise InputError(
            f"a model's ledger holds {_ROWS} different settings (of noise, clip norm, examples and batch size), and "
            "all are taken: train with one of those again."
        )

    def merge(self, earlier: Sequence[Entry]) -> None:
        """Sees to it that no restored ledger forgets: of each settings' counts the larger ones are kept.

        Args:
            earlier: what had been released before weights, and this ledger with them, were restored. Its rows keep
                their places.
        """
        merged = {entry.release: entry for entry in earlier}
        for entry in self.entries():
            known = merged.get(entry.release, entry)
            merged[entry.release] = dataclasses.replace(
                entry, charges=max(entry.charges, known.charges), steps=max(entry.steps, known.steps)
            )
        if len(merged) > _ROWS:
            raise InputError(f"the ledger holds {_ROWS} different settings: restore the weights in a new DPModel.")
        settings, counts = np.zeros(self._settings.shape), np.zeros(self._counts.shape, np.int64)
        for row, entry in enumerate(merged.values()):
            settings[row], counts[row] = entry.release.row(), (entry.charges, entry.steps)
        self._settings.assign(settings)
        self._counts.assign(counts)
