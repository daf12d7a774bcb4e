"""The Keras door of example-level privacy: `model.fit` trains by DP-SGD, DP-Adam or DP-Adagrad."""

from dpfl.clients.keras_door.batches import PoissonBatches
from dpfl.clients.keras_door.callback import EpsilonCallback
from dpfl.clients.keras_door.model import DPModel
from dpfl.clients.keras_door.optimizers import DPKerasAdagradOptimizer, DPKerasAdamOptimizer, DPKerasSGDOptimizer
from dpfl.clients.keras_door.pruning import PruningCallback, as_prunable, pruning_schedule

__all__ = [
    "DPKerasAdagradOptimizer",
    "DPKerasAdamOptimizer",
    "DPKerasSGDOptimizer",
    "DPModel",
    "EpsilonCallback",
    "PoissonBatches",
    "PruningCallback",
    "as_prunable",
    "pruning_schedule",
]
