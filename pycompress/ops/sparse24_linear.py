"""``sparse24_linear``: a linear layer on N:M sparse float weights."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native
from .activation import ACTIVATE, activation_gradient, check_activation
from .cuda import sparse24_float as cuda_float
from .cuda.extension import NAME as CUDA
from .library import define, dispatched
from .sparse24 import sparse24_check, sparse24_check_shapes, sparse24_to_dense, unchecked_to_dense
from .sparse24_packing import NATIVE_PATTERNS, pack_sparse24, sparse24_kernel, unpack_sparse24

OP = "sparse24_linear"


def sparse24_linear_reference(
    x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None = None, *, pattern: str = "2:4", activation: str | None = None
) -> Tensor:
    """What every kernel computes, written for reading: ``F.linear`` on the dense weight, summed in float64."""
    return _linear(x, sparse24_to_dense(values, indices, x.shape[-1], pattern=pattern), bias, activation or "none")


def _linear(x: Tensor, dense: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    y = F.linear(x.double(), dense.double(), None if bias is None else bias.double()).float()
    return ACTIVATE[activation](y).to(x.dtype)


def sparse24_linear(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    bias: Tensor | None = None,
    *,
    pattern: str = "2:4",
    activation: str | None = None,
    kernel: str | None = None,
) -> Tensor:
    """Linear layer on N:M sparse float32 weights: for 2:4 half the products and 53 % of the bytes of a dense one.

    - ``x``: (..., K) float32, bfloat16 or float16; sums are float32
    - ``values``, ``indices``: a float32 weight (N, K) out of ``sparse24_compress``; ``bias``: (N,) float or None
    - ``activation``: None, ``"relu"``, ``"gelu"`` (exact, erf), ``"silu"``, ``"relu6"`` or ``"hardswish"``
    - ``kernel``: forces one of ``native.kernels("sparse24_linear")``, "cuda" on a GPU; patterns other than 2:4 and 1:4 run the
      reference. On CUDA the weight is rounded to the dtype of a bfloat16 or float16 ``x``

    Returns (..., N) in the dtype of ``x``. Equals ``act(F.linear(x, sparse24_to_dense(values, indices, K), bias))``, with a gradient
    with respect to ``x``. NaN and Inf in x reach all outputs that keep a weight there, and may reach others.
    Checks and packs the weight on every call: a layer (``pycompress.nn.Sparse24Linear``) does so once.

    Raises ``ValueError`` for shapes and corrupted indices, ``TypeError`` for dtypes.

    >>> values, indices = sparse24_compress(weight, sparse24_mask(weight.abs()))
    >>> y = sparse24_linear(x, values, indices)
    """
    if not isinstance(x, Tensor) or x.dtype not in native.DTYPES:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{OP}: x must be a float32, bfloat16 or float16 tensor, got {got}")
    if x.dim() == 0:
        raise ValueError(f"{OP}: x must be (..., K), got shape ()")
    k = x.shape[-1]
    check_float_weight(OP, values, indices, bias, k, pattern, x.device)
    check_activation(OP, activation)
    name = sparse24_kernel(OP, x, pattern, kernel)
    packed = pack_sparse24(values, indices, k, pattern, name)
    bias = None if bias is None else bias.float().contiguous()
    return sparse24_linear_packed(x, packed, bias, values.shape[0], k, pattern, activation or "none", name)


def check_float_weight(
    where: str, values: Tensor, indices: Tensor, bias: Tensor | None, k: int, pattern: str, device: torch.device
) -> None:
    """Checks of a float32 compressed weight (N, k) and its bias for an input on ``device``; contents come last."""
    sparse24_check_shapes(where, values, indices, k, pattern)
    if device != values.device:
        raise ValueError(f"{where}: x must be on {values.device} like values, got {device}")
    if values.dtype != torch.float32:
        raise TypeError(f"{where}: values must be float32, got {values.dtype}")
    if bias is not None:
        if not bias.is_floating_point():
            raise TypeError(f"{where}: bias must be floating point, got {bias.dtype}")
        if tuple(bias.shape) != (values.shape[0],):
            raise ValueError(f"{where}: bias must be ({values.shape[0]},) to match values {tuple(values.shape)}, got {tuple(bias.shape)}")
        if bias.device != values.device:
            raise ValueError(f"{where}: bias must be on {values.device} like values, got {bias.device}")
    sparse24_check(where, values, indices, k, pattern=pattern)


def sparse24_linear_packed(
    x: Tensor, packed: Tensor, bias: Tensor | None, n: int, k: int, pattern: str, activation: str, kernel: str
) -> Tensor:
    """``sparse24_linear`` on a weight from ``pack_sparse24``, without checks: for layers, which made the pack."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _WithGradient.apply(x, packed, bias, n, k, pattern, activation, kernel)
    run = _op if dispatched(x) else _run
    return run(x, packed, bias, n, k, pattern, activation, kernel)


class _WithGradient(torch.autograd.Function):
    """Gradient of ``x``; the weight is frozen."""

    @staticmethod
    def forward(ctx, x, packed, bias, n, k, pattern, activation, kernel):
        ctx.save_for_backward(x, packed, bias)
        ctx.arguments = (n, k, pattern, activation, kernel)
        run = _op if dispatched(x) else _run
        return run(x, packed, bias, *ctx.arguments)

    @staticmethod
    def backward(ctx, grad):
        x, packed, bias = ctx.saved_tensors
        n, k, pattern, activation, kernel = ctx.arguments
        if activation != "none":
            before = sparse24_linear_packed(x, packed, bias, n, k, pattern, "none", kernel)
            grad = activation_gradient(activation, before, grad)
        values, indices = unpack_sparse24(packed, n, k, pattern, torch.float32, kernel)
        if kernel == CUDA:
            values = values.to(x.dtype).float()  # the weight that was multiplied with
        return ((grad.float() @ unchecked_to_dense(values, indices, k, pattern)).to(x.dtype), *[None] * 7)


def _run(x, packed, bias, n, k, pattern, activation, kernel):
    if kernel == native.REFERENCE:
        values, indices = unpack_sparse24(packed, n, k, pattern, torch.float32, kernel)
        return _linear(x, unchecked_to_dense(values, indices, k, pattern), bias, activation)
    if kernel == CUDA:
        return cuda_float.linear(x, packed, bias, n, pattern, activation)
    shape = x.shape
    if x.dim() != 2:
        x = x.reshape(math.prod(shape[:-1]), k)
    if x.stride(1) != 1 and k > 1:
        x = x.contiguous()
    m = x.shape[0]
    out = torch.empty(m, n, dtype=x.dtype, device="cpu")
    dtype = native.DTYPES[x.dtype]
    native.module.sparse24_linear(
        kernel,
        m,
        n,
        k,
        NATIVE_PATTERNS[pattern],
        x.data_ptr(),
        x.stride(0),
        dtype,
        packed.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        native.ACTIVATIONS[activation],
        out.data_ptr(),
        dtype,
    )
    return out if len(shape) == 2 else out.view(*shape[:-1], n)


_op = define(
    "sparse24_linear(Tensor x, Tensor packed, Tensor? bias, int n, int k, str pattern, str activation, str kernel) -> Tensor",
    _run,
    lambda x, packed, bias, n, k, pattern, activation, kernel: x.new_empty((*x.shape[:-1], n)),
)
