"""DIST: match how probabilities correlate instead of their values."""

from __future__ import annotations

from typing import Any

from .base import LOSSES
from .check import check_reduction, check_some_weight, check_weight
from .kd import SoftHardLoss


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

    def divergence_options(self) -> dict[str, Any]:
        return {"divergence": "dist", "part_weights": (self.inter_weight, self.intra_weight)}
