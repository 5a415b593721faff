"""Min-max observer: the range covers everything seen."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import OBSERVERS, Observer


@OBSERVERS.register("minmax")
class MinMaxObserver(Observer):
    """Smallest and largest value of all data. No value is clipped, one outlier can cost all resolution."""

    def update(self, rows: Tensor) -> None:
        low, high = torch.aminmax(rows, dim=1)
        if self.low.numel() == 0:
            self.store("low", low)
            self.store("high", high)
        else:
            self.store("low", torch.minimum(self.low, low))
            self.store("high", torch.maximum(self.high, high))
