"""``Int8Conv2d``: drop-in for ``nn.Conv2d`` with int8 weights and int8 arithmetic."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import native
from ..ops.activation import check_activation
from ..ops.affine import quantize_weight
from ..ops.cuda import extension
from ..ops.int8_conv2d import (
    Requantization,
    check_input,
    check_step,
    int8_conv2d_packed,
    is_nchw,
    kernel_for,
    make_geometry,
    make_requantization,
    pack_weight,
    remember_nchw,
    unpack_weight,
    view_of,
)
from ..ops.int8_linear import check_activation_quantization
from ..ops.library import tracing
from .base import LAYERS
from .packed import Int8ActivationModule

Pair = tuple[int, int]


@LAYERS.register("Int8Conv2d")
class Int8Conv2d(Int8ActivationModule):
    """2-d convolution: int8 weights per output channel, int8 activations, exact integer sums.

    Activations are quantised on the fly: dynamic (one symmetric scale per image) unless ``static``; a static layer also takes int8
    inputs, which are on its ``x_scale``. With ``int8_output`` the result is int8, too, on ``out_scale`` and, if
    ``asymmetric_output``, ``out_zero_point``: between such layers nothing is ever float, unless a gradient to ``x`` is wanted, which
    integers do not carry: then the result is float, for the next layer to round. See ``pycompress.ops.int8_conv2d``.

    >>> layer = Int8Conv2d.from_float(nn.Conv2d(3, 8, 3, padding=1))
    >>> y = layer(torch.randn(1, 3, 16, 16))
    """

    dense_type: type[nn.Module] = nn.Conv2d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = (1, 1),
        padding: Pair = (0, 0),
        dilation: Pair = (1, 1),
        groups: int = 1,
        bias: bool = True,
        *,
        static: bool = False,
        asymmetric: bool = False,
        activation: str | None = None,
        int8_output: bool = False,
        asymmetric_output: bool = False,
    ) -> None:
        super().__init__()
        where = type(self).__name__
        check_activation(where, activation)
        if asymmetric and not static:
            raise ValueError(f"{where}: asymmetric activations need static=True")
        if asymmetric_output and not int8_output:
            raise ValueError(f"{where}: asymmetric_output needs int8_output=True")
        if not isinstance(groups, int) or groups < 1 or in_channels % groups:
            raise ValueError(f"{where}: groups must be a positive divisor of the {in_channels} input channels, got {groups!r}")
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride, self.padding, self.dilation = tuple(kernel_size), tuple(stride), tuple(padding), tuple(dilation)
        self.static, self.asymmetric, self.activation = static, asymmetric, activation or "none"
        self.int8_output, self.asymmetric_output = int8_output, asymmetric_output
        shape = (out_channels, in_channels // groups, *self._pair(self.kernel_size, 1))
        pairs = (self._pair(self.stride, 1), self._pair(self.padding, 0), self._pair(self.dilation, 1))
        self._geometry = make_geometry(where, shape, *pairs, groups)
        self._least = self._geometry.least_size()
        depth = shape[1] * shape[2] * shape[3]
        check_activation_quantization(where, depth, 1.0 if static else None, 0 if asymmetric else None)
        self.canonical = {"weight": (torch.int8, self.weight_shape)}
        self.register_buffer("packed", None, persistent=False)
        self.register_buffer("scale", torch.ones(out_channels, dtype=torch.float32))
        self.register_static_activation()
        if int8_output:
            self.register_buffer("out_scale", torch.ones((), dtype=torch.float32))
        if asymmetric_output:
            self.register_buffer("out_zero_point", torch.zeros((), dtype=torch.int32))
        self.register_buffer("bias", torch.zeros(out_channels, dtype=torch.float32) if bias else None)
        self._set_canonical({"weight": torch.zeros(self.weight_shape, dtype=torch.int8)})
        self._loaded()

    @staticmethod
    def _pair(values: tuple[int, ...], missing: int) -> Pair:
        """Sizes as (height, width); a 1-d convolution has the height ``missing``."""
        return values if len(values) == 2 else (missing, *values)  # type: ignore[return-value]

    @classmethod
    def from_float(
        cls,
        conv: nn.Conv1d | nn.Conv2d,
        *,
        x_scale: float | None = None,
        x_zero_point: int | None = None,
        activation: str | None = None,
        weight: Tensor | None = None,
        scale: Tensor | None = None,
        out_scale: float | None = None,
        out_zero_point: int | None = None,
    ) -> Int8Conv2d:
        """Quantise a convolution. ``x_scale`` None = dynamic; ``weight`` (int8) and ``scale`` override plain rounding.

        ``out_scale`` makes the layer return int8 on that scale. Raises ``ValueError`` for NaN weights, string padding with even
        kernels, and padding modes other than zeros.
        """
        where = f"{cls.__name__}.from_float"
        if not isinstance(conv, cls.dense_type):
            raise TypeError(f"{where}: conv must be a {cls.dense_type.__name__}, got {type(conv).__name__}")
        if (weight is None) != (scale is None):
            raise ValueError(f"{where}: weight and scale must be given together")
        if conv.padding_mode != "zeros":
            raise ValueError(f"{where}: padding_mode must be 'zeros', got {conv.padding_mode!r}")
        if x_scale is None and x_zero_point is not None:
            raise ValueError(f"{where}: x_zero_point needs x_scale, got x_scale=None")
        check_activation_quantization(where, conv.weight[0].numel() if len(conv.weight) else 0, x_scale, x_zero_point)
        check_step(where, "out", out_scale, out_zero_point)
        if weight is None:
            weight, scale = quantize_weight(conv.weight)
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            explicit_padding(conv),
            conv.dilation,
            conv.groups,
            conv.bias is not None,
            static=x_scale is not None,
            asymmetric=x_zero_point is not None,
            activation=activation,
            int8_output=out_scale is not None,
            asymmetric_output=out_zero_point is not None,
        )
        if tuple(weight.shape) != layer.weight_shape or weight.dtype != torch.int8:
            raise ValueError(f"{where}: weight must be int8 {layer.weight_shape}, got {weight.dtype} {tuple(weight.shape)}")
        layer.to(weight.device).weight_dtype = conv.weight.dtype
        with torch.no_grad():
            layer.scale.copy_(scale)
            if conv.bias is not None:
                layer.bias.copy_(conv.bias)
            values = {"x_scale": x_scale, "x_zero_point": x_zero_point, "out_scale": out_scale, "out_zero_point": out_zero_point}
            for name, value in values.items():
                if value is not None:
                    getattr(layer, name).fill_(value)
        layer._set_canonical({"weight": weight.detach()})
        layer._loaded()
        return layer.train(conv.training)

    def with_int8_output(self, out_scale: float, out_zero_point: int | None = None) -> Int8Conv2d:
        """The same layer with int8 results on this scale.

        >>> first = first.with_int8_output(float(second.x_scale), None if second.x_zero_point is None else int(second.x_zero_point))
        """
        check_step(f"{type(self).__name__}.with_int8_output", "out", out_scale, out_zero_point)
        layer = type(self)(**(self.config() | {"int8_output": True, "asymmetric_output": out_zero_point is not None}))
        state = self.state_dict() | {"out_scale": torch.tensor(out_scale)}
        if out_zero_point is not None:
            state["out_zero_point"] = torch.tensor(out_zero_point, dtype=torch.int32)
        layer.weight_dtype = self.weight_dtype
        layer.to(self.scale.device).load_state_dict(state)
        return layer.train(self.training)

    def _set_canonical(self, tensors: dict[str, Tensor]) -> None:
        weight = tensors["weight"]
        self._kernel = kernel_for(weight, None, "int8_conv2d")
        self.packed = pack_weight(weight.view(weight.shape[0], weight.shape[1], *self._geometry[1:3]), list(self._geometry), self._kernel)

    def _get_canonical(self) -> dict[str, Tensor]:
        return {"weight": self.int_weight}

    def _loaded(self) -> None:
        super()._loaded()
        known = self.scale.device.type != "meta"
        self._out_scale = float(self.out_scale) if self.int8_output and known else None
        self._out_zero_point = int(self.out_zero_point) if self.asymmetric_output and known else None

    @property
    def int_weight(self) -> Tensor:
        """Canonical int8 weight (out_channels, in_channels / groups, kh, kw), unpacked on access."""
        return unpack_weight(self.packed, self.in_channels, list(self._geometry), self._kernel).view(self.weight_shape)

    @property
    def fallback_reason(self) -> str | None:
        if self._kernel != native.REFERENCE:
            return None
        return extension.fallback_reason("int8_conv2d", self.packed.device)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    def num_params(self) -> int:
        return math.prod(self.weight_shape) + (self.out_channels if self.bias is not None else 0)

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        residual_scale: float | None = None,
        residual_zero_point: int | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """input (N, C, H, W) or (C, H, W), float or, for a static layer, int8. ``residual`` is added before the activation.

        ``out_dtype``: float type of the result, by default that of ``input`` (float32 for int8).
        """
        if input.dim() == len(self.kernel_size) + 1:
            residual = None if residual is None else residual.unsqueeze(0)
            y = self._convolve(view_of(input, input.unsqueeze(0)), residual, residual_scale, residual_zero_point, out_dtype)
            return view_of(y, y.squeeze(0))
        return self._convolve(input, residual, residual_scale, residual_zero_point, out_dtype)

    def _convolve(self, x, residual, residual_scale, residual_zero_point, out_dtype) -> Tensor:
        if tracing():
            packed, scale, bias = self.packed, self.scale, self.bias
        else:  # nn.Module looks for a buffer among everything else first, half a microsecond each
            buffers = self._buffers
            packed, scale, bias = buffers["packed"], buffers["scale"], buffers["bias"]
        static, shape, dtype, least = self._x_scale is not None, x.shape, x.dtype, self._least
        usual = len(shape) == 4 and shape[1] == self.in_channels and shape[2] >= least[0] and shape[3] >= least[1]
        if not usual or x.device != packed.device or not (dtype == torch.float32 or (static and dtype == torch.int8)):
            check_input(type(self).__name__, x, self._geometry, self.in_channels, static, self._device)
        if residual is None and out_dtype is None and residual_scale is None and residual_zero_point is None:
            if self.int8_output and not (x.requires_grad and torch.is_grad_enabled()):
                after = Requantization(torch.int8, self._out_scale, self._out_zero_point)
            elif dtype == torch.int8:
                after = Requantization(torch.float32, nchw=is_nchw(x))
            else:
                after = Requantization(dtype)
        else:
            scales = (residual_scale, residual_zero_point, self._out_scale, self._out_zero_point)
            after = make_requantization(type(self).__name__, x, self._geometry, residual, *scales, out_dtype)
        y = int8_conv2d_packed(
            x,
            packed,
            scale,
            bias,
            residual,
            self._geometry,
            self._x_scale,
            self._x_zero_point,
            after,
            self.activation,
            self._kernel,
        )
        return y if after.out_scale is None else remember_nchw(y, is_nchw(x))

    def to_dense(self) -> nn.Module:
        """Float layer with the dequantised weights (a fused activation and int8 results are not part of it)."""
        dense = self.dense_type(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.bias is not None,
            device=self.scale.device,
            dtype=self.weight_dtype,
        )
        with torch.no_grad():
            dense.weight.copy_(self.weight)
            if self.bias is not None:
                dense.bias.copy_(self.bias)
        return dense.train(self.training)

    def config(self) -> dict[str, Any]:
        config = {
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "kernel_size": list(self.kernel_size),
            "stride": list(self.stride),
            "padding": list(self.padding),
            "dilation": list(self.dilation),
            "groups": self.groups,
            "bias": self.bias is not None,
            "static": self.static,
            "asymmetric": self.asymmetric,
            "activation": self.activation,
        }
        if self.int8_output:
            config |= {"int8_output": True, "asymmetric_output": self.asymmetric_output}
        return config

    def extra_repr(self) -> str:
        activation = "" if self.activation == "none" else f", activation={self.activation}"
        output = ", int8_output=True" if self.int8_output else ""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, "
            f"groups={self.groups}, format={self.format}, kernel={self.kernel}{activation}{output}"
        )


def explicit_padding(conv: nn.Conv1d | nn.Conv2d) -> tuple[int, ...]:
    """Padding as numbers. ``"same"`` with an odd total needs different amounts on both sides, which no kernel here takes."""
    if not isinstance(conv.padding, str):
        return tuple(conv.padding)
    if conv.padding == "valid":
        return (0,) * len(conv.kernel_size)
    totals = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    if any(t % 2 for t in totals):
        raise ValueError(f"explicit_padding: padding='same' needs dilation * (kernel_size - 1) even, got {tuple(conv.kernel_size)}")
    return tuple(t // 2 for t in totals)
