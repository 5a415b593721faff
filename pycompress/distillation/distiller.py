"""Offline distillation: a frozen teacher, or several, and a student that learns."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from .batch import Batch, device_of, logits_of, split_batch, to_device
from .history import History
from .hooks import check_paths, record_outputs
from .losses.base import CombinedLoss, DistillationLoss, Outputs
from .losses.kd import KDLoss, ResponseLoss
from .metrics import Metric, Prediction
from .rng import isolated_rng, seed_all
from .run import total
from .teacher import Ensemble, frozen
from .training import Trainable
from .unwrap import unwrap


class Distiller(Trainable):
    """Trains ``student`` to do what ``teacher`` does.

    ``teacher``: a model; a list of models, which becomes an :class:`Ensemble` (``ensemble="probabilities"`` averages their softmax
    at the loss's temperature, ``"logits"`` their logits); or None, when the loss needs no teacher logits (``soft_weight=0``: plain
    training) or every batch carries ``teacher_logits`` (a :class:`TeacherCache`). Teachers run in eval mode and without
    gradients and are left as they were. They may be on another device than the student.
    ``loss``: a distillation loss, a list or dict of them (their sum), default ``KDLoss()``, i.e. temperature 4 and both weights 0.5.
    Models return logits, or an object with ``.logits``, or a tuple that starts with them.

    Either ``fit(train_loader, epochs=..., val_loader=...)``, or a loop of your own around ``loss(batch)``: then make the
    optimizer from ``parameters()``, after ``prepare(batch)`` if a loss has adapters.

    Raises ``TypeError`` for things that are no models or losses, ``ValueError`` for a teacher that contains the student and for a
    module path that does not exist.

    >>> distiller = Distiller(student, teacher, loss=KDLoss(temperature=4.0, soft_weight=0.5, hard_weight=0.5))
    >>> history = distiller.fit(train_loader, epochs=10, val_loader=val_loader)
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | Sequence[nn.Module] | None,
        loss: DistillationLoss | Sequence[DistillationLoss] | dict[str, DistillationLoss] | None = None,
        *,
        ensemble: str = "probabilities",
    ) -> None:
        self.loss_module = as_loss("Distiller", loss)
        if not isinstance(student, nn.Module):
            raise TypeError(f"Distiller: student must be a torch module, got {type(student).__name__}")
        self.student = student
        self.teacher = as_teacher(teacher, ensemble, self.loss_module)
        if self.teacher is not None and any(module is unwrap(student) for module in self.teacher.modules()):
            raise ValueError(
                "Distiller: teacher must not be or contain the student itself; pass copy.deepcopy(student) to learn from its past"
            )
        check_paths("Distiller", "student", student, self.loss_module.student_paths)
        if self.loss_module.teacher_paths:
            if self.teacher is None:
                raise ValueError("Distiller: teacher must be given for a loss on its features, got None")
            check_paths("Distiller", "teacher", self.teacher, self.loss_module.teacher_paths)
        self.history = History()
        self.term_kernels = {}

    def students(self) -> dict[str, nn.Module]:
        return {"student": self.student}

    def teachers(self) -> list[nn.Module]:
        return [] if self.teacher is None else [self.teacher]

    def terms(self, batch: Any) -> dict[str, Tensor]:
        """Weighted loss terms of one batch by name, with gradient; ``loss(batch)`` is their sum. Training flags stay as they are."""
        outputs = self._run(self.student, split_batch(batch))
        self.term_kernels = self.loss_module.kernels(outputs)
        return self.loss_module.terms(outputs)

    def prepare(self, batch: Any, seed: int = 0) -> None:
        """Make the adapters of the loss for the shapes that this batch gives, initialised from ``seed``.

        ``fit`` does this by itself. In a loop of your own call it once, before ``parameters()``.
        """
        device = device_of(self.student)
        student = unwrap(self.student)
        with isolated_rng(device), frozen(student):
            seed_all(device, seed)
            self.loss_module.prepare(self._run(student, split_batch(batch)))

    def predict(self, batch: Batch, metric: Metric) -> list[Prediction]:
        student = unwrap(self.student)
        loss: Tensor | None = None
        if metric.name == "loss" and metric.function is None:
            outputs = self._run(student, batch)
            loss = total(self.loss_module.terms(outputs))
        else:
            logits = logits_of("student", student(*batch.args, **batch.kwargs))
            outputs = Outputs(student_logits=logits, labels=batch.labels)
            if metric.name == "agreement" and metric.function is None:
                outputs.teacher_logits, _ = self._ask_teacher(batch, (), logits_wanted=True)
        return [make_prediction(self.loss_module, outputs, loss, batch.size)]

    def _run(self, student: nn.Module, batch: Batch) -> Outputs:
        """Both models on one batch, with the features the loss asks for."""
        loss = self.loss_module
        teacher_logits, teacher_features = self._ask_teacher(batch, loss.teacher_paths, logits_wanted=loss.needs_teacher_logits)
        with record_outputs("student", student, loss.student_paths) as student_features:
            output = student(*batch.args, **batch.kwargs)
        return Outputs(
            student_logits=logits_of("student", output) if loss.needs_logits else None,
            teacher_logits=teacher_logits,
            labels=batch.labels,
            student_features=student_features,
            teacher_features=teacher_features,
        )

    def _ask_teacher(self, batch: Batch, paths: tuple[str, ...], logits_wanted: bool) -> tuple[Tensor | None, dict[str, Tensor]]:
        cached = batch.teacher_logits
        if not paths and (not logits_wanted or cached is not None):
            return cached if logits_wanted else None, {}
        if self.teacher is None:
            raise ValueError("Distiller: batch must hold teacher_logits because there is no teacher, got none")
        student_device, teacher_device = device_of(self.student), device_of(self.teacher)
        args, kwargs = to_device((batch.args, batch.kwargs), teacher_device)
        with ExitStack() as stack:
            stack.enter_context(frozen(self.teacher))
            features = stack.enter_context(record_outputs("teacher", self.teacher, paths))
            output = self.teacher(*args, **kwargs)
            logits = None
            if logits_wanted:
                logits = cached if cached is not None else logits_of("teacher", output).to(student_device)
        return logits, to_device(features, student_device)

    def __repr__(self) -> str:
        teacher = "none" if self.teacher is None else f"{type(unwrap(self.teacher)).__name__} ({count(self.teacher):,} parameters)"
        return (
            f"Distiller(\n  student: {type(unwrap(self.student)).__name__} ({count(self.student):,} parameters)\n"
            f"  teacher: {teacher}\n  loss: {self.loss_module!r}\n)"
        )


