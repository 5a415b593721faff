"""``int8_conv2d``: quantise, convolve exactly in integers, dequantise or requantise, in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from .activation import activation_gradient, check_activation
from .int8_conv2d_arguments import (
    Geometry,
    Pair,
    Requantization,
    check_input,
    check_step,
    make_geometry,
    make_requantization,
)
from .int8_conv2d_dispatch import op, run
from .int8_conv2d_packing import pack_op, pack_weight, unpack_op, unpack_weight
from .int8_conv2d_reference import int8_conv2d_reference
from .int8_linear import check_activation_quantization, check_weight
from .int8_matmul import kernel_for as matmul_kernel_for
from .library import dispatched
from .memory_format import TRACEABLE_MARKS, is_nchw, remember_nchw, view_of

__all__ = [
    "TRACEABLE_MARKS",
    "Geometry",
    "Pair",
    "Requantization",
    "check_input",
    "check_step",
    "int8_conv2d",
    "int8_conv2d_packed",
    "int8_conv2d_reference",
    "is_nchw",
    "kernel_for",
    "make_geometry",
    "make_requantization",
    "pack_weight",
    "remember_nchw",
    "unpack_weight",
    "view_of",
]


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
    residual: Tensor | None = None,
    residual_scale: float | None = None,
    residual_zero_point: int | None = None,
    out_scale: float | None = None,
    out_zero_point: int | None = None,
    out_dtype: torch.dtype | None = None,
    kernel: str | None = None,
) -> Tensor:
    """2-d convolution on int8 weights, with activations quantised on the fly or already int8.

    - ``x``: (N, C, H, W) float32, bfloat16 or float16, contiguous or channels_last; or int8, which needs ``x_scale``
    - ``weight``: (O, C / groups, kh, kw) int8; ``scale``: (O,) float32, the step of each output channel; ``bias``: (O,) float or None
    - ``x_scale`` None: dynamic, symmetric, one scale per image. A float: static, with ``x_zero_point`` as in ``int8_linear``
    - ``activation``: None, ``"relu"``, ``"gelu"`` (exact, erf), ``"silu"``, ``"relu6"`` or ``"hardswish"``, after the residual
    - ``residual``: shape of the result, added before the activation; float, or int8 with ``residual_scale`` and ``residual_zero_point``
    - ``out_scale``, ``out_zero_point``: make the result int8, as ``quantize_affine`` would; always channels_last, the layout in which
      int8 results go straight into the next convolution
    - ``out_dtype``: float type of the result; by default that of ``x``, float32 if ``x`` is int8
    - ``kernel``: forces one of ``native.kernels("int8_conv2d")``, or "cuda" for tensors that are there

    Returns (N, O, H', W') in the memory format of ``x``. Equals ``F.conv2d`` on ``(q - zero_point) * x_scale`` and ``weight * scale``
    with the sum exact in integers; padding is the zero point. An image with NaN or Inf gives a NaN image. The gradient with respect to
    ``x`` and a float ``residual`` is the straight-through one; an int8 result has none.
    Packs the weight on every call: a layer (``pycompress.nn.Int8Conv2d``) packs once.

    Raises ``ValueError`` for shapes, ranges and empty results, ``TypeError`` for dtypes.

    >>> q, s = quantize_weight(torch.randn(8, 3, 3, 3))
    >>> y = int8_conv2d(torch.randn(1, 3, 16, 16), q, s, padding=1)
    """
    check_weight("int8_conv2d", weight, scale, bias, dim=4)
    geometry = make_geometry("int8_conv2d", weight.shape, stride, padding, dilation, groups)
    check_activation_quantization("int8_conv2d", weight[0].numel() if len(weight) else 0, x_scale, x_zero_point)
    check_activation("int8_conv2d", activation)
    check_input("int8_conv2d", x, geometry, weight.shape[1] * groups, x_scale is not None, weight.device)
    after = make_requantization(
        "int8_conv2d", x, geometry, residual, residual_scale, residual_zero_point, out_scale, out_zero_point, out_dtype
    )
    name = kernel_for(x, kernel, "int8_conv2d")
    packed = (pack_op if dispatched(x) or dispatched(weight) else pack_weight)(weight, list(geometry), name)
    scale = scale.contiguous()
    bias = None if bias is None else bias.float().contiguous()
    return int8_conv2d_packed(x, packed, scale, bias, residual, geometry, x_scale, x_zero_point, after, activation or "none", name)


def kernel_for(x: Tensor, kernel: str | None, where: str = "int8_conv2d") -> str:
    """The kernel for a tensor: those of ``int8_matmul``."""
    return matmul_kernel_for(x, kernel, where)


def int8_conv2d_packed(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    geometry: Geometry,
    x_scale: float | None,
    x_zero_point: int | None,
    after: Requantization,
    activation: str,
    kernel: str,
) -> Tensor:
    """``int8_conv2d`` on a weight from ``pack_weight(weight, geometry, kernel)``, without checks: for layers, which made the pack."""
    arguments = (x, packed, scale, bias, residual, geometry, x_scale, x_zero_point, *after, activation, kernel)
    if torch.is_grad_enabled() and (x.requires_grad or (residual is not None and residual.requires_grad)):
        if after.out_scale is not None:
            raise RuntimeError("int8_conv2d: an int8 result has no gradient; detach x, or leave out_scale away while training")
        return _StraightThrough.apply(*arguments)
    return (op if dispatched(x) or (residual is not None and dispatched(residual)) else run)(*arguments)


class _StraightThrough(torch.autograd.Function):
    """Gradient as if activations were not quantised: that of a convolution with the dequantised weight."""

    @staticmethod
    def forward(ctx, x, packed, scale, bias, residual, *rest):
        ctx.save_for_backward(x, packed, scale, bias, residual)
        ctx.rest = rest
        return (op if dispatched(x) else run)(x, packed, scale, bias, residual, *rest)

    @staticmethod
    def backward(ctx, grad):
        x, packed, scale, bias, residual = ctx.saved_tensors
        geometry, activation, kernel = ctx.rest[0], ctx.rest[-2], ctx.rest[-1]
        if activation != "none":
            rest = (*ctx.rest[:3], Requantization(*ctx.rest[3:-2]), "none", kernel)
            before = int8_conv2d_packed(x, packed, scale, bias, residual, *rest)
            grad = activation_gradient(activation, before, grad)
        grad_x = grad_residual = None
        if ctx.needs_input_grad[4]:
            grad_residual = grad.to(residual.dtype)
        if ctx.needs_input_grad[0]:
            weight = (unpack_op if dispatched(x) else unpack_weight)(packed, x.shape[1], list(geometry), kernel)
            weight = weight.float() * scale[:, None, None, None]
            stride, padding, dilation, groups = Geometry(*geometry).arguments()
            grad_x = torch.nn.grad.conv2d_input(x.shape, weight, grad.float(), stride, padding, dilation, groups).to(x.dtype)
        return grad_x, None, None, None, grad_residual, *[None] * len(ctx.rest)
