"""Entropy (KL divergence) observer, as known from TensorRT."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .base import OBSERVERS
from .histogram import HistogramObserver


@OBSERVERS.register("entropy")
class EntropyObserver(HistogramObserver):
    """Clips |x| where the quantized distribution keeps most information: argmin over t of KL(P_t || Q_t).

    P_t: histogram of |x| up to t with everything beyond added to its last bin. Q_t: the same bins (without what lies beyond) merged
    to the available levels and spread out again over the bins that are not empty. Asymmetric: [min, max] is cut to [-t, t].
    Source: Migacz 2017, "8-bit Inference with TensorRT", GTC.
    """

    per_channel: ClassVar[bool] = False

    def clipping_range(self) -> tuple[Tensor, Tensor]:
        half = self.bins // 2
        counts = (self.counts[:, half:] + self.counts[:, :half].flip(1))[0]
        # Exact zeros (padding, ReLU) quantize without error at any range, so their spike must not decide.
        counts[0] = counts[1]
        one_sided = not self.symmetric and bool((self.low >= 0) | (self.high <= 0))
        levels = self.quant_max - self.quant_min if one_sided else self.quant_max
        used = int(counts.nonzero().max()) + 1 if bool(counts.any()) else half
        best = used
        if used > levels:
            stops = torch.unique(torch.linspace(levels, used, 256).long()).tolist()
            best = min(stops, key=lambda stop: (_divergence(counts[:used], stop, levels), -stop))
        limit = (self.limit.double() * best / half).float()
        if self.symmetric:
            limit = torch.minimum(limit, torch.maximum(-self.low, self.high))
            return -limit, limit
        return torch.maximum(self.low, -limit), torch.minimum(self.high, limit)


def _divergence(counts: Tensor, stop: int, levels: int) -> float:
    """KL(P || Q) for a clip after ``stop`` bins; infinite where Q has nothing but P has."""
    kept = counts[:stop]
    p = kept.clone()
    p[-1] += counts[stop:].sum()
    level = torch.arange(stop, device=counts.device) * levels // stop
    filled = kept > 0
    mass = torch.zeros(levels, dtype=counts.dtype, device=counts.device).scatter_add(0, level, kept)
    number = torch.zeros_like(mass).scatter_add(0, level, filled.to(counts.dtype))
    q = torch.where(filled, (mass / number.clamp(min=1))[level], torch.zeros_like(p))
    total = q.sum()
    if total == 0 or bool(((p > 0) & (q == 0)).any()):
        return float("inf")
    p, q = p / p.sum(), q / total
    some = p > 0
    return float((p[some] * (p[some] / q[some]).log()).sum())
