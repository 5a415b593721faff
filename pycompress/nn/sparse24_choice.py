"""Whether a 2:4 layer gains from the sparse kernels on this machine: measured, not assumed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import cache

import torch
from torch import nn

from ..ops import native
from .base import set_note
from .sparse24_linear import Sparse24Linear

SMALLEST = 128 * 128
"""Layers with fewer weights stay dense unmeasured: there the cost of a call decides, not the kernel."""
ROWS = (1, 128)
"""Numbers of input rows that are measured."""


def sparse24_or_dense(layer: nn.Module) -> Sparse24Linear | None:
    """The packed 2:4 layer for an ``nn.Linear`` whose weight has the pattern, or None where the dense layer is as fast.

    None leaves a note with the reason on the layer, which ``pycompress.report`` shows. A subclass of ``nn.Linear`` and other layer
    types stay as they are. To force the packed layer, call ``Sparse24Linear.from_float``.
    """
    if type(layer) is not nn.Linear:
        set_note(layer, f"2:4 zeros stay in a dense weight: no sparse layer for {type(layer).__name__}")
        return None
    reason = _reason(layer)
    if reason is not None:
        set_note(layer, f"2:4 zeros stay in a dense weight: {reason}")
        return None
    return Sparse24Linear.from_float(layer)


def _reason(linear: nn.Linear) -> str | None:
    if linear.weight.device.type != "cpu":
        return f"no native kernel for {linear.weight.device.type} tensors"
    if linear.weight.dtype != torch.float32:
        return f"the sparse kernels hold float32 weights, this layer {linear.weight.dtype}"
    if missing := native.fallback_reason("sparse24_linear"):
        return missing
    if linear.weight.numel() < SMALLEST:
        return f"{linear.in_features} x {linear.out_features} is too small to gain"
    ratio = gain(linear.in_features, linear.out_features, torch.get_num_threads())
    if ratio < 1.0:
        return f"the sparse kernel runs at {ratio:.2f}x of the dense layer's speed here"
    return None


@cache
def gain(in_features: int, out_features: int, threads: int) -> float:
    """Speed of ``Sparse24Linear`` over ``nn.Linear`` of this shape: geometric mean over ``ROWS``. Measured once per process."""
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        dense = nn.Linear(in_features, out_features)
        sparse = Sparse24Linear(in_features, out_features)
        logs = []
        for rows in ROWS:
            x = torch.randn(rows, in_features)
            logs.append(math.log(_seconds(lambda: dense(x)) / _seconds(lambda: sparse(x))))  # noqa: B023
    return math.exp(sum(logs) / len(logs))


def _seconds(function: Callable[[], object], rounds: int = 5) -> float:
    """Shortest of a few runs after a warm-up."""
    function()
    best = math.inf
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return best
