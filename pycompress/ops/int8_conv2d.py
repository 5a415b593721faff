"""``int8_conv2d``: convolution on int8 weights with activations quantised on the fly."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native
from .affine import quantize_affine, symmetric_scale
from .int8_linear import _ACTIVATE, check_activation_quantization, check_weight

Pair = tuple[int, int]


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
) -> Tensor:
    """What every kernel computes, written for reading: quantise, an exact integer convolution (in float64), dequantise.

    Dynamic activations have one symmetric scale per image. Padding is real zero, that is, the zero point.
    An image with NaN or Inf comes out as NaN.
    """
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
    return _ACTIVATE[activation or "none"](y).to(x.dtype)


def int8_conv2d(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
    x_scale: float | None = None,
    x_zero_point: int | None = None,
    activation: str | None = None,
    kernel: str | None = None,
) -> Tensor:
    """2-d convolution on int8 weights.

    - ``x``: (N, C, H, W) float32, bfloat16 or float16
    - ``weight``: (O, C / groups, kh, kw) int8; ``scale``: (O,) float32; ``bias``: (O,) or None
    - ``x_scale`` None: dynamic, symmetric, one scale per image. A float: static, with ``x_zero_point`` as in ``int8_linear``

    Returns (N, O, H', W') in the dtype of ``x``. Equals ``F.conv2d`` on ``(q - zero_point) * x_scale`` and ``weight * scale``, the sum
    exact in integers. Raises ``ValueError`` for shapes and ranges, ``TypeError`` for dtypes.

    >>> q, s = quantize_weight(torch.randn(8, 3, 3, 3))
    >>> y = int8_conv2d(torch.randn(1, 3, 16, 16), q, s, padding=1)
    """
    check_weight("int8_conv2d", weight, scale, bias, dim=4)
    stride, padding, dilation = ((v, v) if isinstance(v, int) else tuple(v) for v in (stride, padding, dilation))
    if x.dtype not in native.DTYPES:
        raise TypeError(f"int8_conv2d: x must be float32, bfloat16 or float16, got {x.dtype}")
    if x.dim() != 4 or groups < 1 or x.shape[1] != weight.shape[1] * groups or weight.shape[0] % max(groups, 1):
        raise ValueError(
            f"int8_conv2d: x must be (N, {weight.shape[1] * groups}, H, W) to match weight {tuple(weight.shape)} "
            f"with groups={groups}, got {tuple(x.shape)}"
        )
    if x.device != weight.device:
        raise ValueError(f"int8_conv2d: x must be on {weight.device} like weight, got {x.device}")
    if activation not in native.ACTIVATIONS:
        raise ValueError(f"int8_conv2d: activation must be None, 'relu', 'gelu' or 'silu', got {activation!r}")
    check_activation_quantization("int8_conv2d", weight[0].numel(), x_scale, x_zero_point)
    native.resolve("int8_conv2d", kernel)
    return int8_conv2d_reference(
        x,
        weight,
        scale,
        bias,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        x_scale=x_scale,
        x_zero_point=x_zero_point,
        activation=activation,
    )
