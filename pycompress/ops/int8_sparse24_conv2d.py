"""``int8_sparse24_conv2d``: convolution on N:M sparse int8 weights, on the kernels of ``int8_sparse24_linear``."""

from __future__ import annotations

import torch
from torch import Tensor

from . import native
from .activation import activation_gradient, check_activation
from .affine import symmetric_scale
from .cuda import sparse24_conv2d as cuda_conv2d
from .cuda.extension import NAME as CUDA
from .int8_conv2d_reference import int8_conv2d_reference
from .int8_linear import check_activation_quantization, check_weight
from .int8_sparse24_linear import OP
from .library import define, dispatched
from .memory_format import memory_format_of
from .sparse24 import sparse24_check, sparse24_to_dense, unchecked_to_dense
from .sparse24_conv2d import Pair, check_image, output_size, padded
from .sparse24_packing import NATIVE_PATTERNS, pack_sparse24, sparse24_kernel, unpack_sparse24


def int8_sparse24_conv2d_reference(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    kernel_size: Pair,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    pattern: str = "2:4",
    x_scale: float | None = None,
    activation: str | None = None,
) -> Tensor:
    """What every kernel computes, written for reading: ``int8_conv2d_reference`` on the dense weight."""
    dense = sparse24_to_dense(values, indices, x.shape[1] * kernel_size[0] * kernel_size[1], pattern=pattern)
    weight = dense.view(values.shape[0], x.shape[1], *kernel_size)
    return int8_conv2d_reference(
        x, weight, scale, bias, stride=stride, padding=padding, dilation=dilation, x_scale=x_scale, activation=activation
    )


def int8_sparse24_conv2d(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    kernel_size: int | Pair,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    pattern: str = "2:4",
    x_scale: float | None = None,
    activation: str | None = None,
    kernel: str | None = None,
) -> Tensor:
    """2-d convolution, groups = 1, on N:M sparse int8 weights with activations quantised on the fly.

    - ``x``: (B, C, H, W) float32, bfloat16 or float16, contiguous or channels_last
    - ``values``, ``indices``: ``sparse24_compress(q.flatten(1))`` of an int8 weight (O, C, kh, kw); ``scale``: (O,) float32;
      ``bias``: (O,) float or None
    - ``x_scale`` None: dynamic, symmetric, one scale per image. A float: static, symmetric
    - ``activation``: None, ``"relu"``, ``"gelu"`` (exact, erf), ``"silu"``, ``"relu6"`` or ``"hardswish"``
    - ``kernel``: forces one of ``native.kernels("int8_sparse24_linear")``, "cuda" on a GPU

    Returns (B, O, H', W') in dtype and memory format of ``x``. Equals ``int8_conv2d`` on the dense weight: the integer sum is exact, the
    gradient with respect to ``x`` straight-through, an image with NaN or Inf gives a NaN image.
    The image is unfolded row by row as it is quantised. Checks and packs the weight on every call: a layer
    (``pycompress.nn.Int8Sparse24Conv2d``) does so once.

    Raises ``ValueError`` for shapes, ranges and corrupted indices, ``TypeError`` for dtypes.

    >>> q, s = quantize_weight(weight * sparse24_mask(weight.flatten(1).abs()).view_as(weight))
    >>> y = int8_sparse24_conv2d(x, *sparse24_compress(q.flatten(1)), s, kernel_size=3, padding=1)
    """
    where = "int8_sparse24_conv2d"
    kernel_size, stride, padding, dilation = (
        (v, v) if isinstance(v, int) else (v[0], v[1]) for v in (kernel_size, stride, padding, dilation)
    )
    check_image(where, x)
    check_weight(where, values, scale, bias, dim=2)
    k = x.shape[1] * kernel_size[0] * kernel_size[1]
    check_activation_quantization(where, k, x_scale, None)
    if x.device != values.device:
        raise ValueError(f"{where}: x must be on {values.device} like values, got {x.device}")
    sparse24_check(where, values, indices, k, pattern=pattern)
    check_activation(where, activation)
    name = sparse24_kernel(OP, x, pattern, kernel)
    packed = pack_sparse24(values, indices, k, pattern, name)
    bias = None if bias is None else bias.float().contiguous()
    geometry = (kernel_size, stride, padding, dilation)
    return int8_sparse24_conv2d_packed(
        x, packed, scale.contiguous(), bias, values.shape[0], *geometry, pattern, x_scale, activation or "none", name
    )


