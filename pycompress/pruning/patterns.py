"""Sparsity patterns: how many weights go, and which of the remaining ones may go next."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..registry import Registry
from .ranking import lowest


class Pattern(ABC):
    """A pattern of zeros inside a weight."""

    name: str
    types: tuple[type[nn.Module], ...]
    """Layers the pattern is made for."""

    @abstractmethod
    def removable(self, shape: torch.Size, ratio: float) -> int:
        """How many weights of a layer are zero at the end."""

    def removable_together(self, shapes: Sequence[torch.Size], ratio: float) -> int:
        """How many weights of several layers are zero at the end if they share one budget."""
        return sum(self.removable(shape, ratio) for shape in shapes)

    @abstractmethod
    def candidates(self, scores: Tensor, kept: Tensor) -> Tensor:
        """Which kept weights may be pruned next. ``scores`` and ``kept`` (bool) have the weight's shape."""


PATTERNS: Registry[type[Pattern] | None] = Registry("pruning pattern")
"""``"unstructured"``, ``"N:M"`` (write numbers: ``"2:4"``) and ``"channel"``, which has no mask: it removes, see ``channels.py``."""


@PATTERNS.register("unstructured")
class Unstructured(Pattern):
    """Any weight may go; ``round(ratio * weights)`` of them do."""

    name = "unstructured"
    types = (nn.Linear, _ConvNd)

    def removable(self, shape: torch.Size, ratio: float) -> int:
        return round(ratio * shape.numel())

    def removable_together(self, shapes: Sequence[torch.Size], ratio: float) -> int:
        return round(ratio * sum(shape.numel() for shape in shapes))  # one rounding, not one per layer

    def candidates(self, scores: Tensor, kept: Tensor) -> Tensor:
        return kept


@PATTERNS.register("N:M")
class NM(Pattern):
    """At most N nonzero weights in every M consecutive ones along the input: ``"2:4"`` is what NVIDIA's sparse tensor cores run.

    A weight (out, in, kh, kw) is read as (out, in * kh * kw), the matrix a convolution multiplies with. A tail group of t < M weights
    counts as filled up with zeros, so it keeps min(N, t) weights.
    """

    types = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

    def __init__(self, n: int, m: int) -> None:
        self.n, self.m = n, m
        self.name = f"{n}:{m}"

    def removable(self, shape: torch.Size, ratio: float) -> int:
        groups, tail = divmod(shape[1:].numel(), self.m)
        return shape[0] * (groups * (self.m - self.n) + max(0, tail - self.n))

    def candidates(self, scores: Tensor, kept: Tensor) -> Tensor:
        # In every group the lowest M - N places may be zero. Weights that are already zero and the padding take such places first.
        rows = scores.masked_fill(~kept, -torch.inf).reshape(scores.shape[0], -1)
        padded = F.pad(rows, (0, -rows.shape[1] % self.m), value=-torch.inf)
        order = torch.sort(padded.reshape(-1, self.m), dim=1, stable=True).indices
        places = torch.zeros_like(order, dtype=torch.bool).scatter_(1, order[:, : self.m - self.n], True)
        return places.view(padded.shape)[:, : rows.shape[1]].reshape(scores.shape) & kept


PATTERNS.register("channel")(None)


def parse_pattern(where: str, pattern: str) -> Pattern | None:
    """The pattern a name stands for; None for ``"channel"``. Raises ``ValueError`` for an unknown or impossible one."""
    if not isinstance(pattern, str):
        raise TypeError(f"{where}: pattern must be a name such as 'unstructured', '2:4' or 'channel', got {type(pattern).__name__}")
    found = re.fullmatch(r"(\d+):(\d+)", pattern)
    if found:
        n, m = int(found[1]), int(found[2])
        if not 0 < n < m:
            raise ValueError(f"{where}: pattern 'N:M' must have 0 < N < M, got {pattern!r}")
        return NM(n, m)
    if pattern == "N:M":
        raise ValueError(f"{where}: pattern 'N:M' needs numbers, such as '2:4'")
    kind = PATTERNS[pattern]
    return None if kind is None else kind()


def nm_mask(scores: Tensor, n: int, m: int) -> Tensor:
    """Bool mask that keeps the ``n`` highest scores of every ``m`` consecutive ones along the flattened input dimensions.

    ``scores``: (out, in, ...). Among equal scores the one with the higher index is kept.

    >>> nm_mask(torch.tensor([[1.0, 4.0, 2.0, 3.0]]), 2, 4)
    tensor([[False,  True, False,  True]])
    """
    return ~NM(n, m).candidates(scores, torch.ones_like(scores, dtype=torch.bool))


def unstructured_mask(scores: Tensor, ratio: float) -> Tensor:
    """Bool mask without the ``round(ratio * numel)`` lowest scores."""
    everything = torch.ones_like(scores, dtype=torch.bool)
    return ~lowest(scores, everything, Unstructured().removable(scores.shape, ratio))
