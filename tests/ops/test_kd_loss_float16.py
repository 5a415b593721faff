"""Loss scaling reaches float16 gradients of a mean, which would be lost if they were divided before they are rounded."""

from __future__ import annotations

import pytest
import torch
from support.kernels import all_kernels, native_kernels

from pycompress.ops import kd_loss

SCALE = 2.0**16
OPTIONS = {"temperature": 2.0, "soft_weight": 1.0, "hard_weight": 0.0}  # the label's entry is large and would hide the others


def scaled_gradient(student, teacher, labels, **options):
    """The gradient of the scaled loss in the logits' dtype, and the loss."""
    student = student.clone().requires_grad_()
    loss = kd_loss(student, teacher, labels, **OPTIONS, **options)
    (SCALE * loss).backward()
    return student.grad, loss.detach()


@pytest.mark.parametrize("kernel", all_kernels("kd_loss"))
@pytest.mark.parametrize(
    ("reduction", "weight"), [("mean", None), ("mean", 1.0), ("mean", 1e-6), ("mean", 1e6), ("batchmean", None), ("batchmean", 2.0)]
)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "dkd"])
def test_loss_scaling_reaches_the_gradient(kernel, reduction, weight, divergence):
    student, teacher, labels = torch.randn(257, 2003).half(), torch.randn(257, 2003).half(), torch.randint(2003, (257,))
    labels[::7] = -100
    options = {"reduction": reduction, "divergence": divergence}
    if weight is not None:
        options["row_weights"] = weight * torch.rand(257)
    want, loss = scaled_gradient(student.float(), teacher.float(), labels, **options, kernel="reference")
    got, half_loss = scaled_gradient(student, teacher, labels, **options, kernel=kernel)
    assert got.dtype == torch.float16 and half_loss.dtype == torch.float32
    torch.testing.assert_close(half_loss, loss, rtol=1e-5, atol=1e-6)
    # Two roundings to 11 bits, and below 6e-5 to multiples of 6e-8, where classes have a probability of about 5e-4 * weight.
    assert (got.float() - want).norm() < 2e-3 * want.norm()
    assert (got[::7] == 0).all()


@pytest.mark.parametrize("kernel", native_kernels("kd_loss"))
def test_no_row_that_counts(kernel):
    student, teacher = torch.randn(3, 10).half(), torch.randn(3, 10).half()
    for labels, weights in ((torch.full((3,), -100), None), (torch.zeros(3, dtype=torch.long), torch.zeros(3))):
        gradient, loss = scaled_gradient(student, teacher, labels, row_weights=weights, kernel=kernel)
        assert loss == 0 and (gradient == 0).all()


@pytest.mark.parametrize("kernel", native_kernels("kd_loss"))
def test_in_place_sequences_and_compiled(kernel):
    student, teacher, labels = torch.randn(2, 129, 2003).half(), torch.randn(2, 129, 2003).half(), torch.randint(2003, (2, 129))
    want, _ = scaled_gradient(student, teacher, labels, kernel="reference")
    leaf = student.clone().requires_grad_()
    (SCALE * kd_loss((leaf * 1).view(-1, 2003), teacher.view(-1, 2003), labels.view(-1), **OPTIONS, kernel=kernel, inplace=True)).backward()
    compiled = torch.compile(lambda *case: kd_loss(*case, **OPTIONS, kernel=kernel), fullgraph=True, backend="aot_eager")
    traced = student.clone().requires_grad_()
    (SCALE * compiled(traced, teacher, labels)).backward()
    for got in (scaled_gradient(student, teacher, labels, kernel=kernel)[0], leaf.grad, traced.grad):
        assert (got.float() - want.float()).norm() < 2e-3 * want.float().norm()


@pytest.mark.parametrize("kernel", native_kernels("kd_loss"))
def test_errors_name_the_caller_s_values(kernel):
    student = torch.randn(2, 5).half().requires_grad_()
    with pytest.raises(ValueError, match=r"kd_loss: row_weights must not be negative or NaN, got -3\.0"):
        kd_loss(student, student.detach(), torch.tensor([0, 1]), **OPTIONS, row_weights=torch.tensor([2.0, -3.0]), kernel=kernel)
    with pytest.raises(ValueError, match="kd_loss: labels must lie in"):
        kd_loss(student, student.detach(), torch.tensor([0, 9]), **OPTIONS, kernel=kernel)
