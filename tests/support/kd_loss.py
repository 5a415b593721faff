"""Random arguments for kd_loss, and its float64 reference with gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pycompress.ops import kd_loss


def teacher_values(logits: Tensor, form: str) -> Tensor:
    """Logits as ``teacher_form`` wants them."""
    return {"logits": logits, "probabilities": logits.softmax(-1), "log_probabilities": logits.log_softmax(-1)}[form]


def loss_and_gradient(
    student: Tensor, teacher: Tensor, *args: Any, upstream: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    student = student.detach().clone().requires_grad_()
    loss = kd_loss(student, teacher, *args, **options)
    loss.backward(torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype))
    assert student.grad is not None
    return loss.detach(), student.grad


def double_reference(student: Tensor, teacher: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    options = {k: v.double() if isinstance(v, Tensor) and v.dtype.is_floating_point else v for k, v in options.items()}
    return loss_and_gradient(student.double(), teacher.double(), *args, **{**options, "kernel": "reference"})


def assert_close(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], *, temperature: float, soft_weight: float = 1.0, rows: int = 1):
    """Loss and gradient against float64.

    Exponentials are right to 3 ulp, so log q - log p is right to 8 eps per unit of the logarithm of a sum, and T^2 times that
    is what no float32 loss can resolve. The gradient: 1e-5 in norm, plus the rounding of T (q - p), whose terms have a norm
    up to T each, per row.
    """
    eps = torch.finfo(torch.float32).eps
    (loss, gradient), (want_loss, want_gradient) = got, want
    tolerance = 1e-5 * want_loss.abs() + 16 * eps * (1 + soft_weight * temperature**2)
    assert bool(((loss.double() - want_loss).abs() <= tolerance).all()), (loss, want_loss)
    half = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[gradient.dtype]
    error = (gradient.double() - want_gradient).norm()
    # 2^-25 absolute: float16's smallest step, halved, in every element
    floor = (
        2.0**-25 * gradient.numel() ** 0.5 if gradient.dtype == torch.float16 else 0.0
    ) + 8 * eps * soft_weight * temperature / rows**0.5
    assert float(error) <= (1e-5 + half) * float(want_gradient.norm()) + floor, (float(error), float(want_gradient.norm()))
