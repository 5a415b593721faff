"""First-order Taylor expansion: how much the loss would change if the weight were zero."""

from __future__ import annotations

from torch import Tensor

from .base import CRITERIA, Criterion, Evidence


@CRITERIA.register("taylor")
class Taylor(Criterion):
    """``|w * dL/dw|`` with the mean gradient over the batches (Molchanov et al. 2019, arXiv:1906.10771, section 3.1)."""

    needs = frozenset({"gradients"})

    def scores(self, evidence: Evidence) -> Tensor:
        assert evidence.gradient is not None
        return (evidence.weight * evidence.gradient).abs()
