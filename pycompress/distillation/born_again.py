"""Self-distillation over generations: each student teaches the next one of the same kind."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import nn

from .distiller import Distiller
from .history import History
from .losses.base import DistillationLoss
from .losses.kd import KDLoss


def born_again(
    make_student: Callable[[int], nn.Module],
    train_loader: Iterable[Any],
    epochs: int,
    *,
    generations: int = 3,
    teacher: nn.Module | None = None,
    loss: DistillationLoss | None = None,
    checkpoint: str | Path | None = None,
    **fit: Any,
) -> tuple[list[nn.Module], list[History]]:
    """Train ``generations`` students, each taught by the one before.

    ``make_student(generation)`` returns a fresh model; generations count from 0. Generation 0 learns from ``teacher``, or
    from the labels alone without one; it is the reference that later generations usually beat.
    ``loss``: for taught generations, default ``KDLoss(temperature=1.0, soft_weight=1.0, hard_weight=1.0)``.
    ``checkpoint``: a path; generation g writes ``<stem>.<g><suffix>`` beside it, and with ``resume=True`` finished
    generations (also those that ``on_epoch`` ended early) load instead of training. Everything else goes to ``Distiller.fit``.

    Returns the students and their histories, oldest first; ``Ensemble(students)`` is the paper's strongest model.
    Furlanello et al. 2018, section 3, https://arxiv.org/abs/1805.04770.

    >>> students, histories = born_again(lambda generation: Net(), train_loader, epochs=10, generations=3)
    """
    if isinstance(generations, bool) or not isinstance(generations, int) or generations < 1:
        raise ValueError(f"born_again: generations must be a positive integer, got {generations!r}")
    taught = KDLoss(1.0, 1.0, 1.0) if loss is None else loss
    students: list[nn.Module] = []
    histories: list[History] = []
    for generation in range(generations):
        student = make_student(generation)
        if any(student is earlier for earlier in students):
            raise ValueError("born_again: make_student must return a new model for every generation, got the same one again")
        distiller = Distiller(student, teacher, taught if teacher is not None else KDLoss(soft_weight=0.0, hard_weight=1.0))
        path = None if checkpoint is None else Path(checkpoint).with_name(f"{Path(checkpoint).stem}.{generation}{Path(checkpoint).suffix}")
        histories.append(distiller.fit(train_loader, epochs, checkpoint=path, **fit))
        students.append(student)
        teacher = student
    return students, histories
