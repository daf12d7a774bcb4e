"""Figures from a study's frame of runs, for a paper: functions of a DataFrame that return a Figure.

They need neither pyplot nor a display nor TensorFlow.
"""

from dpfl.charts.clients import client_epsilons
from dpfl.charts.compression import compression
from dpfl.charts.convergence import convergence, signal_to_noise
from dpfl.charts.everything import draw_all
from dpfl.charts.multiples import small_multiples
from dpfl.charts.pareto import pareto, pareto_front
from dpfl.charts.saving import save
from dpfl.charts.summary import best_settings
from dpfl.charts.sweeps import cohort, heterogeneity, local_steps
from dpfl.charts.tradeoffs import clipping, clipping_map, epsilon, mechanisms, round_frequency

__all__ = [
    "best_settings",
    "client_epsilons",
    "clipping",
    "clipping_map",
    "cohort",
    "compression",
    "convergence",
    "draw_all",
    "epsilon",
    "heterogeneity",
    "local_steps",
    "mechanisms",
    "pareto",
    "pareto_front",
    "round_frequency",
    "save",
    "signal_to_noise",
    "small_multiples",
]
