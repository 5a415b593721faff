"""``Int4Linear``: drop-in for ``nn.Linear`` with int4 weights in groups along K."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops import native
from ..ops.activation import check_activation
from ..ops.cuda.extension import fallback_reason, kernel_for
from ..ops.int4 import check_group_size, check_int4, int4_error, num_groups, quantize_weight_int4
from ..ops.int4_linear import (
    check_input,
    dequantize_packed,
    int4_linear_packed,
    pack_int4,
    unpack_int4,
)
from ..ops.library import tracing
from .base import LAYERS
from .packed import PackedModule


@LAYERS.register("Int4Linear")
class Int4Linear(PackedModule):
    """Linear layer: int4 weights with a scale per group of 32, 64 or 128 inputs; an eighth of the memory.

    Multiplies in float ("weight-only": made for few rows, as when a language model writes one token at a time), or, with
    ``int8_activations``, in integers with x rounded to int8 per row (made for many rows). ``symmetric`` False adds a zero point per group.
    See ``pycompress.ops.int4`` for the format and ``pycompress.ops.int4_linear`` for the arithmetic.

    >>> layer = Int4Linear.from_float(nn.Linear(256, 32), group_size=64)
    >>> y = layer(torch.randn(8, 256))
    """

    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        group_size: int = 128,
        symmetric: bool = True,
        int8_activations: bool = False,
        activation: str | None = None,
    ) -> None:
        super().__init__()
        check_group_size("Int4Linear", group_size)
        check_activation("Int4Linear", activation)
        self.in_features, self.out_features, self.group_size = in_features, out_features, group_size
        self.symmetric, self.int8_activations, self.activation = symmetric, int8_activations, activation or "none"
        groups = (out_features, num_groups(in_features, group_size))
        self.canonical = {"weight": (torch.uint8, (out_features, -(-in_features // 2))), "scale": (torch.float32, groups)}
        if not symmetric:
            self.canonical["zero_point"] = (torch.uint8, groups)
        self.register_buffer("packed", None, persistent=False)
        self.register_buffer("bias", torch.zeros(out_features, dtype=torch.float32) if bias else None)
        self._set_canonical({name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in self.canonical.items()})

    @classmethod
    def from_float(
        cls,
        linear: nn.Linear,
        *,
        group_size: int = 128,
        symmetric: bool = True,
        int8_activations: bool = False,
        activation: str | None = None,
        weight: Tensor | None = None,
        scale: Tensor | None = None,
        zero_point: Tensor | None = None,
    ) -> Int4Linear:
        """Quantise an ``nn.Linear``. ``weight`` (nibbles), ``scale`` and, unless ``symmetric``, ``zero_point`` override plain rounding.

        Raises ``ValueError`` for NaN or infinite weights and scales, group sizes other than 32, 64 and 128, zero points above 15.
        """
        where = "Int4Linear.from_float"
        if (weight is None) != (scale is None):
            raise ValueError(f"{where}: weight and scale must be given together")
        if weight is None or scale is None:
            if zero_point is not None:
                raise ValueError(f"{where}: zero_point needs weight and scale, got weight=None")
            weight, scale, zero_point = quantize_weight_int4(linear.weight, group_size, symmetric)
        check_int4(where, weight, scale, zero_point, linear.in_features, group_size)
        if weight.shape[0] != linear.out_features:
            raise ValueError(f"{where}: weight must have {linear.out_features} rows, got {tuple(weight.shape)}")
        if (zero_point is None) != symmetric:
            raise ValueError(f"{where}: zero_point must be given if and only if symmetric is False, got symmetric={symmetric}")
        problem = None if weight.is_meta else int4_error(scale, zero_point)
        if problem is not None:
            raise ValueError(f"{where}: {problem}")
        has_bias = linear.bias is not None
        options = {"group_size": group_size, "symmetric": symmetric, "int8_activations": int8_activations, "activation": activation}
        layer = cls(linear.in_features, linear.out_features, has_bias, **options)
        layer.to(weight.device).weight_dtype = linear.weight.dtype
        if layer.bias is not None:
            with torch.no_grad():
                layer.bias.copy_(linear.bias)
        tensors = {"weight": weight, "scale": scale} | ({} if zero_point is None else {"zero_point": zero_point})
        layer._set_canonical({name: tensor.detach() for name, tensor in tensors.items()})
        return layer.train(linear.training)

    def _set_canonical(self, tensors: dict[str, Tensor]) -> None:
        weight = tensors["weight"]
        self._kernel = kernel_for("int4_matmul", weight, None, "Int4Linear")
        self.packed = pack_int4(weight, tensors["scale"], tensors.get("zero_point"), self.in_features, self.group_size, self._kernel)

    def _get_canonical(self) -> dict[str, Tensor]:
        weight, scale, zero_point = unpack_int4(self.packed, *self._format(), self._kernel)
        return {"weight": weight, "scale": scale} | ({} if zero_point is None else {"zero_point": zero_point})

    def _canonical_error(self, tensors: dict[str, Tensor]) -> str | None:
        return None if tensors["scale"].is_meta else int4_error(tensors["scale"], tensors.get("zero_point"))

    def _format(self) -> tuple[int, int, int, bool]:
        return self.out_features, self.in_features, self.group_size, not self.symmetric

    def _dequantized(self) -> Tensor:
        return dequantize_packed(self.packed, *self._format(), self._kernel)

    @property
    def int_weight(self) -> Tensor:
        """Canonical nibbles (out_features, ceil(in_features / 2)) uint8, unpacked on access; so are ``scale`` and ``zero_point``."""
        return self._get_canonical()["weight"]

    @property
    def scale(self) -> Tensor:  # type: ignore[override]
        return self._get_canonical()["scale"]

    @property
    def zero_point(self) -> Tensor | None:
        return self._get_canonical().get("zero_point")

    @property
    def format(self) -> str:  # type: ignore[override]
        kind = "int8 x int4" if self.int8_activations else "int4 weight-only"
        return f"{kind}{'' if self.symmetric else ' asymmetric'}, groups of {self.group_size}"

    @property
    def fallback_reason(self) -> str | None:
        if self._kernel != native.REFERENCE:
            return None
        return fallback_reason("int4_matmul", self.packed.device)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.out_features, self.in_features)

    def num_params(self) -> int:
        return self.out_features * self.in_features + (self.out_features if self.bias is not None else 0)

    def forward(self, input: Tensor) -> Tensor:
        if tracing():
            packed, bias = self.packed, self.bias
        else:  # nn.Module looks for a buffer among everything else first, half a microsecond each
            packed, bias = self._buffers["packed"], self._buffers["bias"]
        if input.shape[-1:] != (self.in_features,) or input.dtype not in native.DTYPES or input.device != packed.device:
            self._refuse(input)
        return int4_linear_packed(input, packed, bias, *self._format(), self.int8_activations, self.activation, self._kernel)

    def _refuse(self, x: Tensor) -> None:
        check_input("Int4Linear", x)
        if x.shape[-1] != self.in_features:
            raise ValueError(f"Int4Linear: x must be (..., {self.in_features}), got {tuple(x.shape)}")
        raise ValueError(f"Int4Linear: x must be on {self.packed.device} like weight, got {x.device}")

    def to_dense(self) -> nn.Linear:
        """Float layer with the dequantised weights (a fused activation is not part of it)."""
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device=self.packed.device, dtype=self.weight_dtype)
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
            "group_size": self.group_size,
            "symmetric": self.symmetric,
            "int8_activations": self.int8_activations,
            "activation": self.activation,
        }

    def extra_repr(self) -> str:
        activation = "" if self.activation == "none" else f", activation={self.activation}"
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, format={self.format}, kernel={self.kernel}{activation}"
        )
