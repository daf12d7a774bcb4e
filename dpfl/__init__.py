"""dpfl: differentially private federated learning with TensorFlow.

Importing dpfl imports neither TensorFlow nor anything else heavy: names are loaded when first used.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
from typing import TYPE_CHECKING, Any

# TensorFlow reads this when it is imported: without it, it prints a page about accelerators.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

__version__ = importlib.metadata.version("dpfl")

_HOMES = {
    "AdaptiveClipping": "dpfl.mechanisms",
    "BallsInBins": "dpfl.sampling",
    "BandedMatrix": "dpfl.mechanisms",
    "CappedPoisson": "dpfl.sampling",
    "ClientTraining": "dpfl.clients",
    "Compression": "dpfl.compression",
    "Cyclic": "dpfl.sampling",
    "CyclicPoisson": "dpfl.sampling",
    "DPKerasAdagradOptimizer": "dpfl.clients.keras_door",
    "DPKerasAdamOptimizer": "dpfl.clients.keras_door",
    "DPKerasSGDOptimizer": "dpfl.clients.keras_door",
    "DPModel": "dpfl.clients.keras_door",
    "Deployment": "dpfl.mechanisms",
    "DistributedDiscreteGaussian": "dpfl.mechanisms",
    "DistributedSkellam": "dpfl.mechanisms",
    "EpsilonCallback": "dpfl.clients.keras_door",
    "Everyone": "dpfl.sampling",
    "Experiment": "dpfl.simulation",
    "FederatedData": "dpfl.data",
    "FixedSize": "dpfl.sampling",
    "Gaussian": "dpfl.mechanisms",
    "Guarantee": "dpfl.privacy",
    "InputError": "dpfl.errors",
    "LocalGaussian": "dpfl.mechanisms",
    "LocalLaplace": "dpfl.mechanisms",
    "NoMechanism": "dpfl.mechanisms",
    "Poisson": "dpfl.sampling",
    "PoissonBatches": "dpfl.clients.keras_door",
    "Privacy": "dpfl.privacy",
    "PruningCallback": "dpfl.clients.keras_door",
    "RayCluster": "dpfl.simulation",
    "ServerOptimizer": "dpfl.simulation",
    "Study": "dpfl.study",
    "TreeAggregation": "dpfl.mechanisms",
}
_MODULES = (
    "charts",
    "compression",
    "data",
    "explore",
    "mechanisms",
    "models",
    "privacy",
    "simulation",
    "statistics",
    "study",
    "tff",
)

if TYPE_CHECKING:
    from dpfl import charts, compression, data, explore, mechanisms, models, privacy, simulation, statistics, study, tff
    from dpfl.clients import ClientTraining
    from dpfl.clients.keras_door import (
        DPKerasAdagradOptimizer,
        DPKerasAdamOptimizer,
        DPKerasSGDOptimizer,
        DPModel,
        EpsilonCallback,
        PoissonBatches,
        PruningCallback,
    )
    from dpfl.compression import Compression
    from dpfl.data import FederatedData
    from dpfl.errors import InputError
    from dpfl.mechanisms import (
        AdaptiveClipping,
        BandedMatrix,
        Deployment,
        DistributedDiscreteGaussian,
        DistributedSkellam,
        Gaussian,
        LocalGaussian,
        LocalLaplace,
        NoMechanism,
        TreeAggregation,
    )
    from dpfl.privacy import Guarantee, Privacy
    from dpfl.sampling import BallsInBins, CappedPoisson, Cyclic, CyclicPoisson, Everyone, FixedSize, Poisson
    from dpfl.simulation import Experiment, RayCluster, ServerOptimizer
    from dpfl.study import Study

__all__ = [
    "AdaptiveClipping",
    "BallsInBins",
    "BandedMatrix",
    "CappedPoisson",
    "ClientTraining",
    "Compression",
    "Cyclic",
    "CyclicPoisson",
    "DPKerasAdagradOptimizer",
    "DPKerasAdamOptimizer",
    "DPKerasSGDOptimizer",
    "DPModel",
    "Deployment",
    "DistributedDiscreteGaussian",
    "DistributedSkellam",
    "EpsilonCallback",
    "Everyone",
    "Experiment",
    "FederatedData",
    "FixedSize",
    "Gaussian",
    "Guarantee",
    "InputError",
    "LocalGaussian",
    "LocalLaplace",
    "NoMechanism",
    "Poisson",
    "PoissonBatches",
    "Privacy",
    "PruningCallback",
    "RayCluster",
    "ServerOptimizer",
    "Study",
    "TreeAggregation",
    "charts",
    "compression",
    "data",
    "explore",
    "mechanisms",
    "models",
    "privacy",
    "simulation",
    "statistics",
    "study",
    "tff",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"dpfl.{name}")
    raise AttributeError(f"module 'dpfl' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