def as_loss(where: str, loss: Any) -> DistillationLoss:
    if loss is None:
        return KDLoss()
    if isinstance(loss, (list, tuple, dict)):
        return CombinedLoss(loss)
    if not isinstance(loss, DistillationLoss):
        raise TypeError(f"{where}: loss must be a distillation loss such as KDLoss(), or a list or dict of them, got {type(loss).__name__}")
    return loss


def as_teacher(teacher: Any, ensemble: str, loss: DistillationLoss) -> nn.Module | None:
    if ensemble not in ("probabilities", "logits"):
        raise ValueError(f"Distiller: ensemble must be 'probabilities' or 'logits', got {ensemble!r}")
    if teacher is None or (isinstance(teacher, nn.Module) and not isinstance(teacher, nn.ModuleList)):
        return teacher
    if not isinstance(teacher, (list, tuple, nn.ModuleList)):
        raise TypeError(f"Distiller: teacher must be a torch module, a list of them or None, got {type(teacher).__name__}")
    response = loss.response()
    class_dim = response.class_dim if isinstance(response, ResponseLoss) else -1
    temperature = 1.0 if ensemble == "logits" else loss.temperature or 1.0
    return Ensemble(teacher, mean=ensemble, temperature=temperature, class_dim=class_dim)


def make_prediction(loss: DistillationLoss, outputs: Outputs, value: Tensor | None, size: int) -> Prediction:
    """Logits and labels in the layout of the loss's response part, so that metrics agree with it about padding and shifting."""
    response = loss.response()
    logits, teacher_logits, labels = outputs.student_logits, outputs.teacher_logits, outputs.labels
    ignore_index, reduction = -100, None
    if isinstance(response, ResponseLoss):
        logits = response.arrange(logits) if logits is not None else None
        if teacher_logits is not None and logits is not None:
            teacher_logits = response.in_student_classes(response.arrange(teacher_logits), logits.shape[-1])
        labels = response.arrange_labels(labels)
        ignore_index, reduction = response.ignore_index, response.reduction
    return Prediction(logits, teacher_logits, labels, outputs.student_logits, outputs.labels, value, size, ignore_index, reduction)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
