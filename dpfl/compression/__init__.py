"""Compression: what an update looks like on the wire, and how the model becomes smaller.

`Compression` says what is wanted. The codec, the subspaces and the pruning are pure functions beneath the mechanisms,
whose queries use them; see `dpfl.mechanisms.compressed_queries` for the order that keeps the guarantee. `to_lite` turns
a trained model into a file of TensorFlow Lite, and `PruningCallback` prunes what a `dpfl.DPModel` trains.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dpfl.compression.config import Compression
from dpfl.compression.lite import compressed_size, lite_accuracy, lite_logits, to_lite

if TYPE_CHECKING:
    from dpfl.compression.keras_pruning import PruningCallback, as_prunable, pruning_schedule

_KERAS = ("PruningCallback", "as_prunable", "pruning_schedule")  # these need TensorFlow to be imported

__all__ = [
    "Compression",
    "PruningCallback",
    "as_prunable",
    "compressed_size",
    "lite_accuracy",
    "lite_logits",
    "pruning_schedule",
    "to_lite",
]


def __getattr__(name: str) -> Any:
    if name in _KERAS:
        return getattr(importlib.import_module("dpfl.compression.keras_pruning"), name)
    raise AttributeError(f"module 'dpfl.compression' has no attribute '{name}'")
