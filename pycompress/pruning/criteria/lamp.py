"""LAMP: magnitude made comparable between layers."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import CRITERIA, Criterion, Evidence


@CRITERIA.register("lamp")
class Lamp(Criterion):
    """``w_u^2 / sum of w_v^2 over all v with |w_v| >= |w_u|`` (Lee et al. 2021, arXiv:2010.07611, eq. 4).

    In one layer the order is that of magnitude; it is made for ``scope="global"``, where it keeps the last weights of thin layers.
    """

    def scores(self, evidence: Evidence) -> Tensor:
        squares = evidence.weight.double().square().flatten()  # a running sum over millions of terms
        ascending, order = torch.sort(squares, stable=True)
        not_smaller = ascending.flip(0).cumsum(0).flip(0)
        lamp = torch.where(ascending > 0, ascending / not_smaller, 0.0)  # 0 / 0 in a layer of zeros
        return torch.empty_like(lamp).scatter_(0, order, lamp).view_as(evidence.weight).float()
