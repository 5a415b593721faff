"""A teacher's logits, computed once per sample and kept: later epochs and later students need no teacher."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from .. import progress as progress_bar
from .batch import device_of, logits_of, split_batch, to_device
from .teacher import frozen

FORMAT = "pycompress-teacher-cache-1"


class TeacherCache:
    """Teacher logits by sample index, all classes or the ``top_k`` most likely ones.

    With ``top_k`` the k largest log-probabilities are kept and the rest of the probability is spread evenly over the other classes,
    so rows are always whole distributions; at temperatures other than 1 that is an approximation of the tail.
    Right only for a dataset that returns the same sample for the same index every time: no random augmentation.

    ``cache.attach(dataset)`` adds ``teacher_logits`` to every sample, and ``Distiller(student, None, loss)`` uses them.

    >>> cache = TeacherCache.build(teacher, dataset, batch_size=256, top_k=20)
    >>> cache.save("teacher.safetensors")
    >>> loader = DataLoader(cache.attach(dataset), batch_size=64, shuffle=True)
    >>> Distiller(student, None, KDLoss()).fit(loader, epochs=10)
    """

    def __init__(self, values: Tensor, ids: Tensor | None, classes: int) -> None:
        self.values = values
        self.ids = ids
        self.classes = classes

    @classmethod
    def build(
        cls,
        teacher: nn.Module,
        dataset: Dataset[Any],
        *,
        batch_size: int = 256,
        top_k: int | None = None,
        dtype: torch.dtype = torch.float32,
        num_workers: int = 0,
        progress: bool | None = None,
    ) -> TeacherCache:
        """Run the teacher (frozen, on its own device) over the dataset in order. ``dtype``: how the values are kept.

        Samples are inputs, ``(inputs, labels)`` or a mapping as ``split_batch`` takes it. Logits must
        be (batch, ..., classes), of one shape per sample.
        """
        if not isinstance(teacher, nn.Module):
            raise TypeError(f"TeacherCache.build: teacher must be a torch module, got {type(teacher).__name__}")
        if len(dataset) == 0:  # type: ignore[arg-type]
            raise ValueError("TeacherCache.build: dataset must hold at least one sample, got none")
        if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
            raise ValueError(f"TeacherCache.build: top_k must be a positive integer, got {top_k!r}")
        if dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            raise ValueError(f"TeacherCache.build: dtype must be a floating-point type, got {dtype}")
        loader = DataLoader(dataset, batch_size=batch_size, num_workers=num_workers, generator=torch.Generator())
        device, classes, shape = device_of(teacher), 0, torch.Size()
        values: list[Tensor] = []
        ids: list[Tensor] = []
        with frozen(teacher):
            for raw in progress_bar.track(loader, "teacher", total=len(loader), progress=progress):
                check_entries(raw)
                batch = to_device(split_batch(raw), device)
                logits = logits_of("teacher", teacher(*batch.args, **batch.kwargs)).float()
                if values and logits.shape[1:] != shape:
                    raise ValueError(
                        f"TeacherCache.build: every sample must have logits of shape {tuple(shape)}, got {tuple(logits.shape[1:])}; "
                        "pad to one length"
                    )
                shape, classes = logits.shape[1:], logits.shape[-1]
                if top_k is not None and top_k > classes:
                    raise ValueError(f"TeacherCache.build: top_k must be at most the number of classes {classes}, got {top_k}")
                if top_k is not None and top_k < classes:
                    logits, chosen = F.log_softmax(logits, dim=-1).topk(top_k, dim=-1)
                    ids.append(chosen.to("cpu", torch.int32))
                values.append(logits.to("cpu", dtype))
        return cls(torch.cat(values), torch.cat(ids) if ids else None, classes)

    def __len__(self) -> int:
        return self.values.shape[0]

    def __getitem__(self, index: int) -> Tensor:
        """Logits of one sample, (..., classes) float32."""
        values = self.values[index].float()
        if self.ids is None:
            return values
        ids = self.ids[index].long()
        rest = (1.0 - values.exp().sum(-1, keepdim=True)).clamp_min(torch.finfo(torch.float32).eps)
        tail = (rest / (self.classes - ids.shape[-1])).log()
        return tail.expand(*values.shape[:-1], self.classes).scatter(-1, ids, values)

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.values, self.ids) if t is not None)

    def attach(self, dataset: Dataset[Any]) -> Dataset[Any]:
        """The dataset with ``teacher_logits`` in every sample, which becomes a dictionary."""
        if len(dataset) != len(self):  # type: ignore[arg-type]
            raise ValueError(f"TeacherCache.attach: dataset must have the {len(self)} samples of the cache, got {len(dataset)}")  # type: ignore[arg-type]
        return WithTeacherLogits(dataset, self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, atomically."""
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        tensors = {"values": self.values.contiguous()} | ({} if self.ids is None else {"ids": self.ids.contiguous()})
        try:
            save_file(tensors, temporary, metadata={"format": FORMAT, "classes": str(self.classes)})
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TeacherCache:
        """Read what :meth:`save` wrote. Raises ``ValueError`` for anything else."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError(f"its format is {metadata.get('format')!r}, expected {FORMAT!r}")
                values, classes = file.get_tensor("values"), int(metadata["classes"])
                ids = file.get_tensor("ids") if "ids" in file.keys() else None  # noqa: SIM118 (not a dictionary)
            if ids is None and (values.dim() < 2 or values.shape[-1] != classes):
                raise ValueError(f"its values are {tuple(values.shape)}, expected {classes} classes")
            if ids is not None and (ids.shape != values.shape or not 0 < ids.shape[-1] < classes or not in_range(ids, classes)):
                raise ValueError("its class numbers do not fit its values")
            if not values.dtype.is_floating_point or not math.prod(values.shape):
                raise ValueError(f"its values are {values.dtype} {tuple(values.shape)}")
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"TeacherCache.load: {os.fspath(path)!r} is not a usable teacher cache: {error}") from error
        return cls(values, ids, classes)

    def __repr__(self) -> str:
        kept = "all" if self.ids is None else f"top {self.ids.shape[-1]} of"
        return f"TeacherCache({len(self)} samples, {kept} {self.classes} classes, {self.num_bytes:,} bytes)"


class WithTeacherLogits(Dataset[dict[str, Any]]):
    """A dataset whose samples carry their teacher's logits."""

    def __init__(self, dataset: Dataset[Any], cache: TeacherCache) -> None:
        self.dataset = dataset
        self.cache = cache

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.dataset[index]
        if isinstance(sample, Mapping):
            return {**sample, "teacher_logits": self.cache[index]}
        check_entries(sample)
        if not isinstance(sample, Sequence) or isinstance(sample, Tensor):
            return {"inputs": sample, "teacher_logits": self.cache[index]}
        if len(sample) == 1:
            return {"inputs": sample[0], "teacher_logits": self.cache[index]}
        return {"inputs": sample[0], "labels": sample[1], "teacher_logits": self.cache[index]}


def check_entries(sample: Any) -> None:
    """Raise ``ValueError`` for a sample, or a batch of samples, whose entries have no name that a sample with logits could have."""
    if isinstance(sample, Sequence) and not isinstance(sample, Tensor) and len(sample) not in (1, 2):
        raise ValueError(f"TeacherCache: samples must be inputs, (inputs, labels) or a mapping, got {len(sample)} entries")


def in_range(ids: Tensor, classes: int) -> bool:
    return not ids.dtype.is_floating_point and bool((ids >= 0).all() and (ids < classes).all())
