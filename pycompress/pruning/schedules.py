"""Schedules of gradual pruning: progress in [0, 1] -> share of the final ratio that is pruned by then."""

from __future__ import annotations

import math
from collections.abc import Callable

from ..registry import Registry

Schedule = Callable[[float], float]

SCHEDULES: Registry[Schedule] = Registry("pruning schedule")
"""Each is 0 at 0 (nothing pruned yet), 1 at 1 (all pruned) and never falls in between."""


@SCHEDULES.register("one_shot")
def one_shot(progress: float) -> float:
    """Everything at the first step."""
    return 0.0 if progress <= 0 else 1.0


@SCHEDULES.register("linear")
def linear(progress: float) -> float:
    """The same amount at every step: p."""
    return progress


@SCHEDULES.register("cubic")
def cubic(progress: float) -> float:
    """Fast at first, gentle at the end: 1 - (1 - p)^3, the AGP schedule (Zhu and Gupta 2017, arXiv:1710.01878, section 3)."""
    return 1 - (1 - progress) ** 3


_DECAY = 5.0  # exp(-5) < 1%: the last fifth of the steps prunes under 2% of the whole


@SCHEDULES.register("exponential")
def exponential(progress: float) -> float:
    """Each step removes a constant share of what is still to go: (1 - e^(-5p)) / (1 - e^(-5))."""
    return 1.0 if progress >= 1 else math.expm1(-_DECAY * progress) / math.expm1(-_DECAY)


@SCHEDULES.register("cosine")
def cosine(progress: float) -> float:
    """Gentle at both ends: (1 - cos(pi p)) / 2."""
    return (1 - math.cos(math.pi * progress)) / 2


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@SCHEDULES.register("one_cycle")
def one_cycle(progress: float) -> float:
    """A logistic curve with its middle at p = 3/7: s(14p - 6), stretched to run from 0 to 1.

    One-Cycle Pruning (Hubens et al. 2021, arXiv:2107.02086), with the constants of fasterai.
    """
    start, end = _sigmoid(-6.0), _sigmoid(8.0)
    return 1.0 if progress >= 1 else (_sigmoid(14 * progress - 6) - start) / (end - start)
