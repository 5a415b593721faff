"""How one tensor is quantized: bits, symmetry, granularity. Configs are made of these."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .observers import OBSERVERS, Observer

GRANULARITIES = ("tensor", "channel", "group", "token")


@dataclass(frozen=True)
class Scheme:
    """One tensor's quantization.

    ``granularity``: which values share a scale. ``"tensor"``: all; ``"channel"``: one output channel of a weight; ``"group"``:
    ``group_size`` neighbours within an output channel; ``"token"``: one row of an activation (one image for a convolution),
    measured anew on every call.
    """

    bits: int = 8
    symmetric: bool = True
    granularity: str = "tensor"
    group_size: int | None = None
    observer: str = "minmax"
    observer_options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def quant_min(self) -> int:
        """-(2**(bits-1) - 1) if symmetric, so that negation stays in range, else -2**(bits-1)."""
        return -(1 << (self.bits - 1)) + (1 if self.symmetric else 0)

    @property
    def quant_max(self) -> int:
        return (1 << (self.bits - 1)) - 1

    @property
    def dynamic(self) -> bool:
        return self.granularity == "token"

    def make_observer(self, axis: int | None = None) -> Observer:
        return OBSERVERS[self.observer](self.quant_min, self.quant_max, self.symmetric, axis, **self.observer_options)

    def check(self, where: str, what: str, granularities: tuple[str, ...]) -> None:
        """Raise ``ValueError`` or ``TypeError`` for values that make no sense; ``what`` is "weight" or "activation"."""
        prefix = "" if what == "weight" else f"{what}_"
        check_int(where, f"{prefix}bits", self.bits, 2, 16)
        check_bool(where, f"{prefix}symmetric", self.symmetric)
        if self.granularity not in granularities:
            raise ValueError(f"{where}: {prefix}granularity must be one of {', '.join(granularities)}, got {self.granularity!r}")
        if self.granularity == "group":
            check_int(where, "group_size", self.group_size, 1, 2**31)
        elif self.group_size is not None:
            raise ValueError(f"{where}: group_size needs granularity='group', got granularity={self.granularity!r}")
        check_observer(where, self, axis=None if self.granularity in ("tensor", "token") else 0)

    def __str__(self) -> str:
        size = f" of {self.group_size}" if self.granularity == "group" else ""
        return f"{self.bits} bit {'symmetric' if self.symmetric else 'asymmetric'} per {self.granularity}{size}"


def check_int(where: str, name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{where}: {name} must be an int from {low} to {high}, got {value!r}")


def check_bool(where: str, name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{where}: {name} must be True or False, got {value!r}")


def check_observer(where: str, scheme: Scheme, axis: int | None) -> None:
    """An unknown observer or option fails here, when the config is written, not at the first batch."""
    if not isinstance(scheme.observer_options, Mapping):
        raise TypeError(f"{where}: observer_options must be a mapping, got {type(scheme.observer_options).__name__}")
    try:
        scheme.make_observer(axis)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}: {error}") from None


def to_rows(x: Tensor, granularity: str, group_size: int | None = None) -> Tensor:
    """View a weight as (rows, n) where each row shares a scale. Groups are cut from the flattened output channel; a last
    group that is too short is filled with zeros, which never change its range.

    >>> to_rows(torch.ones(8, 3, 5, 5), "group", 32).shape
    torch.Size([24, 32])
    """
    if granularity == "tensor":
        return x.reshape(1, -1)
    rows = x.flatten(1) if x.dim() > 1 else x[:, None]
    if granularity == "group" and group_size is not None:
        missing = -rows.shape[1] % group_size
        if missing:
            rows = torch.nn.functional.pad(rows, (0, missing))
        rows = rows.reshape(-1, group_size)
    return rows


def from_rows(rows: Tensor, shape: torch.Size) -> Tensor:
    """Inverse of ``to_rows``."""
    if rows.numel() == shape.numel():
        return rows.reshape(shape)
    return rows.reshape(shape[0], -1)[:, : shape[1:].numel()].reshape(shape)
