"""Studies: many runs, kept as they end, as one tidy table."""

from dpfl.study.study import Study, grid
from dpfl.study.tradeoff import tradeoff

__all__ = ["Study", "grid", "tradeoff"]
