"""Attention transfer: the student should look where the teacher looks."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .base import LOSSES, PairLoss
from .check import at_least_float32, check_between, check_features


@LOSSES.register("attention_transfer")
class AttentionTransferLoss(PairLoss):
    """Mean squared difference of normalised attention maps, ``normalize(flatten(mean_c |A_c|^power))``.

    Features: (N, C, H, W) maps, any channel counts. Maps of different sizes are average-pooled to the smaller one.

    Zagoruyko and Komodakis 2017, section 3.1, https://arxiv.org/abs/1612.03928, as in the authors' code: mean of
    squares over all positions (the paper's equation 2 writes the norm itself), channels averaged.

    >>> AttentionTransferLoss()(torch.randn(8, 16, 7, 7), torch.randn(8, 64, 7, 7)).backward()
    """

    name = "attention_transfer"

    def __init__(self, power: float = 2.0) -> None:
        super().__init__()
        self.power = check_between("AttentionTransferLoss", "power", power, 1.0, 16.0)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        check_features("AttentionTransferLoss", student, teacher, min_dim=4)
        if student.dim() != 4 or teacher.dim() != 4:
            raise ValueError(f"AttentionTransferLoss: features must be (N, C, H, W), got {tuple(student.shape)} and {tuple(teacher.shape)}")
        maps = [self.attention(at_least_float32(x)) for x in (student, teacher.detach())]
        size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
        flat = [F.normalize(F.adaptive_avg_pool2d(x, size).flatten(1), eps=1e-8) for x in maps]
        return F.mse_loss(flat[0], flat[1].to(flat[0].dtype))

    def attention(self, features: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, 1, H, W)."""
        return features.abs().pow(self.power).mean(1, keepdim=True)

    def extra_repr(self) -> str:
        return f"power={self.power}"
