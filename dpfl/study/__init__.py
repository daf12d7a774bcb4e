"""Studies: many runs, kept as they end, as one tidy table."""

from dpfl.study.axes import clipping, grid, round_frequency, value_range
from dpfl.study.config import StudyConfig
from dpfl.study.store import Store
from dpfl.study.study import Study
from dpfl.study.tradeoff import tradeoff, tuning_prices

__all__ = [
    "Store",
    "Study",
    "StudyConfig",
    "clipping",
    "grid",
    "round_frequency",
    "tradeoff",
    "tuning_prices",
    "value_range",
]
