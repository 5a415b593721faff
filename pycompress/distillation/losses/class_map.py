"""Vocabularies of different size: which class of the teacher belongs to which class of the student."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

ClassMap = Tensor | str | None
"""None: the same classes. "prefix": the leading ones. A tensor (student classes,): the teacher's class of each, -1 for none."""


def keep_class_map(module: nn.Module, class_map: ClassMap) -> None:
    """``module.class_map``, checked; a tensor as a buffer that moves with the module and is not part of its ``state_dict``."""
    where = type(module).__name__
    if isinstance(class_map, Tensor):
        if class_map.dtype.is_floating_point or class_map.dtype.is_complex or class_map.dtype == torch.bool or class_map.dim() != 1:
            raise TypeError(f"{where}: class_map must be integers (classes,), got {class_map.dtype} of shape {tuple(class_map.shape)}")
        module.register_buffer("class_map", class_map, persistent=False)
    elif class_map is None or (isinstance(class_map, str) and class_map == "prefix"):
        module.class_map = class_map  # type: ignore[assignment]
    else:
        raise ValueError(f"{where}: class_map must be None, 'prefix' or a tensor of teacher classes, got {class_map!r}")


def shown(class_map: ClassMap) -> str | None:
    return f"<{len(class_map)} classes>" if isinstance(class_map, Tensor) else class_map


def in_student_classes(teacher_logits: Tensor, class_map: ClassMap, classes: int) -> Tensor:
    """Teacher logits with the student's class numbers, minus infinity where the teacher has no such class."""
    if class_map is None:
        return teacher_logits
    if isinstance(class_map, str):
        return teacher_logits[..., :classes]
    found = teacher_logits.index_select(-1, class_map.clamp_min(0).long())
    return found.masked_fill(class_map < 0, -math.inf)
