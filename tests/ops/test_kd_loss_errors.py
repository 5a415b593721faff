"""Bad input: the error names the argument, and nothing has happened before it."""

import math
import re

import pytest
import torch
from support.kernels import all_kernels, native_kernels

from pycompress.ops import kd_loss

OPTIONS = {"temperature": 2.0, "soft_weight": 0.5, "hard_weight": 0.5}
S, T, Y = torch.zeros(3, 5), torch.ones(3, 5), torch.tensor([0, 1, 4])


def refuses(error, text, *args, **options):
    with pytest.raises(error, match=re.escape(f"kd_loss: {text}")):
        kd_loss(*args, **{**OPTIONS, **options})


@pytest.mark.parametrize("temperature", [0, -1.0, math.inf, math.nan, True, "1"])
def test_temperature(temperature):
    refuses(ValueError, f"temperature must be a finite number above 0, got {temperature!r}", S, T, Y, temperature=temperature)


def test_weights_and_names():
    refuses(ValueError, "soft_weight must be a finite number not below 0, got -1", S, T, Y, soft_weight=-1)
    refuses(ValueError, "hard_weight must be a finite number not below 0, got nan", S, T, Y, hard_weight=math.nan)
    refuses(ValueError, "soft_weight or hard_weight must be above 0, got 0 for both", S, T, Y, soft_weight=0, hard_weight=0)
    refuses(ValueError, "divergence must be one of forward_kl, reverse_kl, jsd, dkd, dist, got 'kl'", S, T, Y, divergence="kl")
    refuses(ValueError, "reduction must be one of none, sum, mean, batchmean, got 'avg'", S, T, Y, reduction="avg")
    refuses(ValueError, "teacher_form must be one of logits, probabilities", S, T, Y, teacher_form="probs")
    refuses(ValueError, "label_smoothing must lie in [0, 1), got 1.0", S, T, Y, label_smoothing=1.0)
    refuses(TypeError, "ignore_index must be an int, got float", S, T, Y, ignore_index=-1.0)
    refuses(ValueError, "kernel must be one of", S, T, Y, kernel="sse9")


def test_options_that_would_be_ignored():
    refuses(ValueError, "beta belongs to divergence 'jsd', got 0.5 with 'forward_kl'", S, T, Y, beta=0.5)
    refuses(ValueError, "beta must lie in [0, 1], got 1.5", S, T, Y, divergence="jsd", beta=1.5)
    refuses(ValueError, "part_weights belongs to divergence 'dkd' or 'dist'", S, T, Y, part_weights=(1, 1))
    refuses(ValueError, "part_weights must be two numbers, got (1,)", S, T, Y, divergence="dkd", part_weights=(1,))
    refuses(ValueError, "part_weights must have one entry above 0", S, T, Y, divergence="dkd", part_weights=(0, 0))
    refuses(ValueError, "tail belongs to a top-k teacher, got True without teacher_ids", S, T, Y, tail=True)
    refuses(ValueError, "reduction must be 'mean' for divergence 'dist'", S, T, Y, divergence="dist", reduction="sum")
    refuses(ValueError, "row_weights must be None for divergence 'dist'", S, T, Y, divergence="dist", row_weights=torch.ones(3))


def test_logits():
    refuses(TypeError, "student_logits must be floating point, got torch.int64", S.long(), T, Y)
    refuses(TypeError, "teacher_logits must be floating point, got torch.int32", S, T.int(), Y)
    refuses(TypeError, "teacher_logits must be a tensor, got list", S, [1.0], Y)
    refuses(TypeError, "student_logits must be a tensor, got NoneType", None, T, Y)
    for empty in (torch.zeros(0, 5), torch.zeros(3, 0), torch.zeros(5)):
        refuses(
            ValueError, f"student_logits must be (..., classes) with at least one row and one class, got {tuple(empty.shape)}", empty, T, Y
        )
    refuses(ValueError, "teacher_logits must have the rows of student_logits (3, 5), got (2, 5)", S, T[:2], Y)
    refuses(ValueError, "teacher_logits must have the 5 classes of student_logits, got 4", S, T[:, :4], Y)
    refuses(ValueError, "divergence 'dkd' needs at least 2 classes", S[:, :1], T[:, :1], Y * 0, divergence="dkd")
    refuses(ValueError, "teacher_logits must be on cpu like student_logits, got meta", S, T.to("meta"), Y)


