"""SR-STE: masked in the forward pass, dense in the backward pass, with a pull to zero on what is masked.

Zhou et al. 2021, "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch", arXiv 2102.04010, equations 8 and 9:

    W <- W - lr * (g(mask * W) + decay * (1 - mask) * W)

``g`` is the gradient with respect to the masked weight. Pruned weights go on learning and may come back; the decay keeps the masks from
flipping back and forth. ``decay = 0`` is the plain straight-through estimator (equation 5).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def sparse_refined(weight: Tensor, mask: Tensor, decay: float) -> Tensor:
    """``where(mask, weight, 0)`` whose gradient is ``grad + decay * where(mask, 0, weight)``. ``mask``: bool, the weight's shape.

    >>> y = sparse_refined(weight, mask, 2e-4)
    """
    refined: Tensor = _SparseRefined.apply(weight, mask, decay)
    return refined


class _SparseRefined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, decay: float) -> Tensor:
        ctx.save_for_backward(weight, mask)
        ctx.decay = decay
        return torch.where(mask, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        weight, mask = ctx.saved_tensors
        if ctx.decay == 0:
            return grad, None, None
        return torch.where(mask, grad, grad + ctx.decay * weight), None, None
