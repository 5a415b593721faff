"""FitNets hints: the student's feature, through a learnable adapter, should equal the teacher's."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .base import LOSSES, PairLoss
from .check import at_least_float32, check_features


@LOSSES.register("hint")
class HintLoss(PairLoss):
    """Mean squared error between adapted student features and teacher features.

    Features are (N, C, *spatial) with two or more spatial dimensions, or (N, ..., C) with up to three dimensions
    (vectors, token sequences). Where the widths C differ, the student's are mapped by a learnable adapter: a 1x1
    convolution, or a linear layer over the last dimension. Student maps of another spatial size are average-pooled
    (or replicated) to the teacher's; the lengths of sequences must agree.

    ``student_width``, ``teacher_width``: give both to make the adapter at once; else :meth:`prepare` makes it
    (``Distiller.fit`` and ``Distiller.prepare`` call that).

    Romero et al. 2015, equation 3, https://arxiv.org/abs/1412.6550 (mean instead of half the sum of squares).

    >>> loss = HintLoss(student_width=16, teacher_width=64)
    >>> loss(torch.randn(8, 16, 7, 7), torch.randn(8, 64, 7, 7)).backward()
    """

    name = "hint"

    def __init__(self, student_width: int | None = None, teacher_width: int | None = None) -> None:
        super().__init__()
        if (student_width is None) != (teacher_width is None):
            raise ValueError("HintLoss: give both student_width and teacher_width, or neither")
        for name, width in (("student_width", student_width), ("teacher_width", teacher_width)):
            if width is not None and (isinstance(width, bool) or not isinstance(width, int) or width < 1):
                raise ValueError(f"HintLoss: {name} must be a positive integer, got {width!r}")
        self.adapter: nn.Module | None = None
        self._prepared = False
        if student_width is not None and teacher_width is not None:
            self._build(student_width, teacher_width)

    @property
    def is_prepared(self) -> bool:
        return self._prepared

    def prepare(self, student: Tensor, teacher: Tensor) -> None:
        check_features("HintLoss", student, teacher)
        if not self._prepared:
            self._build(width(student), width(teacher))
            self.to(student.device)

    def _build(self, student_width: int, teacher_width: int) -> None:
        if student_width != teacher_width:
            self.adapter = nn.Linear(student_width, teacher_width, bias=False)
        self._prepared = True

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        check_features("HintLoss", student, teacher)
        if student.dim() != teacher.dim():
            raise ValueError(
                f"HintLoss: student and teacher features must have the same number of dimensions, "
                f"got {tuple(student.shape)} and {tuple(teacher.shape)}"
            )
        student, teacher = at_least_float32(student), at_least_float32(teacher.detach())
        student = resize(student, teacher)
        if self.adapter is not None:
            student = self._adapt(student)
        elif width(student) != width(teacher):
            raise RuntimeError(
                f"HintLoss: features of widths {width(student)} and {width(teacher)} need an adapter; "
                "pass student_width and teacher_width, or call Distiller.prepare(batch) before making the optimizer"
            )
        if student.shape != teacher.shape:
            raise ValueError(
                f"HintLoss: adapted student features must have the teacher's shape {tuple(teacher.shape)}, got {tuple(student.shape)}"
            )
        return F.mse_loss(student, teacher.to(student.dtype))

    def _adapt(self, student: Tensor) -> Tensor:
        assert self.adapter is not None
        if not is_map(student):
            return self.adapter(student)
        return self.adapter(student.movedim(1, -1)).movedim(-1, 1)  # a 1x1 convolution for any number of spatial dimensions


def is_map(features: Tensor) -> bool:
    """Whether features are (N, C, *spatial) rather than (N, ..., C)."""
    return features.dim() >= 4


def width(features: Tensor) -> int:
    return features.shape[1] if is_map(features) else features.shape[-1]


def resize(student: Tensor, teacher: Tensor) -> Tensor:
    """Student maps (N, C, H, W) or (N, C, D, H, W) at the teacher's spatial size; other features unchanged."""
    size = teacher.shape[2:]
    if not is_map(student) or student.shape[2:] == size:
        return student
    pool = {2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}.get(len(size))
    if pool is None:
        raise ValueError(
            f"features with {len(size)} spatial dimensions must have equal sizes, got {tuple(student.shape)}, {tuple(teacher.shape)}"
        )
    return pool(student, list(size))  # type: ignore[arg-type]
