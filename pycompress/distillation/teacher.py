"""Teachers: frozen while they teach, left as they were; several make an ensemble."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .batch import logits_of
from .losses.check import at_least_float32, check_temperature


@contextmanager
def frozen(*models: nn.Module | None) -> Iterator[None]:
    """Models in eval mode and without gradients inside the block; every module's training flag restored at its end.

    ``requires_grad`` is never touched: without recorded operations no gradient can reach the parameters.
    """
    with evaluating(*models), torch.no_grad():
        yield


@contextmanager
def evaluating(*models: nn.Module | None) -> Iterator[None]:
    """Models in eval mode inside the block, each module's own training flag restored at its end."""
    changed = [model for model in models if model is not None and any(module.training for module in model.modules())]
    with keep_training_flags(*changed):
        for model in changed:
            model.eval()
        yield


@contextmanager
def keep_training_flags(*models: nn.Module) -> Iterator[None]:
    """Restore every module's training flag when the block ends."""
    flags = [(module, module.training) for model in models for module in model.modules()]
    roots = [model.training for model in models]
    try:
        yield
    finally:
        for model, training in zip(models, roots, strict=True):
            model.train(training)  # through the model's own train(), which may do more than set flags
        for module, training in flags:
            module.training = training


class Ensemble(nn.Module):
    """Several teachers as one: ``forward`` runs all and averages.

    ``mean="probabilities"`` (default): logits whose softmax at ``temperature`` is the mean of the members' softmax at that
    temperature (Hinton et al. 2015, section 3, arithmetic mean). With forward KL at the same temperature the student's gradient is
    that of the average KL to the members. ``mean="logits"``: the mean of the logits (geometric mean of the probabilities).
    All members must return logits of one shape, classes in ``class_dim``. Returns logits in at least float32.

    ``Distiller(student, [teacher1, teacher2], loss)`` makes one with the loss's temperature.

    >>> teacher = Ensemble([teacher1, teacher2], mean="logits")
    """

    def __init__(self, models: Iterable[nn.Module], mean: str = "probabilities", temperature: float = 1.0, class_dim: int = -1) -> None:
        super().__init__()
        members = list(models)
        if not members:
            raise ValueError("Ensemble: models must hold at least one model, got none")
        for member in members:
            if not isinstance(member, nn.Module):
                raise TypeError(f"Ensemble: models must be torch modules, got {type(member).__name__}")
        if mean not in ("probabilities", "logits"):
            raise ValueError(f"Ensemble: mean must be 'probabilities' or 'logits', got {mean!r}")
        self.models = nn.ModuleList(members)
        self.mean = mean
        self.temperature = check_temperature("Ensemble", temperature)
        self.class_dim = class_dim

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        logits = [at_least_float32(logits_of(f"ensemble member {i}", model(*args, **kwargs))) for i, model in enumerate(self.models)]
        for i, other in enumerate(logits[1:], start=1):
            if other.shape != logits[0].shape:
                raise ValueError(f"Ensemble: member {i} must return logits of shape {tuple(logits[0].shape)}, got {tuple(other.shape)}")
        if self.mean == "logits":
            return torch.stack(logits).mean(0)
        log_probabilities = torch.stack([F.log_softmax(x / self.temperature, dim=self.class_dim) for x in logits])
        return self.temperature * (log_probabilities.logsumexp(0) - math.log(len(logits)))

    def extra_repr(self) -> str:
        return f"mean={self.mean!r}, temperature={self.temperature}"
