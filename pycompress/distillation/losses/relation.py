"""What the relation losses share: features of any shape become one vector per sample, widths need not match."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import PairLoss
from .check import at_least_float32, check_features


class RelationLoss(PairLoss):
    """Compares how the samples of one batch relate to each other; subclasses write ``compare``.

    ``student`` (N, ...), ``teacher`` (N, ...): flattened to (N, D) each, the D may differ, so no adapter is needed.
    Relations exist within one batch: under data-parallel training within each process's share.
    """

    kind = "relation"

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        check_features(type(self).__name__, student, teacher)
        student = at_least_float32(student).flatten(1)
        teacher = at_least_float32(teacher.detach()).flatten(1).to(student.dtype)
        return self.compare(student, teacher)

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of two matrices (N, D_student), (N, D_teacher)."""
        raise NotImplementedError


def safe_normalize(x: Tensor) -> Tensor:
    """Unit vectors along the last dimension; vectors shorter than 1e-6 become 0 and get no gradient.

    ``F.normalize`` would multiply the gradient of such a vector (two samples with the same feature) by up to 1e12.
    """
    square = x.square().sum(-1, keepdim=True)
    usable = square > 1e-12
    return torch.where(usable, x / torch.where(usable, square, 1.0).sqrt(), 0.0)
