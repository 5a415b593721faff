"""``int8_conv2d`` on CUDA: how the weight lies, which kernel runs, and the calls.

Two launches, three with dynamic scales: the images become pixels of int8 channels, then one kernel convolves and finishes
(csrc/int8_conv2d/int8_conv2d_cuda.h). int8 images that lie like that already, as they do between layers with int8 results, are read in
place.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import native
from . import extension

CONFIGS = {
    "128x128": (128, 128, 16), "128x64": (128, 64, 16), "128x64_8": (128, 64, 8), "128x64_4": (128, 64, 4),
    "64x64": (64, 64, 16), "64x64_8": (64, 64, 8), "64x64_4": (64, 64, 4),
}  # fmt: skip
"""Output pixels, output channels and bytes copied at a time of a block, by configuration, as in the header (a test compares)."""
ELEMENTS = {**native.DTYPES, torch.int8: 3}
"""Element types by their number in csrc/int8_conv2d/int8_conv2d.h."""
STAGE = 64
"""Bytes of the depth that a block loads at a time."""
MAX_SIDE, MAX_PIXELS = 2**28, 2**31
"""Coordinates and numbers of pixels are 32-bit in the kernels, with room for sums."""

# In steps of a 128 x 128 tile; guesses, as no GPU has run it yet. A tile of fewer outputs reads more from shared memory per product.
_STEP_COST = {(128, 128): 1.0, (128, 64): 0.6, (64, 64): 0.375}
_UNIT_COST = {16: 1.0, 8: 1.3, 4: 1.8}
_BLOCK_COST = 8.0
_SPLIT_COST = 4.0
_MAX_SPLITS = 16


class Layout(NamedTuple):
    """How the operands of a convolution lie in memory."""

    depthwise: bool
    sets: int
    """Groups of output channels that share their input channels: the groups, or several merged into one."""
    columns: int
    """Output channels of a set."""
    channels: int
    """Input channels of a set."""
    padded: int
    """Bytes that those take in a pixel, a multiple of ``unit``."""
    unit: int
    depth: int
    """Bytes of a row of the weight: taps * padded, rounded up to 16; depthwise: of all weights."""


@lru_cache(maxsize=1024)
def layout(channels: int, out_channels: int, kernel_h: int, kernel_w: int, groups: int) -> Layout:
    """The layout for a convolution of so many channels.

    >>> layout(3, 64, 7, 7, 1)
    Layout(depthwise=False, sets=1, columns=64, channels=3, padded=4, unit=4, depth=208)
    """
    taps = kernel_h * kernel_w
    if groups > 1 and groups == channels == out_channels:
        padded = _up(channels, 4)
        return Layout(True, 1, channels, channels, padded, 4, kernel_h * _up(kernel_w, 4) * padded)  # a multiple of 16

    def steps(merged: int) -> tuple[int, int]:
        """What all sets together cost a block of 64 columns, if so many groups are merged. Equal ones: the more, the longer the runs."""
        depth = taps * _padding(channels // groups * merged)[0]
        return groups // merged * -(-(out_channels // groups * merged) // 64) * (-(-depth // STAGE) + 4), -merged

    merged = min((m for m in range(1, min(groups, 64) + 1) if groups % m == 0), key=steps)
    set_channels = channels // groups * merged
    padded, unit = _padding(set_channels)
    return Layout(False, groups // merged, out_channels // groups * merged, set_channels, padded, unit, _up(taps * padded, 16))


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _padding(channels: int) -> tuple[int, int]:
    """Bytes for so many channels, and the unit of copies: the largest that wastes at most a fifth, 4 bytes for up to four channels."""
    if channels <= 4:
        return 4, 4
    return (_up(channels, 16), 16) if _up(channels, 16) * 5 <= _up(channels, 8) * 6 else (_up(channels, 8), 8)


@lru_cache(maxsize=4096)
def choose(rows: int, plan: Layout, multiprocessors: int) -> tuple[str, int]:
    """The configuration for so many output pixels, and how many blocks share the depth of a tile: the least time for the busiest
    multiprocessor.

    >>> choose(32 * 56 * 56, layout(64, 64, 3, 3, 1), 132), choose(49, layout(512, 512, 3, 3, 1), 132)
    (('128x64', 1), ('64x64', 16))
    """
    steps = -(-plan.depth // STAGE)

    def cost(choice: tuple[str, int]) -> float:
        bm, bn, unit = CONFIGS[choice[0]]
        blocks = -(-rows // bm) * -(-plan.columns // bn) * plan.sets * choice[1]
        work = -(-steps // choice[1]) * _STEP_COST[bm, bn] * _UNIT_COST[unit]
        return -(-blocks // multiprocessors) * (work + _BLOCK_COST * bm * bn / 128**2) + (_SPLIT_COST if choice[1] > 1 else 0)

    splits = [s for s in range(1, _MAX_SPLITS + 1) if s == 1 or steps >= 4 * s]
    return min(((name, s) for name, (_, _, unit) in CONFIGS.items() if unit == plan.unit for s in splits), key=cost)


def packed_bytes(shape: tuple[int, ...], groups: int) -> int:
    return _rows_bytes(_layout_of(shape, groups)) + _up(4 * shape[0], 16)


def _layout_of(shape: tuple[int, ...], groups: int) -> Layout:
    return layout(shape[1] * groups, shape[0], shape[2], shape[3], groups)


def _rows_bytes(plan: Layout) -> int:
    return plan.depth if plan.depthwise else plan.sets * plan.columns * plan.depth


def pack(weight: Tensor, groups: int) -> Tensor:
    """An int8 weight (O, C / groups, kh, kw) as flat int8: rows of the depth (ky, kx, channel), where merged groups have zeros for each
    other's channels; depthwise, for each row of the kernel, four taps of each channel after the other. Then the sum of each output
    channel as int32."""
    (o, group_channels, kh, kw), plan = weight.shape, _layout_of(weight.shape, groups)
    if plan.depthwise:
        flat = F.pad(weight.view(o, kh, kw), (0, _up(kw, 4) - kw, 0, 0, 0, plan.padded - o))
        rows = flat.view(plan.padded, -1, 4).transpose(0, 1).reshape(-1)
    else:
        merged = plan.channels // group_channels
        rows = weight.new_zeros(plan.sets, merged, plan.columns // merged, kh * kw, merged, group_channels)
        _diagonal(rows).copy_(weight.reshape(plan.sets, merged, plan.columns // merged, group_channels, kh * kw).permute(0, 2, 4, 3, 1))
        rows = F.pad(rows.view(o, kh * kw, plan.channels), (0, plan.padded - plan.channels)).view(o, kh * kw * plan.padded)
        rows = F.pad(rows, (0, plan.depth - rows.shape[1])).reshape(-1)
    sums = weight.sum((1, 2, 3), dtype=torch.int32).view(torch.int8)
    return torch.cat([rows, F.pad(sums, (0, _up(4 * o, 16) - 4 * o))])


def unpack(packed: Tensor, shape: tuple[int, int, int, int], groups: int) -> Tensor:
    """The weight of this shape out of ``pack``'s result."""
    (o, group_channels, kh, kw), plan = shape, _layout_of(shape, groups)
    if plan.depthwise:
        rows = packed[: plan.depth].view(-1, plan.padded, 4).transpose(0, 1).reshape(plan.padded, kh, _up(kw, 4))
        return rows[:o, None, :, :kw].contiguous()
    merged, taps = plan.channels // group_channels, kh * kw
    rows = packed[: o * plan.depth].view(o, plan.depth)[:, : taps * plan.padded].reshape(o, taps, plan.padded)[:, :, : plan.channels]
    rows = rows.reshape(plan.sets, merged, plan.columns // merged, taps, merged, group_channels)
    return _diagonal(rows).permute(0, 4, 1, 3, 2).reshape(o, group_channels, kh, kw).contiguous()


def _diagonal(rows: Tensor) -> Tensor:
    """(sets, group, column, taps, group, channels) -> (sets, column, taps, channels, group): what a group has for its own channels."""
    return rows.diagonal(dim1=1, dim2=4)


def conv2d(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    geometry: tuple[int, ...],
    x_scale: float | None,
    x_zero_point: int | None,
    out_dtype: torch.dtype,
    out_scale: float | None,
    out_zero_point: int | None,
    residual_scale: float | None,
    residual_zero_point: int | None,
    activation: str,
    *,
    out_size: tuple[int, int],
    channels_last: bool,
    out_channels_last: bool,
    config: str | None = None,
    splits: int | None = None,
) -> Tensor:
    """``int8_conv2d_packed`` on torch's current stream. ``channels_last``: how a float ``x`` lies. ``config``, ``splits`` force a plan."""
    (n, c, h, w), (o, kh, kw) = x.shape, geometry[:3]
    plan = layout(c, o, kh, kw, geometry[-1])
    memory_format = torch.channels_last if out_channels_last else torch.contiguous_format
    out = torch.empty((n, o, *out_size), dtype=out_dtype, device=x.device, memory_format=memory_format)
    if out.numel() == 0:
        return out
    rows = n * out_size[0] * out_size[1]
    pixel_bytes = plan.sets * plan.padded
    if max(h + 2 * geometry[5], w + 2 * geometry[6]) >= MAX_SIDE or max(rows, h * w * pixel_bytes) >= MAX_PIXELS:
        raise ValueError(
            f"int8_conv2d: on CUDA a padded image must have sides below {MAX_SIDE}, an image fewer than {MAX_PIXELS} bytes and the result "
            f"fewer than {MAX_PIXELS} pixels, got {tuple(x.shape)} and padding {tuple(geometry[5:7])}"
        )
    if residual is not None:
        residual = residual.contiguous(memory_format=memory_format)
    if x.dtype != torch.int8:
        x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    elif not _in_place(x, plan):
        x = x.contiguous(memory_format=torch.channels_last)
    if plan.depthwise:
        config, splits = "depthwise", 1
    elif config is None or splits is None:
        name, shared = choose(rows, plan, extension.multiprocessors(x.device))
        config, splits = config or name, splits or (shared if config is None else 1)

    # The workspace: int8 pixels, scales of images, parts of their ranges, sums of tiles that several blocks share.
    in_place, floats = _in_place(x, plan), x.dtype != torch.int8
    partials = min(max(c * h * w // 4096, 1), extension.module.int8_conv2d_max_partials)  # 16 elements for each of 256 threads
    sizes = [
        0 if in_place else n * h * w * pixel_bytes,
        4 * n if floats else 0,
        4 * n * partials if floats and x_scale is None else 0,
        _shared_bytes(rows, plan, config) if splits > 1 else 0,
    ]
    workspace = torch.empty(sum(_up(size, 16) for size in sizes), dtype=torch.int8, device=x.device)
    starts = [workspace.data_ptr() + sum(_up(size, 16) for size in sizes[:i]) for i in range(4)]
    q, image_scale, partial, shared_sums = (start if size else 0 for start, size in zip(starts, sizes, strict=True))
    strides = (h * w * pixel_bytes, w * pixel_bytes, pixel_bytes)
    if in_place:
        q, strides = x.data_ptr(), (x.stride(0), x.stride(2), x.stride(3))

    module, stream, device = extension.module, extension.stream(x.device), x.device.index or 0
    zero_point = x_zero_point or 0
    if not in_place:
        module.int8_conv2d_quantize(
            n, c, h * w, x.data_ptr(), ELEMENTS[x.dtype], c * h * w, channels_last or not floats, plan.sets, plan.channels, plan.padded,
            x_scale is None, x_scale or 0.0, zero_point, -127 if x_zero_point is None else -128, partial, partials, image_scale, q, device,
            stream,
        )  # fmt: skip
    sums = packed.data_ptr() + _rows_bytes(plan)
    module.int8_conv2d_cuda(
        config, (n, c, h, w, *geometry, *out_size), q, strides, plan.sets, plan.padded, packed.data_ptr(), plan.depth,
        x_scale or 0.0, image_scale, zero_point, sums, scale.data_ptr(), 0 if bias is None else bias.data_ptr(),
        native.ACTIVATIONS[activation], out.data_ptr(), ELEMENTS[out_dtype], out_channels_last, out_scale or 0.0, out_zero_point or 0,
        -127 if out_zero_point is None else -128, 0 if residual is None else residual.data_ptr(),
        0 if residual is None else ELEMENTS[residual.dtype], residual_scale or 0.0, residual_zero_point or 0, splits, shared_sums, device,
        stream,
    )  # fmt: skip
    return out


def _in_place(x: Tensor, plan: Layout) -> bool:
    """Whether the kernels can read an int8 tensor where it lies."""
    if x.dtype != torch.int8 or plan.channels != plan.padded or x.data_ptr() % plan.unit:
        return False
    dense = x.stride(1) == 1 or x.shape[1] == 1
    image_bytes = sum((size - 1) * stride for size, stride in zip(x.shape[1:], x.stride()[1:], strict=True))
    return dense and image_bytes < MAX_PIXELS and all(x.shape[d] == 1 or x.stride(d) % plan.unit == 0 for d in (0, 2, 3))


def _shared_bytes(rows: int, plan: Layout, config: str) -> int:
    """A counter and the sums of every tile."""
    bm, bn, _ = CONFIGS[config]
    tiles = -(-rows // bm) * -(-plan.columns // bn) * plan.sets
    return 4 * (_up(tiles, 4) + tiles * bm * bn)
