"""Mechanisms: each calibrates itself to a privacy target and returns a plan."""

from dpfl.mechanisms.gaussian import Gaussian
from dpfl.mechanisms.none import NoMechanism
from dpfl.mechanisms.plan import Plan

Mechanism = Gaussian | NoMechanism

__all__ = ["Gaussian", "Mechanism", "NoMechanism", "Plan"]
