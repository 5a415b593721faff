"""``int8_sparse24_linear``: a linear layer on N:M sparse int8 weights with activations quantised on the fly."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import native
from .activation import activation_gradient, check_activation
from .cuda import sparse24 as cuda_sparse24
from .cuda.extension import NAME as CUDA
from .int8_linear import check_activation_quantization, check_input, check_weight, int8_linear_reference
from .library import define, dispatched
from .sparse24 import sparse24_check, sparse24_to_dense, unchecked_to_dense
from .sparse24_packing import NATIVE_PATTERNS, pack_sparse24, sparse24_kernel, unpack_sparse24

OP = "int8_sparse24_linear"


def int8_sparse24_linear_reference(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    pattern: str = "2:4",
    x_scale: float | None = None,
    activation: str | None = None,
) -> Tensor:
    """What every kernel computes, written for reading: ``int8_linear_reference`` on the dense weight."""
    dense = sparse24_to_dense(values, indices, x.shape[-1], pattern=pattern)
    return int8_linear_reference(x, dense, scale, bias, x_scale=x_scale, activation=activation)


def int8_sparse24_linear(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    pattern: str = "2:4",
    x_scale: float | None = None,
    activation: str | None = None,
    kernel: str | None = None,
) -> Tensor:
    """Linear layer on N:M sparse int8 weights: for 2:4 half the products of a dense one.

    - ``x``: (..., K) float32, bfloat16 or float16
    - ``values``, ``indices``: an int8 weight (N, K) out of ``sparse24_compress``; ``scale``: (N,) float32; ``bias``: (N,) float or None
    - ``x_scale`` None: dynamic, symmetric, one scale per row, ``max|x| / 127``. A float: static, symmetric, one scale per tensor
    - ``activation``: None, ``"relu"``, ``"gelu"`` (exact, erf), ``"silu"``, ``"relu6"`` or ``"hardswish"``
    - ``kernel``: forces one of ``native.kernels("int8_sparse24_linear")``; "cuda" on a GPU; patterns other than 2:4 and 1:4 run the
      reference

    Returns (..., N) in the dtype of ``x``. Equals ``int8_linear(x, sparse24_to_dense(values, indices, K), scale, bias, ...)``: the
    integer sum is exact, the gradient with respect to ``x`` straight-through, a row with NaN or Inf gives NaN.
    Checks and packs the weight on every call: a layer (``pycompress.nn.Int8Sparse24Linear``) does so once.

    Raises ``ValueError`` for shapes, ranges and corrupted indices, ``TypeError`` for dtypes.

    >>> q, s = quantize_weight(weight * sparse24_mask(weight.abs()))
    >>> y = int8_sparse24_linear(x, *sparse24_compress(q), s)
    """
    check_weight(OP, values, scale, bias, dim=2)
    k = x.shape[-1] if isinstance(x, Tensor) and x.dim() else 0
    check_activation_quantization(OP, k, x_scale, None)
    check_input(OP, x, k, values.shape, values.device)
    sparse24_check(OP, values, indices, k, pattern=pattern)
    check_activation(OP, activation)
    name = sparse24_kernel(OP, x, pattern, kernel)
    packed = pack_sparse24(values, indices, k, pattern, name)
    bias = None if bias is None else bias.float().contiguous()
    return int8_sparse24_linear_packed(
        x, packed, scale.contiguous(), bias, values.shape[0], k, pattern, x_scale, activation or "none", name
    )


def int8_sparse24_linear_packed(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    n: int,
    k: int,
    pattern: str,
    x_scale: float | None,
    activation: str,
    kernel: str,
) -> Tensor:
    """``int8_sparse24_linear`` on a weight from ``pack_sparse24``, without checks: for layers, which made the pack."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _StraightThrough.apply(x, packed, scale, bias, n, k, pattern, x_scale, activation, kernel)
    run = _op if dispatched(x) else _run
    return run(x, packed, scale, bias, n, k, pattern, x_scale, activation, kernel)


class _StraightThrough(torch.autograd.Function):
    """Gradient of ``x`` as if activations were not quantised: grad @ dequantised weight."""

    @staticmethod
    def forward(ctx, x, packed, scale, bias, n, k, pattern, x_scale, activation, kernel):
        ctx.save_for_backward(x, packed, scale, bias)
        ctx.arguments = (n, k, pattern, x_scale, activation, kernel)
        run = _op if dispatched(x) else _run
        return run(x, packed, scale, bias, *ctx.arguments)

    @staticmethod
    def backward(ctx, grad):
        x, packed, scale, bias = ctx.saved_tensors
        n, k, pattern, x_scale, activation, kernel = ctx.arguments
        if activation != "none":
            before = int8_sparse24_linear_packed(x, packed, scale, bias, n, k, pattern, x_scale, "none", kernel)
            grad = activation_gradient(activation, before, grad)
        values, indices = unpack_sparse24(packed, n, k, pattern, torch.int8, kernel)
        weight = unchecked_to_dense(values, indices, k, pattern).float() * scale[:, None]
        return ((grad.float() @ weight).to(x.dtype), *[None] * 9)


def _run(x, packed, scale, bias, n, k, pattern, x_scale, activation, kernel):
    if kernel == native.REFERENCE:
        values, indices = unpack_sparse24(packed, n, k, pattern, torch.int8, kernel)
        dense = unchecked_to_dense(values, indices, k, pattern)
        return int8_linear_reference(x, dense, scale, bias, x_scale=x_scale, activation=activation)
    if kernel == CUDA:
        return cuda_sparse24.linear(x, packed, bias, n, activation, scale=scale, x_scale=x_scale)
    shape = x.shape
    if x.dim() != 2:
        x = x.reshape(math.prod(shape[:-1]), k)
    if x.stride(1) != 1 and k > 1:
        x = x.contiguous()
    m = x.shape[0]
    out = torch.empty(m, n, dtype=x.dtype, device="cpu")
    dtype = native.DTYPES[x.dtype]
    native.module.int8_sparse24_linear(
        kernel,
        m,
        n,
        k,
        NATIVE_PATTERNS[pattern],
        x.data_ptr(),
        x.stride(0),
        dtype,
        packed.data_ptr(),
        scale.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        x_scale is None,
        x_scale or 0.0,
        native.ACTIVATIONS[activation],
        out.data_ptr(),
        dtype,
    )
    return out if len(shape) == 2 else out.view(*shape[:-1], n)


_op = define(
    "int8_sparse24_linear(Tensor x, Tensor packed, Tensor scale, Tensor? bias, int n, int k, str pattern, float? x_scale, "
    "str activation, str kernel) -> Tensor",
    _run,
    lambda x, packed, scale, bias, n, k, pattern, x_scale, activation, kernel: x.new_empty((*x.shape[:-1], n)),
)
