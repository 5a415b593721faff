"""The arguments of ``int8_conv2d``: the sizes of a convolution, what comes after its sum, and the checks of both."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import native
from .cuda.int8_conv2d import ELEMENTS

Pair = tuple[int, int]


class Geometry(NamedTuple):
    """The sizes that make a convolution what it is, in the order in which the kernels take them."""

    out_channels: int
    kernel_h: int
    kernel_w: int
    stride_h: int
    stride_w: int
    padding_h: int
    padding_w: int
    dilation_h: int
    dilation_w: int
    groups: int

    def out_size(self, h: int, w: int) -> Pair:
        window_h, window_w = self.dilation_h * (self.kernel_h - 1) + 1, self.dilation_w * (self.kernel_w - 1) + 1
        return (
            (h + 2 * self.padding_h - window_h) // self.stride_h + 1,
            (w + 2 * self.padding_w - window_w) // self.stride_w + 1,
        )

    def least_size(self) -> Pair:
        """The smallest image that holds a window."""
        return (
            max(1, self.dilation_h * (self.kernel_h - 1) + 1 - 2 * self.padding_h),
            max(1, self.dilation_w * (self.kernel_w - 1) + 1 - 2 * self.padding_w),
        )

    def arguments(self) -> tuple[Pair, Pair, Pair, int]:
        """stride, padding, dilation and groups, as ``F.conv2d`` takes them."""
        return (
            (self.stride_h, self.stride_w),
            (self.padding_h, self.padding_w),
            (self.dilation_h, self.dilation_w),
            self.groups,
        )


class Requantization(NamedTuple):
    """What comes after the sum: the residual and the type of the result."""

    out_dtype: torch.dtype
    out_scale: float | None = None
    out_zero_point: int | None = None
    residual_scale: float | None = None
    residual_zero_point: int | None = None
    nchw: bool = False
    """A float result of an int8 ``x``, which is channels_last, is to be contiguous."""


def make_geometry(
    where: str, shape: tuple[int, ...], stride: int | Pair, padding: int | Pair, dilation: int | Pair, groups: int
) -> Geometry:
    """Geometry of a weight (O, C / groups, kh, kw). Raises ``ValueError`` and ``TypeError`` for sizes that make no convolution."""
    values = []
    for name, value, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        pair = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, (tuple, list)) else (None,)
        if len(pair) != 2 or not all(isinstance(v, int) and v >= least for v in pair):
            raise ValueError(f"{where}: {name} must be an integer or a pair of integers of at least {least}, got {value!r}")
        values += pair
    if not isinstance(groups, int) or groups < 1 or shape[0] % groups:
        raise ValueError(f"{where}: groups must be a positive divisor of the {shape[0]} output channels, got {groups!r}")
    if 0 in shape[1:]:
        raise ValueError(f"{where}: weight must have channels and taps, got shape {tuple(shape)}")
    return Geometry(shape[0], shape[2], shape[3], *values, groups)


def check_input(where: str, x: Tensor, geometry: Geometry, channels: int, static: bool, device: torch.device) -> None:
    """Checks of x against the convolution, up to the size of the result."""
    if not isinstance(x, Tensor) or x.dtype not in ELEMENTS:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{where}: x must be a float32, bfloat16, float16 or int8 tensor, got {got}")
    if x.dim() != 4 or x.shape[1] != channels:
        raise ValueError(
            f"{where}: x must be (N, {channels}, H, W) to match the weight with groups={geometry.groups}, got {tuple(x.shape)}"
        )
    if x.device != device:
        raise ValueError(f"{where}: x must be on {device} like weight, got {x.device}")
    if x.dtype == torch.int8 and not static:
        raise ValueError(f"{where}: an int8 x needs its x_scale, got x_scale=None")
    least_h, least_w = geometry.least_size()
    if x.shape[2] < least_h or x.shape[3] < least_w:
        raise ValueError(
            f"{where}: x {tuple(x.shape)} must have pixels and, padded by {(geometry.padding_h, geometry.padding_w)}, hold the window "
            f"{(geometry.kernel_h, geometry.kernel_w)} dilated by {(geometry.dilation_h, geometry.dilation_w)}"
        )


def check_step(where: str, name: str, scale: float | None, zero_point: int | None) -> None:
    """Checks of ``<name>_scale`` and ``<name>_zero_point``, None where there is none."""
    if scale is None and zero_point is not None:
        raise ValueError(f"{where}: {name}_zero_point needs {name}_scale, got {name}_scale=None")
    if scale is not None and not (math.isfinite(scale) and 2.0**-100 <= scale <= 2.0**100):
        raise ValueError(f"{where}: {name}_scale must be a finite number between 2**-100 and 2**100, got {scale}")
    if zero_point is not None and (isinstance(zero_point, bool) or int(zero_point) != zero_point or not -128 <= zero_point <= 127):
        raise ValueError(f"{where}: {name}_zero_point must be an integer from -128 to 127, got {zero_point}")


def make_requantization(
    where: str,
    x: Tensor,
    geometry: Geometry,
    residual: Tensor | None,
    residual_scale: float | None,
    residual_zero_point: int | None,
    out_scale: float | None,
    out_zero_point: int | None,
    out_dtype: torch.dtype | None,
) -> Requantization:
    """Checks of residual and result."""
    check_step(where, "out", out_scale, out_zero_point)
    check_step(where, "residual", residual_scale, residual_zero_point)
    if residual is not None:
        shape = (x.shape[0], geometry.out_channels, *geometry.out_size(x.shape[2], x.shape[3]))
        if not isinstance(residual, Tensor) or residual.dtype not in ELEMENTS:
            got = residual.dtype if isinstance(residual, Tensor) else type(residual).__name__
            raise TypeError(f"{where}: residual must be a float32, bfloat16, float16 or int8 tensor, got {got}")
        if tuple(residual.shape) != shape or residual.device != x.device:
            raise ValueError(
                f"{where}: residual must be {shape} on {x.device} like the result, got {tuple(residual.shape)} on {residual.device}"
            )
        if (residual.dtype == torch.int8) != (residual_scale is not None):
            raise ValueError(f"{where}: residual_scale must be given for an int8 residual and only for it, got {residual_scale}")
    elif residual_scale is not None:
        raise ValueError(f"{where}: residual_scale needs a residual, got residual=None")
    if out_dtype is not None and out_dtype not in native.DTYPES:
        raise TypeError(f"{where}: out_dtype must be float32, bfloat16 or float16, got {out_dtype}")
    if out_scale is not None and out_dtype is not None:
        raise ValueError(f"{where}: out_dtype and out_scale exclude each other, got {out_dtype} and {out_scale}")
    dtype = torch.int8 if out_scale is not None else out_dtype or (torch.float32 if x.dtype == torch.int8 else x.dtype)
    return Requantization(dtype, out_scale, out_zero_point, residual_scale, residual_zero_point)
