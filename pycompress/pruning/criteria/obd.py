"""Optimal Brain Damage: the second-order change of the loss, with a diagonal Hessian."""

from __future__ import annotations

from torch import Tensor

from .base import CRITERIA, Criterion, Evidence


@CRITERIA.register("obd")
class OptimalBrainDamage(Criterion):
    """``h * w^2 / 2`` (LeCun et al. 1989, Optimal Brain Damage, eq. 5), where the diagonal Hessian h is the empirical Fisher.

    h = mean over batches of (dL/dw)^2. With batches of one sample that is the textbook empirical Fisher; larger batches average
    gradients first and so give a smaller h, with nearly the same order (as in WoodFisher, arXiv:2004.14340, section 3).
    """

    needs = frozenset({"gradients"})

    def scores(self, evidence: Evidence) -> Tensor:
        assert evidence.squared_gradient is not None
        return evidence.squared_gradient * evidence.weight.square() / 2
