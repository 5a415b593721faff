"""``int8_conv2d``: quantise, convolve exactly in integers, dequantise or requantise, in one call."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native
from .activation import ACTIVATE, check_activation
from .affine import dequantize_affine, quantize_affine, symmetric_scale
from .cuda import int8_conv2d as cuda_conv2d
from .cuda.extension import NAME as CUDA
from .int8_linear import check_activation_quantization, check_weight
from .int8_matmul import kernel_for as matmul_kernel_for
from .library import define, tracing

Pair = tuple[int, int]
_ELEMENTS = cuda_conv2d.ELEMENTS


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


def int8_conv2d_reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    x_scale: float | None = None,
    x_zero_point: int | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    residual_scale: float | None = None,
    residual_zero_point: int | None = None,
    out_scale: float | None = None,
    out_zero_point: int | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """What every kernel computes, written for reading: quantise, an exact integer convolution (in float64), dequantise.

    Arguments as ``int8_conv2d``. Dynamic activations have one symmetric scale per image. Padding is real zero, that is, the zero
    point. An image with NaN or Inf comes out as NaN (as the zero point, if the result is int8).
    """
    if x.dtype == torch.int8:
        image_scale = torch.full((x.shape[0],), x_scale, dtype=torch.float32, device=x.device)
        q = x.int() - (x_zero_point or 0)
    else:
        images = x.float()
        amax = images.abs().flatten(1).amax(dim=1) if x[0:1].numel() else images.new_zeros(x.shape[0])
        if x_scale is None:
            image_scale = symmetric_scale(amax)
            q = quantize_affine(images, image_scale.view(-1, 1, 1, 1))
        else:
            zero_point, quant_min = (0, -127) if x_zero_point is None else (x_zero_point, -128)
            image_scale = torch.where(torch.isfinite(amax), x_scale, float("nan"))
            q = quantize_affine(images, torch.tensor(x_scale, dtype=torch.float32, device=x.device), zero_point, quant_min) - zero_point
    total = F.conv2d(q.double(), weight.double(), None, stride, padding, dilation, groups)
    y = total.float() * (image_scale[:, None] * scale)[:, :, None, None]
    if bias is not None:
        y = y + bias.float()[:, None, None]
    if residual is not None:
        r = (
            residual
            if residual_scale is None
            else dequantize_affine(residual.int(), torch.tensor(residual_scale), residual_zero_point or 0)
        )
        y = y + r.float()
    y = ACTIVATE[activation or "none"](y)
    if out_scale is not None:
        zero_point, quant_min = (0, -127) if out_zero_point is None else (out_zero_point, -128)
        step = torch.tensor(out_scale, dtype=torch.float32, device=x.device)
        q = quantize_affine(y, step, zero_point, quant_min)
        return torch.empty(q.shape, dtype=torch.int8, device=q.device, memory_format=torch.channels_last).copy_(q)
    dtype = out_dtype or (torch.float32 if x.dtype == torch.int8 else x.dtype)
    return torch.empty(y.shape, dtype=dtype, device=y.device, memory_format=_memory_format(x)).copy_(y)


def int8_conv2d(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
    x_scale: float | None = None,
    x_zero_point: int | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    residual_scale: float | None = None,
    residual_zero_point: int | None = None,
    out_scale: float | None = None,
    out_zero_point: int | None = None,
    out_dtype: torch.dtype | None = None,
    kernel: str | None = None,
) -> Tensor:
    """2-d convolution on int8 weights, with activations quantised on the fly or already int8.

    - ``x``: (N, C, H, W) float32, bfloat16 or float16, contiguous or channels_last; or int8, which needs ``x_scale``
    - ``weight``: (O, C / groups, kh, kw) int8; ``scale``: (O,) float32, the step of each output channel; ``bias``: (O,) float or None
    - ``x_scale`` None: dynamic, symmetric, one scale per image. A float: static, with ``x_zero_point`` as in ``int8_linear``
    - ``activation``: None, ``"relu"``, ``"gelu"`` (exact, erf), ``"silu"``, ``"relu6"`` or ``"hardswish"``, after the residual
    - ``residual``: shape of the result, added before the activation; float, or int8 with ``residual_scale`` and ``residual_zero_point``
    - ``out_scale``, ``out_zero_point``: make the result int8, as ``quantize_affine`` would; always channels_last, the layout in which
      int8 results go straight into the next convolution
    - ``out_dtype``: float type of the result; by default that of ``x``, float32 if ``x`` is int8
    - ``kernel``: forces one of ``native.kernels("int8_conv2d")``, or "cuda" for tensors that are there

    Returns (N, O, H', W') in the memory format of ``x``. Equals ``F.conv2d`` on ``(q - zero_point) * x_scale`` and ``weight * scale``
    with the sum exact in integers; padding is the zero point. An image with NaN or Inf gives a NaN image. The gradient with respect to
    ``x`` and a float ``residual`` is the straight-through one; an int8 result has none.
    Packs the weight on every call: a layer (``pycompress.nn.Int8Conv2d``) packs once.

    Raises ``ValueError`` for shapes, ranges and empty results, ``TypeError`` for dtypes.

    >>> q, s = quantize_weight(torch.randn(8, 3, 3, 3))
    >>> y = int8_conv2d(torch.randn(1, 3, 16, 16), q, s, padding=1)
    """
    check_weight("int8_conv2d", weight, scale, bias, dim=4)
    geometry = make_geometry("int8_conv2d", weight.shape, stride, padding, dilation, groups)
    check_activation_quantization("int8_conv2d", weight[0].numel() if len(weight) else 0, x_scale, x_zero_point)
    check_activation("int8_conv2d", activation)
    check_input("int8_conv2d", x, geometry, weight.shape[1] * groups, x_scale is not None, weight.device)
    after = make_requantization(
        "int8_conv2d", x, geometry, residual, residual_scale, residual_zero_point, out_scale, out_zero_point, out_dtype
    )
    name = kernel_for(x, kernel, "int8_conv2d")
    packed = (_pack_op if tracing() else pack_weight)(weight, list(geometry), name)
    scale = scale.contiguous()
    bias = None if bias is None else bias.float().contiguous()
    return int8_conv2d_packed(x, packed, scale, bias, residual, geometry, x_scale, x_zero_point, after, activation or "none", name)


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
    if not isinstance(x, Tensor) or x.dtype not in _ELEMENTS:
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
        if not isinstance(residual, Tensor) or residual.dtype not in _ELEMENTS:
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


def kernel_for(x: Tensor, kernel: str | None, where: str = "int8_conv2d") -> str:
    """The kernel for a tensor: those of ``int8_matmul``."""
    return matmul_kernel_for(x, kernel, where)


def pack_weight(weight: Tensor, geometry: list[int], kernel: str) -> Tensor:
    """An int8 weight (O, C / groups, kh, kw) in the private layout of a kernel, as a flat int8 tensor (itself for the reference)."""
    weight = weight.contiguous()
    if kernel == native.REFERENCE:
        return weight
    if kernel == CUDA:
        return cuda_conv2d.pack(weight, geometry[-1])
    sizes = (1, weight.shape[1] * geometry[-1], 1, 1, *geometry)
    packed = torch.empty(native.module.int8_conv2d_packed_bytes(kernel, sizes), dtype=torch.int8, device="cpu")
    native.module.int8_conv2d_pack(kernel, sizes, weight.data_ptr(), packed.data_ptr())
    return packed


def unpack_weight(packed: Tensor, channels: int, geometry: list[int], kernel: str) -> Tensor:
    """The canonical weight (O, C / groups, kh, kw) out of ``pack_weight``'s result; ``channels`` = C."""
    if kernel == native.REFERENCE:
        return packed
    if kernel == CUDA:
        return cuda_conv2d.unpack(packed, (geometry[0], channels // geometry[-1], geometry[1], geometry[2]), geometry[-1])
    weight = torch.empty(geometry[0], channels // geometry[-1], geometry[1], geometry[2], dtype=torch.int8, device="cpu")
    native.module.int8_conv2d_unpack(kernel, (1, channels, 1, 1, *geometry), packed.data_ptr(), weight.data_ptr())
    return weight


def int8_conv2d_packed(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    geometry: Geometry,
    x_scale: float | None,
    x_zero_point: int | None,
    after: Requantization,
    activation: str,
    kernel: str,
) -> Tensor:
    """``int8_conv2d`` on a weight from ``pack_weight(weight, geometry, kernel)``, without checks: for layers, which made the pack."""
    arguments = (x, packed, scale, bias, residual, geometry, x_scale, x_zero_point, *after, activation, kernel)
    if torch.is_grad_enabled() and (x.requires_grad or (residual is not None and residual.requires_grad)):
        if after.out_scale is not None:
            raise RuntimeError("int8_conv2d: an int8 result has no gradient; detach x, or leave out_scale away while training")
        return _StraightThrough.apply(*arguments)
    return (_op if tracing() else _run)(*arguments)


class _StraightThrough(torch.autograd.Function):
    """Gradient as if activations were not quantised: that of a convolution with the dequantised weight."""

    @staticmethod
    def forward(ctx, x, packed, scale, bias, residual, *rest):
        ctx.save_for_backward(x, packed, scale, bias, residual)
        ctx.rest = rest
        return (_op if tracing() else _run)(x, packed, scale, bias, residual, *rest)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, packed, scale, bias, residual = ctx.saved_tensors
        geometry, activation, kernel = ctx.rest[0], ctx.rest[-2], ctx.rest[-1]
        if activation != "none":
            before = (_op if tracing() else _run)(x, packed, scale, bias, residual, *ctx.rest[:-2], "none", kernel)
            with torch.enable_grad():
                before = before.detach().requires_grad_()
                grad = torch.autograd.grad(ACTIVATE[activation](before), before, grad)[0]
        grad_x = grad_residual = None
        if ctx.needs_input_grad[4]:
            grad_residual = grad.to(residual.dtype)
        if ctx.needs_input_grad[0]:
            weight = (_unpack_op if tracing() else unpack_weight)(packed, x.shape[1], list(geometry), kernel)
            weight = weight.float() * scale[:, None, None, None]
            stride, padding, dilation, groups = Geometry(*geometry).arguments()
            grad_x = torch.nn.grad.conv2d_input(x.shape, weight, grad.float(), stride, padding, dilation, groups).to(x.dtype)
        return grad_x, None, None, None, grad_residual, *[None] * len(ctx.rest)


def _suggests_channels_last(x: Tensor) -> bool:
    """torch's ``suggest_memory_format() == channels_last`` (c10/core/MemoryFormat.h), which Python does not offer."""
    least = 0
    for d in (1, 3, 2, 0):
        size, stride = x.shape[d], x.stride(d)
        if size == 0 or stride < least or (d == 1 and stride == 0) or (d == 0 and least == x.stride(1)):
            return False
        least = stride * max(size, 1)
    return True


def _memory_format(x: Tensor) -> torch.memory_format:
    return torch.channels_last if _suggests_channels_last(x) else torch.contiguous_format


_NCHW = "_pycompress_nchw"
TRACEABLE_MARKS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 6)
"""Dynamo of older torch traces no attributes of tensors (pytorch#134844): there, compiled chains of int8 layers end in channels_last."""


def _marked(x: Tensor) -> bool:
    return (TRACEABLE_MARKS or not tracing()) and getattr(x, _NCHW, False)


def is_nchw(x: Tensor) -> bool:
    """Whether a float result of ``x`` is to be contiguous: floats tell by their strides, int8 by the mark of ``remember_nchw``."""
    return _marked(x) if x.dtype == torch.int8 else not _suggests_channels_last(x)


def remember_nchw(y: Tensor, nchw: bool) -> Tensor:
    """Mark an int8 tensor, which is channels_last, that stands between layers of a model that runs on contiguous tensors. An attribute, as
    strides have no room for it; torch.compile and torch.export see it, too."""
    if nchw and y.dtype == torch.int8 and (TRACEABLE_MARKS or not tracing()):
        setattr(y, _NCHW, True)
    return y


def view_of(x: Tensor, view: Tensor) -> Tensor:
    """``view``, marked like ``x``."""
    return remember_nchw(view, _marked(x))


def _run(
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
    channels_last = strides[3] >= strides[1] * c and _suggests_channels_last(x)  # a usual NCHW tensor at a glance
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
        _ELEMENTS[x_dtype],
        x_channels_last,
        x_scale is None,
        x_scale or 0.0,
        x_zero_point or 0,
        -127 if x_zero_point is None else -128,
        native.ACTIVATIONS[activation],
        _ELEMENTS[out_dtype],
        out_channels_last,
        out_scale or 0.0,
        out_zero_point or 0,
        -127 if out_zero_point is None else -128,
        0 if residual_dtype is None else _ELEMENTS[residual_dtype],
        residual_scale or 0.0,
        residual_zero_point or 0,
    )


def _fake(x, packed, scale, bias, residual, geometry, x_scale, x_zero_point, out_dtype, out_scale, *rest):
    geometry, nchw = Geometry(*geometry), rest[-3]
    memory_format = torch.contiguous_format if nchw else torch.channels_last if out_scale is not None else _memory_format(x)
    shape = (x.shape[0], geometry.out_channels, *geometry.out_size(x.shape[2], x.shape[3]))
    return torch.empty(shape, dtype=out_dtype, device=x.device, memory_format=memory_format)


_op = define(
    "int8_conv2d(Tensor x, Tensor packed, Tensor scale, Tensor? bias, Tensor? residual, int[] geometry, float? x_scale, "
    "int? x_zero_point, ScalarType out_dtype, float? out_scale, int? out_zero_point, float? residual_scale, int? residual_zero_point, "
    "bool nchw, str activation, str kernel) -> Tensor",
    _run,
    _fake,
)


def _fake_pack(weight, geometry, kernel):
    if kernel == native.REFERENCE:
        return torch.empty_like(weight, memory_format=torch.contiguous_format)
    if kernel == CUDA:
        return weight.new_empty(cuda_conv2d.packed_bytes(weight.shape, geometry[-1]))
    return weight.new_empty(native.module.int8_conv2d_packed_bytes(kernel, (1, weight.shape[1] * geometry[-1], 1, 1, *geometry)))


_pack_op = define(
    "int8_conv2d_pack(Tensor weight, int[] geometry, str kernel) -> Tensor",
    lambda weight, geometry, kernel: pack_weight(weight, geometry, kernel).clone(),
    _fake_pack,
)
_unpack_op = define(
    "int8_conv2d_unpack(Tensor packed, SymInt channels, int[] geometry, str kernel) -> Tensor",
    lambda packed, channels, geometry, kernel: unpack_weight(packed, channels, geometry, kernel).clone(),
    lambda packed, channels, geometry, kernel: packed.new_empty((geometry[0], channels // geometry[-1], geometry[1], geometry[2])),
)
