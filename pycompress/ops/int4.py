"""The int4 weight format: nibbles, a scale and perhaps a zero point per group of consecutive k.

    w[n][k] = (u[n][k] - zero_point[n][g]) * scale[n][g]        g = k // group_size, u and zero_point from 0 to 15

- ``weight``: (N, ceil(K / 2)) uint8, element k in byte k // 2, even k in the low nibble; a last odd nibble is 0
- ``scale``: (N, G) float32, G = ceil(K / group_size); the last group may be shorter. float32 and not float16: simulated and executed
  weights then are the same numbers, and at group 128 the difference is 3 % of the bytes (4.25 instead of 4.125 bits per weight)
- ``zero_point``: (N, G) uint8, or None for symmetric weights, which means 8 everywhere

Symmetric quantization rounds to -7..7, so that the range is symmetric as in ``FakeQuant(bits=4)``; -8 (u = 0) is executed all the same.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .affine import asymmetric_qparams, quantize_affine, symmetric_scale

GROUP_SIZES = (32, 64, 128)
SYMMETRIC_ZERO_POINT = 8


def num_groups(k: int, group_size: int) -> int:
    return -(-k // group_size)


def check_group_size(where: str, group_size: int) -> None:
    if isinstance(group_size, bool) or group_size not in GROUP_SIZES:
        raise ValueError(f"{where}: group_size must be 32, 64 or 128, got {group_size!r}")


def quantize_weight_int4(weight: Tensor, group_size: int = 128, symmetric: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    """Round a float weight (N, K) to int4: ``(weight, scale, zero_point)`` in the format above; zero_point None if ``symmetric``.

    Symmetric: ``scale = max|w| / 7``; else ``scale = (max - min) / 15`` of each group, the range widened to include 0.
    Raises ``ValueError`` for NaN or infinite weights, other shapes than (N, K), and group sizes other than 32, 64 and 128.

    >>> weight, scale, zero_point = quantize_weight_int4(torch.randn(8, 256), group_size=64, symmetric=False)
    """
    check_group_size("quantize_weight_int4", group_size)
    if weight.dim() != 2:
        raise ValueError(f"quantize_weight_int4: weight must have 2 dimensions, got shape {tuple(weight.shape)}")
    if not weight.is_floating_point():
        raise TypeError(f"quantize_weight_int4: weight must be floating point, got {weight.dtype}")
    if not torch.isfinite(weight).all():
        raise ValueError("quantize_weight_int4: weight must be finite, got NaN or Inf")
    n, k = weight.shape
    groups = num_groups(k, group_size)
    # Zeros for what is missing in the last group: they belong to every range.
    w = F.pad(weight.detach().float(), (0, groups * group_size - k)).view(n, groups, group_size)
    zero_point = None
    if symmetric:
        scale = symmetric_scale(w.abs().amax(-1), 7)
        u = quantize_affine(w, scale[..., None], 0, -7, 7) + SYMMETRIC_ZERO_POINT
    else:
        scale, zero = asymmetric_qparams(w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0), 0, 15)
        u = quantize_affine(w, scale[..., None], zero[..., None], 0, 15)
        zero_point = zero.to(torch.uint8)
    return pack_nibbles(u.reshape(n, groups * group_size)[:, :k]), scale, zero_point


def pack_nibbles(u: Tensor) -> Tensor:
    """Integers 0..15 (..., K) to bytes (..., ceil(K / 2)), the even ones in the low nibbles."""
    u = F.pad(u.to(torch.uint8), (0, u.shape[-1] % 2))
    return u[..., 0::2] | (u[..., 1::2] << 4)


def unpack_nibbles(weight: Tensor, k: int) -> Tensor:
    """Bytes (..., ceil(K / 2)) to integers 0..15 (..., K) uint8."""
    return torch.stack((weight & 15, weight >> 4), dim=-1).flatten(-2)[..., :k]


def dequantize_int4(weight: Tensor, scale: Tensor, zero_point: Tensor | None, k: int, group_size: int) -> Tensor:
    """Float32 weight (..., K) of rows in the format above: ``(u - zero_point) * scale``."""
    zero = SYMMETRIC_ZERO_POINT if zero_point is None else per_element(zero_point.float(), k, group_size)
    return (unpack_nibbles(weight, k).float() - zero) * per_element(scale, k, group_size)


def per_element(per_group: Tensor, k: int, group_size: int) -> Tensor:
    """(..., G) to (..., K)."""
    return per_group.repeat_interleave(group_size, dim=-1)[..., :k]


def check_int4(where: str, weight: Tensor, scale: Tensor, zero_point: Tensor | None, k: int, group_size: int) -> None:
    """Checks of dtypes, shapes and devices, not of values."""
    check_group_size(where, group_size)
    if not isinstance(weight, Tensor) or weight.dtype != torch.uint8:
        got = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"{where}: weight must be a uint8 tensor of nibbles, got {got}")
    if weight.dim() != 2 or weight.shape[1] != -(-k // 2):
        raise ValueError(f"{where}: weight must be (N, {-(-k // 2)}) bytes for K = {k}, got {tuple(weight.shape)}")
    shape = (weight.shape[0], num_groups(k, group_size))
    for name, t, dtype in (("scale", scale, torch.float32), ("zero_point", zero_point, torch.uint8)):
        if t is None:
            continue
        if t.dtype != dtype:
            raise TypeError(f"{where}: {name} must be {dtype}, got {t.dtype}")
        if tuple(t.shape) != shape:
            raise ValueError(f"{where}: {name} must be {shape} for K = {k} and group_size {group_size}, got {tuple(t.shape)}")
        if t.device != weight.device:
            raise ValueError(f"{where}: {name} must be on {weight.device} like weight, got {t.device}")


def int4_error(scale: Tensor, zero_point: Tensor | None) -> str | None:
    """What is wrong with the values, or None."""
    if not torch.isfinite(scale).all():
        return "scale must be finite, got NaN or Inf"
    if zero_point is not None and (zero_point > 15).any():
        return f"zero_point must be from 0 to 15, got {int(zero_point.max())}"
    return None
