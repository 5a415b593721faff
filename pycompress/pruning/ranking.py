"""Exact selection by rank: the k lowest scores, never a threshold, so ties cannot change the count."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def lowest(scores: Tensor, candidates: Tensor, count: int) -> Tensor:
    """Bool mask, shape of ``scores``, of the ``count`` candidates with the lowest scores. Ties go to the lower flat index.

    ``count`` is at most the number of candidates; scores are finite.
    """
    chosen = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    index = candidates.reshape(-1).nonzero().squeeze(1)
    assert count <= index.numel(), f"{count} wanted, {index.numel()} candidates"
    order = torch.sort(scores.reshape(-1)[index], stable=True).indices
    chosen[index[order[:count]]] = True
    return chosen.view(scores.shape)


def lowest_across(scores: Sequence[Tensor], candidates: Sequence[Tensor], count: int) -> list[Tensor]:
    """``lowest`` over several tensors ranked together; ties go to the earlier tensor."""
    device = scores[0].device
    flat = torch.cat([score.reshape(-1).to(device) for score in scores])
    chosen = lowest(flat, torch.cat([candidate.reshape(-1).to(device) for candidate in candidates]), count)
    parts = chosen.split([score.numel() for score in scores])
    return [part.view(score.shape).to(score.device) for part, score in zip(parts, scores, strict=True)]
