"""What a layer's weight is multiplied with: its inputs as columns of a matrix, and their second moment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class InputMoments:
    """Of the columns x that a layer's weight rows are multiplied with; K = in_features, or in_channels / groups * kernel size.

    ``gram``: (groups, K, K) float64, mean of x x^T. ``mean``: (groups, K). ``count``: number of columns.
    The mean squared error of a layer whose weight is off by D (rows of one group) is trace(D gram D^T).
    """

    gram: Tensor
    mean: Tensor
    count: int = 0

    def add(self, columns: Tensor) -> None:
        n = columns.shape[2]
        if n:
            columns = columns.double()
            share = n / (self.count + n)
            self.gram.mul_(1 - share).baddbmm_(columns, columns.transpose(1, 2), alpha=share / n)
            self.mean.mul_(1 - share).add_(columns.mean(dim=2), alpha=share)
            self.count += n


def to_columns(layer: Any, x: Tensor) -> Tensor:
    """Inputs as (groups, K, n), so that the output without bias is ``weight.view(groups, -1, K) @ columns``."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1]).t()[None]
    sizes: tuple[int, ...] = layer.kernel_size
    d = len(sizes)
    x = x if x.dim() == d + 2 else x[None]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    for i, (size, stride, dilation) in enumerate(zip(sizes, layer.stride, layer.dilation, strict=True)):
        x = x.unfold(2 + i, dilation * (size - 1) + 1, stride)[..., ::dilation]
    # (N, C, out..., kernel...) -> (C, kernel..., N, out...)
    x = x.permute(1, *range(2 + d, 2 + 2 * d), 0, *range(2, 2 + d))
    groups: int = layer.groups
    return x.reshape(groups, layer.weight[0].numel(), -1)
