"""The canonical form of N:M sparse weights: kept values and packed indices, per output row.

A weight row is cut into groups of ``m`` neighbours along K (the last one filled up with zeros). Each group keeps ``n`` entries:

- ``values``  (N, ceil(K / m) * n), the kept entries in order, any floating dtype or int8
- ``indices`` (N, bytes), uint8: the position of each kept entry inside its group, ``ceil(log2(m))`` bits each, little-endian,
  every row starting at a byte. Within a group the positions rise strictly.

For 2:4 that is K / 2 values and K / 8 bytes, the same bits as NVIDIA's metadata before its reordering (see ``sparse24_cutlass``).
A group with fewer than ``n`` entries worth keeping is filled up with zeros at other positions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .library import dispatched

# For groups of up to 256. A table, as torch 2.4 traces neither int.bit_length nor properties of named tuples.
_INDEX_BITS = [max(m - 1, 0).bit_length() for m in range(257)]


class Pattern(NamedTuple):
    """At most ``n`` kept of every ``m``."""

    n: int
    m: int

    @property
    def bits(self) -> int:
        """Bits of one index."""
        return _INDEX_BITS[self.m]

    def kept(self, k: int) -> int:
        """Values in a row of ``k`` weights."""
        return -(-k // self.m) * self.n

    def index_bytes(self, k: int) -> int:
        """Bytes of indices in a row of ``k`` weights."""
        return -(-self.kept(k) * _INDEX_BITS[self.m] // 8)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


def parse_nm(where: str, pattern: str) -> Pattern:
    """``"2:4"`` as numbers. Raises ``ValueError`` unless 0 < N < M <= 256."""
    n, _, m = pattern.partition(":") if isinstance(pattern, str) else ("", "", "")
    if not (n.isdecimal() and m.isdecimal() and 0 < int(n) < int(m) <= 256):  # no regular expression: torch 2.4 cannot trace them
        raise ValueError(f"{where}: pattern must be 'N:M' with 0 < N < M <= 256, such as '2:4', got {pattern!r}")
    return Pattern(int(n), int(m))


def sparse24_mask(scores: Tensor, pattern: str = "2:4") -> Tensor:
    """Bool mask of the ``n`` highest scores in every group of ``m`` along the last dimension; among equals the first ones.

    ``scores``: (..., K). NaN counts as the highest. A tail group of t < m keeps min(n, t).

    >>> sparse24_mask(torch.tensor([[1.0, -4.0, 2.0, 3.0]]).abs())
    tensor([[False,  True, False,  True]])
    """
    n, m = parse_nm("sparse24_mask", pattern)
    k = scores.shape[-1]
    padded = F.pad(scores.nan_to_num(nan=torch.inf) if scores.is_floating_point() else scores.float(), (0, -k % m), value=-torch.inf)
    groups = padded.unflatten(-1, (padded.shape[-1] // m, m))
    best = groups.sort(dim=-1, descending=True, stable=True).indices[..., :n]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, best, True).flatten(-2)[..., :k]


def sparse24_compress(weight: Tensor, mask: Tensor | None = None, *, pattern: str = "2:4") -> tuple[Tensor, Tensor]:
    """Values and packed indices of a sparse weight.

    - ``weight``: (N, K), floating or int8; any K
    - ``mask``: (N, K) bool, True = keep; at most n per group. None: the weight itself must have at most n nonzeros per group
      (NaN is nonzero; -0.0 survives where there is room for it)

    ``sparse24_to_dense`` of the result is ``where(mask, weight, 0)``. Raises ``ValueError`` for a mask or weight that is not N:M
    and names the first group that is not.

    >>> values, indices = sparse24_compress(torch.tensor([[0.0, 5.0, 0.0, 7.0]]))
    >>> values, indices
    (tensor([[5., 7.]]), tensor([[13]], dtype=torch.uint8))
    """
    p = parse_nm("sparse24_compress", pattern)
    _check_matrix("sparse24_compress", "weight", weight)
    keep = weight != 0
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(
                f"sparse24_compress: mask must be a bool tensor, got {mask.dtype if isinstance(mask, Tensor) else type(mask).__name__}"
            )
        if mask.shape != weight.shape or mask.device != weight.device:
            raise ValueError(
                f"sparse24_compress: mask must be {tuple(weight.shape)} on {weight.device} like weight, "
                f"got {tuple(mask.shape)} on {mask.device}"
            )
        keep = mask
        weight = torch.where(mask, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))
    rows, k = weight.shape
    weight, keep = F.pad(weight, (0, -k % p.m)), F.pad(keep, (0, -k % p.m))
    count = weight.shape[1] // p.m
    groups, keep = weight.view(rows, count, p.m), keep.view(rows, count, p.m)
    crowded = keep.sum(-1) > p.n
    if crowded.any():
        row, group = crowded.nonzero()[0].tolist()
        name = "weight" if mask is None else "mask"
        raise ValueError(
            f"sparse24_compress: {name} must keep at most {p.n} of every {p.m} along K, got {int(keep[row, group].sum())} "
            f"in row {row}, columns {group * p.m} to {min(k, (group + 1) * p.m) - 1}"
        )
    # Kept entries first, then -0.0 (the only other value that is not plain zero), then whatever fills up; back in order of position.
    rank = keep.to(torch.int8) * 2
    if weight.is_floating_point():
        rank += groups.signbit().to(torch.int8)
    chosen = rank.sort(dim=-1, descending=True, stable=True).indices[..., : p.n].sort(dim=-1).values
    values = groups.gather(-1, chosen).reshape(rows, count * p.n)
    return values, pack_indices(chosen.reshape(rows, count * p.n), p.bits)


def sparse24_to_dense(values: Tensor, indices: Tensor, k: int, *, pattern: str = "2:4") -> Tensor:
    """The dense (N, K) weight out of ``sparse24_compress``'s result. Raises as ``sparse24_check``."""
    p = parse_nm("sparse24_to_dense", pattern)
    _check_shapes("sparse24_to_dense", values, indices, k, p)
    positions = unpack_indices(indices, p.kept(k), p.bits).view(values.shape[0], -(-k // p.m), p.n)
    if problem := _problem(values, indices, positions, k, p):
        raise ValueError(f"sparse24_to_dense: {problem}")
    return _scatter(values, positions, k, p)


def unchecked_to_dense(values: Tensor, indices: Tensor, k: int, pattern: str) -> Tensor:
    """``sparse24_to_dense`` of tensors that were checked before, without a look at the contents: traceable."""
    p = parse_nm("sparse24_to_dense", pattern)
    return _scatter(values, unpack_indices(indices, p.kept(k), p.bits).view(values.shape[0], -(-k // p.m), p.n), k, p)


def _scatter(values: Tensor, positions: Tensor, k: int, p: Pattern) -> Tensor:
    dense = values.new_zeros(values.shape[0], positions.shape[1], p.m)
    dense.scatter_(-1, positions, values.view(positions.shape))
    return dense.view(values.shape[0], positions.shape[1] * p.m)[:, :k].contiguous()


def sparse24_check(where: str, values: Tensor, indices: Tensor, k: int, *, pattern: str = "2:4") -> None:
    """Raise ``TypeError`` or ``ValueError`` unless the tensors are a valid compressed (N, ``k``) weight.

    Refused: indices that do not rise strictly inside a group or leave it, set bits behind the last index, and a nonzero value in the
    padding of the last group.
    """
    p = sparse24_check_shapes(where, values, indices, k, pattern)
    if not dispatched(values) and (problem := content_problem(values, indices, k, p)):  # contents are unknown while torch.compile looks
        raise ValueError(f"{where}: {problem}")


def sparse24_check_shapes(where: str, values: Tensor, indices: Tensor, k: int, pattern: str) -> Pattern:
    """The part of ``sparse24_check`` that reads no contents."""
    p = parse_nm(where, pattern)
    _check_shapes(where, values, indices, k, p)
    return p


def content_problem(values: Tensor, indices: Tensor, k: int, p: Pattern) -> str | None:
    """What is wrong with the contents of compressed tensors of the right shapes, or None."""
    if values.is_meta or indices.is_meta:  # a meta tensor has no contents
        return None
    return _problem(values, indices, unpack_indices(indices, p.kept(k), p.bits).view(values.shape[0], -(-k // p.m), p.n), k, p)


def pack_indices(positions: Tensor, bits: int) -> Tensor:
    """(N, count) small integers to (N, ceil(count * bits / 8)) uint8, little-endian."""
    rows, count = positions.shape
    flat = (positions[..., None] >> torch.arange(bits, device=positions.device) & 1).view(rows, count * bits)
    flat = F.pad(flat, (0, -flat.shape[1] % 8))
    flat = flat.view(rows, flat.shape[1] // 8, 8)
    return (flat << torch.arange(8, device=positions.device)).sum(-1).to(torch.uint8)


def unpack_indices(indices: Tensor, count: int, bits: int) -> Tensor:
    """(N, bytes) uint8 to (N, count) int64: the inverse of ``pack_indices``."""
    rows = indices.shape[0]
    flat = (indices[..., None] >> torch.arange(8, dtype=torch.uint8, device=indices.device) & 1).view(rows, indices.shape[1] * 8)[
        :, : count * bits
    ]
    return (flat.reshape(rows, count, bits).long() << torch.arange(bits, device=indices.device)).sum(-1)


def _check_matrix(where: str, name: str, t: Tensor) -> None:
    if not isinstance(t, Tensor) or not (t.is_floating_point() or t.dtype == torch.int8):
        raise TypeError(f"{where}: {name} must be a floating or int8 tensor, got {t.dtype if isinstance(t, Tensor) else type(t).__name__}")
    if t.dim() != 2:
        raise ValueError(f"{where}: {name} must have 2 dimensions, got shape {tuple(t.shape)}")


def _check_shapes(where: str, values: Tensor, indices: Tensor, k: int, p: Pattern) -> None:
    _check_matrix(where, "values", values)
    if not isinstance(indices, Tensor) or indices.dtype != torch.uint8:
        raise TypeError(
            f"{where}: indices must be a uint8 tensor, got {indices.dtype if isinstance(indices, Tensor) else type(indices).__name__}"
        )
    expected = (values.shape[0], p.kept(k)), (values.shape[0], p.index_bytes(k))
    if (tuple(values.shape), tuple(indices.shape)) != expected:
        raise ValueError(
            f"{where}: values and indices of a {p} weight with K={k} must be {expected[0]} and {expected[1]}, "
            f"got {tuple(values.shape)} and {tuple(indices.shape)}"
        )
    if values.device != indices.device:
        raise ValueError(f"{where}: indices must be on {values.device} like values, got {indices.device}")


def _problem(values: Tensor, indices: Tensor, positions: Tensor, k: int, p: Pattern) -> str | None:
    if values.numel() == 0:
        return None
    wrong = (positions >= p.m).any(-1) | (positions.diff(dim=-1) <= 0).any(-1)
    if wrong.any():
        row, group = wrong.nonzero()[0].tolist()
        got = positions[row, group].tolist()
        return f"indices must rise strictly inside 0..{p.m - 1} in every group, got {got} in row {row}, group {group}"
    spare = indices.shape[1] * 8 - p.kept(k) * p.bits
    if spare and (indices[:, -1] >> (8 - spare)).any():
        return "indices must have zero bits behind the last index, got others"
    tail = k % p.m
    if tail and (values[:, -p.n :][positions[:, -1] >= tail] != 0).any():
        return f"values must be 0 behind K={k}, got others in the last group"
    return None
