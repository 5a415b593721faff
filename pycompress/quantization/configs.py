"""What to quantize to: frozen dataclasses that validate themselves. A new format is one class here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..nn.base import set_note
from ..nn.int8_conv1d import Int8Conv1d
from ..nn.int8_conv2d import Int8Conv2d, explicit_padding
from ..nn.int8_linear import Int8Linear
from ..nn.int8_weight_only import Int8WeightOnlyConv2d, Int8WeightOnlyLinear
from ..nn.packed import PackedModule
from ..nn.parametrized import remove_parametrizations
from ..nn.sparse24_choice import int8_sparse24_or_reason
from ..nn.sparse24_conv2d import Sparse24Conv2d
from ..nn.sparse24_linear import Sparse24Linear
from ..ops import native
from ..ops.int8_linear import check_activation_quantization
from .codebook import CODEBOOKS, CodebookQuantize
from .fake_quantize import ActivationQuantizer, FakeQuantize, WeightQuantizer, quantized_weight
from .layers import float_twin
from .scheme import Scheme, check_bool, check_int, check_observer
from .types import Layer


class QuantizationConfig:
    """Base of all configs: which layers it takes, how it simulates them, what they become."""

    layer_types: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear, nn.Conv2d)
    """Types that can be converted; other layers are left alone."""

    packed_types: ClassVar[tuple[type[PackedModule], ...]] = ()
    """Packed float layers that are opened (``to_dense``) and converted like the dense ones."""

    trainable: ClassVar[bool] = True
    """Whether quantization-aware training is possible."""

    simulated: ClassVar[bool] = False
    """Whether the result stays a float layer with quantized values."""

    promises_speed: ClassVar[bool] = False
    """Whether the converted layers are meant to be faster than float ones, so that ``crossover`` can leave a layer in float."""

    bits: int
    """Bits per weight."""

    def weight_quantizer(self) -> WeightQuantizer:
        """Parametrization that simulates the weight of one layer."""
        raise NotImplementedError

    def activation_scheme(self) -> Scheme | None:
        """How the layer's input is quantized; None leaves it in float."""
        return None

    def obstacle(self, layer: Layer) -> str | None:
        """Why this layer of a supported type cannot be converted, or None."""
        return None

    def convert(self, layer: Layer) -> nn.Module:
        """The finished layer for a prepared and calibrated one. The prepared layer is not changed, unless it is the result itself."""
        raise NotImplementedError


_INT8_LAYERS: dict[type[nn.Module], Any] = {nn.Linear: Int8Linear, nn.Conv1d: Int8Conv1d, nn.Conv2d: Int8Conv2d}


class _Int8Config(QuantizationConfig):
    """Symmetric int8 weights, one scale per output channel, range -127..127. A weight with 2:4 (or 1:4) zeros runs on the sparse kernels
    where they gain on this machine; a note says why where they do not."""

    layer_types = tuple(_INT8_LAYERS)
    packed_types = (Sparse24Linear, Sparse24Conv2d)
    promises_speed = True
    bits = 8

    def weight_quantizer(self) -> FakeQuantize:
        return FakeQuantize(Scheme(granularity="channel"))

    def obstacle(self, layer: Layer) -> str | None:
        weight: Tensor = layer.weight
        if weight.dtype not in native.DTYPES:
            return f"the int8 layers take float32, bfloat16 and float16, its weight is {weight.dtype}"
        try:
            if not isinstance(layer, nn.Linear):
                explicit_padding(layer)
            scheme = self.activation_scheme()
            zero_point = 0 if scheme is not None and not scheme.symmetric else None  # int32 sums are shorter with one
            check_activation_quantization(type(self).__name__, weight[0].numel(), 1.0, zero_point)
        except ValueError as error:
            return str(error)
        if not isinstance(layer, nn.Linear) and layer.padding_mode != "zeros":
            return f"the int8 convolutions pad with zeros, not padding_mode={layer.padding_mode!r}"
        return None

    def convert(self, layer: Layer) -> nn.Module:
        q, scale, _ = quantized_weight(layer)
        activation: dict[str, Any] = {}
        if hasattr(layer, "input_quantizer"):
            activation = activation_arguments(layer.input_quantizer)
        twin, q = float_twin(layer), q.to(torch.int8)
        sparse = int8_sparse24_or_reason(twin, q, scale, **activation)
        if isinstance(sparse, nn.Module):
            return sparse
        layer_type = next(int8 for kind, int8 in _INT8_LAYERS.items() if isinstance(layer, kind))
        converted: nn.Module = layer_type.from_float(twin, weight=q, scale=scale, **activation)
        if sparse is not None:
            set_note(converted, sparse)
        return converted


