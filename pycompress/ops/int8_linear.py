"""``int8_linear``: quantise, multiply, dequantise, add the bias and activate, in one call."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import native
from .activation import ACTIVATE, activation_gradient, check_activation
from .affine import asymmetric_qparams, quantize_affine, symmetric_scale
from .cuda import int8_linear as cuda_int8
from .cuda.extension import NAME as CUDA
from .int8_matmul import MAX_K, int8_matmul_reference, kernel_for, pack_weight, unpack_weight
from .library import define, dispatched

MAX_K_ZERO_POINT = 66311
"""Largest K with a zero point: |q - zero_point| reaches 255, and 255 * 127 * K must stay below 2**31."""


def int8_linear_reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    x_scale: float | None = None,
    x_zero_point: int | None = None,
    asymmetric: bool = False,
    activation: str | None = None,
) -> Tensor:
    """What every kernel computes, written for reading. Arguments as ``int8_linear``; rows with NaN or Inf come out as NaN."""
    rows = x.float()
    amax = rows.abs().amax(dim=-1, keepdim=True) if x.shape[-1] else rows.new_zeros(*x.shape[:-1], 1)
    if x_scale is None and asymmetric:
        low, high = (rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)) if x.shape[-1] else (amax, amax)
        row_scale, zero_points = asymmetric_qparams(low.clamp(max=0), high.clamp(min=0))
        q = quantize_affine(rows, row_scale, zero_points, -128) - zero_points
    elif x_scale is None:
        row_scale = symmetric_scale(amax)
        q = quantize_affine(rows, row_scale)
    else:
        zero_point, quant_min = (0, -127) if x_zero_point is None else (x_zero_point, -128)
        row_scale = torch.where(torch.isfinite(amax), x_scale, float("nan"))
        q = quantize_affine(rows, torch.tensor(x_scale, dtype=torch.float32, device=x.device), zero_point, quant_min) - zero_point
    total = int8_matmul_reference(q.reshape(math.prod(x.shape[:-1]), x.shape[-1]), weight).view(*x.shape[:-1], weight.shape[0])
    y = total.float() * (row_scale * scale)
    if bias is not None:
        y = y + bias.float()
    return ACTIVATE[activation or "none"](y).to(x.dtype)


def int8_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    x_scale: float | None = None,
    x_zero_point: int | None = None,
    asymmetric: bool = False,
    activation: str | None = None,
    kernel: str | None = None,
) -> Tensor:
    """Linear layer on int8 weights with activations quantised on the fly.

    - ``x``: (..., K) float32, bfloat16 or float16
    - ``weight``: (N, K) int8; ``scale``: (N,) float32, the step of each output channel; ``bias``: (N,) float or None
    - ``x_scale`` None: dynamic, one scale per row ("per token"), symmetric with ``max|x| / 127``, or, if ``asymmetric``, with a zero point
      per row and ``(max - min) / 255``, the range widened to include 0. A float: static, one scale per tensor;
      then ``x_zero_point`` None means symmetric (-127..127), an int from -128 to 127 means asymmetric (-128..127)
    - ``activation``: None, ``"relu"``, ``"gelu"`` (exact, erf), ``"silu"``, ``"relu6"`` or ``"hardswish"``
    - ``kernel``: forces one of ``native.kernels("int8_matmul")``

    Returns (..., N) in the dtype of ``x``. Equals
    ``act((q - zero_point) @ weight.T * (x_scale * scale) + bias)`` with ``q = clamp(round(x / x_scale) + zero_point)`` and the sum
    exact in int32. The gradient with respect to ``x`` is the straight-through one. A row with NaN or Inf gives NaN.
    Packs the weight on every call: a layer (``pycompress.nn.Int8Linear``) packs once.

    Raises ``ValueError`` for shapes, devices and ranges, ``TypeError`` for dtypes.

    >>> q, s = pycompress.ops.quantize_weight(torch.randn(8, 16))
    >>> y = int8_linear(torch.randn(4, 16), q, s)
    """
    check_weight("int8_linear", weight, scale, bias, dim=2)
    n, k = weight.shape
    check_activation_quantization("int8_linear", k, x_scale, x_zero_point, asymmetric)
    check_input("int8_linear", x, k, weight.shape, weight.device)
    check_activation("int8_linear", activation)
    name = kernel_for(x, kernel, "int8_linear")
    packed = _pack_op(weight, name) if dispatched(x) or dispatched(weight) else pack_weight(weight, name)
    scale = scale.contiguous()
    bias = None if bias is None else bias.float().contiguous()
    return int8_linear_packed(x, packed, scale, bias, n, k, x_scale, x_zero_point, asymmetric, activation or "none", name)


def int8_linear_packed(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    n: int,
    k: int,
    x_scale: float | None,
    x_zero_point: int | None,
    asymmetric: bool,
    activation: str,
    kernel: str,
) -> Tensor:
    """``int8_linear`` on a weight from ``pack_weight(weight, kernel)``, without checks: for layers, which made the pack."""
    if x.requires_grad and torch.is_grad_enabled():
        return _StraightThrough.apply(x, packed, scale, bias, n, k, x_scale, x_zero_point, asymmetric, activation, kernel)
    run = _op if dispatched(x) else _run
    return run(x, packed, scale, bias, n, k, x_scale, x_zero_point, asymmetric, activation, kernel)


class _StraightThrough(torch.autograd.Function):
    """Gradient of ``x`` as if activations were not quantised: grad @ dequantised weight."""

    @staticmethod
    def forward(ctx, x, packed, scale, bias, n, k, x_scale, x_zero_point, asymmetric, activation, kernel):
        ctx.save_for_backward(x, packed, scale, bias)
        ctx.arguments = (n, k, x_scale, x_zero_point, asymmetric, activation, kernel)
        run = _op if dispatched(x) else _run
        return run(x, packed, scale, bias, *ctx.arguments)

    @staticmethod
    def backward(ctx, grad):
        x, packed, scale, bias = ctx.saved_tensors
        n, k, *_, activation, kernel = ctx.arguments
        if activation != "none":
            before = int8_linear_packed(x, packed, scale, bias, *ctx.arguments[:-2], "none", kernel)
            grad = activation_gradient(activation, before, grad)
        canonical = _unpack_op(packed, n, k, kernel) if dispatched(x) else unpack_weight(packed, n, k, kernel)
        weight = canonical.float() * scale[:, None]
        return ((grad.float() @ weight).to(x.dtype), *[None] * 10)


def check_weight(where: str, weight: Tensor, scale: Tensor, bias: Tensor | None, *, dim: int) -> None:
    """Checks that quantised weights share: int8 of ``dim`` dimensions, one float32 scale (and bias) per output channel."""
    if not isinstance(weight, Tensor) or weight.dtype != torch.int8:
        raise TypeError(
            f"{where}: weight must be an int8 tensor, got {weight.dtype if isinstance(weight, Tensor) else type(weight).__name__}"
        )
    if weight.dim() != dim:
        raise ValueError(f"{where}: weight must have {dim} dimensions, got shape {tuple(weight.shape)}")
    n = weight.shape[0]
    if scale.dtype != torch.float32:
        raise TypeError(f"{where}: scale must be float32, got {scale.dtype}")
    for name, t in (("scale", scale), ("bias", bias)):
        if t is not None and tuple(t.shape) != (n,):
            raise ValueError(f"{where}: {name} must be ({n},) to match weight {tuple(weight.shape)}, got {tuple(t.shape)}")
        if t is not None and t.device != weight.device:
            raise ValueError(f"{where}: {name} must be on {weight.device} like weight, got {t.device}")
    if bias is not None and not bias.is_floating_point():
        raise TypeError(f"{where}: bias must be floating point, got {bias.dtype}")


def check_activation_quantization(where: str, k: int, x_scale: float | None, x_zero_point: int | None, asymmetric: bool = False) -> None:
    """Checks of the static scale and zero point, and of the depth K for which the int32 sum is exact."""
    if x_scale is None:
        if x_zero_point is not None:
            raise ValueError(f"{where}: x_zero_point needs a static x_scale, got x_scale=None")
    elif not 2.0**-100 <= x_scale <= 2.0**100:  # NaN and Inf fail this too
        raise ValueError(f"{where}: x_scale must be a finite number between 2**-100 and 2**100, got {x_scale}")
    if x_zero_point is not None and (
        isinstance(x_zero_point, bool) or int(x_zero_point) != x_zero_point or not -128 <= x_zero_point <= 127
    ):
        raise ValueError(f"{where}: x_zero_point must be an integer from -128 to 127, got {x_zero_point}")
    if asymmetric and x_scale is not None and x_zero_point is None:
        raise ValueError(f"{where}: asymmetric with a static x_scale needs an x_zero_point, got None")
    limit = MAX_K_ZERO_POINT if asymmetric or x_zero_point is not None else MAX_K
    if k > limit:
        raise ValueError(f"{where}: K must be at most {limit} for an exact int32 sum, got {k}")


def check_input(where: str, x: Tensor, k: int, weight_shape: Sequence[int], device: torch.device) -> None:
    """Checks of ``x`` against a weight of ``weight_shape`` on ``device``, which a layer need not unpack for it."""
    if not isinstance(x, Tensor) or x.dtype not in native.DTYPES:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{where}: x must be a float32, bfloat16 or float16 tensor, got {got}")
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(
            f"{where}: weight must be (N, {x.shape[-1] if x.dim() else '?'}) to match x {tuple(x.shape)}, got {tuple(weight_shape)}"
        )
    if x.device != device:
        raise ValueError(f"{where}: x must be on {device} like weight, got {x.device}")


def _run(x, packed, scale, bias, n, k, x_scale, x_zero_point, asymmetric, activation, kernel):
    if kernel == native.REFERENCE:
        return int8_linear_reference(
            x, packed, scale, bias, x_scale=x_scale, x_zero_point=x_zero_point, asymmetric=asymmetric, activation=activation
        )
    if kernel == CUDA:
        return cuda_int8.linear(x, packed, scale, bias, n, k, x_scale, x_zero_point, asymmetric, activation)
    shape = x.shape
    if len(shape) == 2 and x.is_contiguous():
        m, stride = shape[0], k
    else:
        x = x.reshape(math.prod(shape[:-1]), k)
        if k > 1 and x.stride(1) != 1:
            x = x.contiguous()
        m, stride = x.shape[0], x.stride(0)
    out = x.new_empty(m, n)
    native.module.int8_linear(
        _plan(kernel, n, k, x_scale, x_zero_point, asymmetric, activation),
        m,
        x.data_ptr(),
        stride,
        native.DTYPES[x.dtype],
        packed.data_ptr(),
        scale.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
    )
    return out if len(shape) == 2 else out.view(*shape[:-1], n)


@functools.lru_cache(maxsize=4096)
def _plan(kernel: str, n: int, k: int, x_scale: float | None, x_zero_point: int | None, asymmetric: bool, activation: str) -> Any:
    """What the calls of a layer have in common, in the extension: passing it each time would cost half a microsecond."""
    return native.module.int8_linear_plan(
        kernel,
        n,
        k,
        x_scale is None,
        asymmetric,
        x_scale or 0.0,
        x_zero_point or 0,
        -128 if asymmetric or x_zero_point is not None else -127,
        native.ACTIVATIONS[activation],
    )


_op = define(
    "int8_linear(Tensor x, Tensor packed, Tensor scale, Tensor? bias, int n, int k, float? x_scale, int? x_zero_point, bool asymmetric, "
    "str activation, str kernel) -> Tensor",
    _run,
    lambda x, packed, scale, bias, n, k, x_scale, x_zero_point, asymmetric, activation, kernel: x.new_empty((*x.shape[:-1], n)),
)


def _fake_pack(weight, kernel):
    if kernel == native.REFERENCE:
        return torch.empty_like(weight, memory_format=torch.contiguous_format)
    if kernel == CUDA:
        return weight.new_empty(cuda_int8.packed_bytes(*weight.shape))
    return weight.new_empty(native.module.int8_matmul_packed_bytes(kernel, *weight.shape))


_pack_op = define("int8_pack(Tensor weight, str kernel) -> Tensor", lambda weight, kernel: pack_weight(weight, kernel).clone(), _fake_pack)
_unpack_op = define(
    "int8_unpack(Tensor packed, int n, int k, str kernel) -> Tensor",
    lambda packed, n, k, kernel: unpack_weight(packed, n, k, kernel).clone(),
    lambda packed, n, k, kernel: packed.new_empty((n, k)),
)
