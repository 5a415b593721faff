"""Argument checks that the losses share. Each raises before anything is computed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

REDUCTIONS = ("none", "sum", "mean", "batchmean")


def check_temperature(where: str, temperature: float) -> float:
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)) or not 0 < temperature < math.inf:
        raise ValueError(f"{where}: temperature must be a finite number above 0, got {temperature!r}")
    return float(temperature)


def check_weight(where: str, name: str, weight: float) -> float:
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
        raise ValueError(f"{where}: {name} must be a finite number not below 0, got {weight!r}")
    return float(weight)


def check_some_weight(where: str, **weights: float) -> None:
    if not any(weights.values()):
        raise ValueError(f"{where}: at least one of {', '.join(weights)} must be positive, got 0 for all")


def check_between(where: str, name: str, value: float, low: float, high: float, *, open_end: bool = False) -> float:
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high and not (open_end and value == high)
    if not fits:
        raise ValueError(f"{where}: {name} must lie in [{low}, {high}{')' if open_end else ']'}, got {value!r}")
    return float(value)


def check_reduction(where: str, reduction: str, allowed: tuple[str, ...] = REDUCTIONS) -> str:
    if reduction not in allowed:
        raise ValueError(f"{where}: reduction must be one of {', '.join(allowed)}, got {reduction!r}")
    return reduction


def check_logits(where: str, student: Tensor, teacher: Tensor) -> None:
    """Both (..., classes), floating point, same shape, same device, at least one row and one class."""
    for name, logits in (("student_logits", student), ("teacher_logits", teacher)):
        if not isinstance(logits, Tensor):
            raise TypeError(f"{where}: {name} must be a tensor, got {type(logits).__name__}")
        if not logits.dtype.is_floating_point:
            raise TypeError(f"{where}: {name} must be floating point, got {logits.dtype}")
    if student.dim() < 2 or student.numel() == 0:
        raise ValueError(f"{where}: student_logits must be (..., classes) with at least one row and one class, got {tuple(student.shape)}")
    if teacher.shape != student.shape:
        raise ValueError(
            f"{where}: teacher_logits must have the shape of student_logits {tuple(student.shape)}, got {tuple(teacher.shape)}"
        )
    if teacher.device != student.device:
        raise ValueError(f"{where}: teacher_logits must be on {student.device} like student_logits, got {teacher.device}")


def check_labels(where: str, labels: Tensor, logits: Tensor, ignore_index: int) -> None:
    """Integers of shape ``logits.shape[:-1]`` in [0, classes), or ``ignore_index``.

    Values are looked at on the CPU only: on an accelerator that would stall the stream, and the device asserts there.
    """
    if not isinstance(labels, Tensor):
        raise TypeError(f"{where}: labels must be a tensor, got {type(labels).__name__}")
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise TypeError(f"{where}: labels must be integers (class numbers), got {labels.dtype}")
    if labels.shape != logits.shape[:-1]:
        raise ValueError(f"{where}: labels must have shape {tuple(logits.shape[:-1])}, got {tuple(labels.shape)}")
    if labels.device != logits.device:
        raise ValueError(f"{where}: labels must be on {logits.device} like the logits, got {labels.device}")
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        classes = logits.shape[-1]
        wrong = ((labels < 0) | (labels >= classes)) & (labels != ignore_index)
        if wrong.any():
            raise ValueError(
                f"{where}: labels must lie in 0..{classes - 1} or be ignore_index ({ignore_index}), got {int(labels[wrong].flatten()[0])}"
            )


def check_features(where: str, student: Tensor, teacher: Tensor, min_dim: int = 2) -> None:
    """Floating-point features of one batch: (batch, ...) each, same batch size."""
    for name, features in (("student", student), ("teacher", teacher)):
        if not isinstance(features, Tensor):
            raise TypeError(f"{where}: {name} features must be a tensor, got {type(features).__name__}")
        if not features.dtype.is_floating_point:
            raise TypeError(f"{where}: {name} features must be floating point, got {features.dtype}")
        if features.dim() < min_dim or features.numel() == 0:
            raise ValueError(
                f"{where}: {name} features must have at least {min_dim} dimensions and not be empty, got {tuple(features.shape)}"
            )
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(
            f"{where}: student and teacher features must come from one batch, got {student.shape[0]} and {teacher.shape[0]} samples"
        )


def at_least_float32(x: Tensor) -> Tensor:
    """Half-precision values as float32; sums over thousands of classes need it."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
