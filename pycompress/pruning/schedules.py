"""Schedules of gradual pruning: progress in [0, 1] -> share of the final ratio that is pruned by then."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import SupportsFloat

from ..registry import Registry

Schedule = Callable[[float], float]

SCHEDULES: Registry[Schedule] = Registry("pruning schedule")
"""Each is 0 at 0 (nothing pruned yet), 1 at 1 (all pruned) and never falls in between."""


def share_at(where: str, schedule: Schedule, progress: float) -> float:
    """The schedule's share there. More than 1 would remove more than the ratio, and channels do not come back."""
    returned = schedule(progress)
    if not isinstance(returned, SupportsFloat):  # NumPy's numbers and tensors are fine
        raise TypeError(f"{where}: schedule must return a number, got {type(returned).__name__} at progress {progress:g}")
    share = float(returned)
    if not -_ROUNDING <= share <= 1 + _ROUNDING:
        raise ValueError(f"{where}: schedule must stay in [0, 1], the share of the ratio, got {share!r} at progress {progress:g}")
    return min(1.0, max(0.0, share))


def check_schedule(where: str, schedule: Schedule, steps: int) -> None:
    """Call it for every event, so that a wrong one is noticed before the first."""
    for event in range(1, steps + 1):
        share = share_at(where, schedule, event / steps)
    if share < 1 - _ROUNDING:
        raise ValueError(f"{where}: schedule must be 1 at progress 1, got {share!r}")


_ROUNDING = 1e-9  # of a formula that is 0 and 1 at the ends on paper


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
