"""``int8_weight_linear``: a linear layer on int8 weights with float activations."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native
from .cuda import weight_only as cuda_weight_only
from .cuda.extension import NAME as CUDA
from .cuda.extension import kernel_for
from .int8_linear import check_input, check_weight
from .library import define, dispatched

OP = "int8_weight_linear"


def int8_weight_linear_reference(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """What every kernel computes, written for reading. The weight is scaled before the product: unscaled sums of int8 values would leave
    the range of float16."""
    dense = (weight.float() * scale[:, None]).to(x.dtype)
    return F.linear(x, dense, None if bias is None else bias.to(x.dtype))


def int8_weight_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, *, kernel: str | None = None) -> Tensor:
    """Linear layer on int8 weights with float activations: a quarter of the bytes, which is the time of a product with few rows.

    - ``x``: (..., K) floating point; float32, bfloat16 and float16 on the CPU run the native kernels, with float32 sums
    - ``weight``: (N, K) int8; ``scale``: (N,) float32, the step of each output; ``bias``: (N,) float or None
    - ``kernel``: forces one of ``native.kernels("int8_weight_linear")``; ``"cuda"`` on a GPU

    Returns (..., N) in the dtype of ``x``. Equals ``F.linear(x, weight * scale[:, None], bias)``, with a gradient with respect to ``x``.
    The kernels scale sums, not weights: finite as long as ``K * 127 * max|x|`` is finite in float32. On CUDA they serve few rows (a float32
    row with Inf gives NaN there); more rows run the library's product on a weight that is written out.

    Raises ``ValueError`` for shapes and devices, ``TypeError`` for dtypes.

    >>> q, s = pycompress.ops.quantize_weight(torch.randn(8, 16))
    >>> y = int8_weight_linear(torch.randn(1, 16), q, s)
    """
    check_weight(OP, weight, scale, bias, dim=2)
    if kernel is not None or (isinstance(x, Tensor) and x.dtype in native.DTYPES):
        check_input(OP, x, weight.shape[1], weight.shape, weight.device)
    elif not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"{OP}: x must be a floating-point tensor, got {x.dtype if isinstance(x, Tensor) else type(x).__name__}")
    elif x.shape[-1:] != weight.shape[1:] or x.device != weight.device:
        raise ValueError(f"{OP}: x must be (..., {weight.shape[1]}) on {weight.device}, got {tuple(x.shape)} on {x.device}")
    name = kernel_for(OP, x, kernel, OP)
    bias = None if bias is None else bias.float().contiguous()
    return int8_weight_linear_unchecked(x, weight.contiguous(), scale.contiguous(), bias, name)


def int8_weight_linear_unchecked(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, kernel: str) -> Tensor:
    """``int8_weight_linear`` without checks, for layers. Contiguous weight, scale and bias, a kernel for their device.

    ``weight`` may have padded rows for "cuda" (``ops.cuda.weight_only.pad_int8``).
    """
    if kernel == native.REFERENCE or x.dtype not in native.DTYPES:
        return int8_weight_linear_reference(x, weight[:, : x.shape[-1]], scale, bias)
    if torch.is_grad_enabled() and x.requires_grad:
        return _WithGradient.apply(x, weight, scale, bias, kernel)
    return (_op if dispatched(x) else _run)(x, weight, scale, bias, kernel)


class _WithGradient(torch.autograd.Function):
    """Gradient of ``x``; the weight is frozen."""

    @staticmethod
    def forward(ctx, x, weight, scale, bias, kernel):
        ctx.save_for_backward(weight, scale)
        ctx.dtype, ctx.k = x.dtype, x.shape[-1]
        return (_op if dispatched(x) else _run)(x, weight, scale, bias, kernel)

    @staticmethod
    def backward(ctx, grad):
        weight, scale = ctx.saved_tensors
        return ((grad.float() * scale) @ weight[:, : ctx.k].float()).to(ctx.dtype), None, None, None, None


def _run(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, kernel: str) -> Tensor:
    if kernel == CUDA:
        return cuda_weight_only.linear_int8(x, weight, scale, bias)
    shape = x.shape
    if x.dim() != 2:
        x = x.reshape(math.prod(shape[:-1]), shape[-1])
    if x.stride(1) != 1 and x.shape[1] > 1:
        x = x.contiguous()
    (m, k), n = x.shape, weight.shape[0]
    out = torch.empty(m, n, dtype=x.dtype, device="cpu")
    native.module.int8_weight_linear(
        kernel, m, n, k, x.data_ptr(), x.stride(0), native.DTYPES[x.dtype], weight.data_ptr(), scale.data_ptr(),
        0 if bias is None else bias.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    return out if len(shape) == 2 else out.view(*shape[:-1], n)


_op = define(
    "int8_weight_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias, str kernel) -> Tensor",
    _run,
    lambda x, weight, scale, bias, kernel: x.new_empty((*x.shape[:-1], weight.shape[0])),
)
