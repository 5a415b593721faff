"""``int8_weight_linear`` and ``int4_linear`` with float activations on CUDA: layouts, the choice of a way, and the calls.

Few rows run one kernel that streams the weights (csrc/weight_only/few.cuh); more rows have the weights written out in the dtype of x, for
the library's product. Any M, N and K: rows of x that are not aligned are copied, which are few, and the rest is predicated.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import native
from ..activation import ACTIVATE
from ..int4 import num_groups, pack_nibbles, unpack_nibbles
from . import extension

CONFIGS = {"8x8": (8, 8), "8x32": (8, 32), "16x16": (16, 16), "16x64": (16, 64)}
"""Rows and columns that a block computes, by configuration, as in the header (a test compares)."""
FEW_ROWS = 32
"""Up to here the weights are streamed, once per 16 rows. A guess: writing them out costs four to nine times their bytes."""
BLOCK_K = 128
"""Elements of a row that lie together in the int4 layout: 64 bytes."""


def choose(m: int, n: int, multiprocessors: int) -> str | None:
    """The configuration for few rows, None for the library's product: wide blocks read x less often, if there are enough of them.

    >>> choose(1, 4096, 132), choose(1, 1024, 132), choose(16, 14336, 132), choose(33, 4096, 132)
    ('8x32', '8x8', '16x64', None)
    """
    if m > FEW_ROWS:
        return None
    narrow, wide = ("8x8", "8x32") if m <= 8 else ("16x16", "16x64")
    rows, columns = CONFIGS[wide]
    return wide if 4 * -(-m // rows) * -(-n // columns) >= 3 * multiprocessors else narrow


class Weight(NamedTuple):
    """``pycompress::weight_only::Weight`` behind its sizes: addresses, strides, and the group size, 0 for int8."""

    data: int
    ldw: int
    scale: int
    zero: int = 0
    ldn: int = 0
    group_size: int = 0


def pad_int8(weight: Tensor) -> Tensor:
    """An int8 weight (N, K) with rows of a multiple of 16 bytes, aligned to 16: the tensor itself where it is that already."""
    if weight.shape[1] % 16 == 0 and weight.is_contiguous() and weight.data_ptr() % 16 == 0:
        return weight
    return F.pad(weight, (0, -weight.shape[1] % 16)).clone(memory_format=torch.contiguous_format)


def int4_sizes(n: int, k: int, group_size: int) -> tuple[int, int, int]:
    """Blocks of 128 along k, groups in them, and N padded to 16 (``Weight.ldn``)."""
    blocks = -(-k // BLOCK_K)
    return blocks, blocks * BLOCK_K // group_size, -(-n // 16) * 16


def packed_bytes_int4(n: int, k: int, group_size: int, asymmetric: bool) -> int:
    blocks, groups, ldn = int4_sizes(n, k, group_size)
    return n * blocks * 64 + groups * ldn * (5 if asymmetric else 4)


def pack_int4(weight: Tensor, scale: Tensor, zero_point: Tensor | None, k: int, group_size: int) -> Tensor:
    """The tensors of ``pycompress.ops.int4`` as flat uint8: nibbles, scales, zero points, in the order of the header.

    A block of 128 k is (4 chunks, 4 lanes, 4 pairs); in memory it is (lanes, chunks, even and odd k, pairs).
    """
    n = weight.shape[0]
    blocks, groups, ldn = int4_sizes(n, k, group_size)
    u = F.pad(unpack_nibbles(weight, k), (0, blocks * BLOCK_K - k)).view(n, blocks, 4, 4, 4, 2)
    parts = [pack_nibbles(u.permute(0, 1, 3, 2, 5, 4).reshape(n, blocks * BLOCK_K)).flatten()]
    for t in (scale, zero_point):
        if t is not None:
            padded = F.pad(t.T, (0, ldn - n, 0, groups - t.shape[1])).contiguous()
            parts.append(padded.view(torch.uint8).flatten())
    return torch.cat(parts)


def unpack_int4(packed: Tensor, n: int, k: int, group_size: int, asymmetric: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """``(weight, scale, zero_point)`` out of ``pack_int4``'s result."""
    blocks, groups, ldn = int4_sizes(n, k, group_size)
    weight, scale, zero = packed.split([n * blocks * 64, groups * ldn * 4, groups * ldn if asymmetric else 0])
    u = unpack_nibbles(weight.view(n, blocks * 64), blocks * BLOCK_K).view(n, blocks, 4, 4, 2, 4)
    u = u.permute(0, 1, 3, 2, 5, 4).reshape(n, blocks * BLOCK_K)[:, :k]
    used = num_groups(k, group_size)
    scale = scale.clone().view(torch.float32).view(groups, ldn)[:used, :n].T.contiguous()
    return pack_nibbles(u), scale, zero.view(groups, ldn)[:used, :n].T.contiguous() if asymmetric else None