@dataclass(frozen=True)
class Int8Dynamic(_Int8Config):
    """int8 weights, int8 activations with a scale measured on every call (per token, per image for convolutions). Needs no data.

    ``symmetric``: True: range -127..127. False: a zero point per token, too, twice the resolution behind a ReLU; Linear only, convolutions
    stay float.

    >>> model = pycompress.quantize(model, Int8Dynamic())
    """

    symmetric: bool = True

    def __post_init__(self) -> None:
        check_bool("Int8Dynamic", "symmetric", self.symmetric)

    def activation_scheme(self) -> Scheme:
        return Scheme(symmetric=self.symmetric, granularity="token")

    def obstacle(self, layer: Layer) -> str | None:
        if not isinstance(layer, nn.Linear) and not self.symmetric:
            return "the int8 convolutions have no zero point per image, take Int8Static or symmetric=True"
        return super().obstacle(layer)


@dataclass(frozen=True)
class Int8Static(_Int8Config):
    """int8 weights, int8 activations with one scale per layer found by calibration. The fastest at run time.

    - ``observer``: how the range is found, one of ``OBSERVERS``: minmax, moving_average, percentile, mse, entropy
    - ``symmetric``: True: -127..127, zero point 0. False: -128..127 with a zero point, twice the resolution behind a ReLU
    - ``observer_options``: keyword arguments of the observer, such as ``{"percentile": 99.9}``

    >>> config = Int8Static(observer="percentile", observer_options={"percentile": 99.9})
    """

    observer: str = "minmax"
    symmetric: bool = False
    observer_options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        check_bool("Int8Static", "symmetric", self.symmetric)
        check_observer("Int8Static", self.activation_scheme(), axis=None)
        object.__setattr__(self, "observer_options", dict(self.observer_options))

    def activation_scheme(self) -> Scheme:
        return Scheme(symmetric=self.symmetric, observer=self.observer, observer_options=self.observer_options)


@dataclass(frozen=True)
class Int8WeightOnly(_Int8Config):
    """int8 weights, float activations: a quarter of the memory, nearly no error. Linear layers with few rows of input (decoding one token
    at a time) run at the speed at which their bytes arrive; convolutions are not faster.

    >>> model = pycompress.quantize(model, Int8WeightOnly())
    """

    layer_types: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear, nn.Conv2d)
    packed_types: ClassVar[tuple[type[PackedModule], ...]] = ()
    promises_speed: ClassVar[bool] = False

    def obstacle(self, layer: Layer) -> str | None:
        if isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros":
            return f"Int8WeightOnlyConv2d pads with zeros, not padding_mode={layer.padding_mode!r}"
        return None

    def convert(self, layer: Layer) -> nn.Module:
        q, scale, _ = quantized_weight(layer)
        layer_type = Int8WeightOnlyConv2d if isinstance(layer, nn.Conv2d) else Int8WeightOnlyLinear
        return layer_type.from_float(float_twin(layer), weight=q.to(torch.int8), scale=scale)


class _Simulated(QuantizationConfig):
    """Quantized values in float layers: to study accuracy at widths and formats that no kernel here executes."""

    layer_types: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    simulated: ClassVar[bool] = True

    def convert(self, layer: Layer) -> nn.Module:
        """Bakes the quantized weight into the layer itself; a simulated activation stays, as ``input_quantizer``."""
        for part in layer.parametrizations.weight:
            if isinstance(part, WeightQuantizer):
                part.enabled = True
        remove_parametrizations(layer, "weight")
        set_note(layer, f"simulated in float, not smaller or faster: {self.describe()}")
        return layer

    def describe(self) -> str:
        raise NotImplementedError


