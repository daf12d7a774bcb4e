"""One run and its rounds."""

from dpfl.simulation.experiment import Experiment
from dpfl.simulation.server import ServerOptimizer

__all__ = ["Experiment", "ServerOptimizer"]
