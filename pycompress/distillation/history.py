"""What happened in each epoch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class EpochRecord:
    """One epoch. ``terms``: mean of each weighted loss term; they sum to ``train_loss``."""

    epoch: int
    train_loss: float
    terms: dict[str, float]
    learning_rate: float
    metric: float | None
    seconds: float


@dataclass
class History:
    """All epochs of a ``fit``, resumed ones included.

    >>> history = distiller.fit(train_loader, epochs=3, val_loader=val_loader)
    >>> history.best.epoch, history.best.metric
    (3, 0.97)
    """

    epochs: list[EpochRecord] = field(default_factory=list)
    metric_name: str | None = None
    higher_is_better: bool = True

    @property
    def best(self) -> EpochRecord | None:
        """The epoch with the best metric (the earlier one of equals), or None without validation."""
        scored = [record for record in self.epochs if record.metric is not None and record.metric == record.metric]
        if not scored:
            return None
        sign = 1.0 if self.higher_is_better else -1.0
        return max(scored, key=lambda record: (sign * float(record.metric or 0.0), -record.epoch))

    def __len__(self) -> int:
        return len(self.epochs)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> History:
        return cls([EpochRecord(**record) for record in data["epochs"]], data["metric_name"], data["higher_is_better"])
