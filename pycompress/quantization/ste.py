"""Fake quantization with a gradient: straight-through estimator and learned step size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops.affine import dequantize_affine, quantize_affine

_WIDE = 2**30  # far outside every integer range, exact in float32


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, scale_factor: float) -> Tensor:
        unclamped = quantize_affine(x, scale, zero_point, -_WIDE, _WIDE)
        q = unclamped.clamp(quant_min, quant_max)
        inside = unclamped == q
        ctx.scale_factor = scale_factor
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(inside, x, scale, q - zero_point)
        else:
            ctx.save_for_backward(inside)
        y = dequantize_affine(q, scale, zero_point)
        # The executed layers give NaN for a row with NaN or Inf; a broken training step must not look healthy either.
        return torch.where(torch.isfinite(x), y, torch.full_like(y, float("nan"))).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inside, *rest = ctx.saved_tensors
        grad_x = grad * inside
        if not rest:
            return grad_x, None, None, None, None, None
        x, scale, steps = rest
        safe = torch.where(scale > 0, scale, torch.ones_like(scale))
        slope = steps.float() - torch.where(inside, x.float() / safe, torch.zeros_like(steps, dtype=torch.float32))
        grad_scale = (grad.float() * slope).sum_to_size(scale.shape) * ctx.scale_factor
        return grad_x, grad_scale, None, None, None, None


def fake_quantize_ste(x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """``ops.fake_quantize_affine`` whose gradient is 1 inside the clipping range and 0 outside (clipped straight-through
    estimator; Bengio et al. 2013, arXiv 1308.3432). NaN and Inf come out as NaN. ``scale`` and ``zero_point`` broadcast against ``x``.

    >>> y = fake_quantize_ste(x, torch.tensor(0.1), torch.tensor(0), -127, 127)
    """
    y: Tensor = _FakeQuantize.apply(x, scale.detach(), zero_point, quant_min, quant_max, 1.0)
    return y


def fake_quantize_lsq(x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """The same value, with a gradient for ``scale`` too: learned step size quantization (Esser et al. 2020, arXiv 1902.08153, section 2).

    d x'/d scale = (q - zero_point) - x/scale inside the range, (q - zero_point) outside; multiplied by 1/sqrt(n * quant_max) for n
    values per scale.
    """
    n = max(1, x.numel() // max(1, scale.numel()))
    y: Tensor = _FakeQuantize.apply(x, scale, zero_point, quant_min, quant_max, (n * quant_max) ** -0.5)
    return y
