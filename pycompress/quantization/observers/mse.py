"""MSE observer: the clipping range with the smallest mean squared quantization error."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops.affine import fake_quantize_affine
from .base import OBSERVERS, range_to_qparams
from .histogram import HistogramObserver


@OBSERVERS.register("mse")
class MSEObserver(HistogramObserver):
    """Shrinks [min, max] step by step towards ``smallest`` of its width and keeps the best.

    ``candidates``: number of ranges tried. The error is taken over the histogram. Source: Banner et al. 2019, "Post training 4-bit
    quantization of convolutional networks" (arXiv 1810.05723), there with an analytic optimum for Gaussian and Laplace data.
    """

    def __init__(
        self,
        quant_min: int,
        quant_max: int,
        symmetric: bool,
        axis: int | None = None,
        *,
        candidates: int = 80,
        smallest: float = 0.2,
        bins: int | None = None,
    ) -> None:
        if isinstance(candidates, bool) or not isinstance(candidates, int) or candidates < 1:
            raise ValueError(f"MSEObserver: candidates must be a positive int, got {candidates}")
        if not 0 < smallest <= 1:
            raise ValueError(f"MSEObserver: smallest must be in (0, 1], got {smallest}")
        self.candidates, self.smallest = candidates, smallest
        super().__init__(quant_min, quant_max, symmetric, axis, bins=bins)

    def clipping_range(self) -> tuple[Tensor, Tensor]:
        low, high = self.low.clamp(max=0), self.high.clamp(min=0)
        if self.symmetric:
            high = torch.maximum(-low, high)
            low = -high
        centers = self.centers().float()
        best_error = torch.full_like(low, float("inf"), dtype=torch.float64)
        best_ratio = torch.ones_like(low)
        for ratio in torch.linspace(1.0, self.smallest, self.candidates).tolist():
            scale, zero_point = range_to_qparams(low * ratio, high * ratio, self.quant_min, self.quant_max, self.symmetric)
            error = fake_quantize_affine(centers, scale[:, None], zero_point[:, None], self.quant_min, self.quant_max) - centers
            error = (error.double().square() * self.counts).sum(dim=1)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_ratio = torch.where(better, torch.full_like(best_ratio, ratio), best_ratio)
        return low * best_ratio, high * best_ratio
