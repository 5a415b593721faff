"""LinearKDLoss: the module around ops.linear_kd_loss, which has the tests of the arithmetic."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn

import pycompress as pc
from pycompress.ops import kd_loss, native


def make(*rows: int, classes: int = 30, teacher_classes: int = 30):
    student, teacher = nn.Linear(6, classes), nn.Linear(9, teacher_classes)
    labels = torch.randint(classes, rows)
    labels.view(-1)[2] = -100
    return torch.randn(*rows, 6, requires_grad=True), student, torch.randn(*rows, 9), teacher, labels


def run(loss, hidden, student, teacher_hidden, teacher, *rest):
    value = loss(hidden, student.weight, teacher_hidden, teacher.weight, *rest, student_bias=student.bias, teacher_bias=teacher.bias)
    return (value, *torch.autograd.grad(value, (hidden, student.weight, student.bias)))


def whole(hidden, student, teacher_hidden, teacher, *rest, **options):
    value = kd_loss(student(hidden), teacher(teacher_hidden).detach(), *rest, **options)
    return (value, *torch.autograd.grad(value, (hidden, student.weight, student.bias)))


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


OPTIONS = {"temperature": 3.0, "soft_weight": 0.7, "hard_weight": 0.2}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"divergence": "reverse_kl", "label_smoothing": 0.1},
        {"divergence": "jsd", "beta": 0.2, "reduction": "sum"},
        {"divergence": "dkd", "part_weights": (1.0, 4.0), "reduction": "batchmean"},
        {"ignore_index": 3},
        {"kernel": "reference"},
    ],
)
def test_every_option_arrives(options):
    arguments = make(12)
    if "ignore_index" in options:
        arguments[-1][2] = 3
    assert_same(run(pc.LinearKDLoss(**OPTIONS, **options, chunk_size=5), *arguments), whole(*arguments, **OPTIONS, **options))


def test_row_weights_defaults_and_kd_loss():
    arguments = make(12)
    weights = torch.rand(12)
    assert_same(run(pc.LinearKDLoss(**OPTIONS), *arguments, weights), whole(*arguments, row_weights=weights, **OPTIONS))
    hidden, student, teacher_hidden, teacher, labels = arguments
    linear = run(pc.LinearKDLoss(), *arguments)[0]
    torch.testing.assert_close(linear, pc.KDLoss()(student(hidden), teacher(teacher_hidden), labels))


def test_shift_labels_is_that_of_kd_loss():
    hidden, student, teacher_hidden, teacher, labels = arguments = make(3, 7)
    shifted = run(pc.LinearKDLoss(**OPTIONS, shift_labels=True), *arguments)[0]
    torch.testing.assert_close(shifted, pc.KDLoss(**OPTIONS, shift_labels=True)(student(hidden), teacher(teacher_hidden), labels))
    with pytest.raises(ValueError, match=re.escape("LinearKDLoss: shift_labels needs hidden states of (batch, at least 2 positions, ")):
        run(pc.LinearKDLoss(shift_labels=True), hidden[0], student, teacher_hidden[0], teacher, labels[0])


@pytest.mark.parametrize("kind", ["prefix", "tensor"])
def test_class_map(kind):
    arguments = make(12, teacher_classes=20)
    class_map = torch.arange(30).where(torch.arange(30) < 20, -1) if kind == "tensor" else kind
    loss = pc.LinearKDLoss(**OPTIONS, class_map=class_map)
    assert_same(run(loss, *arguments), whole(*arguments, class_map=class_map, **OPTIONS))
    assert loss.state_dict() == {}
    assert_same(run(copy.deepcopy(loss), *arguments), run(loss, *arguments))
    if kind == "tensor":
        assert loss.to("meta").class_map.device.type == "meta"
        assert "class_map='<30 classes>'" in repr(loss)


def test_trains():
    hidden, student, teacher_hidden, teacher, _ = make(64, classes=20, teacher_classes=20)
    loss = pc.LinearKDLoss(temperature=2.0, soft_weight=1.0, hard_weight=0.0, chunk_size=10)
    optimizer = torch.optim.Adam([hidden, *student.parameters()], lr=0.05)
    values = []
    for _ in range(60):
        value = loss(hidden, student.weight, teacher_hidden, teacher.weight, student_bias=student.bias, teacher_bias=teacher.bias)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.1 * values[0]
    assert teacher.weight.grad is None


def test_repr_shows_what_was_chosen():
    text = repr(pc.LinearKDLoss(2.0, 1.0, 0.0, chunk_size=128))
    assert text == (
        "LinearKDLoss(temperature=2.0, soft_weight=1.0, hard_weight=0.0, divergence='forward_kl', label_smoothing=0.0, "
        "ignore_index=-100, reduction='mean', shift_labels=False, chunk_size=128)"
    )


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({"temperature": 0.0}, ValueError, "temperature must be a finite number above 0, got 0.0"),
        ({"soft_weight": 0.0, "hard_weight": 0.0}, ValueError, "soft_weight or hard_weight must be above 0"),
        ({"hard_weight": -1.0}, ValueError, "hard_weight must be a finite number not below 0, got -1.0"),
        ({"divergence": "dist"}, ValueError, "divergence must not be 'dist', which looks at all rows at once"),
        ({"divergence": "kl"}, ValueError, "divergence must be one of forward_kl, reverse_kl"),
        ({"beta": 0.5}, ValueError, "beta belongs to divergence 'jsd'"),
        ({"part_weights": (1, 1)}, ValueError, "part_weights belongs to divergence 'dkd'"),
        ({"label_smoothing": 1.0}, ValueError, "label_smoothing must lie in [0, 1), got 1.0"),
        ({"ignore_index": 0.5}, TypeError, "ignore_index must be an int, got float"),
        ({"reduction": "avg"}, ValueError, "reduction must be one of none, sum, mean, batchmean, got 'avg'"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be an int above 0 or None, got 0"),
        ({"class_map": "suffix"}, ValueError, "class_map must be None, 'prefix' or a tensor of teacher classes, got 'suffix'"),
        ({"class_map": torch.ones(3)}, TypeError, "class_map must be integers (classes,), got torch.float32 of shape (3,)"),
    ],
)
def test_options_are_checked_on_construction(options, error, text):
    with pytest.raises(error, match=re.escape(f"LinearKDLoss: {text}")):
        pc.LinearKDLoss(**options)


def test_errors_of_the_call_and_the_kernel():
    hidden, student, teacher_hidden, teacher, _ = make(12)
    with pytest.raises(ValueError, match="linear_kd_loss: labels must be given for hard_weight above 0"):
        run(pc.LinearKDLoss(), hidden, student, teacher_hidden, teacher)
    with pytest.raises(TypeError, match="linear_kd_loss: student_hidden must be a floating-point tensor, got NoneType"):
        pc.LinearKDLoss(shift_labels=True)(None, student.weight, teacher_hidden.reshape(3, 4, 9), teacher.weight)
    with pytest.raises(ValueError, match="LinearKDLoss: kernel must be one of"):
        pc.LinearKDLoss(kernel="fastest")
    for kernel in native.kernels("kd_loss"):
        assert pc.LinearKDLoss(kernel=kernel).kernel == kernel
