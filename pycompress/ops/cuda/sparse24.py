"""2:4 linear layers on CUDA: the canonical form in the order of the tensor cores' instructions, plans, and the call.

The kernel (csrc/sparse24_gemm/sparse24_gemm.cuh) multiplies with ``mma.sp``, whose sparse operand is the weight: int8 or 16-bit floats,
sums in int32 or float32. Packing is a few torch operations on the weight's device, once per weight. A 1:4 weight is a 2:4 one with a
zero beside each value. float32 has kernels of its own (``sparse24_float``).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import native
from ..sparse24 import Pattern, pack_indices, unpack_indices
from . import extension
from .rows import quantized

ELEMENTS = {torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
"""Types of the kept values by their number in csrc/sparse24_gemm/sparse24_cuda.h."""
CONFIGS = {"128x128": (128, 128), "64x64": (64, 64), "few": (64, 16), "hopper": (128, 256)}
"""Channels and tokens of a block, as in the same header."""
HOPPER = (9, 0)
"""The compute capability that ``hopper`` is for: newer GPUs do not have its instructions."""
STEP_BYTES = 64
"""Of k of x that one instruction takes: 64 int8, 32 floats."""
ROWS = 128
"""The number of channels is padded to a multiple of this."""
GROUP = 64
"""Channels whose metadata lie together."""
FILLED = 0b0100
"""Places 0 and 1: valid metadata of a group of padding."""


class Packed(NamedTuple):
    """``values``: (rows, K' / 2), ``meta``: (steps, rows / 64, words) int32; rows and K' padded."""

    values: Tensor
    meta: Tensor


def pack(values: Tensor, indices: Tensor, k: int, pattern: str = "2:4") -> Packed:
    """The canonical 2:4 or 1:4 form (``sparse24_compress``) as the kernel reads it. ``values``: (N, kept) bfloat16, float16 or int8.

    Any N and K. Groups of K are in the order of the canonical form; metadata words hold them as PTX's "Sparse matrix storage" says.
    """
    if pattern == "1:4":
        values, indices = _with_partners(values, indices)
    n, small = values.shape[0], values.dtype == torch.int8
    groups = 16 if small else 8  # of a step
    steps = -(-k // (4 * groups))
    padded = F.pad(values, (0, 2 * groups * steps - values.shape[1], 0, -n % ROWS))
    places = torch.stack([indices & 15, indices >> 4], dim=2).flatten(1)[:, : values.shape[1] // 2].long()
    places = F.pad(places, (0, groups * steps - places.shape[1], 0, -n % ROWS), value=FILLED)
    per_word = 8 if small else 4
    words = (places.view(-1, per_word) << torch.arange(0, 4 * per_word, 4, device=places.device)).sum(1)
    # Row g + 8 h of tile i is channel 8 g + 2 i + h of its group of 64.
    if small:  # lanes: g, half of k, h
        ordered = words.view(-1, 8, 4, 2, steps, 2).permute(4, 0, 2, 1, 5, 3)
    else:  # two tiles share a word per lane: tile / 2, g, tile % 2, half of k; both rows h in one word
        pairs = words.view(-1, 8, 2, 2, 2, steps, 2).permute(5, 0, 2, 1, 3, 6, 4)
        ordered = pairs[..., 0] | pairs[..., 1] << 16
    ordered = torch.where(ordered >= 1 << 31, ordered - (1 << 32), ordered)
    return Packed(padded.contiguous(), ordered.reshape(steps, padded.shape[0] // GROUP, 128 if small else 64).to(torch.int32).contiguous())


def _with_partners(values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """1:4 as 2:4. Place p becomes (p, p + 1), the last one (0, 3): so the pair tells which of its values is the kept one."""
    groups = values.shape[1]
    place = unpack_indices(indices, groups, 2)
    last, zero = place == 3, torch.zeros((), dtype=values.dtype, device=values.device)
    pairs = torch.stack([torch.where(last, zero, values), torch.where(last, values, zero)], 2).flatten(1)
    return pairs, pack_indices(torch.stack([torch.where(last, 0, place), torch.where(last, 3, place + 1)], 2).flatten(1), 2)


def _without_partners(values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of ``_with_partners``."""
    pairs, places = values.view(values.shape[0], -1, 2), unpack_indices(indices, values.shape[1], 2).view(values.shape[0], -1, 2)
    last = places[..., 1] - places[..., 0] == 3
    return torch.where(last, pairs[..., 1], pairs[..., 0]), pack_indices(torch.where(last, 3, places[..., 0]), 2)


def unpack(packed: Packed, n: int, k: int, pattern: str = "2:4") -> tuple[Tensor, Tensor]:
    """``(values, indices)`` in canonical form: the inverse of ``pack``."""
    small = packed.values.dtype == torch.int8
    steps, groups = packed.meta.shape[0], packed.meta.shape[1]
    words = packed.meta.long() & 0xFFFFFFFF
    if small:
        words = words.view(steps, groups, 4, 8, 2, 2).permute(1, 3, 2, 5, 0, 4)
        per_word = 8
    else:
        words = torch.stack([words & 0xFFFF, words >> 16], dim=-1).view(steps, groups, 2, 8, 2, 2, 2).permute(1, 3, 2, 4, 6, 0, 5)
        per_word = 4
    places = words.reshape(groups * GROUP, -1, 1) >> torch.arange(0, 4 * per_word, 4, device=words.device) & 15
    p = Pattern(2, 4)
    places = places.flatten(1)[:n, : -(-k // 4)]
    places = F.pad(places, (0, places.shape[1] % 2))
    indices = (places[:, 0::2] | places[:, 1::2] << 4).to(torch.uint8)
    values, indices = packed.values[:n, : p.kept(k)].contiguous(), indices.contiguous()
    return (values, indices) if pattern == "2:4" else _without_partners(values, indices)


def packed_bytes(n: int, k: int, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of ``Packed.values`` and of ``Packed.meta``."""
    rows, steps = -(-n // ROWS) * ROWS, -(-k * dtype.itemsize // STEP_BYTES)
    return rows * steps * STEP_BYTES // 2, rows // GROUP * steps * (512 if dtype == torch.int8 else 256)


def to_flat(packed: Packed) -> Tensor:
    """Both tensors in one of uint8."""
    return torch.cat([t.view(torch.uint8).flatten() for t in packed])


def from_flat(flat: Tensor, n: int, k: int, dtype: torch.dtype) -> Packed:
    """Views of ``to_flat``'s result."""
    end, _ = packed_bytes(n, k, dtype)
    rows, steps = -(-n // ROWS) * ROWS, -(-k * dtype.itemsize // STEP_BYTES)
    width = steps * STEP_BYTES // 2 // dtype.itemsize
    words = 128 if dtype == torch.int8 else 64  # of 64 channels
    return Packed(flat[:end].view(dtype).view(rows, width), flat[end:].view(torch.int32).view(steps, rows // GROUP, words))


PATTERNS = ("2:4", "1:4")


def unsupported(device: torch.device, pattern: str) -> str | None:
    """Why no CUDA kernel runs a 2:4 layer there, or None."""
    reason = extension.unsupported(device.index or 0)
    if reason is not None:
        return f"on {device}: {reason}"
    return None if pattern in PATTERNS else f"pattern {pattern} on {device}, only {' and '.join(PATTERNS)}"


def choose(m: int, n: int, multiprocessors: int, capability: tuple[int, int] = (8, 0)) -> str:
    """The configuration: streams the weight for few tokens, else the larger tile if it still fills the device.

    >>> choose(16, 4096, 132), choose(4096, 4096, 132), choose(200, 512, 132)
    ('few', '128x128', '64x64')
    >>> choose(16, 4096, 132, HOPPER), choose(4096, 4096, 132, HOPPER), choose(1024, 4096, 132, HOPPER)
    ('few', 'hopper', '128x128')
    """
    if m <= 64:
        return "few"  # up to four passes over a weight that stays in the L2 cache
    if capability == HOPPER and 2 * -(-m // 256) * -(-n // 256) >= multiprocessors and max(m, n) < 2**30:
        return "hopper"  # pairs of blocks share 256 tokens; it counts in 32 bits
    return "128x128" if -(-m // 128) * -(-n // 128) >= multiprocessors else "64x64"


def chosen(m: int, n: int, device: torch.device) -> str:
    return choose(m, n, extension.multiprocessors(device), extension.capability(device.index or 0))


def rows_of_bytes(x: Tensor) -> Tensor:
    """(M, K) with rows that start at multiples of 16 bytes and end in zeros where K is none: the tensor itself if it can be."""
    size = x.element_size()
    if x.shape[1] * size % 16 == 0 and x.stride(1) == 1 and x.stride(0) * size % 16 == 0 and x.data_ptr() % 16 == 0:
        return x
    return F.pad(x, (0, -x.shape[1] % (16 // size))) if x.shape[1] * size % 16 else x.clone(memory_format=torch.contiguous_format)


def linear(
    x: Tensor, flat: Tensor, bias: Tensor | None, n: int, activation: str, *, scale: Tensor | None = None, x_scale: float | None = None
) -> Tensor:
    """A 2:4 linear layer on torch's current stream. ``x``: (..., K); ``flat``: ``to_flat``'s result, of int8 values with ``scale``, else of
    values in the dtype of ``x``."""
    module, stream = extension.module, extension.stream(x.device)
    rows = x.reshape(-1, x.shape[-1])
    packed = from_flat(flat, n, rows.shape[1], x.dtype if scale is None else torch.int8)
    out = torch.empty(rows.shape[0], n, dtype=x.dtype, device=x.device)
    row_scale = None
    if scale is None:
        operand = rows_of_bytes(rows)
    else:
        operand, row_scale = quantized(module, stream, rows, x_scale)
    config = chosen(rows.shape[0], n, x.device)
    launch(
        module, stream, operand, packed, n, bias=bias, activation=activation, config=config, out_dtype=x.dtype, row_scale=row_scale,
        col_scale=scale, out=out,
    )  # fmt: skip
    return out.view(*x.shape[:-1], n)


def launch(
    module: Any,
    stream: int,
    x: Tensor,
    packed: Packed,
    n: int,
    *,
    bias: Tensor | None,
    activation: str,
    config: str,
    out_dtype: torch.dtype,
    row_scale: Tensor | None = None,
    col_scale: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``act(x @ weight.T * row_scale * col_scale + bias)``, (M, n), on ``stream``.

    - ``x``: (M, K) of the values' dtype, with rows as ``rows_of_bytes`` makes them; int8 has scales, float32, (M) and (n)
    - ``bias``: (n) float32; ``out_dtype``: that of ``x`` for floats; ``out``: where to write, contiguous
    """
    if out is None:
        out = torch.empty(x.shape[0], n, dtype=out_dtype, device=x.device)
    if x.shape[0] == 0 or n == 0:
        return out
    size = x.element_size()
    module.sparse24_gemm(
        config, x.shape[0], n, packed.values.shape[0], packed.meta.shape[0], x.data_ptr(), x.stride(0) * size, x.shape[1] * size,
        ELEMENTS[packed.values.dtype], packed.values.data_ptr(), packed.meta.data_ptr(),
        0 if row_scale is None else row_scale.data_ptr(), 0 if col_scale is None else col_scale.data_ptr(),
        0 if bias is None else bias.data_ptr(), native.ACTIVATIONS[activation], out.data_ptr(), native.DTYPES[out_dtype],
        x.device.index or 0, stream,
    )  # fmt: skip
    return out
