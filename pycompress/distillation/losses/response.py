"""Losses on logits, as functions: what the fused op computes, written for reading.

For one row with student logits s, teacher logits t, label y and temperature T:

    p = softmax(t / T), q = softmax(s / T)
    loss = soft_weight * T^2 * D(p, q) + hard_weight * CE(softmax(s), y)

    forward_kl   D = KL(p || q) = sum p (log p - log q)      gradient of T^2 D in s: T (q - p)
    reverse_kl   D = KL(q || p) = sum q (log q - log p)      gradient: T q ((log q - log p) - D)
    jsd          D = beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q

T^2 keeps the soft gradients at the size of the hard ones when T changes (Hinton et al. 2015, section 2.1,
https://arxiv.org/abs/1503.02531). It is always there, and nothing is ever divided by the number of classes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .check import (
    at_least_float32,
    check_between,
    check_labels,
    check_logits,
    check_reduction,
    check_some_weight,
    check_temperature,
    check_weight,
)

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float,
    soft_weight: float,
    hard_weight: float,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    row_weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """``soft_weight * T^2 * D(teacher, student) + hard_weight * cross_entropy(student, labels)``.

    ``student_logits``, ``teacher_logits``: (..., classes), floating point; the teacher gets no gradient. Half precision
    is computed and returned in float32. Minus infinity is fine (a masked class); reverse KL is then infinite, by
    definition, where only the teacher masks a class. A NaN teacher gives NaN.
    ``labels``: (...) integers, needed when ``hard_weight`` > 0. Rows whose label is ``ignore_index`` count in neither
    term, even if their logits are NaN.
    ``divergence``: "forward_kl", "reverse_kl" or "jsd"; ``beta`` belongs to "jsd" and lies in [0, 1]. The ends are forward
    KL (0) and reverse KL (1) by convention: the formula itself is 0 there.
    ``row_weights``: (...), one factor per row, not negative.
    ``reduction``: "none" gives one value per row, shape (...), ignored rows 0; "sum"; "mean" divides by the number of
    rows that are not ignored (with ``row_weights``, by their sum); "batchmean" divides by the size of the first
    dimension, ignored rows included, like ``torch.nn.KLDivLoss``. Without a single valid row the loss is 0 with gradient 0.

    Equal to (without ignored rows)
    ``soft_weight * T**2 * F.kl_div(log_softmax(s / T), log_softmax(t / T), reduction="batchmean", log_target=True)
    + hard_weight * F.cross_entropy(s, labels)`` for "forward_kl" and 2-D logits.

    >>> s, t, y = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10), torch.randint(10, (8,))
    >>> kd_loss(s, t, y, temperature=4.0, soft_weight=0.5, hard_weight=0.5).backward()
    """
    where = "kd_loss"
    temperature = check_temperature(where, temperature)
    soft_weight = check_weight(where, "soft_weight", soft_weight)
    hard_weight = check_weight(where, "hard_weight", hard_weight)
    check_some_weight(where, soft_weight=soft_weight, hard_weight=hard_weight)
    check_divergence(where, divergence, beta)
    check_between(where, "label_smoothing", label_smoothing, 0.0, 1.0, open_end=True)
    check_reduction(where, reduction)
    rows = as_rows(where, student_logits, teacher_logits, labels, ignore_index, labels_needed=hard_weight > 0)

    loss = rows.student.new_zeros(rows.student.shape[0])
    if soft_weight > 0:
        loss = loss + soft_weight * temperature**2 * divergence_rows(rows.student, rows.teacher, temperature, divergence, beta)
    if hard_weight > 0:
        assert rows.labels is not None
        loss = loss + hard_weight * F.cross_entropy(
            rows.student, rows.labels, reduction="none", ignore_index=ignore_index, label_smoothing=label_smoothing
        )
    return reduce_rows(where, loss, rows, row_weights, reduction)


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
    """One loss per row -> what ``reduction`` asks for. See :func:`kd_loss`."""
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


def divergence_rows(student: Tensor, teacher: Tensor, temperature: float, divergence: str, beta: float = 0.5) -> Tensor:
    """D(p, q) per row, without T^2. ``student``, ``teacher``: (rows, classes) -> (rows,)."""
    log_q = F.log_softmax(student / temperature, dim=-1)
    log_p = F.log_softmax(teacher / temperature, dim=-1)
    if divergence == "forward_kl" or (divergence == "jsd" and beta == 0.0):
        return kl_rows(log_p, log_q)
    if divergence == "reverse_kl" or (divergence == "jsd" and beta == 1.0):
        return kl_rows(log_q, log_p)
    return jsd_rows(log_p, log_q, beta)


def kl_rows(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) per row from log-probabilities. A class with a = 0 contributes 0 whatever b is, and gets no gradient."""
    a = log_a.exp()
    difference = torch.where(a > 0, log_a - log_b, 0.0)  # -inf - (-inf) is NaN and must not meet the product's backward
    return (a * difference).sum(-1)


def jsd_rows(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m) per row, m = beta p + (1 - beta) q, 0 < beta < 1."""
    nowhere = (log_p == -math.inf) & (log_q == -math.inf)  # logaddexp(-inf, -inf) has a NaN gradient
    log_m = torch.logaddexp(
        torch.where(nowhere, 0.0, log_p) + math.log(beta),
        torch.where(nowhere, 0.0, log_q) + math.log1p(-beta),
    )
    return beta * kl_rows(log_p, log_m) + (1 - beta) * kl_rows(log_q, log_m)


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
