"""Similarity-preserving distillation: inputs that excite the teacher alike should excite the student alike."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .base import LOSSES
from .relation import RelationLoss, safe_normalize


@LOSSES.register("similarity")
class SimilarityPreservingLoss(RelationLoss):
    """``|| G_teacher - G_student ||_F^2 / N^2``, G = Gram matrix of the batch with rows of unit length.

    Features (N, ...) of any widths. Tung and Mori 2019, equations 2 to 4, https://arxiv.org/abs/1907.09682.

    >>> SimilarityPreservingLoss()(torch.randn(8, 16, 7, 7), torch.randn(8, 64)).backward()
    """

    name = "similarity"

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        return F.mse_loss(safe_normalize(student @ student.T), safe_normalize(teacher @ teacher.T))