def test_labels_and_weights():
    refuses(ValueError, "labels must be given for hard_weight above 0 and for divergence 'dkd', got None", S, T)
    refuses(ValueError, "labels must be given for hard_weight above 0", S, T, hard_weight=0, divergence="dkd")
    refuses(TypeError, "labels must be integers (class numbers), got torch.float32", S, T, Y.float())
    refuses(TypeError, "labels must be a tensor, got list", S, T, [0, 1, 2])
    refuses(ValueError, "labels must have shape (3,), got (2,)", S, T, Y[:2])
    refuses(TypeError, "row_weights must be a floating-point tensor, got torch.int64", S, T, Y, row_weights=Y)
    refuses(ValueError, "row_weights must have shape (3,), got (1,)", S, T, Y, row_weights=torch.ones(1))


@pytest.mark.parametrize("kernel", all_kernels("kd_loss"))
@pytest.mark.parametrize("classes", [5, 1100])
def test_values_out_of_range(kernel, classes):
    student, teacher = torch.zeros(3, classes), torch.ones(3, classes)
    for label in (classes, -1, -7, 2**40):
        text = f"labels must lie in 0..{classes - 1} or be ignore_index (-100), got {label}"
        refuses(ValueError, text, student, teacher, torch.tensor([0, label, 1]), kernel=kernel)
    kd_loss(student, teacher, torch.tensor([0, -7, 1]), **OPTIONS, ignore_index=-7, kernel=kernel)
    refuses(
        ValueError,
        "row_weights must not be negative or NaN",
        student,
        teacher,
        Y,
        row_weights=torch.tensor([1.0, -1.0, 1.0]),
        kernel=kernel,
    )
    refuses(
        ValueError,
        "row_weights must not be negative or NaN",
        student,
        teacher,
        Y,
        row_weights=torch.tensor([1, math.nan, 1]),
        kernel=kernel,
    )
    top = teacher[:, :2]
    for ids, text in (
        ([0, classes], f"teacher_ids must lie in 0..{classes - 1}, got {classes}"),
        ([-1, 0], f"teacher_ids must lie in 0..{classes - 1}, got -1"),
        ([3, 3], "teacher_ids must differ within a row, got 3 twice"),
    ):
        refuses(ValueError, text, student, top, Y, teacher_ids=torch.tensor([[0, 1], ids, [1, 2]]), kernel=kernel)
    for value in (-2, classes):
        text = f"class_map must lie in -1..{classes - 1}, got {value}"
        refuses(ValueError, text, student, teacher, Y, class_map=torch.full((classes,), value), kernel=kernel)
    text = "class_map must map at least one class, got -1 for all"
    refuses(ValueError, text, student, teacher, Y, class_map=torch.full((classes,), -1), kernel=kernel)


def test_top_k_and_maps():
    ids, p = torch.tensor([[0, 1]] * 3), T[:, :2] / 4
    refuses(ValueError, "teacher_ids must have shape (3, 2), got (3, 1)", S, p, Y, teacher_ids=ids[:, :1])
    refuses(ValueError, "tail needs teacher_form 'probabilities' or 'log_probabilities', got 'logits'", S, p, Y, teacher_ids=ids, tail=True)
    refuses(ValueError, "reverse_kl is infinite for a top-k teacher without tail", S, p, Y, teacher_ids=ids, divergence="reverse_kl")
    refuses(ValueError, "divergence must be forward_kl, reverse_kl or jsd for a top-k teacher", S, p, Y, teacher_ids=ids, divergence="dkd")
    refuses(ValueError, "class_map must be None with teacher_ids", S, p, Y, teacher_ids=ids, class_map="prefix")
    wide = torch.arange(6).repeat(3, 1)
    refuses(ValueError, "teacher_ids must name at most the student's 5 classes, got 6", S, torch.ones(3, 6), Y, teacher_ids=wide)
    refuses(ValueError, "class_map must be None, 'prefix' or a tensor", S, T, Y, class_map="suffix")
    refuses(ValueError, "class_map must have shape (5,), got (4,)", S, T, Y, class_map=torch.zeros(4, dtype=torch.long))
    refuses(ValueError, "divergence 'dkd' needs equal vocabularies, got a class_map", S, T, Y, class_map="prefix", divergence="dkd")


@pytest.mark.parametrize("kernel", native_kernels("kd_loss"))
def test_what_a_kernel_cannot_run(kernel):
    refuses(ValueError, f"kernel '{kernel}' cannot run torch.float64", S.double(), T.double(), Y, kernel=kernel)
    refuses(ValueError, f"kernel '{kernel}' cannot run divergence 'dist'", S, T, Y, kernel=kernel, divergence="dist")


@pytest.mark.parametrize("kernel", native_kernels("kd_loss"))
def test_a_refused_call_leaves_the_logits_alone(kernel):
    x = torch.randn(3, 5, requires_grad=True)
    logits = x + 0
    before = logits.detach().clone()
    with pytest.raises(ValueError, match="labels must lie"):
        kd_loss(logits, T, torch.tensor([0, 1, 5]), **OPTIONS, inplace=True, kernel=kernel)
    assert torch.equal(logits.detach(), before)