def int8_sparse24_conv2d_packed(
    x, packed, scale, bias, o, kernel_size, stride, padding, dilation, pattern, x_scale, activation, kernel
) -> Tensor:
    """``int8_sparse24_conv2d`` on a weight from ``pack_sparse24``, without checks: for layers, which made the pack."""
    geometry = (list(kernel_size), list(stride), list(padding), list(dilation))
    output_size(x, kernel_size, stride, padding, dilation, "int8_sparse24_conv2d")
    if torch.is_grad_enabled() and x.requires_grad:
        return _StraightThrough.apply(x, packed, scale, bias, o, *geometry, pattern, x_scale, activation, kernel)
    return (_op if dispatched(x) else _run)(x, packed, scale, bias, o, *geometry, pattern, x_scale, activation, kernel)


class _StraightThrough(torch.autograd.Function):
    """Gradient of ``x`` as if activations were not quantised; the weight is frozen."""

    @staticmethod
    def forward(ctx, x, packed, scale, bias, *arguments):
        ctx.save_for_backward(x, packed, scale, bias)
        ctx.arguments = arguments
        return (_op if dispatched(x) else _run)(x, packed, scale, bias, *arguments)

    @staticmethod
    def backward(ctx, grad):
        x, packed, scale, bias = ctx.saved_tensors
        o, kernel_size, stride, padding, dilation, pattern, _, activation, kernel = ctx.arguments
        if activation != "none":
            before = int8_sparse24_conv2d_packed(x, packed, scale, bias, *ctx.arguments[:-2], "none", kernel)
            grad = activation_gradient(activation, before, grad)
        weight = _dense(packed, o, x.shape[1], kernel_size, pattern, kernel).float() * scale[:, None, None, None]
        dx = torch.nn.grad.conv2d_input(x.shape, weight, grad.float(), stride, padding, dilation)
        return (dx.to(x.dtype), *[None] * 12)


def _dense(packed: Tensor, o: int, c: int, kernel_size: list[int], pattern: str, kernel: str) -> Tensor:
    k = c * kernel_size[0] * kernel_size[1]
    values, indices = unpack_sparse24(packed, o, k, pattern, torch.int8, kernel)
    return unchecked_to_dense(values, indices, k, pattern).view(o, c, *kernel_size)


def _run(x, packed, scale, bias, o, kernel_size, stride, padding, dilation, pattern, x_scale, activation, kernel):
    b, c = x.shape[:2]
    if kernel == native.REFERENCE:
        weight = _dense(packed, o, c, kernel_size, pattern, kernel)
        return int8_conv2d_reference(
            x, weight, scale, bias, stride=stride, padding=padding, dilation=dilation, x_scale=x_scale, activation=activation
        )
    h, w = output_size(x, kernel_size, stride, padding, dilation, "int8_sparse24_conv2d")
    memory_format = memory_format_of(x)
    if kernel == CUDA:
        out = torch.empty(b, o, h, w, dtype=x.dtype, device=x.device, memory_format=memory_format)
        return cuda_conv2d.int8_conv2d(x.detach(), packed, scale, bias, out, kernel_size, stride, padding, dilation, x_scale, activation)
    out = torch.empty(b, o, h, w, dtype=x.dtype, memory_format=memory_format)
    dtype = native.DTYPES[x.dtype]
    for i in range(b):
        image = x[i].detach().float()
        amax = torch.stack(torch.aminmax(image)).abs().amax() if image.numel() else image.new_zeros(())
        if not bool(torch.isfinite(amax)):
            out[i].fill_(float("nan"))
            continue
        image = padded(image, padding)
        native.module.int8_sparse24_conv2d(
            kernel,
            h * w,
            o,
            NATIVE_PATTERNS[pattern],
            image.data_ptr(),
            (c, *image.shape[1:], *kernel_size, *stride, *dilation, w),
            packed.data_ptr(),
            scale.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            float(symmetric_scale(amax)) if x_scale is None else x_scale,
            native.ACTIVATIONS[activation],
            out[i].data_ptr(),
            dtype,
            memory_format == torch.contiguous_format,
        )
    return out


def _fake(x, packed, scale, bias, o, kernel_size, stride, padding, dilation, pattern, x_scale, activation, kernel):
    shape = (x.shape[0], o, *output_size(x, kernel_size, stride, padding, dilation, "int8_sparse24_conv2d"))
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format_of(x))


_op = define(
    "int8_sparse24_conv2d(Tensor x, Tensor packed, Tensor scale, Tensor? bias, int o, int[] kernel_size, int[] stride, int[] padding, "
    "int[] dilation, str pattern, float? x_scale, str activation, str kernel) -> Tensor",
    _run,
    _fake,
)
