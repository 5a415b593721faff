"""Correlation congruence: kernel matrices of the batch should agree."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import LOSSES
from .check import check_between
from .relation import RelationLoss, safe_normalize


@LOSSES.register("correlation")
class CorrelationCongruenceLoss(RelationLoss):
    """``|| K_teacher - K_student ||_F^2 / N^2``, K = Gaussian kernel of the unit-length features, by its Taylor series.

    ``K(x, y) = sum_{p=0}^{order} exp(-2 gamma) (2 gamma)^p / p! (x . y)^p``, the expansion of ``exp(-gamma ||x - y||^2)``
    up to ``order``. Features (N, ...) of any widths.

    Peng et al. 2019, equations 8 to 11, https://arxiv.org/abs/1904.01802 (there gamma = 0.4, order = 2).

    >>> CorrelationCongruenceLoss()(torch.randn(8, 16), torch.randn(8, 64)).backward()
    """

    name = "correlation"

    def __init__(self, gamma: float = 0.4, order: int = 2) -> None:
        super().__init__()
        self.gamma = check_between("CorrelationCongruenceLoss", "gamma", gamma, 1e-6, 100.0)
        if isinstance(order, bool) or not isinstance(order, int) or not 1 <= order <= 20:
            raise ValueError(f"CorrelationCongruenceLoss: order must be an integer in 1..20, got {order!r}")
        self.order = order

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        return F.mse_loss(self.kernel(student), self.kernel(teacher))

    def kernel(self, x: Tensor) -> Tensor:
        """(N, D) -> (N, N)."""
        x = safe_normalize(x)
        cosine = x @ x.T
        power, total = torch.ones_like(cosine), torch.ones_like(cosine)
        for p in range(1, self.order + 1):
            power = power * cosine * (2 * self.gamma / p)
            total = total + power
        return math.exp(-2 * self.gamma) * total

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}, order={self.order}"
