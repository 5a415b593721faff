"""Layers that keep their weights only in the layout of the kernel that runs them.

Memory holds the packed form alone; ``state_dict``, ``pickle``, ``deepcopy`` and moves between devices go through the canonical
tensors, so no layout ever leaves the machine it was made for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import CompressedModule


class PackedModule(CompressedModule):
    """Base of the drop-in layers. A subclass packs its canonical tensors in ``_set_canonical`` and gives them back in ``_get_canonical``.

    ``canonical``: names, dtypes and shapes of the tensors that are stored packed, filled in by the subclass before the first
    ``_set_canonical``. Other persistent tensors (scales, bias) are ordinary buffers and always stay float32 on ``.half()``.
    """

    canonical: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    _kernel: str
    scale: Tensor

    def _set_canonical(self, tensors: dict[str, Tensor]) -> None:
        """Pack canonical tensors for the best kernel on their device; sets the packed buffers and ``self._kernel``."""
        raise NotImplementedError

    def _get_canonical(self) -> dict[str, Tensor]:
        """The canonical tensors, by the names in ``canonical``."""
        raise NotImplementedError

    def _loaded(self) -> None:
        """Called after tensors were loaded or moved; subclasses refresh what they derive from buffers."""

    @property
    def int_weight(self) -> Tensor:
        """The integers that are stored, unpacked on every access."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """What the layer multiplies with, in ``weight_dtype``, computed on every access: models ask their layers' weights for dtype and
        device, and cast inputs to it (the patch embeddings of Hugging Face's vision models do)."""
        return self._dequantized().to(self.weight_dtype)

    def _dequantized(self) -> Tensor:
        """The weight in float32, exactly what the kernels multiply with."""
        integers = self.int_weight
        return integers.float() * self.scale.view(-1, *[1] * (integers.dim() - 1))

    @property
    def _device(self) -> torch.device:
        return self.scale.device

    @property
    def kernel(self) -> str:
        return self._kernel

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in self._get_canonical().items():
            destination[prefix + name] = tensor

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs) -> None:
        own = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
        tensors = {name: own.pop(prefix + name, None) for name in self.canonical}
        missing = [prefix + name for name, tensor in tensors.items() if tensor is None]
        wrong = []
        for name, (dtype, shape) in self.canonical.items():
            t = tensors[name]
            if t is not None and (t.dtype != dtype or tuple(t.shape) != shape):
                wrong.append(f"{type(self).__name__}: {prefix}{name} must be {dtype} {shape}, got {t.dtype} {tuple(t.shape)}")
        problem = None if missing or wrong else self._canonical_error({name: t for name, t in tensors.items() if t is not None})
        missing_keys.extend(missing)
        error_msgs.extend(wrong if problem is None else [f"{type(self).__name__}: {prefix}{problem}"])
        dtypes = {name: buffer.dtype for name, buffer in self._buffers.items() if buffer is not None}
        super()._load_from_state_dict(own, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        for name, dtype in dtypes.items():  # assign=True takes tensors as they come, and kernels read float32 only
            self._buffers[name] = self._buffers[name].to(dtype)
        if not missing and not wrong and problem is None:
            device = self._device
            self._set_canonical({name: tensor.detach().to(device) for name, tensor in tensors.items()})
            self._loaded()

    def _canonical_error(self, tensors: dict[str, Tensor]) -> str | None:
        """What is wrong with the values of loaded tensors (right dtype and shape given), or None."""
        return None

    def _apply(self, fn, recurse: bool = True):
        """Device moves repack; dtype casts (``.half()``) leave scales, bias and integers as they are, ``weight_dtype`` follows them."""
        canonical = self._get_canonical()
        self._follow_cast(fn, next(iter(canonical.values())).device)
        for name, buffer in list(self._buffers.items()):
            if buffer is not None and name in self._non_persistent_buffers_set:
                continue
            if buffer is not None:
                moved = fn(buffer)
                self._buffers[name] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
        for name, tensor in canonical.items():
            moved = fn(tensor)
            canonical[name] = moved if moved.dtype == tensor.dtype else tensor.to(moved.device)
        self._set_canonical(canonical)
        self._loaded()
        return self

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["_buffers"] = {name: None if name in self._non_persistent_buffers_set else b for name, b in self._buffers.items()}
        state["_canonical_tensors"] = {name: tensor.clone() for name, tensor in self._get_canonical().items()}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        tensors = state.pop("_canonical_tensors")
        super().__setstate__(state)
        for name in self._non_persistent_buffers_set:  # assigning to them must make buffers, not plain attributes
            self._buffers.setdefault(name, None)
        self._set_canonical(tensors)
        self._loaded()


class Int8ActivationModule(PackedModule):
    """A packed layer that quantises its input to int8: dynamic, or static with a scale and perhaps a zero point."""

    static: bool
    asymmetric: bool
    x_scale: Tensor | None
    x_zero_point: Tensor | None

    def register_static_activation(self) -> None:
        """Add ``x_scale`` and ``x_zero_point`` as the layer needs them.

        A buffer that is None may only come last: torch.export counts it in the root module's inputs (seen with torch 2.13).
        """
        if self.static:
            self.register_buffer("x_scale", torch.ones((), dtype=torch.float32))
        else:
            self.x_scale = None
        if self.static and self.asymmetric:
            self.register_buffer("x_zero_point", torch.zeros((), dtype=torch.int32))
        else:
            self.x_zero_point = None

    def _loaded(self) -> None:
        """Static parameters as Python numbers: reading a tensor on every call would cost more than a small layer."""
        device = self.scale.device.type
        self._x_scale = float(self.x_scale) if self.static and device != "meta" else None
        self._x_zero_point = int(self.x_zero_point) if self.static and self.asymmetric and device != "meta" else None

    @property
    def format(self) -> str:
        return f"int8 {'static' if self.static else 'dynamic'}{' asymmetric' if self.asymmetric else ''}"
