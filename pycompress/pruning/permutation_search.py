"""An order of input channels in which N:M keeps more magnitude: swaps of two channels, the best ones first."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 1024
"""Channels whose swaps are looked at together: only the table itself is channels x channels."""


def kept_magnitude(magnitude: Tensor, n: int, m: int) -> float:
    """Sum of the ``n`` largest of every ``m`` neighbours in the rows of ``magnitude`` (rows, columns); a tail is filled with zeros."""
    padded = torch.nn.functional.pad(magnitude, (0, -magnitude.shape[1] % m))
    return float(padded.reshape(-1, m).topk(n, dim=1).values.sum(dtype=torch.float64))


def search_order(magnitude: Tensor, n: int, m: int, *, max_rounds: int) -> Tensor:
    """Order (channels,) of the columns of ``magnitude`` (rows, channels) >= 0 in which ``kept_magnitude`` is at a local maximum.

    Greedy swaps between groups, as in Pool and Yu 2021 ("Channel Permutations for N:M Sparsity", NeurIPS 2021, section 4), with
    every swap's gain exact: in a group that keeps N of M, the sum with one channel replaced by d is the N - 1 largest of the others
    plus max(N-th largest of the others, d), and a sum over rows of max(a, b) is (sum a + sum b + L1 distance) / 2. A round takes
    the best swaps whose groups are not yet touched. Columns behind the last full group stay. Equal gains: the lower index.

    >>> search_order(torch.tensor([[4.0, 3.0, 2.0, 0.0, 1.0, 0.0, 0.0, 0.0]]), 2, 4, max_rounds=9)[:4]  # parts 4, 3, 2
    """
    columns = magnitude.shape[1]
    full = columns // m * m
    order = torch.arange(columns)
    if full < 2 * m or magnitude.shape[0] == 0:
        return order
    values = magnitude[:, :full].T.contiguous().float()  # (channels, rows)
    groups = values.view(-1, m, values.shape[1])
    # Below it a gain is rounding, and the search would not end.
    floor = 1e-6 * float(values.sum(dtype=torch.float64))
    base, threshold, kept = values.new_empty(full), torch.empty_like(values), values.new_empty(full)
    table = values.new_empty(full, full)  # [a, d]: what the group of a keeps with d in its place
    stale = torch.arange(full // m)  # groups that changed in the last round; the rest of the table still holds
    for _ in range(max_rounds):
        channels = (stale[:, None] * m + torch.arange(m)).flatten()
        base[channels], threshold[channels], kept[channels] = _without_one(groups[stale], n)
        table[channels] = _replaced(base[channels], threshold[channels], values)
        if len(channels) < full:
            table[:, channels] = _replaced(base, threshold, values[channels])
        swaps = _best_swaps(table, kept, m, floor)
        if not swaps:
            break
        for a, b in swaps:
            values[[a, b]] = values[[b, a]]
            order[[a, b]] = order[[b, a]]
        stale = torch.tensor(sorted({channel // m for swap in swaps for channel in swap}))
    return order


def _without_one(groups: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each channel of ``groups`` (groups, m, rows) what the others of its group give (the sum of their n - 1 largest; per row their
    n-th largest), and what the group keeps as it is."""
    m = groups.shape[1]
    base, threshold = [], []
    for slot in range(m):
        others = torch.cat([groups[:, :slot], groups[:, slot + 1 :]], dim=1).topk(n, dim=1).values  # (groups, n, rows)
        base.append(others[:, : n - 1].sum((1, 2)))
        threshold.append(others[:, n - 1])
    kept = groups.topk(n, dim=1).values.sum((1, 2)).repeat_interleave(m)
    return torch.stack(base, dim=1).flatten(), torch.stack(threshold, dim=1).flatten(0, 1), kept


def _replaced(base: Tensor, threshold: Tensor, values: Tensor) -> Tensor:
    """(channels, replacements): base + the sum over rows of max(threshold, value)."""
    return (threshold.sum(1)[:, None] + values.sum(1) + torch.cdist(threshold, values, p=1)) / 2 + base[:, None]


def _best_swaps(table: Tensor, kept: Tensor, m: int, floor: float) -> list[tuple[int, int]]:
    """Swaps that gain more than ``floor``, the best first, none of two in the same group."""
    channels = len(kept)
    group = torch.arange(channels) // m
    best: list[tuple[float, int, int]] = []
    for begin in range(0, channels, BLOCK):
        part = slice(begin, min(channels, begin + BLOCK))
        gain = table[part] + table[:, part].T - kept[part, None] - kept
        gain[group[part, None] >= group] = 0
        # A channel's best partner is enough: a round takes at most one swap per group.
        highest, partner = gain.max(dim=1)
        best += [(-g, begin + a, b) for a, (g, b) in enumerate(zip(highest.tolist(), partner.tolist(), strict=True)) if g > floor]
    touched: set[int] = set()
    swaps = []
    for _, a, b in sorted(best):
        if not {a // m, b // m} & touched:
            touched |= {a // m, b // m}
            swaps.append((a, b))
    return swaps
