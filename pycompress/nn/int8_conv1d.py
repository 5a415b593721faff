"""``Int8Conv1d``: drop-in for ``nn.Conv1d``, a view of ``Int8Conv2d`` with one row."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops.int8_conv2d import view_of
from .base import LAYERS
from .int8_conv2d import Int8Conv2d


@LAYERS.register("Int8Conv1d")
class Int8Conv1d(Int8Conv2d):
    """1-d convolution: int8 weights per output channel, int8 activations, exact integer sums.

    Everything as in ``Int8Conv2d``, with sizes of one element and x (N, C, L) or (C, L). An int8 result lies in memory as
    (N, L, C), the layout in which it goes straight into the next layer.

    >>> layer = Int8Conv1d.from_float(nn.Conv1d(3, 8, 5, padding=2))
    >>> y = layer(torch.randn(1, 3, 16))
    """

    dense_type = nn.Conv1d

    def _convolve(self, x: Tensor, residual, residual_scale, residual_zero_point, out_dtype) -> Tensor:
        if x.dim() != 3:
            raise ValueError(f"Int8Conv1d: x must be (N, {self.in_channels}, L) or ({self.in_channels}, L), got {tuple(x.shape)}")
        residual = None if residual is None else residual.unsqueeze(2)
        y = super()._convolve(view_of(x, x.unsqueeze(2)), residual, residual_scale, residual_zero_point, out_dtype)
        return view_of(y, y.squeeze(2))
