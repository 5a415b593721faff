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
            self.low, self.high = low, high
        else:
            self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
