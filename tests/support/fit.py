"""What the tests of ``fit`` share."""

from __future__ import annotations

import torch

from pycompress.distillation import History


def records(history: History) -> list[dict]:
    """Everything in a history that must be reproducible."""
    return [{key: value for key, value in record.items() if key != "seconds"} for record in history.to_dict()["epochs"]]


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
