"""``Int8Linear``: drop-in for ``nn.Linear`` with int8 weights and int8 arithmetic."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops import native
from ..ops.activation import check_activation
from ..ops.affine import quantize_weight
from ..ops.cuda import int8_linear as cuda_int8
from ..ops.int8_linear import check_activation_quantization, check_input, int8_linear_packed
from ..ops.int8_matmul import kernel_for, pack_weight, unpack_weight
from ..ops.library import tracing
from .base import LAYERS
from .packed import Int8ActivationModule


@LAYERS.register("Int8Linear")
class Int8Linear(Int8ActivationModule):
    """Linear layer: int8 weights per output channel, int8 activations, exact int32 sums, float in and out.

    Activations are quantised on the fly: dynamic (one scale per row) unless ``static`` is True, then with the scale in
    ``x_scale``. ``asymmetric`` adds a zero point: per row, or, when static, the one in ``x_zero_point``.
    See ``pycompress.ops.int8_linear`` for the arithmetic.

    >>> layer = Int8Linear.from_float(nn.Linear(64, 32))
    >>> y = layer(torch.randn(8, 64))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        static: bool = False,
        asymmetric: bool = False,
        activation: str | None = None,
    ) -> None:
        super().__init__()
        check_activation("Int8Linear", activation)
        check_activation_quantization("Int8Linear", in_features, 1.0 if static else None, 0 if static and asymmetric else None, asymmetric)
        self.in_features, self.out_features = in_features, out_features
        self.static, self.asymmetric, self.activation = static, asymmetric, activation or "none"
        self.canonical = {"weight": (torch.int8, (out_features, in_features))}
        self.register_buffer("packed", None, persistent=False)
        self.register_buffer("scale", torch.ones(out_features, dtype=torch.float32))
        self.register_static_activation()
        self.register_buffer("bias", torch.zeros(out_features, dtype=torch.float32) if bias else None)
        self._set_canonical({"weight": torch.zeros(out_features, in_features, dtype=torch.int8)})
        self._loaded()

    @classmethod
    def from_float(
        cls,
        linear: nn.Linear,
        *,
        x_scale: float | None = None,
        x_zero_point: int | None = None,
        asymmetric: bool = False,
        activation: str | None = None,
        weight: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> Int8Linear:
        """Quantise an ``nn.Linear``. ``x_scale`` None = dynamic; ``weight`` (int8) and ``scale`` override plain rounding.

        Raises ``ValueError`` for NaN or infinite weights and for scales out of range.
        """
        if (weight is None) != (scale is None):
            raise ValueError("Int8Linear.from_float: weight and scale must be given together")
        check_activation_quantization("Int8Linear.from_float", linear.in_features, x_scale, x_zero_point, asymmetric)
        if weight is None:
            weight, scale = quantize_weight(linear.weight)
        has_bias = linear.bias is not None
        layer = cls(
            linear.in_features,
            linear.out_features,
            has_bias,
            static=x_scale is not None,
            asymmetric=asymmetric or x_zero_point is not None,
            activation=activation,
        )
        layer.to(weight.device).weight_dtype = linear.weight.dtype
        with torch.no_grad():
            layer.scale.copy_(scale)
            if has_bias:
                layer.bias.copy_(linear.bias)
            if x_scale is not None:
                layer.x_scale.fill_(x_scale)
            if x_zero_point is not None:
                layer.x_zero_point.fill_(x_zero_point)
        layer._set_canonical({"weight": weight.detach()})
        layer._loaded()
        return layer.train(linear.training)

    def _set_canonical(self, tensors: dict[str, Tensor]) -> None:
        weight = tensors["weight"]
        self._kernel = kernel_for(weight, None)
        self.packed = pack_weight(weight, self._kernel)

    def _get_canonical(self) -> dict[str, Tensor]:
        return {"weight": self.int_weight}

    @property
    def int_weight(self) -> Tensor:
        """Canonical int8 weight (out_features, in_features), unpacked on access."""
        return unpack_weight(self.packed, self.out_features, self.in_features, self._kernel)

    @property
    def fallback_reason(self) -> str | None:
        if self._kernel != native.REFERENCE:
            return None
        if self.packed.device.type == "cuda":
            return cuda_int8.unsupported(self.packed.device)
        return native.fallback_reason("int8_matmul") or f"no native kernel for {self.packed.device.type} tensors"

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.out_features, self.in_features)

    def num_params(self) -> int:
        return self.out_features * self.in_features + (self.out_features if self.bias is not None else 0)

    def forward(self, input: Tensor) -> Tensor:
        if tracing():
            packed, scale, bias = self.packed, self.scale, self.bias
        else:  # nn.Module looks for a buffer among everything else first, half a microsecond each
            buffers = self._buffers
            packed, scale, bias = buffers["packed"], buffers["scale"], buffers["bias"]
        if input.shape[-1:] != (self.in_features,) or input.dtype not in native.DTYPES or input.device != packed.device:
            check_input("Int8Linear", input, self.in_features, self.weight_shape, self._device)
        return int8_linear_packed(
            input,
            packed,
            scale,
            bias,
            self.out_features,
            self.in_features,
            self._x_scale,
            self._x_zero_point,
            self.asymmetric,
            self.activation,
            self._kernel,
        )

    def to_dense(self) -> nn.Linear:
        """Float layer with the dequantised weights (a fused activation is not part of it)."""
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device=self.scale.device, dtype=self.weight_dtype)
        with torch.no_grad():
            dense.weight.copy_(self.weight)
            if self.bias is not None:
                dense.bias.copy_(self.bias)
        return dense.train(self.training)

    def config(self) -> dict[str, Any]:
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias is not None,
            "static": self.static,
            "asymmetric": self.asymmetric,
            "activation": self.activation,
        }

    def extra_repr(self) -> str:
        activation = "" if self.activation == "none" else f", activation={self.activation}"
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, format={self.format}, kernel={self.kernel}{activation}"
        )
