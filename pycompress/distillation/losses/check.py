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
