"""Moving-average min-max observer, the usual choice for quantization-aware training."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import OBSERVERS, Observer


@OBSERVERS.register("moving_average")
class MovingAverageObserver(Observer):
    """Exponential average of each batch's minimum and maximum: ``low += momentum * (batch_low - low)``.

    ``momentum``: share of the newest batch, in (0, 1]. Source: Jacob et al. 2018, "Quantization and Training of Neural
    Networks for Efficient Integer-Arithmetic-Only Inference", section 3.1 (arXiv 1712.05877).
    """

    def __init__(self, quant_min: int, quant_max: int, symmetric: bool, axis: int | None = None, *, momentum: float = 0.01) -> None:
        if not 0 < momentum <= 1:
            raise ValueError(f"MovingAverageObserver: momentum must be in (0, 1], got {momentum}")
        self.momentum = momentum
        super().__init__(quant_min, quant_max, symmetric, axis)

    def update(self, rows: Tensor) -> None:
        low, high = torch.aminmax(rows, dim=1)
        if self.low.numel() == 0:
            self.store("low", low)
            self.store("high", high)
        else:
            # torch.where instead of an if: no wait for the device inside a training step.
            first = self.low > self.high
            self.store("low", torch.where(first, low, torch.lerp(self.low, low, self.momentum)))
            self.store("high", torch.where(first, high, torch.lerp(self.high, high, self.momentum)))
