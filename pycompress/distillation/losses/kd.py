"""Distillation from logits: Hinton's loss and its reverse and symmetric relatives."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from ...ops.kd_loss import kd_loss, kernel_and_reason
from .base import LOSSES, DistillationLoss, Outputs
from .check import check_between, check_reduction, check_some_weight, check_temperature, check_weight
from .class_map import ClassMap, in_student_classes, keep_class_map, shown
from .standardize import standardize

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
"""What ``KDLoss`` compares with; "dkd" and "dist" have weights of their own and are losses of their own."""


class ResponseLoss(DistillationLoss):
    """A loss of student logits, teacher logits and labels: ``loss(student_logits, teacher_logits, labels=None)``.

    ``class_dim``: where the classes are, -1 as in language models; 1 for (N, classes, H, W). ``labels`` has the logits'
    shape without that dimension. ``shift_labels=True``: position i is compared with label i + 1, for causal language
    models whose labels equal their inputs, as Hugging Face ships them.
    """

    kind: Literal["response"] = "response"
    needs_logits = True
    needs_teacher_logits = True

    def __init__(
        self, *, temperature: float, ignore_index: int, reduction: str, standardize: bool, class_dim: int, shift_labels: bool
    ) -> None:
        super().__init__()
        where = type(self).__name__
        self.temperature = check_temperature(where, temperature)
        if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
            raise TypeError(f"{where}: ignore_index must be an int, got {type(ignore_index).__name__}")
        if isinstance(class_dim, bool) or not isinstance(class_dim, int):
            raise TypeError(f"{where}: class_dim must be an int, got {type(class_dim).__name__}")
        self.ignore_index = ignore_index
        self.reduction = check_reduction(where, reduction)
        self.standardize = bool(standardize)
        self.class_dim = class_dim
        self.shift_labels = bool(shift_labels)

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None, row_weights: Tensor | None = None
    ) -> Tensor:
        student = self.arrange(student_logits)
        teacher = self.arrange(teacher_logits)
        labels = self.arrange_labels(labels)
        return self.compare(student, teacher, labels, self.arrange_labels(row_weights))

    def compare(self, student: Tensor, teacher: Tensor, labels: Tensor | None, row_weights: Tensor | None) -> Tensor:
        """The loss of arranged tensors: logits (..., classes), the rest (...)."""
        raise NotImplementedError

    def arrange(self, logits: Tensor) -> Tensor:
        """Classes last, and for ``shift_labels`` without the last position, which has no next label."""
        if isinstance(logits, Tensor) and self.class_dim != -1:
            if not -logits.dim() <= self.class_dim < logits.dim():
                raise ValueError(
                    f"{type(self).__name__}: logits must have a dimension {self.class_dim} (class_dim), got {tuple(logits.shape)}"
                )
            logits = logits.movedim(self.class_dim, -1)
        if isinstance(logits, Tensor) and self.shift_labels:
            if logits.dim() < 3 or logits.shape[-2] < 2:
                raise ValueError(
                    f"{type(self).__name__}: shift_labels needs logits of (batch, at least 2 positions, classes), got {tuple(logits.shape)}"
                )
            logits = logits[..., :-1, :]
        return logits

    def arrange_labels(self, labels: Tensor | None) -> Tensor | None:
        return labels[..., 1:] if self.shift_labels and labels is not None else labels

    def in_student_classes(self, teacher_logits: Tensor, classes: int) -> Tensor:
        """Arranged teacher logits with the student's class numbers, so that the most likely class of both can be compared."""
        return teacher_logits

    def terms(self, outputs: Outputs) -> dict[str, Tensor]:
        assert outputs.student_logits is not None
        teacher_logits = outputs.teacher_logits
        if teacher_logits is None:  # only where the soft weight is 0 and the values do not count
            teacher_logits = outputs.student_logits.detach()
        return {self.name: self(outputs.student_logits, teacher_logits, outputs.labels)}

    def response(self) -> ResponseLoss:
        return self

    def extra_repr(self) -> str:
        options = {key: value for key, value in vars(self).items() if not key.startswith("_") and key not in ("training", "class_map")}
        return ", ".join(f"{key}={value!r}" for key, value in options.items())


