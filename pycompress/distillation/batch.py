"""What a batch holds, and where a model's output keeps the logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

LABEL_KEYS = ("labels", "label")


@dataclass
class Batch:
    """Arguments for the models, and what the losses need beside them."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    labels: Tensor | None = None
    teacher_logits: Tensor | None = None

    @property
    def size(self) -> int:
        """Samples in the batch: the first dimension of the first tensor."""
        for value in (*self.args, *self.kwargs.values()):
            if isinstance(value, Tensor) and value.dim() > 0:
                return value.shape[0]
        return 1


def split_batch(batch: Any) -> Batch:
    """Sort a loader's batch into arguments, labels and cached teacher logits.

    - a tensor: the inputs, no labels;
    - a tuple or list: ``(inputs, labels)``; ``(inputs,)`` has no labels; with more entries the last one holds the labels and the
      others are positional arguments;
    - a mapping, as in Hugging Face datasets: ``labels`` (or ``label``) and ``teacher_logits`` are taken out, ``inputs`` becomes the
      positional argument, everything else goes to the models by keyword. Models never see the labels.

    >>> split_batch((torch.zeros(2, 3), torch.tensor([0, 1]))).labels
    tensor([0, 1])
    """
    if isinstance(batch, Batch):
        return batch
    if isinstance(batch, Tensor):
        return Batch(args=(batch,))
    if isinstance(batch, Mapping):
        kwargs = dict(batch)
        labels = next((kwargs.pop(key) for key in LABEL_KEYS if key in kwargs), None)
        teacher_logits = kwargs.pop("teacher_logits", None)
        args = (kwargs.pop("inputs"),) if "inputs" in kwargs else ()
        if not args and not kwargs:
            raise ValueError(f"batch must hold inputs beside the labels, got the keys {', '.join(map(str, batch))}")
        return Batch(args=args, kwargs=kwargs, labels=labels, teacher_logits=teacher_logits)
    if isinstance(batch, (tuple, list)) and len(batch) > 0:
        if len(batch) == 1:
            return Batch(args=(batch[0],))
        return Batch(args=tuple(batch[:-1]), labels=batch[-1])
    raise TypeError(f"batch must be a tensor, (inputs, labels) or a mapping with labels, got {type(batch).__name__}")


def to_device(value: Any, device: torch.device) -> Any:
    """Tensors on ``device``, in tuples, lists, mappings and batches too; everything else as it is."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Batch):
        return Batch(*(to_device(part, device) for part in (value.args, value.kwargs, value.labels, value.teacher_logits)))
    if isinstance(value, Mapping):
        return {key: to_device(entry, device) for key, entry in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(to_device(entry, device) for entry in value))
    if isinstance(value, (tuple, list)):
        return type(value)(to_device(entry, device) for entry in value)
    return value


def logits_of(who: str, output: Any) -> Tensor:
    """A model's logits: the output itself, its ``.logits``, its ``"logits"`` entry, or the first entry of a tuple."""
    if isinstance(output, Tensor):
        return output
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if found is None and isinstance(output, (tuple, list)) and output:
        found = output[0]
    if not isinstance(found, Tensor):
        raise TypeError(f"{who} must return logits as a tensor, a tuple that starts with it, or .logits, got {type(output).__name__}")
    return found


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter or buffer is; the CPU for a model without any."""
    tensor = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device
