"""Gradients through autograd, torch.compile and torch.export."""

import pytest
import torch
from support.kd_loss import loss_and_gradient
from support.kernels import all_kernels, native_kernels
from torch import nn

from pycompress.ops import kd_loss

OPTIONS = {"temperature": 2.0, "soft_weight": 0.5, "hard_weight": 0.5}
EVERY = pytest.mark.parametrize("kernel", all_kernels("kd_loss"))
NATIVE = pytest.mark.parametrize("kernel", native_kernels("kd_loss"))
BOTH = pytest.mark.parametrize("classes", [10, 1100])


def data(rows=4, classes=10, requires_grad=True):
    student = torch.randn(rows, classes, requires_grad=requires_grad)
    return student, torch.randn(rows, classes), torch.randint(classes, (rows,))


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "dkd", "dist"])
@pytest.mark.parametrize("form", ["logits", "probabilities"])
def test_gradcheck_of_the_reference(divergence, form):
    student, teacher, labels = data()
    teacher = teacher.double() if form == "logits" else teacher.double().softmax(1)
    labels[1] = -100

    def loss(s):
        return kd_loss(s, teacher, labels, **OPTIONS, divergence=divergence, teacher_form=form, label_smoothing=0.1)

    assert torch.autograd.gradcheck(loss, student.detach().double().requires_grad_())
    assert torch.autograd.gradgradcheck(loss, student.detach().double().requires_grad_())


def test_gradcheck_of_top_k_and_maps():
    student, teacher, labels = data()
    student = student.detach().double().requires_grad_()
    p, ids = teacher.double().softmax(1).topk(3, dim=1)
    for divergence in ("forward_kl", "reverse_kl", "jsd"):
        top = {"divergence": divergence, "teacher_form": "probabilities", "teacher_ids": ids, "tail": True}
        assert torch.autograd.gradcheck(lambda s, top=top: kd_loss(s, p, labels, **OPTIONS, **top), student)
    class_map = torch.tensor([3, -1, 0, 7, 2, -1, 9, 1, 4, 5])
    assert torch.autograd.gradcheck(lambda s: kd_loss(s, teacher.double(), labels, **OPTIONS, class_map=class_map), student)


@NATIVE
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "dkd"])
def test_native_gradient_against_finite_differences(kernel, divergence):
    """Independent of the reference: central differences of the kernel's own loss, in a random direction."""
    student, teacher, labels = data(3, 60, requires_grad=False)
    options = {**OPTIONS, "divergence": divergence, "kernel": kernel}
    _, gradient = loss_and_gradient(student, teacher, labels, **options)
    direction = torch.randn_like(student)
    step = 1e-2
    up, down = (kd_loss(student + sign * step * direction, teacher, labels, **options).double() for sign in (1, -1))
    assert float((up - down) / (2 * step)) == pytest.approx(float((gradient * direction).sum()), rel=5e-3, abs=2e-4)


@EVERY
@BOTH
@pytest.mark.parametrize("factor", [0.0, 1.0, -2.5])
def test_upstream_scalars(kernel, classes, factor):
    student, teacher, labels = data(4, classes)
    (plain,) = torch.autograd.grad(kd_loss(student, teacher, labels, **OPTIONS, kernel=kernel), student)
    (got,) = torch.autograd.grad(factor * kd_loss(student, teacher, labels, **OPTIONS, kernel=kernel), student)
    torch.testing.assert_close(got, factor * plain)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_upstream_per_row(kernel, dtype):
    student, teacher, labels = data(4, 20)
    student, teacher = student.detach().to(dtype).requires_grad_(), teacher.to(dtype)
    upstream = torch.tensor([0.0, 1.0, -3.0, 0.5])
    options = {**OPTIONS, "reduction": "none", "kernel": kernel}
    (unit,) = torch.autograd.grad(kd_loss(student, teacher, labels, **options).sum(), student)
    (got,) = torch.autograd.grad(kd_loss(student, teacher, labels, **options), student, upstream)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), upstream[:, None] * unit.float(), rtol=0.02 if dtype != torch.float32 else 1e-6, atol=1e-6)


@EVERY
def test_using_the_graph_twice(kernel):
    student, teacher, labels = data()
    loss = kd_loss(student, teacher, labels, **OPTIONS, kernel=kernel)
    (first,) = torch.autograd.grad(loss, student, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(3 * loss, student, retain_graph=True)
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(second, 3 * kept)
    torch.testing.assert_close(student.grad, 2 * kept)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@NATIVE
def test_second_derivatives_are_refused(kernel):
    student, teacher, labels = data()
    loss = kd_loss(student, teacher, labels, **OPTIONS, kernel=kernel)
    with pytest.raises(RuntimeError, match=r"kd_loss: create_graph=True asks for second derivatives.*kernel='reference'"):
        torch.autograd.grad(loss, student, create_graph=True)


def test_the_reference_has_second_derivatives():
    student, teacher, labels = data()
    (gradient,) = torch.autograd.grad(kd_loss(student, teacher, labels, **OPTIONS, kernel="reference"), student, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), student)
    assert second.abs().sum() > 0


