"""Random scores: the baseline that every other criterion has to beat."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import CRITERIA, Criterion, Evidence


@CRITERIA.register("random")
class Random(Criterion):
    """Uniform in [0, 1), drawn from the pruner's seeded generator (on the CPU, so every device prunes the same weights)."""

    def scores(self, evidence: Evidence) -> Tensor:
        return torch.rand(evidence.weight.shape, generator=evidence.generator).to(evidence.weight.device)
