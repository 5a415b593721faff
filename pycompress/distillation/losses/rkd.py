"""Relational knowledge distillation: distances and angles between samples."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import LOSSES
from .check import check_some_weight, check_weight
from .relation import RelationLoss, safe_normalize


@LOSSES.register("rkd")
class RKDLoss(RelationLoss):
    """``distance_weight * Huber(pairwise distances / their mean) + angle_weight * Huber(cosines of all triplets)``.

    Features (N, ...) of any widths. The angle term needs N^3 memory: 256 samples are 64 MiB in float32.
    The defaults are the paper's for metric learning (1 and 2); for classification it uses 25 and 50.

    Park et al. 2019, equations 5 to 9, https://arxiv.org/abs/1904.05068.

    >>> RKDLoss()(torch.randn(8, 16), torch.randn(8, 64)).backward()
    """

    name = "rkd"

    def __init__(self, distance_weight: float = 1.0, angle_weight: float = 2.0) -> None:
        super().__init__()
        self.distance_weight = check_weight("RKDLoss", "distance_weight", distance_weight)
        self.angle_weight = check_weight("RKDLoss", "angle_weight", angle_weight)
        check_some_weight("RKDLoss", distance_weight=self.distance_weight, angle_weight=self.angle_weight)

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        total = student.sum() * 0.0
        if self.distance_weight > 0:
            total = total + self.distance_weight * F.smooth_l1_loss(relative_distances(student), relative_distances(teacher))
        if self.angle_weight > 0:
            total = total + self.angle_weight * F.smooth_l1_loss(angles(student), angles(teacher))
        return total

    def extra_repr(self) -> str:
        return f"distance_weight={self.distance_weight}, angle_weight={self.angle_weight}"


def relative_distances(x: Tensor) -> Tensor:
    """(N, D) -> (N, N): Euclidean distances divided by the mean of those that are not 0."""
    # exact differences: the faster Gram-matrix form loses the distances of close samples
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    mean = distance.sum() / (distance > 0).sum().clamp_min(1)
    return distance / torch.where(mean > 0, mean, 1.0)


def angles(x: Tensor) -> Tensor:
    """(N, D) -> (N, N, N): [j, i, k] is the cosine of the angle at sample j between samples i and k."""
    directions = safe_normalize(x.unsqueeze(0) - x.unsqueeze(1))
    return directions @ directions.transpose(1, 2)
