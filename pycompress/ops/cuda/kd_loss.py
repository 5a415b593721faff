"""``kd_loss`` on CUDA: how a row is spread over threads and blocks, and the call.

The kernel (csrc/kd_loss/kd_loss_cuda_row.cuh) reads a row once if it fits the shared memory of one block, or of a cluster of blocks
on compute capability 9.0 and up, and writes the gradient from there; else it reads it once per sweep.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import native
from ..kd_loss_options import DIVERGENCES, REDUCTIONS, TEACHER_FORMS, Options
from . import extension

CHUNK = 8
"""Neighbouring classes that one thread works on (csrc/kd_loss/kd_loss_cuda.h)."""
MAX_THREADS = 256
MAX_CLASSES = 1 << 28
"""Positions within a row are 32-bit integers in the kernel."""
CLUSTERS = (1, 2, 4, 8)
"""Blocks per row; 8 is the largest cluster that every device with clusters runs."""
STATIC_BYTES = 1024
"""Shared memory that the kernel declares itself, rounded up."""


class Plan(NamedTuple):
    """How a row runs: ``threads`` per block, ``cluster`` blocks per row, and whether the row stays in their shared memory."""

    threads: int
    cluster: int
    on_chip: bool


def shared_limit(capability: tuple[int, int]) -> int:
    """Shared memory that one block may ask for, in bytes (CUDA programming guide, table of technical specifications)."""
    if capability in ((8, 6), (8, 9)) or capability[0] >= 12:
        return 99 * 1024
    return (163 if capability[0] == 8 else 227) * 1024


def shared_bytes(classes: int, student_size: int, teacher_size: int, ids: int, cluster: int, on_chip: bool) -> int:
    """Dynamic shared memory of a block. Sizes of elements; ``teacher_size`` 0 where the teacher is top-k or has no part."""
    chunks = _chunks(classes, cluster)
    row = chunks * CHUNK * (student_size + teacher_size) if on_chip else 0
    return row + (12 * ids + 4 * math.ceil(chunks / 4) if ids else 0)


def plan(classes: int, student_size: int, teacher_size: int, ids: int, capability: tuple[int, int]) -> Plan | None:
    """The smallest cluster whose blocks leave room for three per multiprocessor, so that one loads while another computes.

    Else the largest cluster whose blocks fit at all, else the sweeps read the row anew. None if not even the marks of a top-k
    teacher's classes fit.

    >>> plan(128256, 2, 2, 0, (9, 0))
    Plan(threads=256, cluster=8, on_chip=True)
    >>> plan(128256, 2, 2, 0, (8, 0))
    Plan(threads=256, cluster=1, on_chip=False)
    """
    clusters = CLUSTERS if capability[0] >= 9 else (1,)
    limit = shared_limit(capability) - STATIC_BYTES
    bytes_of = {c: shared_bytes(classes, student_size, teacher_size, ids, c, True) for c in clusters}
    fitting = [c for c in clusters if bytes_of[c] <= limit // 3][:1] or [c for c in clusters if bytes_of[c] <= limit][-1:]
    if not fitting and shared_bytes(classes, student_size, teacher_size, ids, 1, False) > limit:
        return None
    cluster, on_chip = (fitting[0], True) if fitting else (1, False)
    return Plan(min(MAX_THREADS, math.ceil(_chunks(classes, cluster) / 32) * 32), cluster, on_chip)


def _chunks(classes: int, cluster: int) -> int:
    """Of one block."""
    return math.ceil(math.ceil(classes / CHUNK) / cluster)


def unsupported(student: Tensor, teacher: Tensor, divergence: str, ids: int) -> str | None:
    """Why no CUDA kernel runs these arguments, or None. ``divergence``: "" if the teacher does not count; ``ids``: of a top-k one."""
    reason = extension.unsupported(student.device.index or 0)
    if reason is not None:
        return f"on {student.device}: {reason}"
    if divergence == "dist":
        return "divergence 'dist'"
    classes, capability = student.shape[-1], extension.capability(student.device.index or 0)
    size = teacher.element_size() if divergence and not ids else 0
    if classes >= MAX_CLASSES or plan(classes, student.element_size(), size, ids if divergence else 0, capability) is None:
        return f"{classes} classes" + (f" with {ids} of a top-k teacher" if ids else "")
    return None


def run(*arguments: Any, **others: Any) -> Tensor:
    """``launch`` with the extension, on the student's device and torch's current stream."""
    device = arguments[0].device
    return launch(extension.module, extension.capability(device.index or 0), extension.stream(device), *arguments, **others)


def scale_in_place(module: Any, stream: int, gradient: Tensor, upstream: Tensor) -> None:
    """``gradient *= upstream``, a scalar or one value per row; touches no memory where that is 1, without asking the device."""
    rows = gradient.view(-1, gradient.shape[-1]) if gradient.dim() != 2 else gradient
    upstream = upstream.detach().to(torch.float32).contiguous()
    module.kd_loss_scale(
        rows.shape[0], rows.shape[1], rows.stride(0), rows.data_ptr(), native.DTYPES[rows.dtype], upstream.data_ptr(), upstream.dim() > 0,
        rows.device.index or 0, stream,
    )  # fmt: skip


def scale_once(where: str, ctx: Any, gradients: Sequence[Tensor | None], upstream: Tensor) -> None:
    """``scale_in_place`` for the backward pass of an autograd function, which may run once.

    Only the device knows whether upstream is 1. A copy would cost two more passes over the gradients, and their memory again.
    """
    if getattr(ctx, "scaled", False):
        raise RuntimeError(f"{where}: on CUDA the graph can be used only once (gradients are scaled in place); pass kernel='reference'")
    ctx.scaled = True
    for gradient in gradients:
        if gradient is not None:
            scale_in_place(extension.module, extension.stream(gradient.device), gradient, upstream)


def launch(
    module: Any,
    capability: tuple[int, int],
    stream: int,
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    row_weights: Tensor | None,
    teacher_ids: Tensor | None,
    class_map: Tensor | None,
    common: int,
    options: Options,
    gradient: Tensor | None,
    batch: int,
    scale: Tensor | None = None,
    how: Plan | None = None,
) -> Tensor:
    """Run the kernels on ``stream`` and return the loss: a scalar, or (rows) for reduction "none".

    - ``student``, ``teacher``: (rows, classes) with contiguous rows; labels and indices int64, weights float32, all contiguous
    - ``gradient``: (rows, classes) with contiguous rows, may be the student itself; None for the loss alone
    - ``scale``: one float32 on the device, what the sum is multiplied with instead of what the reduction says
    - ``how``: a plan instead of ``plan``'s
    """
    rows, classes = student.shape
    device = student.device
    ids = 0 if teacher_ids is None else teacher_ids.shape[1]
    teacher_size = 0 if teacher is None or ids else teacher.element_size()
    chosen = how or plan(classes, student.element_size(), teacher_size, ids, capability)
    assert chosen is not None  # unsupported() has said so
    row_loss = torch.empty(rows, dtype=torch.float32, device=device)
    loss = row_loss if options.reduction == "none" else torch.empty((), dtype=torch.float32, device=device)
    given = scale is not None
    if scale is None:
        scale = torch.empty((), dtype=torch.float32, device=device)
    _options(module, options)(
        rows, classes, student.data_ptr(), student.stride(0), native.DTYPES[student.dtype],
        *((0, 0, 0, 0) if teacher is None else (teacher.data_ptr(), teacher.stride(0), teacher.shape[1], native.DTYPES[teacher.dtype])),
        0 if teacher_ids is None else teacher_ids.data_ptr(), 0 if class_map is None else class_map.data_ptr(), common,
        0 if labels is None else labels.data_ptr(), 0 if row_weights is None else row_weights.data_ptr(), batch,
        row_loss.data_ptr(), loss.data_ptr(), scale.data_ptr(), given,
        *((0, 0) if gradient is None else (gradient.data_ptr(), gradient.stride(0))),
        *chosen, device.index or 0, stream,
    )  # fmt: skip
    return loss


@lru_cache(maxsize=256)
def _options(module: ModuleType, o: Options):
    return module.KdLossCudaPlan(
        TEACHER_FORMS[o.teacher_form], o.tail, o.ignore_index, DIVERGENCES[o.divergence], o.temperature, o.soft_weight,
        o.hard_weight, o.beta, *o.part_weights, o.label_smoothing, REDUCTIONS[o.reduction],
    )  # fmt: skip
