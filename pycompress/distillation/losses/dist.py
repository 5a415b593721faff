"""DIST: match how probabilities correlate instead of their values."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import LOSSES
from .check import check_reduction, check_some_weight, check_weight
from .kd import SoftHardLoss
from .response import as_rows


@LOSSES.register("dist")
class DISTLoss(SoftHardLoss):
    """``soft_weight * T^2 * (inter_weight * inter + intra_weight * intra) + hard_weight * cross_entropy``.

    inter: 1 - Pearson correlation of student and teacher probabilities over the classes, mean over rows. intra: the
    same over the rows of the batch, mean over classes (0 for a batch of one row). A correlation is blind to scale and shift, so a
    stronger teacher is easier to follow. ``inter_weight`` and ``intra_weight`` are the paper's beta and gamma.

    Huang et al. 2022, equations 5 to 9, https://arxiv.org/abs/2205.10536. ``reduction`` is "mean" only, because intra
    looks at all rows together; rows with ``ignore_index`` are left out of both. Labels are optional when ``hard_weight`` is 0.

    >>> loss = DISTLoss(temperature=1.0, inter_weight=1.0, intra_weight=1.0)
    >>> loss(student_logits, teacher_logits, labels).backward()
    """

    name = "dist"

    def __init__(
        self,
        temperature: float = 1.0,
        soft_weight: float = 1.0,
        hard_weight: float = 1.0,
        *,
        inter_weight: float = 1.0,
        intra_weight: float = 1.0,
        **options: object,
    ) -> None:
        super().__init__(temperature=temperature, soft_weight=soft_weight, hard_weight=hard_weight, **options)  # type: ignore[arg-type]
        check_reduction("DISTLoss", self.reduction, ("mean",))
        self.inter_weight = check_weight("DISTLoss", "inter_weight", inter_weight)
        self.intra_weight = check_weight("DISTLoss", "intra_weight", intra_weight)
        check_some_weight("DISTLoss", inter_weight=self.inter_weight, intra_weight=self.intra_weight)

    def soft(self, student: Tensor, teacher: Tensor, labels: Tensor | None, row_weights: Tensor | None) -> Tensor:
        if row_weights is not None:
            raise ValueError("DISTLoss: row_weights must be None (the loss compares rows with each other), got a tensor")
        rows = as_rows("DISTLoss", student, teacher, labels, self.ignore_index, labels_needed=False)
        assert self.temperature is not None
        q, p = (rows.student / self.temperature).softmax(-1), (rows.teacher / self.temperature).softmax(-1)
        if rows.valid is not None:
            q, p = q[rows.valid], p[rows.valid]
        total = q.sum() * 0.0  # a batch without valid rows gives 0 that still has a gradient
        if self.inter_weight > 0 and q.shape[0] > 0:
            total = total + self.inter_weight * pearson_distance(q, p).mean()
        if self.intra_weight > 0 and q.shape[0] > 1:
            total = total + self.intra_weight * pearson_distance(q.T, p.T).mean()
        return self.temperature**2 * total


def pearson_distance(x: Tensor, y: Tensor) -> Tensor:
    """1 - correlation of each row of ``x`` with the same row of ``y``. ``x``, ``y``: (rows, n) -> (rows,).

    A constant row (to 1e-5 of its size, which is rounding noise) has no correlation: distance 1 without gradient, or
    0 if both are constant.
    """
    unit_x, varies_x = centred_unit(x)
    unit_y, varies_y = centred_unit(y)
    return torch.where(varies_x | varies_y, 1.0 - (unit_x * unit_y).sum(1), 0.0)


def centred_unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows minus their mean, at unit length, 0 for constant rows; and which rows vary."""
    centred = x - x.mean(1, keepdim=True)
    square = centred.square().sum(1, keepdim=True)
    varies = square > 1e-10 * x.square().sum(1, keepdim=True)
    unit = torch.where(varies, centred / torch.where(varies, square, 1.0).sqrt(), 0.0)
    return unit, varies.squeeze(1)
