"""How well a student does on validation batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

METRICS = ("accuracy", "agreement", "loss")

MetricFunction = Callable[[Tensor, Tensor], "Tensor | float"]


@dataclass(frozen=True)
class Metric:
    """``function``: None for the built-in names. ``higher_is_better`` decides which epoch is best."""

    name: str
    higher_is_better: bool
    function: MetricFunction | None = None


@dataclass
class Prediction:
    """One student on one batch. Logits have the classes last; ``labels`` has their shape without it."""

    logits: Tensor | None
    teacher_logits: Tensor | None
    labels: Tensor | None
    raw_logits: Tensor | None
    raw_labels: Tensor | None
    loss: Tensor | None
    size: int
    ignore_index: int
    reduction: str | None
    """How ``loss`` was reduced over rows; None for a loss without logits, the mean over samples."""


def resolve_metric(metric: str | MetricFunction | None, mode: str, has_labels: bool) -> Metric:
    """What ``fit(metric=...)`` means. None is "accuracy" with labels, "agreement" with the teacher without."""
    if mode not in ("max", "min"):
        raise ValueError(f"fit: metric_mode must be 'max' or 'min', got {mode!r}")
    if metric is None:
        metric = "accuracy" if has_labels else "agreement"
    if isinstance(metric, str):
        if metric not in METRICS:
            raise ValueError(f"fit: metric must be a function or one of {', '.join(METRICS)}, got {metric!r}")
        if mode == "min" and metric != "loss":
            raise ValueError(f"fit: metric_mode must be 'max' for metric {metric!r}, got 'min'; pass a function to choose otherwise")
        return Metric(metric, metric != "loss")
    if not callable(metric):
        raise TypeError(f"fit: metric must be a function or one of {', '.join(METRICS)}, got {type(metric).__name__}")
    return Metric(getattr(metric, "__name__", type(metric).__name__), mode == "max", metric)


def score(metric: Metric, prediction: Prediction) -> tuple[Tensor, Tensor]:
    """(sum of scores, number of scored rows) of one batch, as scalar tensors on the logits' device."""
    if metric.name == "loss" and metric.function is None:
        assert prediction.loss is not None
        return score_loss(prediction, prediction.loss.detach())
    if metric.function is not None:
        return score_function(metric, prediction)
    target = prediction.labels
    assert prediction.logits is not None
    if metric.name == "agreement":
        assert prediction.teacher_logits is not None
        target = prediction.teacher_logits.argmax(-1)
        if prediction.labels is not None:  # padding counts nowhere
            target = torch.where(prediction.labels == prediction.ignore_index, prediction.ignore_index, target)
    if target is None:
        raise ValueError("fit: metric 'accuracy' needs validation batches with labels; use metric='agreement' or a function")
    counted = target != prediction.ignore_index
    right = (prediction.logits.argmax(-1) == target) & counted
    return right.sum().float(), counted.sum().float()


def score_loss(prediction: Prediction, loss: Tensor) -> tuple[Tensor, Tensor]:
    """The loss weighted so that it does not depend on how the data is batched.

    A mean counts with the rows it is a mean of, "batchmean" with its samples; a sum is one already, and becomes one per sample.
    """
    size = torch.full_like(loss, prediction.size)
    if prediction.reduction == "sum":
        return loss, size
    if prediction.reduction == "mean" and prediction.labels is not None:
        rows = (prediction.labels != prediction.ignore_index).sum().to(loss)
        return torch.where(rows > 0, loss * rows, 0.0), rows
    return loss * size, size


def score_function(metric: Metric, prediction: Prediction) -> tuple[Tensor, Tensor]:
    """A user's function of (logits, labels): a tensor of scores per sample, or one number for the batch."""
    assert metric.function is not None and prediction.raw_logits is not None
    if prediction.raw_labels is None:
        raise ValueError(f"fit: metric {metric.name!r} needs validation batches with labels")
    value = torch.as_tensor(metric.function(prediction.raw_logits, prediction.raw_labels), device=prediction.raw_logits.device).float()
    if value.dim() == 0:
        return value * prediction.size, torch.full_like(value, prediction.size)
    return value.sum(), torch.full_like(value.sum(), value.numel())