class SoftHardLoss(ResponseLoss):
    """``soft_weight * (a loss against the teacher) + hard_weight * cross-entropy``: the frame of the response losses."""

    def __init__(
        self,
        *,
        temperature: float,
        soft_weight: float,
        hard_weight: float,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        standardize: bool = False,
        class_dim: int = -1,
        shift_labels: bool = False,
    ) -> None:
        super().__init__(
            temperature=temperature,
            ignore_index=ignore_index,
            reduction=reduction,
            standardize=standardize,
            class_dim=class_dim,
            shift_labels=shift_labels,
        )
        where = type(self).__name__
        self.soft_weight = check_weight(where, "soft_weight", soft_weight)
        self.hard_weight = check_weight(where, "hard_weight", hard_weight)
        check_some_weight(where, soft_weight=self.soft_weight, hard_weight=self.hard_weight)
        self.label_smoothing = check_between(where, "label_smoothing", label_smoothing, 0.0, 1.0, open_end=True)

    @property
    def needs_teacher_logits(self) -> bool:  # type: ignore[override]
        return self.soft_weight > 0

    def divergence_options(self) -> dict[str, Any]:
        """What the soft term compares, as arguments of :func:`~pycompress.ops.kd_loss`: divergence, beta, part_weights, class_map."""
        raise NotImplementedError

    def compare(self, student: Tensor, teacher: Tensor, labels: Tensor | None, row_weights: Tensor | None) -> Tensor:
        if not self.standardize or self.soft_weight == 0:
            return self._kd_loss(student, teacher, labels, row_weights, self.soft_weight, self.hard_weight)
        loss = self._kd_loss(standardize(student), standardize(teacher), labels, row_weights, self.soft_weight, 0.0)
        if self.hard_weight > 0:  # reads other logits than the soft term
            loss = loss + self._kd_loss(student, teacher, labels, row_weights, 0.0, self.hard_weight)
        return loss

    def kernels(self, outputs: Outputs) -> dict[str, str]:
        student, teacher = outputs.student_logits, outputs.teacher_logits
        assert student is not None
        divergence = self.divergence_options()["divergence"] if self.soft_weight > 0 else ""
        kernel, reason = kernel_and_reason(student, student if teacher is None else teacher, divergence)
        return {self.name: f"kd_loss, {kernel}" if reason is None else f"kd_loss, {kernel} ({reason})"}

    def _kd_loss(
        self, student: Tensor, teacher: Tensor, labels: Tensor | None, row_weights: Tensor | None, soft_weight: float, hard_weight: float
    ) -> Tensor:
        assert self.temperature is not None
        return kd_loss(
            student,
            teacher,
            labels,
            temperature=self.temperature,
            soft_weight=soft_weight,
            hard_weight=hard_weight,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            row_weights=row_weights,
            reduction=self.reduction,
            **self.divergence_options(),
        )


