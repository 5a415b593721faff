"""Arguments of ``fit``: checked before anything is changed, optimizer and scheduler made where functions were given."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .metrics import resolve_metric

OptimizerLike = torch.optim.Optimizer | Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None
SchedulerLike = Any  # an LRScheduler, a function of the optimizer that makes one, or None


def check_arguments(
    train_loader: Any,
    val_loader: Any,
    epochs: int,
    seed: int,
    max_grad_norm: float | None,
    checkpoint: Any,
    resume: bool,
    scheduler_interval: str,
    metric: Any,
    metric_mode: str,
) -> None:
    for name, loader in (("train_loader", train_loader), ("val_loader", val_loader)):
        if loader is None and name == "val_loader":
            continue
        if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
            raise TypeError(f"fit: {name} must be iterable, got {type(loader).__name__}")
        if length(loader) == 0:
            raise ValueError(f"fit: {name} must yield at least one batch, got none")
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
        raise ValueError(f"fit: epochs must be a positive integer, got {epochs!r}")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"fit: seed must be an integer not below 0, got {seed!r}")
    if max_grad_norm is not None and not (isinstance(max_grad_norm, (int, float)) and max_grad_norm > 0):
        raise ValueError(f"fit: max_grad_norm must be a number above 0, got {max_grad_norm!r}")
    if scheduler_interval not in ("epoch", "step"):
        raise ValueError(f"fit: scheduler_interval must be 'epoch' or 'step', got {scheduler_interval!r}")
    resolve_metric(metric, metric_mode, has_labels=True)
    if metric is not None and val_loader is None:
        raise ValueError(f"fit: metric {getattr(metric, '__name__', metric)!r} needs val_loader, the batches to score, got None")
    if checkpoint is None:
        if resume:
            raise ValueError("fit: resume=True needs checkpoint, the file to continue from")
    elif not Path(checkpoint).absolute().parent.is_dir():
        raise ValueError(f"fit: the folder of checkpoint must exist, got {os.fspath(checkpoint)!r}")


def make_optimizer(optimizer: OptimizerLike, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if not parameters:
        raise ValueError("fit: the student must have parameters that require a gradient, got none")
    if optimizer is None:
        return torch.optim.AdamW(parameters, lr=1e-3)
    made = optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer(parameters) if callable(optimizer) else None
    if not isinstance(made, torch.optim.Optimizer):
        raise TypeError(f"fit: optimizer must be a torch optimizer or a function that makes one, got {type(optimizer).__name__}")
    held = {id(parameter) for group in made.param_groups for parameter in group["params"]}
    if not any(id(parameter) in held for parameter in parameters):
        raise ValueError("fit: optimizer must hold parameters of the student, got other ones only")
    return made


def check_adapters(optimizer: torch.optim.Optimizer, loss: nn.Module) -> None:
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [name for name, parameter in loss.named_parameters() if parameter.requires_grad and id(parameter) not in held]
    if missing:
        raise ValueError(
            f"fit: optimizer must hold the loss's adapters ({', '.join(missing)}) too; call distiller.prepare(batch) and then make it from "
            "distiller.parameters(), or pass a function: optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1)"
        )


def make_scheduler(scheduler: SchedulerLike, optimizer: torch.optim.Optimizer, interval: str) -> Any:
    if scheduler is None:
        return None
    made = scheduler if hasattr(scheduler, "step") else scheduler(optimizer) if callable(scheduler) else None
    if not (hasattr(made, "step") and hasattr(made, "state_dict")):
        raise TypeError(f"fit: scheduler must be a torch scheduler or a function that makes one, got {type(scheduler).__name__}")
    if getattr(made, "optimizer", optimizer) is not optimizer:
        raise ValueError("fit: scheduler must belong to the optimizer that is used, got one of another optimizer")
    if interval == "step" and isinstance(made, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise ValueError("fit: scheduler_interval must be 'epoch' for ReduceLROnPlateau, which waits for the metric, got 'step'")
    return made


def length(loader: Any) -> int | None:
    try:
        return len(loader)
    except TypeError:  # an IterableDataset or a generator has none
        return None
