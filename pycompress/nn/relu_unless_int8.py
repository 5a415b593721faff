"""``ReLUUnlessInt8``: the ReLU of a block that calls it both behind a layer with int8 results and elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ReLUUnlessInt8(nn.ReLU):
    """``nn.ReLU`` on floats. int8 passes: it comes from a layer with the ReLU fused into it, and its zero may be any integer.

    >>> ReLUUnlessInt8()(torch.tensor([-128], dtype=torch.int8))
    """

    def forward(self, input: Tensor) -> Tensor:
        return input if input.dtype == torch.int8 else super().forward(input)
