"""``int4_linear``: linear layer on int4 weights, with float activations (weight-only) or int8 activations."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native
from .activation import ACTIVATE, activation_gradient, check_activation
from .affine import quantize_affine, symmetric_scale
from .cuda import int4_int8 as cuda_int4_int8
from .cuda import weight_only as cuda_weight_only
from .cuda.extension import NAME as CUDA
from .cuda.extension import kernel_for
from .int4 import SYMMETRIC_ZERO_POINT, check_int4, dequantize_int4, int4_error, num_groups, unpack_nibbles
from .library import define, dispatched


def int4_linear_reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    group_size: int = 128,
    int8_activations: bool = False,
    activation: str | None = None,
) -> Tensor:
    """What every kernel computes, written for reading. Arguments as ``int4_linear``; rows with NaN or Inf come out as NaN."""
    rows = x.float()
    k = x.shape[-1]
    amax = rows.abs().amax(dim=-1, keepdim=True) if k else rows.new_zeros(*x.shape[:-1], 1)
    if int8_activations:
        row_scale = symmetric_scale(amax)
        q = quantize_affine(rows, row_scale).float()
        w = unpack_nibbles(weight, k).float()
        y = rows.new_zeros(*x.shape[:-1], weight.shape[0])
        for g in range(num_groups(k, group_size)):
            part = slice(g * group_size, (g + 1) * group_size)
            zero = SYMMETRIC_ZERO_POINT if zero_point is None else zero_point[:, g, None].float()
            # Exact in float32: |sum| <= 128 * 127 * 15 < 2**24.
            y = y + (q[..., part] @ (w[:, part] - zero).T) * scale[:, g]
        y = y * row_scale
    else:
        y = F.linear(rows, dequantize_int4(weight, scale, zero_point, k, group_size))
        y = torch.where(torch.isfinite(amax), y, float("nan"))
    if bias is not None:
        y = y + bias.float()
    return ACTIVATE[activation or "none"](y).to(x.dtype)


def int4_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    group_size: int = 128,
    int8_activations: bool = False,
    activation: str | None = None,
    kernel: str | None = None,
) -> Tensor:
    """Linear layer on int4 weights with group scales along K.

    - ``x``: (..., K) float32, bfloat16 or float16
    - ``weight`` (N, ceil(K / 2)) uint8, ``scale`` (N, G) float32, ``zero_point`` (N, G) uint8 or None: see ``pycompress.ops.int4``
    - ``bias``: (N,) float or None
    - ``int8_activations``: False multiplies in float; True quantises each row of x to int8 (dynamic, symmetric, ``max|x| / 127``),
      with sums that are exact inside a group and float over groups, in ascending order
    - ``activation``: None, ``"relu"``, ``"gelu"`` (exact, erf), ``"silu"``, ``"relu6"`` or ``"hardswish"``
    - ``kernel``: forces one of ``native.kernels("int4_matmul")``; ``"cuda"`` on a GPU

    Returns (..., N) in the dtype of ``x``. Equals ``act(F.linear(x, dequantize_int4(weight, ...), bias))``, with x rounded to int8 first
    if asked for. The gradient with respect to ``x`` is that of the dequantised weight (straight through the rounding of x). A row with NaN
    or Inf gives NaN; float activations below 2**-98 lose bits, and the products of those near the float32 maximum may overflow.
    Packs the weight on every call: a layer (``pycompress.nn.Int4Linear``) packs once.

    Raises ``ValueError`` for shapes, devices, group sizes, scales that are not finite; ``TypeError`` for dtypes.

    >>> w, s, z = pycompress.ops.quantize_weight_int4(torch.randn(8, 256), group_size=64)
    >>> y = int4_linear(torch.randn(4, 256), w, s, z, group_size=64)
    """
    check_input("int4_linear", x)
    k = x.shape[-1]
    check_int4("int4_linear", weight, scale, zero_point, k, group_size)
    if x.device != weight.device:
        raise ValueError(f"int4_linear: x must be on {weight.device} like weight, got {x.device}")
    n = weight.shape[0]
    if bias is not None:
        if tuple(bias.shape) != (n,):
            raise ValueError(f"int4_linear: bias must be ({n},) to match weight {tuple(weight.shape)}, got {tuple(bias.shape)}")
        if not bias.is_floating_point():
            raise TypeError(f"int4_linear: bias must be floating point, got {bias.dtype}")
        if bias.device != weight.device:
            raise ValueError(f"int4_linear: bias must be on {weight.device} like weight, got {bias.device}")
        bias = bias.float().contiguous()
    check_activation("int4_linear", activation)
    name = kernel_for("int4_matmul", x, kernel, "int4_linear")
    through = dispatched(x) or dispatched(weight)
    problem = None if through else int4_error(scale, zero_point)
    if problem is not None:
        raise ValueError(f"int4_linear: {problem}")
    pack = _pack_op if through else pack_int4
    packed = pack(weight, scale, zero_point, k, group_size, name)
    return int4_linear_packed(x, packed, bias, n, k, group_size, zero_point is not None, int8_activations, activation or "none", name)


def check_input(where: str, x: Tensor) -> None:
    if not isinstance(x, Tensor) or x.dtype not in native.DTYPES:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{where}: x must be a float32, bfloat16 or float16 tensor, got {got}")
    if x.dim() == 0:
        raise ValueError(f"{where}: x must be (..., K), got shape ()")


def pack_int4(weight: Tensor, scale: Tensor, zero_point: Tensor | None, k: int, group_size: int, kernel: str) -> Tensor:
    """The format's tensors in the private layout of a kernel, as one flat uint8 tensor."""
    if kernel == CUDA:
        return cuda_weight_only.pack_int4(weight, scale, zero_point, k, group_size)
    parts = [weight.contiguous(), scale.contiguous(), *([] if zero_point is None else [zero_point.contiguous()])]
    if kernel == native.REFERENCE:
        return torch.cat([part.view(torch.uint8).flatten() for part in parts])
    n = weight.shape[0]
    size = native.module.int4_matmul_packed_bytes(kernel, n, k, group_size, zero_point is not None)
    packed = torch.empty(size, dtype=torch.uint8, device="cpu")
    addresses = [part.data_ptr() for part in parts] + [0] * (3 - len(parts))
    native.module.int4_matmul_pack(kernel, *addresses, n, k, group_size, packed.data_ptr())
    return packed


