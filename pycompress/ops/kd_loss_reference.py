"""What ``kd_loss`` computes, in PyTorch and written for reading: differentiable, any device, in at least float32.

For one row with student logits s, teacher logits t, label y and temperature T:

    p = softmax(t / T), q = softmax(s / T)
    loss = row_weight * (soft_weight * T^2 * D(p, q) + hard_weight * CE(softmax(s), y))

    forward_kl   D = KL(p || q) = sum p (log p - log q)      gradient of T^2 D in s: T (q - p)
    reverse_kl   D = KL(q || p) = sum q (log q - log p)      gradient: T q ((log q - log p) - D)
    jsd          D = beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q
    dkd          D = target KL((p_y, 1 - p_y) || (q_y, 1 - q_y)) + nontarget KL(p without y || q without y)
    dist         D = inter (1 - correlation of p and q over classes) + intra (1 - correlation over rows), for all rows together
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def kd_loss_reference(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    row_weights: Tensor | None,
    teacher_ids: Tensor | None,
    class_map: Tensor | None,
    *,
    common: int,
    teacher_form: str,
    tail: bool,
    divergence: str,
    temperature: float,
    soft_weight: float,
    hard_weight: float,
    beta: float,
    part_weights: tuple[float, float],
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
    batch: int,
) -> Tensor:
    """Arguments as ``kd_loss``, checked, with logits as (rows, classes) and everything else as (rows,).

    ``common``: how many leading classes the soft term compares. ``batch``: the divisor of "batchmean".
    """
    student = at_least_float32(student)
    counted = torch.ones(student.shape[0], dtype=torch.bool, device=student.device)
    weights = student.new_ones(student.shape[0])
    if labels is not None:
        counted = labels != ignore_index
    if row_weights is not None:
        weights = row_weights.to(student)
        counted = counted & (weights > 0)
    # Rows that do not count become zeros first, so that a NaN in padding reaches neither the sum nor a gradient.
    student = torch.where(counted[:, None], student, 0.0)
    if labels is not None:
        labels = torch.where(counted, labels, 0)
    weights = torch.where(counted, weights, 0.0)
    total = weights.sum()
    denominator = {"none": 1, "sum": 1, "mean": torch.where(total > 0, total, 1.0), "batchmean": batch}[reduction]

    loss = student.new_zeros(student.shape[0])
    shared = student.new_zeros(())  # what has no value per row
    if soft_weight > 0:
        assert teacher is not None
        teacher = torch.where(counted[:, None], at_least_float32(teacher.detach()).to(student.dtype), 1.0)
        scale = soft_weight * temperature**2
        if divergence == "dist":
            q, p = compared(student, teacher, class_map, common, teacher_form, temperature)
            shared = scale * correlation_distance(p.exp()[counted], q.exp()[counted], *part_weights)
        elif teacher_ids is not None:
            ids = torch.where(counted[:, None], teacher_ids, torch.arange(teacher_ids.shape[1], device=student.device))
            q, p = bucketed(student, teacher, ids, teacher_form, temperature, tail)
            loss = loss + scale * divergence_rows(p, q, divergence, beta)
        else:
            q, p = compared(student, teacher, class_map, common, teacher_form, temperature)
            if divergence == "dkd":
                assert labels is not None
                loss = loss + scale * decoupled_rows(p, q, labels, *part_weights)
            else:
                loss = loss + scale * divergence_rows(p, q, divergence, beta)
    if hard_weight > 0:
        assert labels is not None
        loss = loss + hard_weight * F.cross_entropy(student, labels, reduction="none", label_smoothing=label_smoothing)
    loss = torch.where(counted, loss * weights, 0.0)
    return loss if reduction == "none" else loss.sum() / denominator + shared


def at_least_float32(x: Tensor) -> Tensor:
    """Half-precision values as float32; sums over thousands of classes need it."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def teacher_log_probabilities(teacher: Tensor, teacher_form: str, temperature: float) -> Tensor:
    """log p, normalised, out of logits (softened by the temperature), probabilities or log-probabilities (as they are)."""
    if teacher_form == "logits":
        return F.log_softmax(teacher / temperature, dim=-1)
    if teacher_form == "probabilities":
        return teacher.log() - teacher.sum(-1, keepdim=True).log()
    return F.log_softmax(teacher, dim=-1)