def linear_int8(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, config: str | None = None) -> Tensor:
    """``int8_weight_linear`` on torch's current stream; ``weight`` canonical or from ``pad_int8``. ``config`` forces a way."""
    weight = pad_int8(weight)
    how = Weight(weight.data_ptr(), weight.shape[1], scale.data_ptr())
    return _linear(x, weight.shape[0], how, bias, "none", config, False)


def linear_int4(
    x: Tensor, packed: Tensor, bias: Tensor | None, n: int, group_size: int, asymmetric: bool, activation: str, config: str | None = None
) -> Tensor:
    """``int4_linear`` with float activations on torch's current stream; ``packed`` from ``pack_int4``."""
    return _linear(x, n, int4_weight(packed, n, x.shape[-1], group_size, asymmetric), bias, activation, config, True)


LIBRARY = "library"
"""The ``config`` that writes the weights out."""


def _linear(x: Tensor, n: int, weight: Weight, bias: Tensor | None, activation: str, config: str | None, only_finite: bool) -> Tensor:
    k, m = x.shape[-1], x.shape[:-1].numel()
    if m == 0 or n == 0:
        return torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=x.device)
    config = config or choose(m, n, extension.multiprocessors(x.device)) or LIBRARY
    if config == LIBRARY:
        if only_finite:  # a row with Inf is NaN: Inf alone could give Inf
            x = x.masked_fill(x.isinf(), float("nan"))
        y = F.linear(x, _dequantize(weight, n, k, x.dtype, x.device), None if bias is None else bias.to(x.dtype))
        return ACTIVATE[activation](y)
    rows, out = _aligned_rows(x.reshape(m, k)), torch.empty(m, n, dtype=x.dtype, device=x.device)
    module, stream, device = _target(x.device)
    module.weight_few(
        config, m, n, k, rows.data_ptr(), rows.stride(0), native.DTYPES[x.dtype], *weight, 0 if bias is None else bias.data_ptr(),
        native.ACTIVATIONS[activation], out.data_ptr(), device, stream,
    )  # fmt: skip
    return out.view(*x.shape[:-1], n)


def _aligned_rows(rows: Tensor) -> Tensor:
    """Rows that start at multiples of 16 bytes, with zeros up to a multiple of 8 elements."""
    m, k = rows.shape
    if k % 8 == 0 and rows.stride(1) == 1 and (rows.stride(0) % 8 == 0 or m == 1) and rows.data_ptr() % 16 == 0:
        return rows
    return F.pad(rows, (0, -k % 8)).clone(memory_format=torch.contiguous_format)


def dequantize_int4(packed: Tensor, n: int, k: int, group_size: int, asymmetric: bool, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight (N, K) that ``pack_int4``'s result stands for."""
    return _dequantize(int4_weight(packed, n, k, group_size, asymmetric), n, k, dtype, packed.device)


def _dequantize(weight: Weight, n: int, k: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    ldo = -(-k // 8) * 8
    out = torch.empty(n, ldo, dtype=dtype, device=device)
    if out.numel():
        module, stream, index = _target(device)
        module.weight_dequantize(n, k, *weight, native.DTYPES[dtype], out.data_ptr(), ldo, index, stream)
    return out[:, :k]


def int4_weight(packed: Tensor, n: int, k: int, group_size: int, asymmetric: bool) -> Weight:
    """Where the parts of ``pack_int4``'s result lie."""
    blocks, groups, ldn = int4_sizes(n, k, group_size)
    scale = packed.data_ptr() + n * blocks * 64
    return Weight(packed.data_ptr(), blocks * 64, scale, scale + groups * ldn * 4 if asymmetric else 0, ldn, group_size)


def _target(device: torch.device) -> tuple[Any, int, int]:
    return extension.module, extension.stream(device), device.index or 0
