"""kd_loss and linear_kd_loss on a real GPU: what the emulator cannot show."""

from __future__ import annotations

import pytest
import torch
from support.kd_loss import assert_close, double_reference, loss_and_gradient, teacher_values

from pycompress.ops import kd_loss, linear_kd_loss
from pycompress.ops.cuda import extension

_reason = "no CUDA device" if not torch.cuda.is_available() else extension.unsupported(torch.cuda.current_device())
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(_reason is not None, reason=f"CUDA kernels do not run here: {_reason}")]
OPTIONS = {"temperature": 2.0, "soft_weight": 0.7, "hard_weight": 0.3}


def logits(rows: int, classes: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (3 * torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed))).to("cuda", dtype)


def labels_for(rows: int, classes: int) -> torch.Tensor:
    labels = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(7))
    labels[1] = -100
    return labels.cuda()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [2, 31, 33, 1000, 4097, 32000, 50257, 128256])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "dkd"])
def test_against_float64(divergence, classes, dtype):
    student, teacher, labels = logits(4, classes, 1, dtype), logits(4, classes, 2, dtype), labels_for(4, classes)
    for temperature in (1.0, 2.0, 2.5):
        options = {**OPTIONS, "temperature": temperature, "divergence": divergence, "label_smoothing": 0.1}
        got = loss_and_gradient(student, teacher, labels, kernel="cuda", **options)
        assert_close(got, double_reference(student, teacher, labels, **options), temperature=temperature, soft_weight=0.7, rows=4)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
@pytest.mark.parametrize("form", ["logits", "probabilities", "log_probabilities"])
def test_forms_reductions_and_top_k(form, reduction):
    student, full, labels = logits(4, 5000, 1), logits(4, 5000, 2), labels_for(4, 5000)
    weights = torch.tensor([1.0, 1.0, 0.0, 2.5], device="cuda")
    options = {**OPTIONS, "reduction": reduction, "teacher_form": form, "row_weights": weights}
    teacher = teacher_values(full, form)
    got = loss_and_gradient(student, teacher, labels, kernel="cuda", **options)
    assert_close(got, double_reference(student, teacher, labels, **options), temperature=2.0)
    values, ids = teacher.topk(50)
    options |= {"teacher_ids": ids, "tail": form != "logits"}
    got = loss_and_gradient(student, values, labels, kernel="cuda", **options)
    assert_close(got, double_reference(student, values, labels, **options), temperature=2.0)


def test_another_stream_and_no_synchronisation():
    student, teacher, labels = logits(64, 32000, 1), logits(64, 32000, 2), labels_for(64, 32000)
    want = double_reference(student, teacher, labels, **OPTIONS)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            got = loss_and_gradient(student, teacher, labels, kernel="cuda", **OPTIONS)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    assert_close(got, want, temperature=2.0)


def test_capture_in_a_graph():
    student, teacher, labels = logits(8, 1000, 1).requires_grad_(), logits(8, 1000, 2), labels_for(8, 1000)
    kd_loss(student, teacher, labels, **OPTIONS).backward()  # warms up
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = kd_loss(student, teacher, labels, **OPTIONS)
        (gradient,) = torch.autograd.grad(loss, student)
    fresh = logits(8, 1000, 3)
    with torch.no_grad():
        student.copy_(fresh)
    graph.replay()
    assert_close((loss.detach(), gradient), double_reference(fresh, teacher, labels, **OPTIONS), temperature=2.0)


def test_compile():
    student, teacher, labels = logits(8, 1000, 1), logits(8, 1000, 2), labels_for(8, 1000)
    step = torch.compile(lambda s: kd_loss(s * 1.0, teacher, labels, **OPTIONS), fullgraph=True)
    leaf = student.clone().requires_grad_()
    loss = step(leaf)
    loss.backward()
    assert_close((loss.detach(), leaf.grad), double_reference(student, teacher, labels, **OPTIONS), temperature=2.0)


def test_the_second_backward_pass_is_refused():
    student = logits(4, 100, 1).requires_grad_()
    loss = kd_loss(student, logits(4, 100, 2), labels_for(4, 100), **OPTIONS)
    (3.0 * loss).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="can be used only once"):
        loss.backward()


@pytest.mark.parametrize("chunk_size", [None, 100])
def test_linear_chunks(chunk_size):
    def random(*shape: int, seed: int) -> torch.Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).mul_(0.3).cuda()

    hidden, head, teacher_hidden, teacher_head = (random(*s, seed=i) for i, s in enumerate([(257, 64), (1003, 64), (257, 96), (1003, 96)]))
    labels = labels_for(257, 1003)
    results = []
    for dtype, kernel in ((torch.float32, None), (torch.float64, "reference")):
        leaves = [t.to(dtype).requires_grad_() for t in (hidden, head)]
        loss = linear_kd_loss(
            *leaves, teacher_hidden.to(dtype), teacher_head.to(dtype), labels, chunk_size=chunk_size, kernel=kernel, **OPTIONS
        )  # fmt: skip
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for got, want in zip(*results, strict=True):
        assert float((got - want).norm()) <= 2e-5 * float(want.norm())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_current():
    student, teacher = logits(4, 1000, 1).to("cuda:1"), logits(4, 1000, 2).to("cuda:1")
    options = {"temperature": 2.0, "soft_weight": 1.0, "hard_weight": 0.0}
    assert_close(loss_and_gradient(student, teacher, **options), double_reference(student, teacher, **options), temperature=2.0)
    assert torch.cuda.current_device() == 0


def test_tensors_on_different_devices_are_refused():
    with pytest.raises(ValueError, match="teacher_logits must be on cuda:0 like student_logits, got cpu"):
        kd_loss(logits(2, 10, 1), torch.randn(2, 10), temperature=1.0, soft_weight=1.0, hard_weight=0.0)
