"""What ``int8_conv2d`` computes, in PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .activation import ACTIVATE
from .affine import dequantize_affine, quantize_affine, symmetric_scale
from .int8_conv2d_arguments import Pair
from .memory_format import memory_format_of


def int8_conv2d_reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    x_scale: float | None = None,
    x_zero_point: int | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    residual_scale: float | None = None,
    residual_zero_point: int | None = None,
    out_scale: float | None = None,
    out_zero_point: int | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """What every kernel computes, written for reading: quantise, an exact integer convolution (in float64), dequantise.

    Arguments as ``int8_conv2d``. Dynamic activations have one symmetric scale per image. Padding is real zero, that is, the zero
    point. An image with NaN or Inf comes out as NaN (as the zero point, if the result is int8).
    """
    if x.dtype == torch.int8:
        image_scale = torch.full((x.shape[0],), x_scale, dtype=torch.float32, device=x.device)
        q = x.int() - (x_zero_point or 0)
    else:
        images = x.float()
        amax = images.abs().flatten(1).amax(dim=1) if x[0:1].numel() else images.new_zeros(x.shape[0])
        if x_scale is None:
            image_scale = symmetric_scale(amax)
            q = quantize_affine(images, image_scale.view(-1, 1, 1, 1))
        else:
            zero_point, quant_min = (0, -127) if x_zero_point is None else (x_zero_point, -128)
            image_scale = torch.where(torch.isfinite(amax), x_scale, float("nan"))
            q = quantize_affine(images, torch.tensor(x_scale, dtype=torch.float32, device=x.device), zero_point, quant_min) - zero_point
    total = F.conv2d(q.double(), weight.double(), None, stride, padding, dilation, groups)
    y = total.float() * (image_scale[:, None] * scale)[:, :, None, None]
    if bias is not None:
        y = y + bias.float()[:, None, None]
    if residual is not None:
        r = (
            residual
            if residual_scale is None
            else dequantize_affine(residual.int(), torch.tensor(residual_scale), residual_zero_point or 0)
        )
        y = y + r.float()
    y = ACTIVATE[activation or "none"](y)
    if out_scale is not None:
        zero_point, quant_min = (0, -127) if out_zero_point is None else (out_zero_point, -128)
        step = torch.tensor(out_scale, dtype=torch.float32, device=x.device)
        q = quantize_affine(y, step, zero_point, quant_min)
        return torch.empty(q.shape, dtype=torch.int8, device=q.device, memory_format=torch.channels_last).copy_(q)
    dtype = out_dtype or (torch.float32 if x.dtype == torch.int8 else x.dtype)
    return torch.empty(y.shape, dtype=dtype, device=y.device, memory_format=memory_format_of(x)).copy_(y)
