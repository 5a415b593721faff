"""What the losses on logits share beside the fused op :mod:`pycompress.ops.kd_loss`: rows, reductions, standardized logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .check import at_least_float32, check_between, check_labels, check_logits

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")


class Rows(NamedTuple):
    """Logits as (rows, classes) in at least float32, with ignored rows blanked out."""

    student: Tensor
    teacher: Tensor
    labels: Tensor | None
    valid: Tensor | None
    shape: torch.Size


def as_rows(
    where: str, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None, ignore_index: int, *, labels_needed: bool
) -> Rows:
    """Check the tensors and flatten them. Ignored rows become zero logits, so that a NaN in padding reaches no gradient."""
    check_logits(where, student_logits, teacher_logits)
    if labels is not None:
        check_labels(where, labels, student_logits, ignore_index)
    elif labels_needed:
        raise ValueError(
            f"{where}: labels must be given here (only a loss with hard_weight=0 and no use for labels goes without), got None"
        )
    classes = student_logits.shape[-1]
    student = at_least_float32(student_logits).reshape(-1, classes)
    teacher = at_least_float32(teacher_logits.detach()).reshape(-1, classes).to(student.dtype)
    if labels is None:
        return Rows(student, teacher, None, None, student_logits.shape[:-1])
    flat = labels.reshape(-1).long()
    valid = flat != ignore_index
    keep = valid.unsqueeze(1)
    return Rows(torch.where(keep, student, 0.0), torch.where(keep, teacher, 0.0), flat, valid, student_logits.shape[:-1])


def reduce_rows(where: str, loss: Tensor, rows: Rows, row_weights: Tensor | None, reduction: str) -> Tensor:
    """One loss per row -> what ``reduction`` asks for. See :func:`~pycompress.ops.kd_loss`."""
    if rows.valid is not None:
        loss = torch.where(rows.valid, loss, 0.0)
    count: Tensor | int = loss.shape[0] if rows.valid is None else rows.valid.sum()
    if row_weights is not None:
        weights = check_row_weights(where, row_weights, rows, loss)
        loss = loss * weights
        count = weights.sum() if rows.valid is None else torch.where(rows.valid, weights, 0.0).sum()
    if reduction == "none":
        return loss.reshape(rows.shape)
    if reduction == "sum":
        return loss.sum()
    if reduction == "batchmean":
        return loss.sum() / rows.shape[0]
    # no .item(): an accelerator must not wait for the count
    return loss.sum() / (count if isinstance(count, int) else torch.where(count > 0, count, 1))


def check_row_weights(where: str, row_weights: Tensor, rows: Rows, loss: Tensor) -> Tensor:
    if not isinstance(row_weights, Tensor) or not row_weights.dtype.is_floating_point:
        got = row_weights.dtype if isinstance(row_weights, Tensor) else type(row_weights).__name__
        raise TypeError(f"{where}: row_weights must be a floating-point tensor, got {got}")
    if row_weights.shape != rows.shape:
        raise ValueError(f"{where}: row_weights must have shape {tuple(rows.shape)}, got {tuple(row_weights.shape)}")
    if row_weights.device.type == "cpu" and not torch.compiler.is_compiling() and not bool((row_weights >= 0).all()):
        raise ValueError(f"{where}: row_weights must not be negative or NaN, got {float(row_weights.min())}")
    return row_weights.reshape(-1).to(loss)


def check_divergence(where: str, divergence: str, beta: float) -> None:
    if divergence not in DIVERGENCES:
        raise ValueError(f"{where}: divergence must be one of {', '.join(DIVERGENCES)}, got {divergence!r}")
    check_between(where, "beta", beta, 0.0, 1.0)


def kl_rows(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) per row from log-probabilities. A class with a = 0 contributes 0 whatever b is, and gets no gradient."""
    a = log_a.exp()
    difference = torch.where(a > 0, log_a - log_b, 0.0)  # -inf - (-inf) is NaN and must not meet the product's backward
    return (a * difference).sum(-1)


def standardize(logits: Tensor) -> Tensor:
    """Z-score of each row, ``(x - mean) / (std + 1e-7)``, over its finite entries; minus infinity stays.

    Sun et al. 2024, "Logit Standardization in Knowledge Distillation", section 4.2, https://arxiv.org/abs/2403.01427.
    ``logits``: (..., classes). The standard deviation divides by the number of classes (not one less), as the paper does.

    >>> standardize(torch.tensor([[1.0, 3.0]]))
    tensor([[-1.0000,  1.0000]])
    """
    logits = at_least_float32(logits)
    finite = torch.isfinite(logits) | torch.isnan(logits)
    count = finite.sum(-1, keepdim=True).clamp_min(1)
    known = torch.where(finite, logits, 0.0)
    centred = torch.where(finite, known - known.sum(-1, keepdim=True) / count, 0.0)
    variance = centred.square().sum(-1, keepdim=True) / count
    scaled = centred / (variance.clamp_min(1e-30).sqrt() + 1e-7)  # clamp: the root has no gradient at 0
    return torch.where(finite, scaled, logits)
