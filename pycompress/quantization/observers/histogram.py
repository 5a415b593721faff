"""Base of the observers that look at the whole distribution, not only at its ends."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops.affine import SMALLEST_AMAX
from .base import Observer


class HistogramObserver(Observer):
    """Counts values in equal bins over [-limit, limit].

    When larger values arrive, the limit doubles until they fit and pairs of bins merge, so no count is ever smeared.
    ``bins``: a multiple of 4; default 8192 per tensor, 2048 per channel (8 or more bins for each step of 8-bit quantization).
    """

    limit: Tensor
    counts: Tensor

    def __init__(self, quant_min: int, quant_max: int, symmetric: bool, axis: int | None = None, *, bins: int | None = None) -> None:
        bins = (8192 if axis is None else 2048) if bins is None else bins
        if isinstance(bins, bool) or not isinstance(bins, int) or bins < 4 or bins % 4:
            raise ValueError(f"{type(self).__name__}: bins must be a positive multiple of 4, got {bins}")
        self.bins = bins
        super().__init__(quant_min, quant_max, symmetric, axis)

    def reset(self) -> None:
        super().reset()
        self.store("limit", torch.zeros_like(self.low))
        self.store("counts", torch.zeros(self.low.numel(), self.bins, dtype=torch.float64))

    def update(self, rows: Tensor) -> None:
        low, high = torch.aminmax(rows, dim=1)
        if self.low.numel() == 0:
            self.store("low", low)
            self.store("high", high)
            self.store("limit", torch.zeros_like(low))
            self.store("counts", torch.zeros(rows.shape[0], self.bins, dtype=torch.float64, device=rows.device))
        else:
            self.store("low", torch.minimum(self.low, low))
            self.store("high", torch.maximum(self.high, high))
        self._grow(torch.maximum(-low, high))
        width = (2 * self.limit / self.bins)[:, None]
        # Rows that were zero so far have no width yet; their zeros belong to the first bin at or above 0.
        index = torch.where(width > 0, rows / width, torch.zeros_like(rows)).floor() + self.bins // 2
        index = index.clamp_(0, self.bins - 1).long()
        ones = torch.ones_like(rows, dtype=torch.float64)
        self.counts.scatter_add_(1, index, ones)

    def _grow(self, amax: Tensor) -> None:
        fresh = (self.limit == 0) & (amax >= SMALLEST_AMAX)
        self.store("limit", torch.where(fresh, amax, self.limit))
        quarter = self.bins // 4
        while bool((small := (amax > self.limit) & (self.limit > 0)).any()):
            merged = torch.zeros_like(self.counts)
            merged[:, quarter : 3 * quarter] = self.counts.view(-1, self.bins // 2, 2).sum(dim=2)
            self.store("counts", torch.where(small[:, None], merged, self.counts))
            self.store("limit", torch.where(small, self.limit * 2, self.limit))

    def edges(self) -> Tensor:
        """Lower edges of the bins and the last upper edge, (channels, bins + 1), float64."""
        steps = torch.arange(self.bins + 1, dtype=torch.float64, device=self.limit.device) * (2.0 / self.bins) - 1.0
        return self.limit.double()[:, None] * steps

    def centers(self) -> Tensor:
        """Middles of the bins, (channels, bins), float64."""
        edges = self.edges()
        return (edges[:, 1:] + edges[:, :-1]) / 2
