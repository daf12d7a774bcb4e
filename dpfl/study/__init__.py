"""Studies: many runs, kept as they end, as one tidy table."""

from dpfl.study.study import Study, grid
from dpfl.study.tradeoff import tradeoff, tuning_prices

__all__ = ["Study", "grid", "tradeoff", "tuning_prices"]