def compared(
    student: Tensor, teacher: Tensor, class_map: Tensor | None, common: int, teacher_form: str, temperature: float
) -> tuple[Tensor, Tensor]:
    """log q and log p over the classes that both models have, each normalised over them."""
    if class_map is not None:
        kept = (class_map >= 0).nonzero().squeeze(1)
        student, teacher = student[:, kept], teacher[:, class_map[kept]]
    else:
        student, teacher = student[:, :common], teacher[:, :common]
    return F.log_softmax(student / temperature, dim=-1), teacher_log_probabilities(teacher, teacher_form, temperature)


def bucketed(student: Tensor, values: Tensor, ids: Tensor, teacher_form: str, temperature: float, tail: bool) -> tuple[Tensor, Tensor]:
    """log q and log p over the k named classes and one bucket for all others, (rows, k + 1).

    The teacher's bucket is what its k probabilities lack to 1 with ``tail``, else 0 with the k renormalised.
    """
    log_q = F.log_softmax(student / temperature, dim=-1)
    rest_q = log_q.scatter(1, ids, -math.inf).logsumexp(1, keepdim=True) if student.shape[1] > ids.shape[1] else log_q[:, :1] * 0 - math.inf
    log_q = torch.cat([log_q.gather(1, ids), rest_q], dim=1)
    if not tail:
        log_p = teacher_log_probabilities(values, teacher_form, temperature)
        return log_q, torch.cat([log_p, torch.full_like(log_p[:, :1], -math.inf)], dim=1)
    p = values if teacher_form == "probabilities" else values.exp()
    p = torch.cat([p, (1.0 - p.sum(1, keepdim=True)).clamp_min(0.0)], dim=1)
    return log_q, p.log() - p.sum(1, keepdim=True).log()


def divergence_rows(log_p: Tensor, log_q: Tensor, divergence: str, beta: float = 0.5) -> Tensor:
    """D(p, q) per row, without T^2, from log-probabilities (rows, classes)."""
    if divergence == "forward_kl" or (divergence == "jsd" and beta == 0.0):
        return kl_rows(log_p, log_q)
    if divergence == "reverse_kl" or (divergence == "jsd" and beta == 1.0):
        return kl_rows(log_q, log_p)
    return jsd_rows(log_p, log_q, beta)


def kl_rows(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) per row from log-probabilities. A class with a = 0 contributes 0 whatever b is, and gets no gradient."""
    a = log_a.exp()
    absent = a == 0  # -inf - (-inf) is NaN and must not meet the product's backward
    return (a * (torch.where(absent, 0.0, log_a) - torch.where(absent, 0.0, log_b))).sum(-1)


def jsd_rows(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m) per row, m = beta p + (1 - beta) q, 0 < beta < 1."""
    nowhere = (log_p == -math.inf) & (log_q == -math.inf)  # logaddexp(-inf, -inf) has a NaN gradient
    log_m = torch.logaddexp(
        torch.where(nowhere, 0.0, log_p) + math.log(beta),
        torch.where(nowhere, 0.0, log_q) + math.log1p(-beta),
    )
    return beta * kl_rows(log_p, log_m) + (1 - beta) * kl_rows(log_q, log_m)


def decoupled_rows(log_p: Tensor, log_q: Tensor, labels: Tensor, target_weight: float, nontarget_weight: float) -> Tensor:
    """Zhao et al. 2022, equation 6 (https://arxiv.org/abs/2203.08679): the label against the rest, and the rest among themselves."""
    (target_p, rest_p), (target_q, rest_q) = (split_label(log, labels) for log in (log_p, log_q))
    return target_weight * kl_rows(target_p, target_q) + nontarget_weight * kl_rows(rest_p, rest_q)


def split_label(log_p: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, classes) -> log-probabilities of (label, rest), (rows, 2), and of the other classes among themselves, (rows, classes)."""
    others = log_p.scatter(1, labels[:, None], -math.inf)
    of_others = others.logsumexp(1, keepdim=True)
    return torch.log_softmax(torch.cat([log_p.gather(1, labels[:, None]), of_others], dim=1), dim=1), others - of_others


def correlation_distance(p: Tensor, q: Tensor, inter_weight: float, intra_weight: float) -> Tensor:
    """DIST, Huang et al. 2022, equations 5 to 9 (https://arxiv.org/abs/2205.10536), for probabilities (rows, classes)."""
    total = q.sum() * 0.0  # no rows: 0 that still has a gradient
    if inter_weight > 0 and q.shape[0] > 0:
        total = total + inter_weight * pearson_distance(q, p).mean()
    if intra_weight > 0 and q.shape[0] > 1:
        total = total + intra_weight * pearson_distance(q.T, p.T).mean()
    return total


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
