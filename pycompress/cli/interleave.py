"""Time several calls so that their ratios hold on a machine that has other things to do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any


def interleaved(calls: Mapping[str, Callable[[], Any]], seconds: float, min_rounds: int = 5) -> dict[str, list[float]]:
    """Seconds per call and round. A round times every call once, so that a slow moment of the machine hits all alike.

    Every call runs once untimed first; then rounds follow until ``seconds`` are over, at least ``min_rounds``.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    deadline = perf_counter() + seconds
    rounds = 0
    while rounds < min_rounds or perf_counter() < deadline:
        for name, call in calls.items():
            start = perf_counter()
            call()
            times[name].append(perf_counter() - start)
        rounds += 1
    return times
