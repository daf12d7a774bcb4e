"""The guarantee: what is protected, what it costs, and the noise that it needs."""

from dpfl.privacy.accounting import epsilon
from dpfl.privacy.calibration import noise_multiplier, poisson_gaussian
from dpfl.privacy.guarantee import Guarantee
from dpfl.privacy.relations import Accountant, Relation, Unit
from dpfl.privacy.target import Privacy

__all__ = [
    "Accountant",
    "Guarantee",
    "Privacy",
    "Relation",
    "Unit",
    "epsilon",
    "noise_multiplier",
    "poisson_gaussian",
]