@LOSSES.register("kd")
class KDLoss(SoftHardLoss):
    """Knowledge distillation: ``soft_weight * T^2 * KL(teacher || student) + hard_weight * cross_entropy(student, labels)``.

    Both distributions of the KL are softened by ``temperature`` (T), the cross-entropy is not. ``soft_weight`` is on the
    teacher's side, ``hard_weight`` on the labels'; they need not sum to 1, and one of them may be 0. T^2 is always
    applied. ``reduction="mean"`` is the mean over rows that are not ignored; nothing is divided by the number of classes.
    ``standardize``: z-score both logits before the soft term (Sun et al. 2024, https://arxiv.org/abs/2403.01427).
    ``divergence``: "forward_kl", "reverse_kl" or "jsd" with ``beta``. ``class_map``: vocabularies of different size: "prefix" compares
    the common leading classes, a tensor (classes,) holds the teacher's class of each student class, -1 for none; it moves with the
    module and is not part of its ``state_dict``. ``label_smoothing``, ``ignore_index`` and ``reduction`` are those of
    :func:`~pycompress.ops.kd_loss`, ``class_dim`` and ``shift_labels`` those of :class:`ResponseLoss`.

    Hinton, Vinyals, Dean 2015, section 2, https://arxiv.org/abs/1503.02531.
    Raises ``ValueError`` for a temperature not above 0, negative weights, both weights 0, and shapes that do not match.

    >>> loss = KDLoss(temperature=4.0, soft_weight=0.5, hard_weight=0.5)
    >>> loss(student_logits, teacher_logits, labels).backward()
    """

    name = "kd"
    class_map: ClassMap

    def __init__(
        self,
        temperature: float = 4.0,
        soft_weight: float = 0.5,
        hard_weight: float = 0.5,
        *,
        divergence: str = "forward_kl",
        beta: float = 0.5,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        standardize: bool = False,
        class_dim: int = -1,
        shift_labels: bool = False,
        class_map: ClassMap = None,
    ) -> None:
        super().__init__(
            temperature=temperature,
            soft_weight=soft_weight,
            hard_weight=hard_weight,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            reduction=reduction,
            standardize=standardize,
            class_dim=class_dim,
            shift_labels=shift_labels,
        )
        where = type(self).__name__
        if divergence not in DIVERGENCES:
            raise ValueError(f"{where}: divergence must be one of {', '.join(DIVERGENCES)}, got {divergence!r}")
        self.divergence = divergence
        self.beta = check_between(where, "beta", beta, 0.0, 1.0)
        if class_map is not None and self.standardize:
            raise ValueError(f"{where}: standardize must be False with class_map (classes that are not compared would count), got True")
        keep_class_map(self, class_map)

    def divergence_options(self) -> dict[str, Any]:
        return {
            "divergence": self.divergence,
            "beta": self.beta if self.divergence == "jsd" else None,
            "class_map": self.class_map if self.soft_weight > 0 else None,
        }

    def in_student_classes(self, teacher_logits: Tensor, classes: int) -> Tensor:
        return in_student_classes(teacher_logits, self.class_map, classes)

    def extra_repr(self) -> str:
        kept = "" if self.class_map is None else f", class_map={shown(self.class_map)!r}"
        return super().extra_repr() + kept


@LOSSES.register("reverse_kl")
class ReverseKLLoss(KDLoss):
    """:class:`KDLoss` with KL(student || teacher), which seeks a mode instead of covering all (MiniLLM, https://arxiv.org/abs/2306.08543).

    Infinite where the teacher masks a class (minus infinity) that the student does not.
    """

    name = "reverse_kl"

    def __init__(self, temperature: float = 4.0, soft_weight: float = 0.5, hard_weight: float = 0.5, **options: object) -> None:
        super().__init__(temperature, soft_weight, hard_weight, divergence="reverse_kl", **options)  # type: ignore[arg-type]


@LOSSES.register("jsd")
class JSDLoss(KDLoss):
    """:class:`KDLoss` with the generalized Jensen-Shannon divergence, ``beta KL(p || m) + (1 - beta) KL(q || m)``.

    ``m = beta p + (1 - beta) q``, p the teacher, q the student (GKD, https://arxiv.org/abs/2306.13649, section 2). The ends are
    forward KL (``beta=0``) and reverse KL (``beta=1``) by convention; the formula itself tends to 0 there.
    """

    name = "jsd"

    def __init__(
        self, temperature: float = 4.0, soft_weight: float = 0.5, hard_weight: float = 0.5, *, beta: float = 0.5, **options: object
    ) -> None:
        super().__init__(temperature, soft_weight, hard_weight, divergence="jsd", beta=beta, **options)  # type: ignore[arg-type]
