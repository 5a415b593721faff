"""The Python side of kd_loss and linear_kd_loss on CUDA, with the emulated kernels behind it and CPU tensors before it."""

from __future__ import annotations

import sys

import pytest
import torch
from support.cuda_emulation import needs_compiler
from support.cuda_kd_loss import emulated
from support.kd_loss import assert_close, double_reference

from pycompress.ops import kd_loss, linear_kd_loss
from pycompress.ops.cuda import extension
from pycompress.ops.cuda import kd_loss as cuda_kd_loss
from pycompress.ops.cuda.extension import NAME

pytestmark = needs_compiler
OPTIONS = {"temperature": 2.0, "soft_weight": 0.6, "hard_weight": 0.4}


@pytest.fixture(autouse=True)
def emulated_device(monkeypatch):
    """CPU tensors are treated as if they were on a GPU."""
    modules = [sys.modules["pycompress.ops.kd_loss"], sys.modules["pycompress.ops.linear_kd_loss"]]
    for module in modules:
        monkeypatch.setattr(module, "kernel_for", lambda where, student, teacher, options, kernel, ids=0: kernel or NAME)
    monkeypatch.setattr(extension, "module", emulated())
    monkeypatch.setattr(extension, "stream", lambda device: 0)
    monkeypatch.setattr(cuda_kd_loss, "run", lambda *a, **k: cuda_kd_loss.launch(emulated(), (9, 0), 0, *a, **k))


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
def test_leading_dimensions_and_gradients(reduction):
    student, teacher = random(2, 3, 40, seed=1).requires_grad_(), random(2, 3, 40, seed=2)
    labels = torch.tensor([[1, 2, -100], [4, -100, 6]], dtype=torch.int32)
    weights = torch.tensor([[1.0, 2.0, 3.0], [0.5, 1.0, 1.5]], dtype=torch.float64)
    want = double_reference(student, teacher, labels, reduction=reduction, row_weights=weights, **OPTIONS)
    loss = kd_loss(student, teacher, labels, reduction=reduction, row_weights=weights, **OPTIONS)
    assert loss.shape == want[0].shape
    loss.backward(torch.ones_like(loss))
    assert_close((loss.detach(), student.grad), want, temperature=2.0)


def test_top_k_and_in_place():
    student, teacher = random(2, 3, 40, seed=1).requires_grad_(), random(2, 3, 40, seed=2)
    values, ids = teacher.softmax(-1).topk(5)
    options = {
        "teacher_ids": ids.int(),
        "tail": True,
        "teacher_form": "probabilities",
        "temperature": 2.0,
        "soft_weight": 1.0,
        "hard_weight": 0.0,
    }
    want = double_reference(student, values, **options)
    logits = student * 1.0
    kd_loss(logits, values, inplace=True, **options).backward()
    assert_close((want[0], student.grad), want, temperature=2.0)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "mean", "batchmean"])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_linear_chunks(chunk_size, reduction, weighted):
    hidden, head, bias = (t.requires_grad_() for t in (random(5, 8, seed=1), random(33, 8, seed=2), random(33, seed=3)))
    teacher_hidden, teacher_head = random(5, 6, seed=4), random(33, 6, seed=5)
    labels = torch.tensor([1, -100, 32, 4, 5])
    weights = torch.tensor([1.0, 1.0, 0.0, 0.5, 2.0]) if weighted else None
    arguments = (hidden, head, teacher_hidden, teacher_head, labels)
    options = {"student_bias": bias, "reduction": reduction, "row_weights": weights, **OPTIONS}
    loss = linear_kd_loss(*arguments, chunk_size=chunk_size, **options)
    got = torch.autograd.grad(loss, (hidden, head, bias))
    plain = kd_loss_reference_of(*arguments, **options)
    want = torch.autograd.grad(plain, (hidden, head, bias))
    assert torch.allclose(loss, plain, rtol=1e-5)
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def kd_loss_reference_of(hidden, head, teacher_hidden, teacher_head, labels, *, student_bias, row_weights, reduction, **options):
    from pycompress.ops.kd_loss_reference import kd_loss_reference

    return kd_loss_reference(
        torch.nn.functional.linear(hidden, head, student_bias), teacher_hidden @ teacher_head.T, labels, row_weights, None, None, common=33,
        teacher_form="logits", tail=False, divergence="forward_kl", beta=0.5, part_weights=(1.0, 1.0), label_smoothing=0.0,
        ignore_index=-100, reduction=reduction, batch=5, **options,
    )  # fmt: skip
