"""Decoupled knowledge distillation."""

from __future__ import annotations

from typing import Any

from .base import LOSSES
from .check import check_some_weight, check_weight
from .kd import SoftHardLoss


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

    def divergence_options(self) -> dict[str, Any]:
        return {"divergence": "dkd", "part_weights": (self.target_weight, self.nontarget_weight)}
