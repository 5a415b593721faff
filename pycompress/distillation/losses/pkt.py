"""Probabilistic knowledge transfer: who is near whom, as a distribution."""

from __future__ import annotations

from torch import Tensor

from .base import LOSSES
from .relation import RelationLoss, safe_normalize


@LOSSES.register("pkt")
class PKTLoss(RelationLoss):
    """Mean over pairs of ``p log(p / q)``, p and q = teacher's and student's probability that i picks j as a neighbour.

    The probabilities are (cosine + 1) / 2, normalised over each row. Features (N, ...) of any widths.

    Passalis and Tefas 2018, equations 4 to 8, https://arxiv.org/abs/1803.10837; mean as in the authors' code.

    >>> PKTLoss()(torch.randn(8, 16), torch.randn(8, 64)).backward()
    """

    name = "pkt"

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        p, q = neighbours(teacher), neighbours(student)
        # clamped rather than shifted by a small number, so that equal models have exactly no gradient
        return (p * (p.clamp_min(1e-7).log() - q.clamp_min(1e-7).log())).mean()


def neighbours(x: Tensor) -> Tensor:
    """(N, D) -> (N, N), rows sum to 1."""
    x = safe_normalize(x)
    similarity = (x @ x.T + 1) / 2
    return similarity / similarity.sum(1, keepdim=True)
