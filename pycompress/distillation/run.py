"""One call of ``fit``: epochs, validation, the best weights, the checkpoint."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import progress as progress_bar
from .arguments import length
from .batch import split_batch, to_device
from .checkpoint import save_state
from .distributed import average_gradients, barrier, is_synchronised, rank, sum_over_processes
from .held import HeldParameters
from .history import EpochRecord, History
from .masked import masked_entries
from .metrics import Metric, MetricFunction, resolve_metric, score
from .rng import seed_all
from .teacher import frozen
from .unwrap import unwrap

if TYPE_CHECKING:
    from .training import Trainable


@dataclass
class Run:
    """One call of ``fit``: everything that changes while it runs."""

    task: Trainable
    device: torch.device
    optimizer: torch.optim.Optimizer
    scheduler: Any
    scheduler_interval: str
    metric_choice: str | MetricFunction | None
    metric_mode: str
    seed: int
    max_grad_norm: float | None
    progress: bool | None
    on_step: Callable[[int], Any] | None
    on_epoch: Callable[[EpochRecord], Any] | None
    checkpoint: Path | None
    generators: list[torch.Generator]
    history: History = field(default_factory=History)
    metric: Metric | None = None
    best: dict[str, dict[str, Any]] | None = None
    step: int = 0

    def __post_init__(self) -> None:
        self.students = self.task.students()
        self.held = HeldParameters(self.students, self.optimizer)
        self.synchronised = is_synchronised(list(self.students.values()))
        self.rank = rank(self.synchronised)
        self.accumulator_dtype = torch.float32 if self.device.type == "mps" else torch.float64

    # -- the loop ------------------------------------------------------------------------------------------------------

    def train(self, train_loader: Iterable[Any], val_loader: Iterable[Any] | None, epochs: int) -> None:
        if self.history.stopped:  # resumed: what on_epoch decided then stays decided
            return
        if not self.history.epochs:
            self.save()
        for epoch in range(len(self.history.epochs) + 1, epochs + 1):
            record = self.train_epoch(train_loader, epoch, epochs)
            if val_loader is not None:
                record.metric = self.validate(val_loader, epoch, epochs)
            self.history.epochs.append(record)
            record.masked = self.history.masked = masked_entries(self.students.values())
            self.step_scheduler("epoch", record.train_loss if record.metric is None else record.metric)
            if self.history.best is record:
                self.best = self.students_state(copied=True)
            elif self.history.best is None:
                self.best = None
            self.save()
            if self.on_epoch is not None:
                self.history.stopped = self.on_epoch(record) is True
                self.held.check("on_epoch")
                if self.history.stopped:
                    self.save()
                    break

    def train_epoch(self, loader: Iterable[Any], epoch: int, epochs: int) -> EpochRecord:
        started = time.perf_counter()
        seed_all(self.device, self.seed, epoch, self.rank)
        set_epoch(loader, epoch)
        for model in (*self.students.values(), self.task.loss_module):
            model.train()
        rate = float(self.optimizer.param_groups[0]["lr"])
        sums: dict[str, Tensor] = {}
        steps = 0
        for batch in progress_bar.track(loader, f"epoch {epoch}/{epochs}", total=length(loader), progress=self.progress):
            terms = self.train_step(batch)
            for name, value in terms.items():
                value = value.detach().to(self.accumulator_dtype)
                sums[name] = sums[name] + value if name in sums else value
            steps += 1
            self.step += 1
            if self.on_step is not None:
                self.on_step(self.step)
                self.held.check("on_step")
        if steps == 0:
            hint = " (a generator is used up after one epoch; pass a list or a DataLoader)" if epoch > 1 else ""
            raise ValueError(f"fit: train_loader must yield at least one batch, got none in epoch {epoch}{hint}")
        means = self.mean_over_processes(sums, steps)
        loss = math.fsum(means.values())
        if not math.isfinite(loss):
            raise RuntimeError(
                f"fit: the loss of epoch {epoch} must be finite, got {loss}; lower the learning rate, set max_grad_norm, "
                "or look for NaN in the inputs and minus infinity in the logits"
            )
        return EpochRecord(epoch, loss, means, rate, None, time.perf_counter() - started, dict(self.task.term_kernels))

    def train_step(self, batch: Any) -> dict[str, Tensor]:
        self.optimizer.zero_grad(set_to_none=True)
        terms = self.task.terms(to_device(split_batch(batch), self.device))
        total(terms).backward()
        average_gradients(self.task.loss_module.parameters(), self.synchronised)
        if self.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(list(self.task.parameters()), self.max_grad_norm)
        self.optimizer.step()
        self.step_scheduler("step", None)
        return terms

    def validate(self, loader: Iterable[Any], epoch: int, epochs: int) -> float:
        sums = torch.zeros(2, dtype=self.accumulator_dtype, device=self.device)
        batches = 0
        # unwrapped: DistributedDataParallel would wait for other processes, whose share may have fewer batches
        with frozen(*(unwrap(model) for model in self.students.values()), self.task.loss_module):
            for raw in progress_bar.track(loader, f"validate {epoch}/{epochs}", total=length(loader), progress=self.progress):
                batch = to_device(split_batch(raw), self.device)
                if self.metric is None:
                    self.metric = self.choose_metric(batch.labels is not None)
                for prediction in self.task.predict(batch, self.metric):
                    scored, count = score(self.metric, prediction)
                    sums = sums + torch.stack([scored, count]).to(sums)
                batches += 1
        if batches == 0:
            raise ValueError(f"fit: val_loader must yield at least one batch, got none in epoch {epoch}")
        scored, count = sum_over_processes(sums, self.synchronised).tolist()
        return scored / count if count else math.nan

    def choose_metric(self, has_labels: bool) -> Metric:
        metric = resolve_metric(self.metric_choice, self.metric_mode, has_labels)
        check_same_metric(self.history, metric)
        self.history.metric_name, self.history.higher_is_better = metric.name, metric.higher_is_better
        return metric

    def step_scheduler(self, moment: str, value: float | None) -> None:
        if self.scheduler is None or moment != self.scheduler_interval:
            return
        if isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            assert value is not None
            self.scheduler.step(value)
        else:
            self.scheduler.step()

    def mean_over_processes(self, sums: dict[str, Tensor], steps: int) -> dict[str, float]:
        packed = torch.stack([*sums.values(), torch.full_like(next(iter(sums.values())), steps)])
        *values, count = sum_over_processes(packed, self.synchronised).tolist()
        return {name: value / count for name, value in zip(sums, values, strict=True)}

    # -- state ---------------------------------------------------------------------------------------------------------

    def students_state(self, copied: bool = False) -> dict[str, dict[str, Any]]:
        states = {name: unwrap(model).state_dict() for name, model in self.students.items()}
        return {name: copy_state(state) for name, state in states.items()} if copied else states

    def restore_best(self) -> None:
        """Put the best weights back. The last ones stay where the student has changed since: masks would be undone, shapes not fit."""
        if self.held.stranger() is not None:
            return
        self.history.masked = masked_entries(self.students.values())
        if self.best is not None and self.history.best is not None:
            for name, state in self.best.items():
                unwrap(self.students[name]).load_state_dict(state)

    def save(self) -> None:
        if self.checkpoint is None:
            return
        if self.rank == 0:
            save_state(
                {
                    "seed": self.seed,
                    "step": self.step,
                    "history": self.history.to_dict(),
                    "students": self.students_state(),
                    "best": self.best,
                    "loss": self.task.loss_module.state_dict(),
                    "optimizer": {"kind": type(self.optimizer).__name__, "state": self.optimizer.state_dict()},
                    "scheduler": None
                    if self.scheduler is None
                    else {"kind": type(self.scheduler).__name__, "state": self.scheduler.state_dict()},
                    "generators": [generator.get_state() for generator in self.generators],
                },
                self.checkpoint,
            )
        barrier(self.synchronised)

    def load(self, saved: dict[str, Any]) -> None:
        """Continue from a checkpoint. Everything is checked before the first change."""
        where = f"fit: checkpoint {os.fspath(self.checkpoint or '')!r}"
        try:
            history, step = History.from_dict(saved["history"]), int(saved["step"])
            states, best, loss_state = saved["students"], saved["best"], saved["loss"]
            optimizer, scheduler, generators, seed = saved["optimizer"], saved["scheduler"], saved["generators"], saved["seed"]
            kinds = (optimizer["kind"], None if scheduler is None else scheduler["kind"])
            groups = [len(group["params"]) for group in optimizer["state"]["param_groups"]]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{where} does not hold a training state: {error!r}") from error
        if seed != self.seed:
            raise ValueError(f"{where} must have been written with seed {self.seed}, got seed {seed}")
        expected_kinds = (type(self.optimizer).__name__, None if self.scheduler is None else type(self.scheduler).__name__)
        if kinds != expected_kinds:
            raise ValueError(f"{where} must come from optimizer and scheduler {expected_kinds}, got {kinds}")
        expected_groups = [len(group["params"]) for group in self.optimizer.param_groups]
        if groups != expected_groups:
            raise ValueError(f"{where} must have optimizer groups of {expected_groups} parameters, got {groups}")
        if self.metric_choice is not None:  # otherwise the first validation batch decides
            check_same_metric(history, resolve_metric(self.metric_choice, self.metric_mode, has_labels=True))
        if len(generators) != len(self.generators):
            raise ValueError(f"{where} must hold the state of {len(self.generators)} DataLoader generator(s), got {len(generators)}")
        for found in (states, best):
            if found is None and found is best:
                continue
            if not isinstance(found, dict) or set(found) != set(self.students):
                raise ValueError(f"{where} must hold the students {', '.join(self.students)}")
            for name, model in self.students.items():
                check_state(f"{where} ({name})", unwrap(model).state_dict(), found[name])
        check_state(f"{where} (loss)", self.task.loss_module.state_dict(), loss_state)

        for name, model in self.students.items():
            unwrap(model).load_state_dict(states[name])
        self.task.loss_module.load_state_dict(loss_state)
        self.optimizer.load_state_dict(optimizer["state"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(scheduler["state"])
        for generator, state in zip(self.generators, generators, strict=True):
            generator.set_state(state)
        self.best = None if best is None else {name: to_device(state, self.device) for name, state in best.items()}
        self.history, self.step = history, step


def total(terms: dict[str, Tensor]) -> Tensor:
    """The sum of scalar terms."""
    for name, value in terms.items():
        if value.dim() != 0:
            raise ValueError(f"loss: term {name!r} must be a scalar, got shape {tuple(value.shape)}; use reduction='mean'")
    return torch.stack(list(terms.values())).sum() if len(terms) > 1 else next(iter(terms.values()))


def check_same_metric(history: History, metric: Metric) -> None:
    """Scores of two metrics, or of one in two directions, say nothing about which epoch is best."""
    if history.metric_name is None:
        return
    modes = {True: "max", False: "min"}
    earlier, now = (history.metric_name, modes[history.higher_is_better]), (metric.name, modes[metric.higher_is_better])
    if earlier != now:
        raise ValueError(
            f"fit: metric must be {earlier[0]!r} ({earlier[1]}) as in the epochs before the checkpoint, got {now[0]!r} ({now[1]}); "
            "leave resume out to start over"
        )


def copy_state(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value) for key, value in state.items()}


def check_state(where: str, own: dict[str, Any], found: Any) -> None:
    """Same keys, same shapes, same dtypes."""
    if not isinstance(found, dict) or set(found) != set(own):
        differing = sorted(set(own) ^ set(found)) if isinstance(found, dict) else []
        raise ValueError(f"{where} must have the model's state, got differing keys {', '.join(map(str, differing[:4]))}")
    for key, value in own.items():
        other = found[key]
        if isinstance(value, Tensor) and (not isinstance(other, Tensor) or other.shape != value.shape or other.dtype != value.dtype):
            got = f"{tuple(other.shape)} {other.dtype}" if isinstance(other, Tensor) else type(other).__name__
            raise ValueError(f"{where} must have {key} of {tuple(value.shape)} {value.dtype}, got {got}")


def set_epoch(loader: Any, epoch: int) -> None:
    """Tell a DistributedSampler which epoch it is, or it would shuffle alike every time."""
    for owner in (getattr(loader, "sampler", None), getattr(getattr(loader, "batch_sampler", None), "sampler", None)):
        if owner is not None and hasattr(owner, "set_epoch"):
            owner.set_epoch(epoch)
            return
