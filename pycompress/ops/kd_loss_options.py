"""Arguments of ``kd_loss`` and ``linear_kd_loss``: what they may be, checked before anything is computed."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

DIVERGENCES = {"forward_kl": 0, "reverse_kl": 1, "jsd": 2, "dkd": 3, "dist": 4}
"""Divergences by their number in csrc/kd_loss/kd_loss.h; "dist" has no kernel."""
TEACHER_FORMS = {"logits": 0, "probabilities": 1, "log_probabilities": 2}
REDUCTIONS = {"none": 0, "sum": 1, "mean": 2, "batchmean": 3}
PART_WEIGHTS = {"dkd": (1.0, 8.0), "dist": (1.0, 1.0)}
"""Default weights of the two parts: (target, nontarget) of DKD, (inter, intra) of DIST."""


class Options(NamedTuple):
    """Everything but tensors."""

    temperature: float
    soft_weight: float
    hard_weight: float
    divergence: str
    beta: float
    part_weights: tuple[float, float]
    label_smoothing: float
    ignore_index: int
    reduction: str
    teacher_form: str
    tail: bool


OPTION_NAMES = Options._fields  # torch 2.4 cannot trace the attribute, nor _asdict


def check_options(
    where: str,
    temperature: float,
    soft_weight: float,
    hard_weight: float,
    divergence: str,
    beta: float | None,
    part_weights: tuple[float, float] | None,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
    teacher_form: str,
    tail: bool,
) -> Options:
    """The options with defaults filled in. Raises ``ValueError`` or ``TypeError``, naming the argument."""
    _number(where, "temperature", temperature, above=True)
    _number(where, "soft_weight", soft_weight)
    _number(where, "hard_weight", hard_weight)
    if soft_weight == 0 and hard_weight == 0:
        raise ValueError(f"{where}: soft_weight or hard_weight must be above 0, got 0 for both")
    _one_of(where, "divergence", divergence, DIVERGENCES)
    _one_of(where, "reduction", reduction, REDUCTIONS)
    _one_of(where, "teacher_form", teacher_form, TEACHER_FORMS)
    if beta is None:
        beta = 0.5
    elif divergence != "jsd":
        raise ValueError(f"{where}: beta belongs to divergence 'jsd', got {beta!r} with {divergence!r}")
    elif isinstance(beta, bool) or not isinstance(beta, (int, float)) or not 0 <= beta <= 1:
        raise ValueError(f"{where}: beta must lie in [0, 1], got {beta!r}")
    if part_weights is None:
        part_weights = PART_WEIGHTS.get(divergence, (1.0, 1.0))
    elif divergence not in PART_WEIGHTS:
        raise ValueError(f"{where}: part_weights belongs to divergence 'dkd' or 'dist', got {part_weights!r} with {divergence!r}")
    elif not isinstance(part_weights, (tuple, list)) or len(part_weights) != 2:
        raise ValueError(f"{where}: part_weights must be two numbers, got {part_weights!r}")
    else:
        for weight in part_weights:
            _number(where, "part_weights", weight)
        if not any(part_weights):
            raise ValueError(f"{where}: part_weights must have one entry above 0, got {part_weights!r}")
        part_weights = (float(part_weights[0]), float(part_weights[1]))
    if isinstance(label_smoothing, bool) or not isinstance(label_smoothing, (int, float)) or not 0 <= label_smoothing < 1:
        raise ValueError(f"{where}: label_smoothing must lie in [0, 1), got {label_smoothing!r}")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"{where}: ignore_index must be an int, got {type(ignore_index).__name__}")
    if divergence == "dist" and reduction != "mean":
        raise ValueError(f"{where}: reduction must be 'mean' for divergence 'dist', which compares rows with each other, got {reduction!r}")
    # The ends of the Jensen-Shannon family are forward and reverse KL by convention: the formula itself is 0 there.
    if divergence == "jsd" and beta in (0, 1):
        divergence = "reverse_kl" if beta else "forward_kl"
    return Options(
        float(temperature), float(soft_weight), float(hard_weight), divergence, float(beta), part_weights, float(label_smoothing),
        ignore_index, reduction, teacher_form, bool(tail),
    )  # fmt: skip


def check_tensors(
    where: str,
    options: Options,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    row_weights: Tensor | None,
    teacher_ids: Tensor | None,
    class_map: Tensor | str | None,
) -> int:
    """Shapes, dtypes, devices and combinations. Returns how many leading classes the soft term compares."""
    shape = student.shape if isinstance(student, Tensor) else None
    for name, logits in (("student_logits", student), ("teacher_logits", teacher)):
        if not isinstance(logits, Tensor):
            raise TypeError(f"{where}: {name} must be a tensor, got {type(logits).__name__}")
        if not logits.dtype.is_floating_point:
            raise TypeError(f"{where}: {name} must be floating point, got {logits.dtype}")
    assert shape is not None
    if len(shape) < 2 or student.numel() == 0:
        raise ValueError(f"{where}: student_logits must be (..., classes) with at least one row and one class, got {tuple(shape)}")
    if teacher.shape != shape and (teacher.shape[:-1] != shape[:-1] or teacher.shape[-1] == 0):
        raise ValueError(f"{where}: teacher_logits must have the rows of student_logits {tuple(shape)}, got {tuple(teacher.shape)}")
    if teacher.device != student.device:
        raise ValueError(f"{where}: teacher_logits must be on {student.device} like student_logits, got {teacher.device}")
    if labels is not None:
        _integers(where, "labels", labels, student, shape[:-1])
    elif options.hard_weight > 0 or (options.divergence == "dkd" and options.soft_weight > 0):
        raise ValueError(f"{where}: labels must be given for hard_weight above 0 and for divergence 'dkd', got None")
    if row_weights is not None:
        _row_weights(where, options, row_weights, student)
    if teacher_ids is not None:
        _top_k(where, options, student, teacher, teacher_ids, class_map)
        return shape[-1]
    if options.tail:
        raise ValueError(f"{where}: tail belongs to a top-k teacher, got True without teacher_ids")
    if options.divergence == "dkd" and shape[-1] < 2:
        raise ValueError(f"{where}: divergence 'dkd' needs at least 2 classes, got {tuple(shape)}")
    if isinstance(class_map, Tensor):
        _integers(where, "class_map", class_map, student, shape[-1:])
    elif class_map is None:
        if teacher.shape[-1] != shape[-1]:
            raise ValueError(
                f"{where}: teacher_logits must have the {shape[-1]} classes of student_logits, got {teacher.shape[-1]}; for vocabularies "
                "of different size pass class_map='prefix' or the teacher's class of each student class"
            )
        return shape[-1]
    elif class_map != "prefix":
        raise ValueError(f"{where}: class_map must be None, 'prefix' or a tensor of teacher classes, got {class_map!r}")
    if options.divergence == "dkd":
        raise ValueError(f"{where}: divergence 'dkd' needs equal vocabularies, got a class_map")
    return shape[-1] if isinstance(class_map, Tensor) else min(shape[-1], teacher.shape[-1])


def check_values(
    where: str, options: Options, student: Tensor, teacher_classes: int, labels, row_weights, teacher_ids, class_map: Tensor | None
) -> None:
    """The checks that the native kernels make while they read, for the reference on the CPU.

    On an accelerator looking at values would stall the stream, so an index out of range is the device's own assertion there.
    """
    if student.device.type != "cpu" or torch.compiler.is_compiling():
        return
    classes = student.shape[-1]
    if labels is not None:
        wrong = labels[((labels < 0) | (labels >= classes)) & (labels != options.ignore_index)]
        if wrong.numel():
            raise ValueError(
                f"{where}: labels must lie in 0..{classes - 1} or be ignore_index ({options.ignore_index}), got {int(wrong[0])}"
            )
    if row_weights is not None and not bool((row_weights >= 0).all()):
        raise ValueError(f"{where}: row_weights must not be negative or NaN, got {float(row_weights.min()):f}")
    if teacher_ids is not None:
        wrong = teacher_ids[(teacher_ids < 0) | (teacher_ids >= classes)]
        if wrong.numel():
            raise ValueError(f"{where}: teacher_ids must lie in 0..{classes - 1}, got {int(wrong[0])}")
        ordered = teacher_ids.sort(dim=-1).values
        twice = ordered[..., 1:][ordered[..., 1:] == ordered[..., :-1]]
        if twice.numel():
            raise ValueError(f"{where}: teacher_ids must differ within a row, got {int(twice[0])} twice")
    if class_map is not None:
        wrong = class_map[(class_map < -1) | (class_map >= teacher_classes)]
        if wrong.numel():
            raise ValueError(f"{where}: class_map must lie in -1..{teacher_classes - 1}, got {int(wrong[0])}")
        if not bool((class_map >= 0).any()):
            raise ValueError(f"{where}: class_map must map at least one class, got -1 for all")


def _number(where: str, name: str, value: float, above: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (value > 0 if above else value >= 0) or value == math.inf:
        raise ValueError(f"{where}: {name} must be a finite number {'above 0' if above else 'not below 0'}, got {value!r}")


def _one_of(where: str, name: str, value: str, allowed: dict[str, int]) -> None:
    if value not in allowed:
        raise ValueError(f"{where}: {name} must be one of {', '.join(allowed)}, got {value!r}")


def _integers(where: str, name: str, tensor: Tensor, student: Tensor, shape: torch.Size) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{where}: {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype != torch.int64 and (tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype == torch.bool):
        raise TypeError(f"{where}: {name} must be integers (class numbers), got {tensor.dtype}")
    if tensor.shape != shape:
        raise ValueError(f"{where}: {name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.device != student.device:
        raise ValueError(f"{where}: {name} must be on {student.device} like student_logits, got {tensor.device}")


def _row_weights(where: str, options: Options, row_weights: Tensor, student: Tensor) -> None:
    if not isinstance(row_weights, Tensor) or not row_weights.dtype.is_floating_point:
        got = row_weights.dtype if isinstance(row_weights, Tensor) else type(row_weights).__name__
        raise TypeError(f"{where}: row_weights must be a floating-point tensor, got {got}")
    if row_weights.shape != student.shape[:-1]:
        raise ValueError(f"{where}: row_weights must have shape {tuple(student.shape[:-1])}, got {tuple(row_weights.shape)}")
    if row_weights.device != student.device:
        raise ValueError(f"{where}: row_weights must be on {student.device} like student_logits, got {row_weights.device}")
    if options.divergence == "dist":
        raise ValueError(f"{where}: row_weights must be None for divergence 'dist', which compares rows with each other, got a tensor")


def _top_k(where: str, options: Options, student: Tensor, teacher: Tensor, teacher_ids: Tensor, class_map: Tensor | str | None) -> None:
    _integers(where, "teacher_ids", teacher_ids, student, teacher.shape)
    if teacher.shape[-1] > student.shape[-1]:
        raise ValueError(f"{where}: teacher_ids must name at most the student's {student.shape[-1]} classes, got {teacher.shape[-1]}")
    if class_map is not None:
        raise ValueError(f"{where}: class_map must be None with teacher_ids, which are student classes, got {type(class_map).__name__}")
    if options.divergence in ("dkd", "dist"):
        raise ValueError(f"{where}: divergence must be forward_kl, reverse_kl or jsd for a top-k teacher, got {options.divergence!r}")
    if options.tail and options.teacher_form == "logits":
        raise ValueError(f"{where}: tail needs teacher_form 'probabilities' or 'log_probabilities', got 'logits'")
    if not options.tail and options.divergence == "reverse_kl":
        raise ValueError(f"{where}: reverse_kl is infinite for a top-k teacher without tail, got tail=False")
