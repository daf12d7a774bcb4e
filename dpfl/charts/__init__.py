"""Figures from a study's frame of runs, for a paper: functions of a DataFrame that return a Figure.

They need neither pyplot nor a display nor TensorFlow.
"""

from dpfl.charts.saving import save
from dpfl.charts.summary import best_settings
from dpfl.charts.tradeoffs import clipping, epsilon, round_frequency

__all__ = ["best_settings", "clipping", "epsilon", "round_frequency", "save"]
