"""A plan to test."""

import pytest

from dpfl.mechanisms import Gaussian, Plan
from dpfl.privacy import Privacy
from dpfl.sampling import Poisson

POPULATION, COHORT, ROUNDS, CLIP = 60, 20, 4, 0.7


@pytest.fixture(scope="session")
def plan() -> Plan:
    """Four rounds with 20 of 60 clients, clip 0.7, at epsilon 1."""
    target = Privacy(epsilon=1, delta=1e-3)
    return Gaussian(clip_norm=CLIP).plan(target, Poisson(cohort=COHORT), POPULATION, ROUNDS)