@EVERY
def test_the_teacher_gets_no_gradient(kernel):
    student, teacher, labels = data()
    teacher.requires_grad_()
    kd_loss(student, teacher, labels, **OPTIONS, kernel=kernel).backward()
    assert teacher.grad is None and student.grad is not None
    assert not kd_loss(student.detach(), teacher, labels, **OPTIONS, kernel=kernel).requires_grad


@NATIVE
@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "dkd"])
def test_inplace(kernel, classes, dtype, divergence):
    _, teacher, labels = data(4, classes)
    labels[3] = -100
    head, x = nn.Linear(6, classes).to(dtype), torch.randn(4, 6, dtype=dtype, requires_grad=True)
    teacher = teacher.to(dtype)
    options = {**OPTIONS, "divergence": divergence, "kernel": kernel}
    for upstream in (1.0, 0.5):
        results = []
        for inplace in (False, True):
            logits = head(x)
            before = logits.detach().clone()
            loss = kd_loss(logits, teacher, labels, **options, inplace=inplace)
            assert torch.equal(logits.detach(), before) != inplace
            results.append((loss.detach(), *torch.autograd.grad(upstream * loss, (x, head.weight, head.bias))))
        for plain, written in zip(*results, strict=True):
            assert torch.equal(plain, written)


@NATIVE
def test_inplace_top_k(kernel):
    _, teacher, labels = data(4, 1100)
    values, ids = teacher.topk(5, dim=1)
    labels[0] = ids[0, 1]
    head, x = nn.Linear(6, 1100), torch.randn(4, 6, requires_grad=True)
    options = {**OPTIONS, "teacher_ids": ids, "kernel": kernel}
    plain, written = (torch.autograd.grad(kd_loss(head(x), values, labels, **options, inplace=i), x)[0] for i in (False, True))
    assert torch.equal(plain, written)


@NATIVE
def test_inplace_is_noticed_by_others(kernel):
    _, teacher, labels = data(4, 50)
    x = torch.randn(4, 50, requires_grad=True)
    logits = x.exp()  # keeps its result for its backward
    loss = kd_loss(logits, teacher, labels, **OPTIONS, inplace=True, kernel=kernel)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with pytest.raises(ValueError, match=r"kd_loss: inplace needs student_logits that are no leaf"):
        kd_loss(x, teacher, labels, **OPTIONS, inplace=True, kernel=kernel)


def test_training_step_in_autocast():
    head, x = nn.Linear(6, 30), torch.randn(8, 6)
    teacher, labels = torch.randn(8, 30), torch.randint(30, (8,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = kd_loss(head(x), teacher, labels, **OPTIONS)
    assert loss.dtype == torch.float32
    loss.backward()
    assert head.weight.grad is not None and head.weight.grad.isfinite().all()


@EVERY
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile_full_graph(kernel, reduction):
    torch._dynamo.reset()
    student, teacher, labels = data(4, 60)
    labels[2] = -100
    options = {**OPTIONS, "reduction": reduction, "kernel": kernel}

    def step(s, t, y):
        return kd_loss(2 * s, t, y, **options).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    want = torch.autograd.grad(step(student, teacher, labels), student)[0]
    got = torch.autograd.grad(compiled(student, teacher, labels), student)[0]
    torch.testing.assert_close(got, want)
    with torch.no_grad():
        torch.testing.assert_close(compiled(student, teacher, labels), step(student, teacher, labels))


@EVERY
def test_export(kernel):
    class Loss(nn.Module):
        def forward(self, s, t, y):
            return kd_loss(s, t, y, **OPTIONS, kernel=kernel)

    arguments = data(4, 60, requires_grad=False)
    program = torch.export.export(Loss(), arguments)
    torch.testing.assert_close(program.module()(*arguments), Loss()(*arguments))


@NATIVE
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(kernel, gradient, reduction):
    student, teacher, labels = data(4, 60, requires_grad=False)
    arguments = (
        student, teacher, labels, torch.rand(4), None, None, [2.0, 0.5, 0.5, 0.5, 1.0, 8.0, 0.0], 60, -100,
        ["forward_kl", reduction, "logits", kernel], False, gradient,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.pycompress.kd_loss.default, arguments)
