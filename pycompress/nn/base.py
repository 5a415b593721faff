"""What every compressed layer has in common: the face that report, save and load rely on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..registry import Registry

LAYERS: Registry[type[CompressedModule]] = Registry("compressed layer")
"""Compressed layer classes by class name; ``pycompress.load`` rebuilds layers from it."""


class CompressedModule(nn.Module):
    """A drop-in layer that owns compressed weights.

    ``forward`` names its argument ``input``, as torch's layers do, so that calls by keyword go on working.

    The packed form a kernel wants is private and made per machine. ``state_dict`` holds the canonical tensors
    only, so a checkpoint written on one machine loads on any other.
    """

    format: str = ""
    """Human name of the storage format, e.g. ``"int8 dynamic"``."""

    weight_dtype: torch.dtype = torch.float32
    """dtype of the float layer that this one stands for, hence of ``weight``. Casts of the model (``.half()``) change it and nothing else:
    what is stored keeps its type. As with any layer, a ``state_dict`` does not change it; files of ``pycompress.save`` hold it.
    A default of the class, for layers that were pickled before it existed."""

    @property
    def kernel(self) -> str:
        """Name of the kernel that runs this layer here, e.g. ``"avx2"`` or ``"reference"``."""
        raise NotImplementedError

    @property
    def fallback_reason(self) -> str | None:
        """Why the native kernel does not run, or None if it does."""
        return None

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the dense weight this layer stands for."""
        raise NotImplementedError

    def num_params(self) -> int:
        """Parameters that are stored: kept weights plus biases (scales are counted as bytes, not as parameters)."""
        raise NotImplementedError

    def num_bytes(self) -> int:
        """Bytes of the canonical tensors, i.e. what a checkpoint holds for this layer."""
        return sum(t.numel() * t.element_size() for t in self.state_dict().values() if isinstance(t, torch.Tensor))

    def to_dense(self) -> nn.Module:
        """The float layer with the same (dequantized) weights, in ``weight_dtype``."""
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """JSON-able constructor arguments; ``type(self).from_config(layer.config())`` gives an empty twin."""
        raise NotImplementedError

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> CompressedModule:
        return cls(**config)

    def _follow_cast(self, fn: Callable[[torch.Tensor], torch.Tensor], device: torch.device) -> None:
        """For ``_apply``: ``weight_dtype`` becomes what ``fn`` makes of a parameter of that type."""
        dtype = fn(torch.empty((), dtype=self.weight_dtype, device=device)).dtype
        if dtype.is_floating_point:
            self.weight_dtype = dtype


_NOTE = "_pycompress_note"


def set_note(module: nn.Module, text: str | None) -> None:
    """Attach the reason why a layer was left as it is, None takes it away; ``pycompress.report`` shows it, checkpoints keep it."""
    object.__setattr__(module, _NOTE, text)


def get_note(module: nn.Module) -> str | None:
    return getattr(module, _NOTE, None)
