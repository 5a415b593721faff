"""The call of ``int8_conv2d``: to the reference, to CUDA or to the extension, and its registration with torch."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from . import native
from .cuda import int8_conv2d as cuda_conv2d
from .cuda.extension import NAME as CUDA
from .cuda.int8_conv2d import ELEMENTS
from .int8_conv2d_arguments import Geometry, Pair
from .int8_conv2d_reference import int8_conv2d_reference
from .library import define
from .memory_format import memory_format_of, suggests_channels_last


def run(
    x,
    packed,
    scale,
    bias,
    residual,
    geometry,
    x_scale,
    x_zero_point,
    out_dtype,
    out_scale,
    out_zero_point,
    residual_scale,
    residual_zero_point,
    nchw,
    activation,
    kernel,
    algorithm="",
):
    if not isinstance(geometry, Geometry):  # from the dispatcher
        geometry = Geometry(*geometry)
    if kernel == native.REFERENCE:
        stride, padding, dilation, groups = geometry.arguments()
        y = int8_conv2d_reference(
            x,
            packed,
            scale,
            bias,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            x_scale=x_scale,
            x_zero_point=x_zero_point,
            activation=activation,
            residual=residual,
            residual_scale=residual_scale,
            residual_zero_point=residual_zero_point,
            out_scale=out_scale,
            out_zero_point=out_zero_point,
            out_dtype=None if out_scale is not None else out_dtype,
        )
        return y.contiguous() if nchw else y
    n, c, h, w = x.shape
    strides = x.stride()
    channels_last = strides[3] >= strides[1] * c and suggests_channels_last(x)  # a usual NCHW tensor at a glance
    if kernel == CUDA:
        return cuda_conv2d.conv2d(
            x,
            packed,
            scale,
            bias,
            residual,
            geometry,
            x_scale,
            x_zero_point,
            out_dtype,
            out_scale,
            out_zero_point,
            residual_scale,
            residual_zero_point,
            activation,
            out_size=geometry.out_size(x.shape[2], x.shape[3]),
            channels_last=channels_last,
            out_channels_last=out_scale is not None or (channels_last and not nchw),
        )
    depthwise = geometry.groups == c == geometry.out_channels
    out_channels_last = out_scale is not None or (channels_last and (depthwise or not nchw))
    # The kernels read dense pixels (channels_last) or dense rows; int8 only the former, and depthwise layers keep the layout.
    if channels_last or x.dtype == torch.int8 or (out_channels_last and depthwise):
        if not channels_last or (strides[1] != 1 and c != 1):
            x = x.contiguous(memory_format=torch.channels_last)
        channels_last = True
    elif strides[3] != 1 and w != 1:
        x = x.contiguous()
    out = _new_result(x, n, geometry.out_channels, geometry.out_size(h, w), out_dtype, out_channels_last)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last if out_channels_last else torch.contiguous_format)
    residual_dtype = None if residual is None else residual.dtype
    plan = _plan(
        kernel,
        algorithm,
        c,
        geometry,
        x.dtype,
        channels_last,
        x_scale,
        x_zero_point,
        activation,
        out_dtype,
        out_channels_last,
        out_scale,
        out_zero_point,
        residual_dtype,
        residual_scale,
        residual_zero_point,
    )
    native.module.int8_conv2d(
        plan,
        n,
        h,
        w,
        x.data_ptr(),
        *x.stride(),
        packed.data_ptr(),
        scale.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        out.data_ptr(),
    )
    return out.contiguous() if nchw else out


def _new_result(x: Tensor, n: int, channels: int, size: Pair, dtype: torch.dtype, channels_last: bool) -> Tensor:
    """``torch.empty`` in half the time: it costs 2 microseconds with a dtype, a device and a memory format."""
    shape = (n, *size, channels) if channels_last else (n, channels, *size)
    out = x.new_empty(shape) if x.dtype == dtype else x.new_empty(shape, dtype=dtype)
    return out.permute(0, 3, 1, 2) if channels_last else out


@functools.lru_cache(maxsize=4096)
def _plan(
    kernel: str,
    algorithm: str,
    channels: int,
    geometry: Geometry,
    x_dtype: torch.dtype,
    x_channels_last: bool,
    x_scale: float | None,
    x_zero_point: int | None,
    activation: str,
    out_dtype: torch.dtype,
    out_channels_last: bool,
    out_scale: float | None,
    out_zero_point: int | None,
    residual_dtype: torch.dtype | None,
    residual_scale: float | None,
    residual_zero_point: int | None,
) -> Any:
    """What the calls of a layer have in common, in the extension: passing it each time would cost five microseconds."""
    return native.module.int8_conv2d_plan(
        kernel,
        algorithm,
        (1, channels, 1, 1, *geometry),
        ELEMENTS[x_dtype],
        x_channels_last,
        x_scale is None,
        x_scale or 0.0,
        x_zero_point or 0,
        -127 if x_zero_point is None else -128,
        native.ACTIVATIONS[activation],
        ELEMENTS[out_dtype],
        out_channels_last,
        out_scale or 0.0,
        out_zero_point or 0,
        -127 if out_zero_point is None else -128,
        0 if residual_dtype is None else ELEMENTS[residual_dtype],
        residual_scale or 0.0,
        residual_zero_point or 0,
    )


def _fake(x, packed, scale, bias, residual, geometry, x_scale, x_zero_point, out_dtype, out_scale, *rest):
    geometry, nchw = Geometry(*geometry), rest[-3]
    memory_format = torch.contiguous_format if nchw else torch.channels_last if out_scale is not None else memory_format_of(x)
    shape = (x.shape[0], geometry.out_channels, *geometry.out_size(x.shape[2], x.shape[3]))
    return torch.empty(shape, dtype=out_dtype, device=x.device, memory_format=memory_format)


op = define(
    "int8_conv2d(Tensor x, Tensor packed, Tensor scale, Tensor? bias, Tensor? residual, int[] geometry, float? x_scale, "
    "int? x_zero_point, ScalarType out_dtype, float? out_scale, int? out_zero_point, float? residual_scale, int? residual_zero_point, "
    "bool nchw, str activation, str kernel) -> Tensor",
    run,
    _fake,
)
