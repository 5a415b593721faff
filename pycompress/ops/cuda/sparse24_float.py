"""2:4 and 1:4 layers on CUDA whose weight is float32: its layout, the kernels for float32 activations, and the 16-bit weights made from it.

float32 activations: few rows run a kernel that reads the kept values and their places (csrc/sparse24_gemm/float_few_cuda.cu); more rows
have the weight written out dense, for the library's product. bfloat16 and float16 activations run on the tensor cores (``sparse24``), with
the weight rounded to their dtype once and kept as long as the float32 one lives.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .. import native
from ..activation import ACTIVATE
from ..sparse24 import Pattern
from . import extension, sparse24

FEW_ROWS = 32
"""Up to here the weight is streamed, once per 8 rows. A guess: the dense weight costs five times the bytes, written and read."""
CHUNK = 4
"""Values that a byte holds the places of."""


class Packed(NamedTuple):
    """``values``: (N, 4 C) float32, ``indices``: (N, C) uint8: the canonical form with rows filled up to whole chunks."""

    values: Tensor
    indices: Tensor


def pack(values: Tensor, indices: Tensor) -> Packed:
    """The canonical form of a float32 weight as the kernels read it."""
    return Packed(F.pad(values, (0, CHUNK * indices.shape[1] - values.shape[1])), indices)


def unpack(packed: Packed, k: int, pattern: str) -> tuple[Tensor, Tensor]:
    """``(values, indices)`` in canonical form: the inverse of ``pack``."""
    return packed.values[:, : _pattern(pattern).kept(k)].contiguous(), packed.indices.clone()


def _pattern(pattern: str) -> Pattern:
    return Pattern(int(pattern[0]), 4)


def packed_bytes(n: int, k: int, pattern: str) -> int:
    return -(-n * _pattern(pattern).index_bytes(k) * (4 * CHUNK + 1) // 16) * 16


def to_flat(packed: Packed) -> Tensor:
    """Both tensors in one of uint8, filled up to 16 bytes."""
    flat = torch.cat([t.contiguous().view(torch.uint8).flatten() for t in packed])
    return F.pad(flat, (0, -flat.numel() % 16))


def from_flat(flat: Tensor, n: int, k: int, pattern: str) -> Packed:
    """Views of ``to_flat``'s result."""
    chunks = _pattern(pattern).index_bytes(k)
    end = n * chunks * 4 * CHUNK
    return Packed(flat[:end].view(torch.float32).view(n, 4 * chunks), flat[end : end + n * chunks].view(n, chunks))


_sixteen_bit: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Flat float32 weight -> {dtype: flat 16-bit weight}. An entry goes with its float32 weight, which a layer replaces on loads and moves."""


def sixteen_bit(flat: Tensor, n: int, k: int, pattern: str, dtype: torch.dtype) -> Tensor:
    """The weight rounded to ``dtype``, packed for the tensor cores (``sparse24.to_flat``); made once per weight and dtype.

    Raises ``RuntimeError`` during the capture of a CUDA graph, if it is not there yet: it would be made anew by every replay.
    """
    made = _sixteen_bit.get(flat)
    if made is None:
        made = _sixteen_bit[flat] = {}
    if dtype not in made:
        if extension.capturing(flat.device):
            raise RuntimeError(f"sparse24_linear: run the layer once in {dtype} before a CUDA graph is captured, which packs its weight")
        values, indices = unpack(from_flat(flat, n, k, pattern), k, pattern)
        packed = sparse24.to_flat(sparse24.pack(values.to(dtype), indices, k, pattern))
        extension.wait(flat.device)  # once per weight: other streams use it without waiting for this one
        made[dtype] = packed
    return made[dtype]


def choose(m: int) -> bool:
    """Whether to stream the weight."""
    return m <= FEW_ROWS


def linear(x: Tensor, flat: Tensor, bias: Tensor | None, n: int, pattern: str, activation: str, few: bool | None = None) -> Tensor:
    """``sparse24_linear`` on torch's current stream; ``flat``: ``to_flat``'s result. ``few`` forces a way for float32 ``x``."""
    k, m = x.shape[-1], x.shape[:-1].numel()
    if x.dtype != torch.float32:
        return sparse24.linear(x, sixteen_bit(flat, n, k, pattern, x.dtype), bias, n, activation)
    if m == 0 or n == 0:
        return torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=x.device)
    if not (choose(m) if few is None else few):
        return ACTIVATE[activation](F.linear(x, dense(flat, n, k, pattern), bias))
    rows, out = sparse24.rows_of_bytes(x.reshape(m, k)), torch.empty(m, n, dtype=x.dtype, device=x.device)
    packed = from_flat(flat, n, k, pattern)
    extension.module.sparse24_float_few(  # type: ignore[union-attr]
        m, n, k, packed.indices.shape[1], int(pattern[0]), packed.values.data_ptr(), packed.indices.data_ptr(), rows.data_ptr(),
        rows.stride(0), 0 if bias is None else bias.data_ptr(), native.ACTIVATIONS[activation], out.data_ptr(), x.device.index or 0,
        extension.stream(x.device),
    )  # fmt: skip
    return out.view(*x.shape[:-1], n)


def dense(flat: Tensor, n: int, k: int, pattern: str) -> Tensor:
    """The dense float32 weight (N, K)."""
    ldo, packed = -(-k // 4) * 4, from_flat(flat, n, k, pattern)
    out = torch.empty(n, ldo, dtype=torch.float32, device=flat.device)
    if out.numel():
        extension.module.sparse24_float_dense(  # type: ignore[union-attr]
            n, k, packed.indices.shape[1], int(pattern[0]), packed.values.data_ptr(), packed.indices.data_ptr(), out.data_ptr(), ldo,
            flat.device.index or 0, extension.stream(flat.device),
        )  # fmt: skip
    return out[:, :k]