def unpack_int4(packed: Tensor, n: int, k: int, group_size: int, asymmetric: bool, kernel: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """``(weight, scale, zero_point)`` out of ``pack_int4``'s result."""
    if kernel == CUDA:
        return cuda_weight_only.unpack_int4(packed, n, k, group_size, asymmetric)
    groups, width = num_groups(k, group_size), -(-k // 2)
    if kernel == native.REFERENCE:
        weight, scale, zero = packed.split([n * width, n * groups * 4, n * groups if asymmetric else 0])
        return weight.view(n, width), scale.clone().view(torch.float32).view(n, groups), zero.view(n, groups) if asymmetric else None
    weight = torch.empty(n, width, dtype=torch.uint8, device="cpu")
    scale = torch.empty(n, groups, device="cpu", dtype=torch.float32)
    zero_point = torch.empty(n, groups, dtype=torch.uint8, device="cpu") if asymmetric else None
    addresses = (weight.data_ptr(), scale.data_ptr(), 0 if zero_point is None else zero_point.data_ptr())
    native.module.int4_matmul_unpack(kernel, packed.data_ptr(), n, k, group_size, *addresses)
    return weight, scale, zero_point


def int4_linear_packed(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    n: int,
    k: int,
    group_size: int,
    asymmetric: bool,
    int8_activations: bool,
    activation: str,
    kernel: str,
) -> Tensor:
    """``int4_linear`` on a weight from ``pack_int4(..., kernel)``, without checks: for layers, which made the pack."""
    if x.requires_grad and torch.is_grad_enabled():
        return _StraightThrough.apply(x, packed, bias, n, k, group_size, asymmetric, int8_activations, activation, kernel)
    run = _op if dispatched(x) else _run
    return run(x, packed, bias, n, k, group_size, asymmetric, int8_activations, activation, kernel)


class _StraightThrough(torch.autograd.Function):
    """Gradient of ``x`` as if activations were not quantised: grad @ dequantised weight."""

    @staticmethod
    def forward(ctx, x, packed, bias, *arguments):
        ctx.save_for_backward(x, packed, bias)
        ctx.arguments = arguments
        run = _op if dispatched(x) else _run
        return run(x, packed, bias, *arguments)

    @staticmethod
    def backward(ctx, grad):
        x, packed, bias = ctx.saved_tensors
        n, k, group_size, asymmetric, _, activation, kernel = ctx.arguments
        if activation != "none":
            before = int4_linear_packed(x, packed, bias, *ctx.arguments[:-2], "none", kernel)
            grad = activation_gradient(activation, before, grad)
        dequantize = _dequantize_op if dispatched(x) else dequantize_packed
        dense = dequantize(packed, n, k, group_size, asymmetric, kernel)
        return (grad.float() @ dense).to(x.dtype), *[None] * (2 + len(ctx.arguments))


def dequantize_packed(packed: Tensor, n: int, k: int, group_size: int, asymmetric: bool, kernel: str) -> Tensor:
    """Float32 weight (N, K) out of ``pack_int4``'s result."""
    if kernel == CUDA:
        return cuda_weight_only.dequantize_int4(packed, n, k, group_size, asymmetric).contiguous()
    return dequantize_int4(*unpack_int4(packed, n, k, group_size, asymmetric, kernel), k, group_size)


def _run(x, packed, bias, n, k, group_size, asymmetric, int8_activations, activation, kernel):
    if kernel == native.REFERENCE:
        tensors = unpack_int4(packed, n, k, group_size, asymmetric, kernel)
        return int4_linear_reference(x, *tensors, bias, group_size=group_size, int8_activations=int8_activations, activation=activation)
    if kernel == CUDA:
        linear = cuda_int4_int8.linear if int8_activations else cuda_weight_only.linear_int4
        return linear(x, packed, bias, n, group_size, asymmetric, activation)
    shape = x.shape
    if len(shape) == 2 and x.is_contiguous():
        m, stride = shape[0], k
    else:
        x = x.reshape(math.prod(shape[:-1]), k)
        if k > 1 and x.stride(1) != 1:
            x = x.contiguous()
        m, stride = x.shape[0], x.stride(0)
    out = x.new_empty(m, n)
    native.module.int4_linear(
        _plan(kernel, n, k, group_size, asymmetric, int8_activations, activation),
        m,
        x.data_ptr(),
        stride,
        native.DTYPES[x.dtype],
        packed.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
    )
    return out if len(shape) == 2 else out.view(*shape[:-1], n)


@functools.lru_cache(maxsize=4096)
def _plan(kernel: str, n: int, k: int, group_size: int, asymmetric: bool, int8_activations: bool, activation: str) -> Any:
    """What the calls of a layer have in common, in the extension: passing it each time would cost half a microsecond."""
    return native.module.int4_linear_plan(kernel, n, k, group_size, asymmetric, int8_activations, native.ACTIVATIONS[activation])


_op = define(
    "int4_linear(Tensor x, Tensor packed, Tensor? bias, int n, int k, int group_size, bool asymmetric, bool int8_activations, "
    "str activation, str kernel) -> Tensor",
    _run,
    lambda x, packed, bias, n, *arguments: x.new_empty((*x.shape[:-1], n)),
)


def _fake_pack(weight, scale, zero_point, k, group_size, kernel):
    if kernel == native.REFERENCE:
        zeros = 0 if zero_point is None else zero_point.numel()
        return weight.new_empty(weight.numel() + 4 * scale.numel() + zeros)
    if kernel == CUDA:
        return weight.new_empty(cuda_weight_only.packed_bytes_int4(weight.shape[0], k, group_size, zero_point is not None))
    return weight.new_empty(native.module.int4_matmul_packed_bytes(kernel, weight.shape[0], k, group_size, zero_point is not None))


_pack_op = define(
    "int4_pack(Tensor weight, Tensor scale, Tensor? zero_point, int k, int group_size, str kernel) -> Tensor", pack_int4, _fake_pack
)
_dequantize_op = define(
    "int4_dequantize(Tensor packed, int n, int k, int group_size, bool asymmetric, str kernel) -> Tensor",
    dequantize_packed,
    lambda packed, n, k, *arguments: packed.new_empty((n, k), dtype=torch.float32),
)
