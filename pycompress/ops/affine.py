"""The one place that says how a number becomes an integer and back.

Everything else (kernels, layers, observers, fake quantization) repeats exactly this arithmetic, in float32:

    inverse = 1 / scale
    q       = clamp(round_half_even(x * inverse) + zero_point, quant_min, quant_max)
    x'      = (q - zero_point) * scale

The product with the reciprocal, not a division, is what the kernels execute; both differ only for values within
one ulp of a rounding boundary, and simulation must land on the same side as execution.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST_AMAX = 2.0**-100
"""Rows whose largest absolute value lies below this quantize to zero: their reciprocal would leave float32."""


def symmetric_scale(amax: Tensor, quant_max: int = 127) -> Tensor:
    """Scale of a symmetric range: ``amax / quant_max``; 0 where amax < 2**-100, NaN where amax is not finite.

    ``amax``: any shape, float32, the largest absolute value of each row, channel or tensor.
    """
    scale = amax.float() / quant_max
    scale = torch.where(amax < SMALLEST_AMAX, torch.zeros_like(scale), scale)
    return torch.where(torch.isfinite(amax), scale, torch.full_like(scale, float("nan")))


def asymmetric_qparams(low: Tensor, high: Tensor, quant_min: int = -128, quant_max: int = 127) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a range that includes 0: ``scale = (high - low) / (quant_max - quant_min)``.

    ``low`` <= 0 <= ``high``: any shape, float32. Returns (scale float32, zero_point int32); ranges below 2**-100 and ranges that
    are not finite as in ``symmetric_scale``, with the zero point at ``quant_min``.
    """
    steps = quant_max - quant_min
    scale = high.float() / steps - low.float() / steps  # each part first: high - low could overflow
    scale = torch.where(torch.maximum(high, -low) < SMALLEST_AMAX, torch.zeros_like(scale), scale)
    scale = torch.where(torch.isfinite(low) & torch.isfinite(high), scale, torch.full_like(scale, float("nan")))
    zero_point = torch.round(quant_min - torch.nan_to_num(low) * inverse_scale(scale))
    return scale, zero_point.clamp(quant_min, quant_max).to(torch.int32)


def inverse_scale(scale: Tensor) -> Tensor:
    """``1 / scale``, and 0 where the scale is 0 or NaN, so that such rows quantize to the zero point."""
    usable = scale > 0
    return torch.where(usable, 1.0 / torch.where(usable, scale, torch.ones_like(scale)), torch.zeros_like(scale))


def quantize_affine(x: Tensor, scale: Tensor, zero_point: Tensor | int = 0, quant_min: int = -127, quant_max: int = 127) -> Tensor:
    """Integers of ``x`` as int32. ``scale`` and ``zero_point`` broadcast against ``x``.

    >>> quantize_affine(torch.tensor([0.5, -1.0]), torch.tensor(0.25)).tolist()
    [2, -4]
    """
    product = x.float() * inverse_scale(scale)
    product = torch.nan_to_num(product, nan=0.0, posinf=3.0e38, neginf=-3.0e38)
    return (torch.round(product) + zero_point).clamp(quant_min, quant_max).to(torch.int32)


def dequantize_affine(q: Tensor, scale: Tensor, zero_point: Tensor | int = 0) -> Tensor:
    """Float32 values of integers: ``(q - zero_point) * scale``."""
    return (q - zero_point).float() * scale


def fake_quantize_affine(x: Tensor, scale: Tensor, zero_point: Tensor | int = 0, quant_min: int = -127, quant_max: int = 127) -> Tensor:
    """``dequantize(quantize(x))`` without a gradient; the straight-through estimator lives with quantization-aware training."""
    return dequantize_affine(quantize_affine(x, scale, zero_point, quant_min, quant_max), scale, zero_point).to(x.dtype)


def quantize_weight(weight: Tensor, axis: int = 0) -> tuple[Tensor, Tensor]:
    """Symmetric per-channel int8 weights: (int8 tensor of the same shape, float32 scales of shape ``(weight.shape[axis],)``).

    The range is -127..127, so that negation stays in range. Raises ``ValueError`` for NaN or infinite weights.

    >>> q, scale = quantize_weight(torch.tensor([[1.0, -2.0]]))
    """
    if not torch.isfinite(weight).all():
        raise ValueError("quantize_weight: weight must be finite, got NaN or Inf")
    flat = weight.detach().float().movedim(axis, 0).flatten(1)
    amax = flat.abs().amax(dim=1) if flat.shape[1] else flat.new_zeros(flat.shape[0])
    scale = symmetric_scale(amax)
    shape = [1] * weight.dim()
    shape[axis] = -1
    return quantize_affine(weight.detach(), scale.view(shape)).to(torch.int8), scale
