"""Non-uniform quantization by codebooks: learned (k-means) and fixed (NF4, powers of two). Simulated in float."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..registry import Registry
from .fake_quantize import WeightQuantizer
from .scheme import from_rows, to_rows

CODEBOOKS: Registry[Callable[[int], Tensor | None]] = Registry("codebook kind")
"""Functions from bits to the sorted table of values in [-1, 1] that contains 0; None: the values are learned from the weight."""

# Quantiles of the normal distribution, scaled to [-1, 1], with an exact 0 (Dettmers et al. 2023, QLoRA, appendix E, arXiv 2305.14314).
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@CODEBOOKS.register("kmeans")
def kmeans(bits: int) -> None:
    """2**bits values per row, learned by k-means (Han et al. 2016, Deep Compression, section 3, arXiv 1510.00149)."""


@CODEBOOKS.register("nf4")
def nf4(bits: int = 4) -> Tensor:
    """NormalFloat: equally probable values for normal weights; 4 bits only."""
    if bits != 4:
        raise ValueError(f"Codebook: bits must be 4 for kind='nf4', got {bits}")
    return torch.tensor(_NF4)


@CODEBOOKS.register("pot")
def power_of_two(bits: int) -> Tensor:
    """0 and ±2**-i for i < 2**(bits-1) - 1: multiplication becomes a shift (Zhou et al. 2017, INQ, arXiv 1702.03044)."""
    magnitudes = 2.0 ** -torch.arange(2 ** (bits - 1) - 1, dtype=torch.float64)
    return _signed(magnitudes.tolist())


@CODEBOOKS.register("apot")
def additive_power_of_two(bits: int) -> Tensor:
    """Sums of powers of two, one from each of several sets, so that large values are not as coarse as with "pot" (Li et al. 2020,
    arXiv 1909.13144, section 2.2). 2 bits of magnitude select from each set; with an odd number, one set has a single power."""
    pairs, odd = divmod(bits - 1, 2)
    # Exponents 1, 2, 3, ... are dealt out in turn, as in the authors' code for 3 and 5 bits of magnitude.
    turn = [*range(pairs), *range(pairs), *([pairs] if odd else []), *range(pairs)]
    sums = {0.0}
    for term in range(pairs + odd):
        powers = [0.0, *(2.0**-exponent for exponent, owner in enumerate(turn, start=1) if owner == term)]
        sums = {a + b for a in sums for b in powers}
    return _signed([value / max(sums) for value in sums if value])


def _signed(magnitudes: list[float]) -> Tensor:
    return torch.tensor(sorted([0.0, *magnitudes, *(-m for m in magnitudes)]), dtype=torch.float32)


class CodebookQuantize(WeightQuantizer):
    """Parametrization that replaces each weight by its nearest codebook value. Weights that are exactly 0 (pruned) stay 0."""

    def __init__(self, bits: int, kind: str, granularity: str = "channel", group_size: int | None = None) -> None:
        super().__init__()
        self.bits, self.kind, self.granularity, self.group_size = bits, kind, granularity, group_size

    @torch.no_grad()
    def quantize(self, weight: Tensor) -> Tensor:
        if weight.numel() == 0:
            return weight
        rows = to_rows(weight.detach().float(), self.granularity, self.group_size)
        table = CODEBOOKS[self.kind](self.bits)
        if table is None:
            rows = kmeans_rows(rows, 2**self.bits)
        else:
            scale = rows.abs().amax(dim=1, keepdim=True)
            normal = rows / torch.where(scale > 0, scale, torch.ones_like(scale))
            table = table.to(rows.device)
            rows = table[torch.bucketize(normal, (table[1:] + table[:-1]) / 2)] * scale
        return from_rows(rows, weight.shape).to(weight.dtype)

    def extra_repr(self) -> str:
        return f"{self.bits} bit {self.kind} per {self.granularity}"


def kmeans_rows(rows: Tensor, k: int, iterations: int = 50) -> Tensor:
    """Each value of (rows, n) replaced by the nearest of k means of its row (Lloyd's algorithm in one dimension).

    The means start evenly spaced between the row's ends, which keeps the rare large weights (Han et al., section 3.2); no random numbers.
    Zeros are pruned weights: they stay 0 and take no part.
    """
    used = rows != 0
    low = torch.where(used, rows, torch.full_like(rows, float("inf"))).amin(dim=1, keepdim=True)
    high = torch.where(used, rows, torch.full_like(rows, float("-inf"))).amax(dim=1, keepdim=True)
    empty = low > high
    low, high = (torch.where(empty, torch.zeros_like(end), end).double() for end in (low, high))
    means = low + (high - low) * torch.linspace(0, 1, k, dtype=torch.float64, device=rows.device)
    values, counted = rows.double(), used.double()
    nearest = torch.zeros_like(rows, dtype=torch.int64)
    for _ in range(iterations):
        before = nearest
        nearest = torch.searchsorted((means[:, 1:] + means[:, :-1]) / 2, values)
        if torch.equal(before, nearest):
            break
        number = torch.zeros_like(means).scatter_add(1, nearest, counted)
        total = torch.zeros_like(means).scatter_add(1, nearest, values * counted)
        # Means of empty clusters stay where they are; the order of means in one dimension never changes.
        means = torch.where(number > 0, total / number.clamp(min=1), means)
    return torch.where(used, means.gather(1, nearest), torch.zeros_like(values)).float()