@dataclass(frozen=True)
class FakeQuant(_Simulated):
    """Simulated affine quantization at any width.

    - ``bits`` 2 to 16; ``granularity`` of the weight: "tensor", "channel" or "group" (with ``group_size``)
    - ``symmetric``: zero point 0 and range ±(2**(bits-1) - 1)
    - ``observer`` (and ``observer_options``): how the weight's range is found; all but "minmax" look once, before training
    - ``activation_bits`` None leaves activations in float; else they are quantized per ``activation_granularity``: "token" (measured
      on every call, symmetric) or "tensor" (calibrated by ``activation_observer``)

    The result keeps float layers; ``get_note(layer)`` and the report say "simulated".

    >>> model = pycompress.quantize(model, FakeQuant(bits=4, granularity="group", group_size=32))
    """

    bits: int = 8
    granularity: str = "channel"
    symmetric: bool = True
    group_size: int | None = None
    observer: str = "minmax"
    observer_options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    activation_bits: int | None = None
    activation_granularity: str = "token"
    activation_symmetric: bool = True
    activation_observer: str = "minmax"
    activation_observer_options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        self._weight_scheme().check("FakeQuant", "weight", ("tensor", "channel", "group"))
        for name in ("observer_options", "activation_observer_options"):
            object.__setattr__(self, name, dict(getattr(self, name)))
        scheme = self.activation_scheme()
        if scheme is None:
            for name in ("activation_granularity", "activation_symmetric", "activation_observer", "activation_observer_options"):
                default = {} if name.endswith("options") else getattr(FakeQuant, name)
                if getattr(self, name) != default:
                    raise ValueError(f"FakeQuant: {name} needs activation_bits, got activation_bits=None")
            return
        scheme.check("FakeQuant", "activation", ("token", "tensor"))
        if scheme.dynamic and not (scheme.symmetric and scheme.observer == "minmax" and not scheme.observer_options):
            raise ValueError("FakeQuant: activation_granularity must be 'tensor' for an observer or asymmetry, got 'token'")

    def _weight_scheme(self) -> Scheme:
        return Scheme(self.bits, self.symmetric, self.granularity, self.group_size, self.observer, self.observer_options)

    def weight_quantizer(self) -> FakeQuantize:
        return FakeQuantize(self._weight_scheme())

    def activation_scheme(self) -> Scheme | None:
        if self.activation_bits is None:
            return None
        return Scheme(
            self.activation_bits,
            self.activation_symmetric,
            self.activation_granularity,
            observer=self.activation_observer,
            observer_options=self.activation_observer_options,
        )

    def describe(self) -> str:
        activation = self.activation_scheme()
        return f"weights {self._weight_scheme()}" + (f", activations {activation}" if activation else "")


@dataclass(frozen=True)
class Codebook(_Simulated):
    """Simulated non-uniform quantization: each weight becomes the nearest of 2**bits values, times a scale.

    ``kind``: "kmeans" (values learned from the weight), "nf4" (NormalFloat, 4 bits), "pot" (powers of two), "apot" (sums of
    powers of two); see ``pycompress/quantization/codebook.py``. ``granularity`` "tensor", "channel" or "group" (with ``group_size``).

    >>> model = pycompress.quantize(model, Codebook(bits=3, kind="kmeans"))
    """

    trainable: ClassVar[bool] = False

    bits: int = 4
    kind: str = "kmeans"
    granularity: str = "channel"
    group_size: int | None = None

    def __post_init__(self) -> None:
        check_int("Codebook", "bits", self.bits, 2, 8)
        CODEBOOKS[self.kind](self.bits)
        if self.granularity not in ("tensor", "channel", "group"):
            raise ValueError(f"Codebook: granularity must be one of tensor, channel, group, got {self.granularity!r}")
        if self.granularity == "group":
            check_int("Codebook", "group_size", self.group_size, 1, 2**31)
        elif self.group_size is not None:
            raise ValueError(f"Codebook: group_size needs granularity='group', got granularity={self.granularity!r}")

    def weight_quantizer(self) -> CodebookQuantize:
        return CodebookQuantize(self.bits, self.kind, self.granularity, self.group_size)

    def describe(self) -> str:
        size = f" of {self.group_size}" if self.group_size else ""
        return f"weights {self.bits} bit {self.kind} codebook per {self.granularity}{size}"


def activation_arguments(quantizer: ActivationQuantizer) -> dict[str, Any]:
    """Arguments of the int8 layers that say how activations are quantized."""
    if quantizer.scheme.dynamic:
        return {} if quantizer.scheme.symmetric else {"asymmetric": True}
    scale, zero_point = (tensor.detach() for tensor in quantizer.qparams(Tensor()))
    return {"x_scale": float(scale), "x_zero_point": None if quantizer.scheme.symmetric else int(zero_point)}
