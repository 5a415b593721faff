"""The training loop behind ``Distiller.fit`` and ``MutualLearning.fit``.

Requirements it was written to:
- the same seed gives the same model, and a resumed run gives the same model as one that was never interrupted, bit for bit;
- the caller's random state, the teachers, and every module's training flag are as before when it ends, however it ends;
- the best epoch's weights are in the student at the end, also after Ctrl-C;
- nothing waits for the accelerator inside an epoch;
- it runs unchanged under torchrun with students wrapped in DistributedDataParallel.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import OptimizerLike, SchedulerLike, check_adapters, check_arguments, make_optimizer, make_scheduler
from .batch import Batch, device_of, split_batch, to_device
from .checkpoint import load_state
from .distributed import check_not_sharded
from .history import EpochRecord, History
from .losses.base import DistillationLoss
from .metrics import Metric, MetricFunction, Prediction
from .peeked import Peeked
from .rng import isolated_rng, loader_generators, seed_all
from .run import Run, total
from .teacher import evaluating, keep_training_flags


class Trainable(ABC):
    """Students that learn from a distillation loss. Subclasses say what a batch's loss is; ``fit`` is the same for all."""

    loss_module: DistillationLoss
    history: History
    term_kernels: dict[str, str]
    """What computed each term of the last batch, for the history."""

    @abstractmethod
    def students(self) -> dict[str, nn.Module]:
        """The models that learn, as the user gave them, by a name for the checkpoint."""

    @abstractmethod
    def teachers(self) -> list[nn.Module]:
        """The models that only teach."""

    @abstractmethod
    def terms(self, batch: Any) -> dict[str, Tensor]:
        """Weighted loss terms of one batch, with gradient."""

    @abstractmethod
    def prepare(self, batch: Any, seed: int = 0) -> None:
        """Make the learnable parts of the loss that wait for the shapes of a batch."""

    @abstractmethod
    def predict(self, batch: Batch, metric: Metric) -> list[Prediction]:
        """What each student says about a validation batch. Called without gradients and in eval mode."""

    def loss(self, batch: Any) -> Tensor:
        """The loss of one batch, for a training loop of your own: ``distiller.loss(batch).backward()``."""
        return total(self.terms(batch))

    def parameters(self) -> Iterator[nn.Parameter]:
        """Everything that learns: the students' parameters and the loss's adapters, frozen ones left out."""
        seen: set[int] = set()
        for module in (*self.students().values(), self.loss_module):
            for parameter in module.parameters():
                if parameter.requires_grad and id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield parameter

    def fit(
        self,
        train_loader: Iterable[Any],
        epochs: int,
        *,
        val_loader: Iterable[Any] | None = None,
        optimizer: OptimizerLike = None,
        scheduler: SchedulerLike = None,
        scheduler_interval: str = "epoch",
        metric: str | MetricFunction | None = None,
        metric_mode: str = "max",
        checkpoint: str | os.PathLike[str] | None = None,
        resume: bool = False,
        seed: int = 0,
        max_grad_norm: float | None = None,
        device: torch.device | str | None = None,
        progress: bool | None = None,
        on_step: Callable[[int], Any] | None = None,
        on_epoch: Callable[[EpochRecord], Any] | None = None,
    ) -> History:
        """Train for ``epochs`` epochs; the students end with the weights of the best epoch (see :attr:`History.best`).

        ``train_loader``, ``val_loader``: anything that can be iterated once per epoch and yields batches as
        :func:`~pycompress.distillation.batch.split_batch` takes them; a generator lasts one epoch.
        Without ``val_loader`` the last epoch counts as the best.
        ``optimizer``: an optimizer, or a function that makes one from a list of parameters (it gets the students' and the
        adapters'); default AdamW with learning rate 1e-3. ``scheduler``: a scheduler of that optimizer, or a function that
        makes one from it; stepped after every epoch, or after every optimizer step with ``scheduler_interval="step"``.
        ``ReduceLROnPlateau`` sees the metric, or the training loss without validation.
        ``metric``: "accuracy" (default with labels), "agreement" with the teacher (default without), "loss", or a function
        of (logits, labels) that returns one score per sample or one number per batch; ``metric_mode`` ("max", "min") goes with
        a function. A resumed run must have the metric and mode of the epochs before; functions are told apart by ``__name__``,
        so lambdas are not.
        ``checkpoint``: a safetensors file, written before the first and after every epoch. ``resume=True`` continues from it if it
        exists, with the result an uninterrupted run would have had (same machine, versions, loaders and arguments).
        An epoch that was cut short starts again. Training for more epochs than before also works, except after ``on_epoch``
        ended it early: such a run is finished, and resuming it gives its result again.
        ``seed`` fixes dropout, shuffling and augmentation through torch's, NumPy's and Python's global generators, which
        are put back afterwards; a DataLoader's own ``generator`` keeps its state and is part of the checkpoint.
        ``max_grad_norm``: clip the gradient's norm. ``device``: move students, loss and teachers there first.
        ``on_step(step)`` runs after every optimizer step (``lambda _: pruner.step()``, say), ``on_epoch(record)`` after every
        epoch; training ends early if it returns True.

        Returns the :class:`History`, also kept as ``.history``. Raises ``ValueError`` or ``TypeError`` for bad arguments and
        a checkpoint that does not fit, ``RuntimeError`` when the loss is no longer finite and when a callback replaced Parameters
        behind the optimizer's back, as removing channels does. Ctrl-C raises
        ``KeyboardInterrupt`` as usual, after the best weights so far were put back; the checkpoint on disk is that of the
        last complete epoch.

        >>> history = Distiller(student, teacher).fit(train_loader, epochs=10, val_loader=val_loader)
        """
        check_arguments(train_loader, val_loader, epochs, seed, max_grad_norm, checkpoint, resume, scheduler_interval, metric, metric_mode)
        saved = load_state(checkpoint) if checkpoint is not None and resume and Path(checkpoint).exists() else None
        students = list(self.students().values())
        check_not_sharded(students)
        place = torch.device(device) if device is not None else device_of(students[0])
        with ExitStack() as stack:
            stack.enter_context(isolated_rng(place))
            stack.enter_context(keep_training_flags(*students, self.loss_module))
            stack.enter_context(evaluating(*self.teachers()))
            for module in (*students, *self.teachers(), self.loss_module):
                if device is not None or module is self.loss_module:
                    module.to(place)
            batches = self._prepare_from(train_loader, seed, place)
            made_optimizer = make_optimizer(optimizer, list(self.parameters()))
            check_adapters(made_optimizer, self.loss_module)
            run = Run(
                self,
                place,
                made_optimizer,
                make_scheduler(scheduler, made_optimizer, scheduler_interval),
                scheduler_interval,
                metric,
                metric_mode,
                seed,
                max_grad_norm,
                progress,
                on_step,
                on_epoch,
                None if checkpoint is None else Path(checkpoint),
                loader_generators(train_loader),
            )
            self.history = run.history
            if saved is not None:
                run.load(saved)
                self.history = run.history
            try:
                run.train(batches, val_loader, epochs)
            finally:
                run.restore_best()
                made_optimizer.zero_grad(set_to_none=True)
        return self.history

    def _prepare_from(self, train_loader: Iterable[Any], seed: int, device: torch.device) -> Iterable[Any]:
        """Let the loss make its adapters from the first batch, without moving the loader's generators on.

        Returns what to train on: the loader, which starts anew, or, for an iterator, all of its batches.
        """
        if self.loss_module.is_prepared:
            return train_loader
        generators = loader_generators(train_loader)
        states = [generator.get_state() for generator in generators]
        seed_all(device, seed, 0)
        iterator = iter(train_loader)
        batch = next(iterator, None)
        if batch is None:
            raise ValueError("fit: train_loader must yield at least one batch, got none")
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        self.prepare(to_device(split_batch(batch), device), seed)
        return Peeked(batch, iterator) if iterator is train_loader else train_loader
