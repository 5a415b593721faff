"""Magnitude: small weights matter little (Han et al. 2015, arXiv:1506.02626)."""

from __future__ import annotations

from torch import Tensor

from .base import CRITERIA, Criterion, Evidence


@CRITERIA.register("magnitude")
@CRITERIA.register("magnitude_l1")
class MagnitudeL1(Criterion):
    """``|w|``; a channel's score is its L1 norm (Li et al. 2017, arXiv:1608.08710, section 3.1)."""

    def scores(self, evidence: Evidence) -> Tensor:
        return evidence.weight.abs()


@CRITERIA.register("magnitude_l2")
class MagnitudeL2(Criterion):
    """``w^2``; the same order as L1 for single weights, a channel's score is its squared L2 norm."""

    def scores(self, evidence: Evidence) -> Tensor:
        return evidence.weight.square()
