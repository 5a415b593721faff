"""Losses on the outputs of named modules."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .base import LOSSES, DistillationLoss, Outputs, PairLoss
from .check import check_weight

Path = str | tuple[str, ...]


class FeatureLoss(DistillationLoss):
    """``weight`` * sum over pairs of a feature or relation loss between a student module and a teacher module.

    ``pairs``: ``{"student.path": "teacher.path"}``, paths as in ``model.named_modules()``. For a loss that reads two
    modules at once (FSP) both sides are tuples: ``{("conv1", "conv2"): ("layer1", "layer2")}``. Teachers in an ensemble are
    ``"models.0.layer1"``, ``"models.1.layer1"``, ...
    ``loss``: a name in ``LOSSES`` ("hint", "attention_transfer", "fsp", "rkd", "similarity", "correlation", "pkt") or an
    instance, e.g. ``RKDLoss(25, 50)``. Each pair gets its own copy, with its own adapter where one is needed.
    Features are taken by forward hooks, so the models' code stays as it is. A module that returns a tuple counts with its first
    entry. Adapters are parameters of this loss: train them with the student (``Distiller.fit`` does, and
    ``Distiller.parameters()`` lists them).

    >>> loss = KDLoss() + FeatureLoss({"layer2": "layer3"}, loss="attention_transfer", weight=100.0)
    >>> Distiller(student, teacher, loss).fit(train_loader, epochs=10)
    """

    def __init__(self, pairs: Mapping[Path, Path], loss: str | PairLoss = "hint", weight: float = 1.0) -> None:
        super().__init__()
        if isinstance(loss, str):
            kind = LOSSES[loss]
            if not issubclass(kind, PairLoss):
                raise ValueError(f"FeatureLoss: loss must be a feature or relation loss, got {loss!r}, which works on logits")
            loss = kind()
        if not isinstance(loss, PairLoss):
            raise TypeError(f"FeatureLoss: loss must be a name or a feature or relation loss, got {type(loss).__name__}")
        if not isinstance(pairs, Mapping):
            raise TypeError(f"FeatureLoss: pairs must be a dict of student path to teacher path, got {type(pairs).__name__}")
        if not pairs:
            raise ValueError("FeatureLoss: pairs must name at least one pair of modules, got none")
        self.pairs = [(as_paths(student, loss.arity), as_paths(teacher, loss.arity)) for student, teacher in pairs.items()]
        self.weight = check_weight("FeatureLoss", "weight", weight)
        if self.weight == 0:
            raise ValueError("FeatureLoss: weight must be positive, got 0")
        self.losses = nn.ModuleList(copy.deepcopy(loss) for _ in self.pairs)
        self.name = str(getattr(loss, "name", "feature"))

    @property
    def student_paths(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(path for student, _ in self.pairs for path in student))

    @property
    def teacher_paths(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(path for _, teacher in self.pairs for path in teacher))

    @property
    def is_prepared(self) -> bool:
        return all(loss.is_prepared for loss in self._pair_losses())

    def prepare(self, outputs: Outputs) -> None:
        for loss, (student, teacher) in zip(self._pair_losses(), self.pairs, strict=True):
            loss.prepare(pick(outputs.student_features, student), pick(outputs.teacher_features, teacher))

    def terms(self, outputs: Outputs) -> dict[str, Tensor]:
        values = [
            loss(pick(outputs.student_features, student), pick(outputs.teacher_features, teacher))
            for loss, (student, teacher) in zip(self._pair_losses(), self.pairs, strict=True)
        ]
        return {self.name: self.weight * torch.stack(values).sum()}

    def _pair_losses(self) -> list[PairLoss]:
        return [loss for loss in self.losses if isinstance(loss, PairLoss)]

    def extra_repr(self) -> str:
        shown = ", ".join(f"{'+'.join(student)} -> {'+'.join(teacher)}" for student, teacher in self.pairs)
        return f"{shown}, weight={self.weight}"


def as_paths(path: Path, arity: int) -> tuple[str, ...]:
    paths = (path,) if isinstance(path, str) else path
    if not isinstance(paths, tuple) or not all(isinstance(name, str) for name in paths):
        raise TypeError(f"FeatureLoss: pairs must hold module paths or tuples of them, got {path!r}")
    if len(paths) != arity:
        raise ValueError(f"FeatureLoss: this loss reads {arity} module(s) on each side of a pair, got {path!r}")
    return paths


def pick(features: Mapping[str, Tensor], paths: tuple[str, ...]) -> Tensor:
    """The feature of one path, or a tuple for several (losses of arity 2 take tuples)."""
    found = tuple(features[path] for path in paths)
    return found[0] if len(found) == 1 else found  # type: ignore[return-value]
