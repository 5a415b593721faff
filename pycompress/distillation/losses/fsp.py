"""FSP: the flow from one layer to a later one, as a matrix."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import LOSSES, PairLoss
from .check import at_least_float32, check_features


@LOSSES.register("fsp")
class FSPLoss(PairLoss):
    """Squared Frobenius distance of FSP matrices, ``G[i, j] = mean_{h,w} early[i, h, w] * late[j, h, w]``, mean over the batch.

    One pair names two modules of each model: ``FeatureLoss({("conv1", "conv2"): ("layer1", "layer2")}, loss="fsp")``;
    ``forward`` takes (early, late) tuples of (N, C, H, W) maps. Student and teacher need the same channel counts; the
    larger of the two maps is max-pooled to the smaller.

    Yim et al. 2017, equations 1 and 2, "A Gift from Knowledge Distillation" (CVPR 2017).

    >>> early, late = torch.randn(8, 16, 14, 14), torch.randn(8, 32, 7, 7)
    >>> FSPLoss()((early, late), (early, late))
    tensor(0.)
    """

    name = "fsp"
    arity = 2

    def forward(self, student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]) -> Tensor:
        for name, pair in (("student", student), ("teacher", teacher)):
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise TypeError(f"FSPLoss: {name} must be a pair (early, late) of feature maps, got {type(pair).__name__}")
        for mine, theirs in zip(student, teacher, strict=True):
            check_features("FSPLoss", mine, theirs, min_dim=4)
            if mine.dim() != 4 or theirs.dim() != 4 or mine.shape[1] != theirs.shape[1]:
                raise ValueError(
                    "FSPLoss: student and teacher features must be (N, C, H, W) with the same channel counts, "
                    f"got {tuple(mine.shape)} and {tuple(theirs.shape)}"
                )
        difference = fsp_matrix(*student) - fsp_matrix(*(x.detach() for x in teacher))
        return difference.square().sum((1, 2)).mean()


def fsp_matrix(early: Tensor, late: Tensor) -> Tensor:
    """(N, C1, H1, W1), (N, C2, H2, W2) -> (N, C1, C2)."""
    early, late = at_least_float32(early), at_least_float32(late)
    size = [min(a, b) for a, b in zip(early.shape[2:], late.shape[2:], strict=True)]
    early, late = (F.adaptive_max_pool2d(x, size) if list(x.shape[2:]) != size else x for x in (early, late))
    return torch.einsum("nihw,njhw->nij", early, late) / (size[0] * size[1])
