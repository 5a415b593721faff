"""Decoupled knowledge distillation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .base import LOSSES
from .check import check_logits, check_some_weight, check_weight
from .kd import SoftHardLoss
from .response import as_rows, kl_rows, reduce_rows


@LOSSES.register("dkd")
class DKDLoss(SoftHardLoss):
    """``soft_weight * T^2 * (target_weight * TCKD + nontarget_weight * NCKD) + hard_weight * cross_entropy``.

    TCKD is the KL of (probability of the label, rest), NCKD the KL over the other classes renormalised, so the
    knowledge in the wrong classes is not damped by a confident teacher. With ``nontarget_weight`` replaced by the
    teacher's (1 - p_label) the two sum to plain KL. ``target_weight`` and ``nontarget_weight`` are the paper's alpha and beta.

    Zhao et al. 2022, equations 6 and 7, https://arxiv.org/abs/2203.08679 (there alpha = 1, beta = 8 on CIFAR-100 and
    full cross-entropy). Needs labels and at least 2 classes.

    >>> loss = DKDLoss(temperature=4.0, nontarget_weight=8.0)
    >>> loss(student_logits, teacher_logits, labels).backward()
    """

    name = "dkd"

    def __init__(
        self,
        temperature: float = 4.0,
        soft_weight: float = 1.0,
        hard_weight: float = 1.0,
        *,
        target_weight: float = 1.0,
        nontarget_weight: float = 8.0,
        **options: object,
    ) -> None:
        super().__init__(temperature=temperature, soft_weight=soft_weight, hard_weight=hard_weight, **options)  # type: ignore[arg-type]
        self.target_weight = check_weight("DKDLoss", "target_weight", target_weight)
        self.nontarget_weight = check_weight("DKDLoss", "nontarget_weight", nontarget_weight)
        check_some_weight("DKDLoss", target_weight=self.target_weight, nontarget_weight=self.nontarget_weight)

    def soft(self, student: Tensor, teacher: Tensor, labels: Tensor | None, row_weights: Tensor | None) -> Tensor:
        check_logits("DKDLoss", student, teacher)
        if student.shape[-1] < 2:
            raise ValueError(f"DKDLoss: logits must have at least 2 classes, got {tuple(student.shape)}")
        rows = as_rows("DKDLoss", student, teacher, labels, self.ignore_index, labels_needed=True)
        assert rows.labels is not None and rows.valid is not None and self.temperature is not None
        label = torch.where(rows.valid, rows.labels, 0).unsqueeze(1)
        target_q, rest_q = split(rows.student / self.temperature, label)
        target_p, rest_p = split(rows.teacher / self.temperature, label)
        loss = self.target_weight * kl_rows(target_p, target_q) + self.nontarget_weight * kl_rows(rest_p, rest_q)
        return reduce_rows("DKDLoss", self.temperature**2 * loss, rows, row_weights, self.reduction)


def split(logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, classes) -> log-probabilities of (label, rest), (rows, 2), and of the other classes among themselves, (rows, classes)."""
    others = logits.scatter(1, label, -math.inf)
    total_of_others = others.logsumexp(1, keepdim=True)
    target = torch.log_softmax(torch.cat([logits.gather(1, label), total_of_others], dim=1), dim=1)
    return target, others - total_of_others
