"""Mechanisms: each calibrates itself to a privacy target and returns a plan."""

from typing import Annotated

import pydantic

from dpfl.mechanisms.adaptive_clipping import AdaptiveClipping
from dpfl.mechanisms.banded_matrix import BandedMatrix
from dpfl.mechanisms.deployment import Deployment
from dpfl.mechanisms.distributed import DistributedDiscreteGaussian, DistributedSkellam
from dpfl.mechanisms.gaussian import Gaussian
from dpfl.mechanisms.local import LocalGaussian, LocalLaplace
from dpfl.mechanisms.none import NoMechanism
from dpfl.mechanisms.plan import Plan
from dpfl.mechanisms.tree_aggregation import TreeAggregation

Mechanism = Annotated[
    Gaussian
    | AdaptiveClipping
    | TreeAggregation
    | BandedMatrix
    | DistributedDiscreteGaussian
    | DistributedSkellam
    | LocalGaussian
    | LocalLaplace
    | NoMechanism,
    pydantic.Field(discriminator="name"),
]

__all__ = [
    "AdaptiveClipping",
    "BandedMatrix",
    "Deployment",
    "DistributedDiscreteGaussian",
    "DistributedSkellam",
    "Gaussian",
    "LocalGaussian",
    "LocalLaplace",
    "Mechanism",
    "NoMechanism",
    "Plan",
    "TreeAggregation",
]
