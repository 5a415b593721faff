"""FPGM: filters close to all the others can be replaced by them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from .base import CRITERIA, ChannelCriterion, Evidence


@CRITERIA.register("geometric_median")
class GeometricMedian(ChannelCriterion):
    """Sum of a filter's Euclidean distances to the other filters of its layer (He et al. 2019, arXiv:1811.00250, eq. 6).

    The filters nearest to the geometric median have the lowest sum. Looks at output filters only.
    """

    def channel_scores(self, module: nn.Module, side: str, evidence: Evidence | None) -> Tensor | None:
        if evidence is None or side != "out":
            return None
        weight = evidence.weight
        if isinstance(module, _ConvTransposeNd) and module.groups == 1:
            weight = weight.transpose(0, 1)
        filters = weight.flatten(1)
        # The direct difference: the shortcut through a matrix product loses the digits of nearly equal filters.
        return torch.cdist(filters, filters, compute_mode="donot_use_mm_for_euclid_dist").sum(1)
