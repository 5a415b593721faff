"""Conversion between the canonical 2:4 form and the layout of torch's CUTLASS kernels.

Both hold the same two-bit indices; CUTLASS reads them as 16-bit (half) or 32-bit (int8) words, reordered as ``reorder_meta`` in its
tools/util/include/cutlass/util/host_reorder.h says and stored in ColumnMajorInterleaved<2> order (include/cutlass/layout/matrix.h).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .sparse24 import sparse24_check

_WORD = {torch.int8: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
"""Word of metadata by the dtype of the values. torch's float32 layout is 1:2, another pattern."""


def sparse24_to_cutlass(values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """``(packed, meta)`` as ``torch.sparse.SparseSemiStructuredTensorCUTLASS`` holds them.

    ``values``: (N, K / 2) float16, bfloat16 or int8; ``indices``: (N, K / 8) uint8, from ``sparse24_compress``. K must be a multiple
    of 32 (int8: 64), because metadata words are interleaved in pairs, and N of 32 (int8: 16). Raises ``ValueError`` otherwise,
    ``TypeError`` for other dtypes.

    >>> packed, meta = sparse24_to_cutlass(*sparse24_compress(weight.half(), mask))
    """
    where = "sparse24_to_cutlass"
    word = _word(where, values)
    sparse24_check(where, values, indices, 2 * values.shape[1] if values.dim() == 2 else 0)
    _check_multiples(where, values, word)
    meta = indices.contiguous().view(word)
    reordered = torch.empty_like(meta).view(-1)
    reordered[_places(meta.shape[0], meta.shape[1], word, meta.device)] = meta.view(-1)
    return values.contiguous(), reordered.view(meta.shape)


def sparse24_from_cutlass(packed: Tensor, meta: Tensor) -> tuple[Tensor, Tensor]:
    """``(values, indices)`` in canonical form: the inverse of ``sparse24_to_cutlass``. Corrupted metadata raises ``ValueError``."""
    where = "sparse24_from_cutlass"
    word = _word(where, packed)
    if meta.dtype != word:
        raise TypeError(f"{where}: meta must be {word} for {packed.dtype} values, got {meta.dtype}")
    expected = (packed.shape[0], packed.shape[1] // 4 // word.itemsize) if packed.dim() == 2 else ()
    if tuple(meta.shape) != expected:
        raise ValueError(f"{where}: meta must be {expected} to match packed {tuple(packed.shape)}, got {tuple(meta.shape)}")
    _check_multiples(where, packed, word)
    ordered = meta.contiguous().view(-1)[_places(meta.shape[0], meta.shape[1], word, meta.device)]
    indices = ordered.view(meta.shape).contiguous().view(torch.uint8)
    sparse24_check(where, packed, indices, 2 * packed.shape[1])
    return packed.contiguous(), indices


def _word(where: str, values: Tensor) -> torch.dtype:
    if values.dtype not in _WORD:
        raise TypeError(f"{where}: values must be float16, bfloat16 or int8, got {values.dtype}")
    return _WORD[values.dtype]


def _check_multiples(where: str, values: Tensor, word: torch.dtype) -> None:
    rows, depth = (16, 64) if word == torch.int32 else (32, 32)
    n, k = values.shape[0], 2 * values.shape[1]
    if n % rows or k % depth:
        raise ValueError(f"{where}: N must be a multiple of {rows} and K of {depth} for {values.dtype}, got N={n} and K={k}")


def _places(rows: int, columns: int, word: torch.dtype, device: torch.device) -> Tensor:
    """Where word (row, column) lies in CUTLASS's order, flattened."""
    group, interweave = (32, 4) if word == torch.int16 else (16, 2)
    row = torch.arange(rows, device=device)[:, None].expand(rows, columns)
    column = torch.arange(columns, device=device).expand(rows, columns)
    row = row // group * group + row % 8 * interweave + row % group // 8
    # In every 2 x 2 block the top right and the bottom left word change places.
    swap = (row % 2 == 0).long() * (column % 2) - (row % 2) * (column % 2 == 0).long()
    row, column = row + swap, column - swap
    return (column // 2 * rows * 2 + row * 2 + column % 2).reshape(-1)
