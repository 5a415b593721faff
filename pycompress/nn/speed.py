"""How fast one layer runs against another on this machine: what decides between formats where no rule can."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


@torch.inference_mode()
def speed_up(layer: nn.Module, other: nn.Module, inputs: Iterable[Tensor]) -> float:
    """How many times as fast ``other`` is as ``layer``: geometric mean over the inputs."""
    logs = [math.log(seconds(lambda: layer(x)) / seconds(lambda: other(x))) for x in inputs]  # noqa: B023
    return math.exp(sum(logs) / len(logs))


def seconds(function: Callable[[], object], rounds: int = 5) -> float:
    """Shortest of a few runs after a warm-up."""
    function()
    best = math.inf
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return best
