"""What happened in each epoch."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class EpochRecord:
    """One epoch. ``terms``: mean of each weighted loss term; they sum to ``train_loss``.

    ``kernels``: what computed each term in the last batch: the kernel of a fused loss, with the reason where it is the
    reference, or "torch". ``masked``: weights that masks held at zero at its end.
    """

    epoch: int
    train_loss: float
    terms: dict[str, float]
    learning_rate: float
    metric: float | None
    seconds: float
    kernels: dict[str, str] = field(default_factory=dict)
    masked: int = 0


@dataclass
class History:
    """All epochs of a ``fit``, resumed ones included.

    ``masked``: weights that masks hold at zero now. ``stopped``: whether ``on_epoch`` ended the training early.

    >>> history = distiller.fit(train_loader, epochs=3, val_loader=val_loader)
    >>> history.best.epoch, history.best.metric
    (3, 0.97)
    >>> print(history.summary())
    3 epochs, 12.4 s; training loss 1.94 -> 0.81; best accuracy 0.97 in epoch 3
      kd  0.81  kd_loss, avx512
    """

    epochs: list[EpochRecord] = field(default_factory=list)
    metric_name: str | None = None
    higher_is_better: bool = True
    masked: int = 0
    stopped: bool = False

    @property
    def best(self) -> EpochRecord | None:
        """The epoch with the best metric (the earlier one of equals) among those since a pruner last changed the sparsity.

        A denser student usually scores better, but is not the one that was asked for. None without validation, and when the
        sparsity changed after the last one.
        """
        since = itertools.takewhile(lambda record: record.masked == self.masked, reversed(self.epochs))
        scored = [record for record in since if record.metric is not None and record.metric == record.metric]
        if not scored:
            return None
        sign = 1.0 if self.higher_is_better else -1.0
        return max(scored, key=lambda record: (sign * float(record.metric or 0.0), -record.epoch))

    def __len__(self) -> int:
        return len(self.epochs)

    def summary(self) -> str:
        """Epochs, time, losses, the best metric, and each loss term of the last epoch with what computed it."""
        if not self.epochs:
            return "0 epochs"
        first, last, best = self.epochs[0], self.epochs[-1], self.best
        seconds = sum(record.seconds for record in self.epochs)
        head = f"{len(self)} epoch{'s' if len(self) > 1 else ''}, {seconds:.1f} s; "
        head += f"training loss {first.train_loss:.4g} -> {last.train_loss:.4g}"
        if best is not None:
            head += f"; best {self.metric_name} {best.metric:.4g} in epoch {best.epoch}"
        lines = [head]
        width = max(map(len, last.terms))
        lines += [f"  {name:{width}}  {value:.4g}  {last.kernels.get(name, '')}".rstrip() for name, value in last.terms.items()]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> History:
        epochs = [EpochRecord(**record) for record in data["epochs"]]
        return cls(epochs, data["metric_name"], data["higher_is_better"], data.get("masked", 0), data.get("stopped", False))
