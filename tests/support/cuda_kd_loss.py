"""kd_loss's CUDA kernels on the host: the binding built under the emulator, and a call that looks like ``kd_loss``."""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from pycompress.ops.cuda.kd_loss import Plan, launch
from pycompress.ops.kd_loss_options import check_options, check_tensors
from support.cuda_emulation import ALIGNED, ORDERS, extension
from support.guard import guarded

SOURCES = ("csrc/kd_loss/kd_loss_cuda.cu", "csrc/bindings/bind_kd_loss_cuda.cpp", "tests/cuda/kd_loss_module.cpp")


@cache
def emulated(arch: int = 90) -> ModuleType:
    return extension("_C_kd_loss", *SOURCES, arch=arch, flags=ALIGNED)


def emulated_loss_and_gradient(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float,
    soft_weight: float,
    hard_weight: float,
    row_weights: Tensor | None = None,
    teacher_ids: Tensor | None = None,
    class_map: Tensor | str | None = None,
    arch: int = 90,
    how: Plan | None = None,
    inplace: bool = False,
    scale: Tensor | None = None,
    order: str = "forward",
    **others: Any,
) -> tuple[Tensor, Tensor]:
    """Loss and gradient; every tensor that the kernels see ends at a guard page."""
    names = ("divergence", "beta", "part_weights", "label_smoothing", "ignore_index", "reduction", "teacher_form", "tail")
    defaults = ("forward_kl", None, None, 0.0, -100, "mean", "logits", False)
    given = [others.pop(name, default) for name, default in zip(names, defaults, strict=True)]
    assert not others, others
    options = check_options("kd_loss", temperature, soft_weight, hard_weight, *given)
    common = check_tensors("kd_loss", options, student, teacher, labels, row_weights, teacher_ids, class_map)
    mapped = class_map if isinstance(class_map, Tensor) else None
    student, soft = guarded(student), soft_weight > 0
    gradient = student if inplace else guarded(torch.full_like(student, float("nan")))
    module = emulated(arch)
    module.set_order(ORDERS[order])
    loss = launch(
        module, (arch // 10, arch % 10), 0, student, guarded(teacher) if soft else None,
        *(None if t is None else guarded(t) for t in (labels, row_weights)),
        *(None if t is None or not soft else guarded(t) for t in (teacher_ids, mapped)),
        common if soft else 0, options, gradient, student.shape[0], scale, how,
    )  # fmt: skip
    return loss, gradient
