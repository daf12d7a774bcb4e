"""The guarantee: what is protected, what it costs, and the noise that it needs."""

from dpfl.privacy.accounting import accountant_for, epsilon, epsilon_by_accountant
from dpfl.privacy.calibration import largest_count, noise_for, noise_multiplier, poisson_gaussian
from dpfl.privacy.example_level import client_epsilons
from dpfl.privacy.guarantee import Guarantee
from dpfl.privacy.relations import Accountant, Relation, Unit
from dpfl.privacy.target import Privacy
from dpfl.privacy.tuning import all_of, best_of

__all__ = [
    "Accountant",
    "Guarantee",
    "Privacy",
    "Relation",
    "Unit",
    "accountant_for",
    "all_of",
    "best_of",
    "client_epsilons",
    "epsilon",
    "epsilon_by_accountant",
    "largest_count",
    "noise_for",
    "noise_multiplier",
    "poisson_gaussian",
]
