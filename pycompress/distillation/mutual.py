"""Online distillation: students without a teacher learn from each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .batch import Batch, logits_of, split_batch
from .distiller import as_loss, count, make_prediction
from .history import History
from .losses.base import DistillationLoss, Outputs
from .losses.kd import KDLoss
from .metrics import Metric, Prediction
from .run import total
from .teacher import Ensemble
from .training import Trainable
from .unwrap import unwrap


class MutualLearning(Trainable):
    """Deep mutual learning: each student learns from the labels and, as if each peer were its teacher, from the peers.

    Student i's loss is the mean over its peers j of ``loss(student_i, student_j, labels)``; peers get no gradient through it.
    All students take one step together per batch, on one optimizer. ``fit``, ``loss`` and ``parameters`` are those of
    :class:`Distiller`; terms are named ``"0/kd"``, ``"1/kd"``, ...; the metric is the mean over students, and
    ``best`` is the epoch where that mean is best.

    ``students``: two or more models with logits of one shape, of any architectures. ``loss``: a loss on logits, default
    ``KDLoss(temperature=1.0, soft_weight=1.0, hard_weight=1.0)`` as in Zhang et al. 2018, equations 3 to 8,
    https://arxiv.org/abs/1706.00384 (with simultaneous updates).

    >>> cohort = MutualLearning([small, other_small])
    >>> history = cohort.fit(train_loader, epochs=10, val_loader=val_loader)
    """

    def __init__(
        self,
        students: Sequence[nn.Module],
        loss: DistillationLoss | Sequence[DistillationLoss] | dict[str, DistillationLoss] | None = None,
    ) -> None:
        self.loss_module = as_loss("MutualLearning", KDLoss(1.0, 1.0, 1.0) if loss is None else loss)
        if not isinstance(students, (list, tuple, nn.ModuleList)):
            raise TypeError(f"MutualLearning: students must be a list of torch modules, got {type(students).__name__}")
        self.models = list(students)
        for student in self.models:
            if not isinstance(student, nn.Module):
                raise TypeError(f"MutualLearning: students must be torch modules, got {type(student).__name__}")
        if len({id(unwrap(student)) for student in self.models}) != len(self.models):
            raise ValueError("MutualLearning: students must be different models, got one twice")
        if len(self.models) < 2:
            raise ValueError(f"MutualLearning: students must be at least 2, got {len(self.models)}")
        if self.loss_module.student_paths or not self.loss_module.needs_teacher_logits:
            raise ValueError("MutualLearning: loss must compare logits with the peers' (soft_weight > 0) and read no features")
        self.history = History()
        self.term_kernels = {}

    def students(self) -> dict[str, nn.Module]:
        return {f"student{i}": student for i, student in enumerate(self.models)}

    def teachers(self) -> list[nn.Module]:
        return []

    def prepare(self, batch: Any, seed: int = 0) -> None:
        """Losses on logits have nothing to prepare."""

    def terms(self, batch: Any) -> dict[str, Tensor]:
        return self._terms(self.models, split_batch(batch))[0]

    def predict(self, batch: Batch, metric: Metric) -> list[Prediction]:
        models = [unwrap(student) for student in self.models]
        if metric.name == "loss" and metric.function is None:
            terms, logits = self._terms(models, batch)
            value = total(terms) / len(models)
        else:
            logits, value = self._logits(models, batch), None
        predictions = []
        for i, mine in enumerate(logits):
            peers = torch.stack([other for j, other in enumerate(logits) if j != i]).mean(0)
            outputs = Outputs(student_logits=mine, teacher_logits=peers, labels=batch.labels)
            predictions.append(make_prediction(self.loss_module, outputs, value, batch.size))
        return predictions

    def as_teacher(self, mean: str = "probabilities") -> Ensemble:
        """The students as one ensemble, usually better than each alone."""
        return Ensemble([unwrap(student) for student in self.models], mean=mean)

    def _logits(self, models: list[nn.Module], batch: Batch) -> list[Tensor]:
        return [logits_of(f"student {i}", model(*batch.args, **batch.kwargs)) for i, model in enumerate(models)]

    def _terms(self, models: list[nn.Module], batch: Batch) -> tuple[dict[str, Tensor], list[Tensor]]:
        logits = self._logits(models, batch)
        found: dict[str, Tensor] = {}
        for i, mine in enumerate(logits):
            for j, peer in enumerate(logits):
                if i == j:
                    continue
                outputs = Outputs(mine, peer.detach(), batch.labels)
                self.term_kernels |= {f"{i}/{name}": kernel for name, kernel in self.loss_module.kernels(outputs).items()}
                for name, value in self.loss_module.terms(outputs).items():
                    key, share = f"{i}/{name}", value / (len(logits) - 1)
                    found[key] = found[key] + share if key in found else share
        return found, logits

    def __repr__(self) -> str:
        sizes = ", ".join(f"{type(unwrap(student)).__name__} ({count(student):,} parameters)" for student in self.models)
        return f"MutualLearning(\n  students: {sizes}\n  loss: {self.loss_module!r}\n)"
