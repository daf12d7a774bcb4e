"""One run and its rounds."""

from dpfl.simulation.cluster import RayCluster
from dpfl.simulation.experiment import Experiment
from dpfl.simulation.server import ServerOptimizer

__all__ = ["Experiment", "RayCluster", "ServerOptimizer"]
