"""Observers watch tensors go by and choose the scale and zero point: one file each, one import line here."""

from .base import OBSERVERS, Observer, range_to_qparams
from .entropy import EntropyObserver
from .minmax import MinMaxObserver
from .moving_average import MovingAverageObserver
from .mse import MSEObserver
from .percentile import PercentileObserver

__all__ = [
    "OBSERVERS",
    "EntropyObserver",
    "MSEObserver",
    "MinMaxObserver",
    "MovingAverageObserver",
    "Observer",
    "PercentileObserver",
    "range_to_qparams",
]
