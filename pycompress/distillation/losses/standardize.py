"""Logit standardization: what a student must match is the shape of the teacher's logits, not their size."""

from __future__ import annotations

import torch
from torch import Tensor

from .check import at_least_float32


def standardize(logits: Tensor) -> Tensor:
    """Z-score of each row, ``(x - mean) / (std + 1e-7)``, over its finite entries; minus infinity stays.

    Sun et al. 2024, "Logit Standardization in Knowledge Distillation", section 4.2, https://arxiv.org/abs/2403.01427.
    ``logits``: (..., classes). The standard deviation divides by the number of classes (not one less), as the paper does.

    >>> standardize(torch.tensor([[1.0, 3.0]]))
    tensor([[-1.0000,  1.0000]])
    """
    logits = at_least_float32(logits)
    finite = torch.isfinite(logits) | torch.isnan(logits)
    count = finite.sum(-1, keepdim=True).clamp_min(1)
    known = torch.where(finite, logits, 0.0)
    centred = torch.where(finite, known - known.sum(-1, keepdim=True) / count, 0.0)
    variance = centred.square().sum(-1, keepdim=True) / count
    scaled = centred / (variance.clamp_min(1e-30).sqrt() + 1e-7)  # clamp: the root has no gradient at 0
    return torch.where(finite, scaled, logits)
