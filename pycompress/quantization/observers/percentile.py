"""Percentile observer: give up a few outliers for more resolution everywhere else."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import OBSERVERS
from .histogram import HistogramObserver


@OBSERVERS.register("percentile")
class PercentileObserver(HistogramObserver):
    """Clips the tails. symmetric: keeps ``percentile`` % of |x|; asymmetric: cuts ``100 - percentile`` % off each end.

    ``percentile`` in (50, 100]; 100 equals min-max. Resolution is one histogram bin. Source: Wu et al. 2020, "Integer
    Quantization for Deep Learning Inference", section 3.3 (arXiv 2004.09602).
    """

    def __init__(
        self,
        quant_min: int,
        quant_max: int,
        symmetric: bool,
        axis: int | None = None,
        *,
        percentile: float = 99.99,
        bins: int | None = None,
    ) -> None:
        if not 50 < percentile <= 100:
            raise ValueError(f"PercentileObserver: percentile must be in (50, 100], got {percentile}")
        self.percentile = percentile
        super().__init__(quant_min, quant_max, symmetric, axis, bins=bins)

    def clipping_range(self) -> tuple[Tensor, Tensor]:
        edges, keep = self.edges(), self.percentile / 100
        if self.symmetric:
            half = self.bins // 2
            magnitude = self.counts[:, half:] + self.counts[:, :half].flip(1)
            limit = _upper_edge(magnitude, edges[:, half:], keep)
            limit = torch.minimum(limit, torch.maximum(-self.low, self.high))
            return -limit, limit
        high = _upper_edge(self.counts, edges, keep)
        low = -_upper_edge(self.counts.flip(1), -edges.flip(1), keep)
        return torch.maximum(low, self.low), torch.minimum(high, self.high)


def _upper_edge(counts: Tensor, edges: Tensor, keep: float) -> Tensor:
    """Upper edge of the first bin at which the share ``keep`` of all counts lies at or below, (channels,)."""
    total = counts.cumsum(dim=1)
    bin_ = torch.searchsorted(total, keep * total[:, -1:]).clamp(max=counts.shape[1] - 1)
    return edges.gather(1, bin_ + 1)[:, 0].float()
