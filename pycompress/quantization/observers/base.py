"""What every observer does: see data, then answer with ``(scale, zero_point)``."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ...ops.affine import asymmetric_qparams, symmetric_scale
from ...registry import Registry

OBSERVERS: Registry[type[Observer]] = Registry("observer")


class Observer(nn.Module):
    """Collects statistics of a tensor and derives its quantization parameters.

    ``axis`` None: one scale for the whole tensor. An int: one scale per index of that axis (per channel).
    The clipping range always contains 0, so that zero padding, masks and ReLU zeros stay exact.

    >>> observer = MinMaxObserver(quant_min=-127, quant_max=127, symmetric=True)
    >>> observer.observe(torch.tensor([-1.0, 2.0])); scale, zero_point = observer.calculate_qparams()
    """

    low: Tensor
    high: Tensor

    per_channel: ClassVar[bool] = True
    """Whether ``axis`` may be given."""

    def __init__(self, quant_min: int, quant_max: int, symmetric: bool, axis: int | None = None) -> None:
        super().__init__()
        name = type(self).__name__
        if not quant_min < 0 < quant_max:
            raise ValueError(f"{name}: quant_min and quant_max must enclose 0, got {quant_min} and {quant_max}")
        if axis is not None and not self.per_channel:
            raise ValueError(f"{name}: axis must be None, this observer works per tensor only, got {axis}")
        self.quant_min, self.quant_max, self.symmetric, self.axis = quant_min, quant_max, symmetric, axis
        self.reset()

    def observe(self, x: Tensor) -> None:
        """Take in a tensor of any shape. Raises ``ValueError`` if it holds NaN or Inf; an empty tensor changes nothing."""
        if not torch.isfinite(x).all():
            raise ValueError(f"{type(self).__name__}: data must be finite, got NaN or Inf")
        self.observe_unchecked(x)

    def observe_unchecked(self, x: Tensor) -> None:
        """``observe`` without the check for NaN and Inf, which waits for the device: the training loop uses this one."""
        if x.numel():
            x = x.detach().float()
            self.update(x.reshape(1, -1) if self.axis is None else x.movedim(self.axis, 0).flatten(1))

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """(scale float32, zero_point int32), of shape () per tensor or (channels,) per channel. The scale of all-zero data is 0.

        Raises ``RuntimeError`` before any data was seen.
        """
        if not self.has_data():
            raise RuntimeError(f"{type(self).__name__}: calculate_qparams needs data, call observe first")
        low, high = self.clipping_range()
        scale, zero_point = range_to_qparams(low, high, self.quant_min, self.quant_max, self.symmetric)
        return (scale[0], zero_point[0]) if self.axis is None else (scale, zero_point)

    def reset(self) -> None:
        """Forget all data."""
        rows = 1 if self.axis is None else 0
        # +inf/-inf mean "nothing seen"; with an axis the number of rows is known at the first batch.
        self.store("low", torch.full((rows,), float("inf")))
        self.store("high", torch.full((rows,), float("-inf")))

    def store(self, name: str, value: Tensor) -> None:
        """Set a buffer in place where its shape allows: DistributedDataParallel synchronizes the tensors it saw at the start."""
        buffer = self._buffers.get(name)
        if buffer is not None and buffer.shape == value.shape:
            buffer.copy_(value)
        else:
            self.register_buffer(name, value if buffer is None else value.to(buffer.device))

    def has_data(self) -> bool:
        return bool(self.low.numel()) and bool((self.low <= self.high).all())

    def update(self, rows: Tensor) -> None:
        """Take in float32 ``rows`` of shape (channels, n), n > 0; (1, n) per tensor."""
        raise NotImplementedError

    def clipping_range(self) -> tuple[Tensor, Tensor]:
        """(low, high) of the range to keep, each of shape (channels,)."""
        return self.low, self.high

    def extra_repr(self) -> str:
        return f"quant_min={self.quant_min}, quant_max={self.quant_max}, symmetric={self.symmetric}, axis={self.axis}"


def range_to_qparams(low: Tensor, high: Tensor, quant_min: int, quant_max: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero point that map [low, high] onto the integers; the range is widened to contain 0.

    symmetric:  scale = max(|low|, |high|) / quant_max, zero_point = 0
    asymmetric: scale = (high - low) / (quant_max - quant_min), zero_point = round(quant_min - low / scale)

    The scale is 0 where the range is a point at 0 (narrower than 2**-100).
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    if symmetric:
        scale = symmetric_scale(torch.maximum(-low, high), quant_max)
        return scale, torch.zeros_like(scale, dtype=torch.int32)
    return asymmetric_qparams(low, high, quant_min, quant_max)
