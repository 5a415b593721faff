"""BatchNorm scale: a channel that is scaled down contributes little."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .base import CRITERIA, ChannelCriterion, Evidence


@CRITERIA.register("bn_scale")
class BatchNormScale(ChannelCriterion):
    """``|gamma|`` of the BatchNorm layers that lose the channel (Network Slimming, Liu et al. 2017, arXiv:1708.06519, section 3).

    Made for networks trained with an L1 penalty on gamma. Every group of layers pruned together needs a BatchNorm with weights.
    """

    def channel_scores(self, module: nn.Module, side: str, evidence: Evidence | None) -> Tensor | None:
        if isinstance(module, _BatchNorm) and module.affine:
            return module.weight.detach().float().abs()
        return None
