"""The simulation: what quantization does to weights and activations, in float, before a layer is converted.

Requirements: (1) values equal those of the executed layer to the bit, so all arithmetic is ``ops.affine``; (2) weights are
simulated by a ``torch.nn.utils.parametrize`` parametrization, so pruning masks stay and optimizers keep their parameters;
(3) everything that a checkpoint of a training run needs is in the state_dict.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..ops.affine import SMALLEST_AMAX, dequantize_affine, quantize_affine
from .observers import range_to_qparams
from .scheme import Scheme, from_rows, to_rows
from .ste import fake_quantize_lsq, fake_quantize_ste
from .types import Layer


class WeightQuantizer(nn.Module):
    """Base of the parametrizations of ``weight``; ``enabled=False`` passes the weight through."""

    config: Any
    """The config that asked for this quantizer."""

    def __init__(self) -> None:
        super().__init__()
        self.enabled = True

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Assigning ``layer.weight = w`` stores ``w`` itself."""
        return weight

    def quantize(self, weight: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, weight: Tensor) -> Tensor:
        return self.quantize(weight) if self.enabled else weight


class FakeQuantize(WeightQuantizer):
    """Affine fake quantization of a weight.

    The scale follows the weight (min-max of each row, every call) until ``fix`` sets it or ``learn`` makes it a parameter.
    ``rounded``: integers to use instead of rounding to nearest, see ``hold``. ``offset``: (rows,) added before and taken off after, i.e. a
    float zero point, see ``algorithms/hqq.py``.

    >>> parametrize.register_parametrization(layer, "weight", FakeQuantize(Scheme(granularity="channel")))
    """

    scale: Any  # None, a buffer, or a parameter
    zero_point: Any
    rounded: Tensor | None
    offset: Tensor | None

    def __init__(self, scheme: Scheme) -> None:
        super().__init__()
        self.scheme = scheme
        self.learned = False
        for name in ("scale", "zero_point", "rounded", "offset"):
            self.register_buffer(name, None)

    def observe(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point that the scheme's observer chooses for this weight, (rows,) each."""
        rows, scheme = self.rows(weight.detach()).float(), self.scheme
        if scheme.observer == "minmax":  # every training step comes by here
            return range_to_qparams(*torch.aminmax(rows, dim=1), scheme.quant_min, scheme.quant_max, scheme.symmetric)
        observer = scheme.make_observer(axis=0)
        observer.observe_unchecked(rows)
        return observer.calculate_qparams()

    def fix(self, scale: Tensor, zero_point: Tensor | None = None) -> None:
        """Hold the scale, (rows,), from now on; used by observers that search and by algorithms that choose their own grid."""
        self.scale = scale.detach().clone().float()
        self.zero_point = torch.zeros_like(self.scale, dtype=torch.int32) if zero_point is None else zero_point.detach().clone()
        self.rounded = self.offset = None

    def hold(self, rounded: Tensor, scale: Tensor, zero_point: Tensor) -> None:
        """Take ``rounded``, which lies on the grid of ``scale`` and ``zero_point``, for the result from now on, whatever the weight is.

        For post-training algorithms that round in their own way. The float weight stays and gets no gradient any more.
        """
        q = self.integers(rounded, scale, zero_point)
        self.fix(scale, zero_point)
        self.rounded = q.to(torch.int8 if self.scheme.bits <= 8 else torch.int16)

    def learn(self, weight: Tensor) -> None:
        """Make the scale a parameter, started at ``2 * mean|w| / sqrt(quant_max)`` (LSQ, section 2.1)."""
        _, zero_point = self.observe(weight)
        start = 2 * self.rows(weight.detach()).float().abs().mean(dim=1) / self.scheme.quant_max**0.5
        del self.scale
        self.scale = nn.Parameter(start.clamp(min=SMALLEST_AMAX))
        self.zero_point = zero_point
        self.learned = True

    def rows(self, weight: Tensor) -> Tensor:
        return to_rows(weight, self.scheme.granularity, self.scheme.group_size)

    def qparams(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Scale float32 and zero point int32 in use for this weight, (rows,) each."""
        if self.scale is None:
            return self.observe(weight)
        # An optimizer may push a learned scale through 0; its size is what counts.
        return (self.scale.abs().clamp(min=SMALLEST_AMAX) if self.learned else self.scale), self.zero_point

    def integers(self, weight: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """int32, in the weight's shape, rounded to nearest."""
        q = quantize_affine(self.rows(weight.detach()), scale[:, None], zero_point[:, None], self.scheme.quant_min, self.scheme.quant_max)
        return from_rows(q, weight.shape)

    def quantize(self, weight: Tensor) -> Tensor:
        scale, zero_point = self.qparams(weight)
        if self.rounded is not None:
            rows = dequantize_affine(self.rows(self.rounded.to(torch.int32)), scale[:, None], zero_point[:, None])
            return from_rows(rows, weight.shape).to(weight.dtype)
        rows = self.rows(weight)
        shifted = rows if self.offset is None else rows + self.offset[:, None]
        function = fake_quantize_lsq if self.learned else fake_quantize_ste
        result = function(shifted, scale[:, None], zero_point[:, None], self.scheme.quant_min, self.scheme.quant_max)
        if self.offset is not None:
            # With a zero point between two integers 0 is not on the grid; pruned weights stay 0 all the same.
            result = torch.where(rows == 0, rows, (result - self.offset[:, None]).to(rows.dtype))
        return from_rows(result, weight.shape)

    def extra_repr(self) -> str:
        return f"{self.scheme}, scale={'learned' if self.learned else 'from the weight' if self.scale is None else 'fixed'}"


class ActivationQuantizer(nn.Module):
    """Observes and fake-quantizes the input of a layer; a prepared layer holds it as ``input_quantizer``.

    ``sample_dims``: number of trailing dimensions that make one token (1 for Linear, 3 for Conv2d), for dynamic schemes.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, scheme: Scheme, sample_dims: int, name: str = "") -> None:
        super().__init__()
        self.scheme = scheme
        self.dims = tuple(range(-sample_dims, 0))
        self.name = name
        self.observing = False
        self.quantizing = True
        self.learned = False
        self.ready = scheme.dynamic
        if not scheme.dynamic:
            self.observer = scheme.make_observer()
            self.register_buffer("scale", torch.tensor(float("nan")))
            self.register_buffer("zero_point", torch.tensor(0, dtype=torch.int32))

    def learn(self) -> None:
        """Make the static scale a parameter (LSQ); ``calibrate`` gives it its start."""
        start = self.scale
        del self.scale
        self.scale = nn.Parameter(start)
        self.learned = True

    def calculate_qparams(self) -> None:
        """Take over the observer's scale and zero point."""
        scale, zero_point = self.observer.calculate_qparams()
        # All-zero calibration data says nothing about the scale; 0 would silence the layer for every later input.
        scale = torch.where(scale < SMALLEST_AMAX, torch.ones_like(scale), scale)
        with torch.no_grad():
            self.scale.copy_(scale)
            self.zero_point.copy_(zero_point)
        self.ready = True

    def qparams(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point in use, broadcastable against ``x``."""
        if not self.scheme.dynamic:
            return (self.scale.abs().clamp(min=SMALLEST_AMAX) if self.learned else self.scale), self.zero_point
        low, high = x.detach().float().amin(self.dims, keepdim=True), x.detach().float().amax(self.dims, keepdim=True)
        return range_to_qparams(low, high, self.scheme.quant_min, self.scheme.quant_max, self.scheme.symmetric)

    def integers(self, x: Tensor) -> Tensor:
        """int32 values that the executed layer multiplies, in the shape of ``x``, zero point included."""
        scale, zero_point = self.qparams(x)
        return quantize_affine(x.detach(), scale.detach(), zero_point, self.scheme.quant_min, self.scheme.quant_max)

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() == 0:
            return x
        if self.observing and not self.scheme.dynamic:
            if not self.training:
                self._observe_checked(x)
            elif not self.learned:
                self.observer.observe_unchecked(x)
                self.calculate_qparams()
        if not self.quantizing:
            return x
        if not self.ready:
            raise RuntimeError(f"layer {self.name!r} has no activation scale yet: run Quantizer.calibrate, or one step in training mode")
        scale, zero_point = self.qparams(x)
        function = fake_quantize_lsq if self.learned else fake_quantize_ste
        return function(x, scale, zero_point, self.scheme.quant_min, self.scheme.quant_max)

    def _observe_checked(self, x: Tensor) -> None:
        try:
            self.observer.observe(x)
        except ValueError as error:
            raise ValueError(f"calibrate: input of layer {self.name!r}: {error}") from None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if not self.scheme.dynamic:
            self.ready = not bool(torch.isnan(self.scale))

    def extra_repr(self) -> str:
        return f"{self.scheme}{', scale learned' if self.learned else ''}"


def quantize_input(layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook of a prepared layer. A plain function, so that the model can be copied."""
    quantizer = layer.input_quantizer
    if args:
        return (quantizer(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "input": quantizer(kwargs["input"])}


def weight_quantizer(layer: Layer) -> WeightQuantizer | None:
    """The quantizing parametrization of a prepared layer's weight, or None."""
    if parametrize.is_parametrized(layer, "weight"):
        for part in layer.parametrizations.weight:
            if isinstance(part, WeightQuantizer):
                return part
    return None


def layer_quantizer(layer: Layer) -> WeightQuantizer:
    """``weight_quantizer`` of a layer that is known to be prepared."""
    quantizer = weight_quantizer(layer)
    assert quantizer is not None
    return quantizer


def affine_quantizer(layer: Layer) -> FakeQuantize:
    """The ``FakeQuantize`` of a prepared layer's weight. ``ValueError`` if it has none."""
    quantizer = weight_quantizer(layer)
    if not isinstance(quantizer, FakeQuantize):
        raise ValueError(f"layer must be prepared with FakeQuantize, got {type(layer).__name__}")
    return quantizer


@torch.no_grad()
def quantized_weight(layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
    """(integers int32 in the weight's shape, scale, zero_point) of a layer prepared with ``FakeQuantize``, whatever else
    parametrizes its weight."""
    quantizer = affine_quantizer(layer)
    seen: list[Tensor] = []
    handle = quantizer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    enabled, quantizer.enabled = quantizer.enabled, True
    try:
        weight = layer.weight
    finally:
        handle.remove()
        quantizer.enabled = enabled
    scale, zero_point = quantizer.qparams(seen[0])
    # Quantizing the final weight again is exact on its own grid and keeps zeros of masks that come after this parametrization.
    return quantizer.integers(weight, scale, zero_point), scale, zero_point
