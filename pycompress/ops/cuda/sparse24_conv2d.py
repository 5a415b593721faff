"""2:4 convolutions on CUDA: images are unfolded on the device, piece by piece, for the linear kernels.

A piece is as many images, or rows of one image's output, as fit ``WORKSPACE`` bytes unfolded; the buffer is allocated once, before any
launch. int8 is quantised before it is unfolded, so its pieces hold twice as much. float32 activations have no sparse product that would pay
here: the weight is written out dense for torch's convolution (which may use TF32, as torch's flags say).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activation import ACTIVATE
from ..affine import quantize_affine, symmetric_scale
from . import extension, sparse24, sparse24_float

WORKSPACE = 64 << 20
"""Bytes of unfolded input at a time: more than fills a GPU, and about what its L2 cache holds. A guess."""

Pair = list[int]


def pieces(images: int, rows: int, row_bytes: int, limit: int) -> Iterator[tuple[slice, slice]]:
    """Ranges of images, and of the output rows of each, that take at most ``limit`` bytes, but at least one row of one image.

    >>> list(pieces(3, 4, 10, 80)) == [(slice(0, 2), slice(0, 4)), (slice(2, 3), slice(0, 4))]
    True
    """
    fit = max(1, limit // max(1, row_bytes))
    together, height = (fit // rows, rows) if fit >= rows else (1, fit)
    for image in range(0, images, together):
        for row in range(0, rows, height):
            yield slice(image, min(images, image + together)), slice(row, min(rows, row + height))


def unfold(images: Tensor, rows: slice, width: int, kernel_size: Pair, stride: Pair, dilation: Pair, buffer: Tensor) -> Tensor:
    """What the output positions of ``rows`` see of padded ``images`` (B, C, H, W), as (B * rows * width, K') in ``buffer``: K in the order
    (C, kh, kw), and behind it what the buffer has there."""
    b, c = images.shape[:2]
    sb, sc, sh, sw = images.stride()
    height = rows.stop - rows.start
    windows = images.as_strided(
        (b, height, width, c, *kernel_size),
        (sb, sh * stride[0], sw * stride[1], sc, sh * dilation[0], sw * dilation[1]),
        images.storage_offset() + rows.start * stride[0] * sh,
    )
    out = buffer[: b * height * width]
    k = c * kernel_size[0] * kernel_size[1]
    out.view(b, height, width, -1)[..., :k].unflatten(3, (c, *kernel_size)).copy_(windows)
    return out


def _convolve(
    out: Tensor, images: Tensor, padding: Pair, geometry: tuple[Pair, Pair, Pair], product: Callable[[Tensor, slice], Tensor], limit: int
) -> Tensor:
    """Fills ``out`` (B, O, H', W') with ``product(rows, images)``, (rows, O), piece by piece."""
    b, _, height, width = out.shape
    k = images.shape[1] * geometry[0][0] * geometry[0][1]
    size = images.element_size()
    wide = -(-k * size // 16) * 16 // size  # rows start at multiples of 16 bytes
    if out.numel() == 0:
        return out
    plan = list(pieces(b, height, width * wide * size, limit))
    positions = max((i.stop - i.start) * (r.stop - r.start) for i, r in plan) * width
    buffer = torch.zeros(positions, wide, dtype=images.dtype, device=images.device)
    padded = F.pad(images, (padding[1], padding[1], padding[0], padding[0])) if any(padding) else images
    for image, rows in plan:
        y = product(unfold(padded[image], rows, width, *geometry, buffer), image)
        out[image, :, rows].copy_(y.view(-1, rows.stop - rows.start, width, out.shape[1]).permute(0, 3, 1, 2))
    return out


def conv2d(
    x: Tensor, flat: Tensor, bias: Tensor | None, out: Tensor, kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair,
    pattern: str, activation: str, limit: int = WORKSPACE,
) -> Tensor:  # fmt: skip
    """``sparse24_conv2d`` on torch's current stream into ``out``, which it returns. ``flat``: ``sparse24_float.to_flat``'s result."""
    o, k = out.shape[1], x.shape[1] * kernel_size[0] * kernel_size[1]
    if x.dtype == torch.float32:
        weight = sparse24_float.dense(flat, o, k, pattern).reshape(o, x.shape[1], *kernel_size)
        return out.copy_(ACTIVATE[activation](F.conv2d(x, weight, bias, stride, padding, dilation)))
    packed = sparse24.from_flat(sparse24_float.sixteen_bit(flat, o, k, pattern, x.dtype), o, k, x.dtype)
    module, stream = extension.module, extension.stream(x.device)

    def product(rows: Tensor, image: slice) -> Tensor:
        config = sparse24.chosen(rows.shape[0], o, x.device)
        return sparse24.launch(module, stream, rows, packed, o, bias=bias, activation=activation, config=config, out_dtype=x.dtype)

    return _convolve(out, x, padding, (kernel_size, stride, dilation), product, limit)


def int8_conv2d(
    x: Tensor, flat: Tensor, scale: Tensor, bias: Tensor | None, out: Tensor, kernel_size: Pair, stride: Pair, padding: Pair,
    dilation: Pair, x_scale: float | None, activation: str, limit: int = WORKSPACE,
) -> Tensor:  # fmt: skip
    """``int8_sparse24_conv2d`` on torch's current stream into ``out``, which it returns. ``flat``: ``sparse24.to_flat``'s result."""
    o, k = out.shape[1], x.shape[1] * kernel_size[0] * kernel_size[1]
    if out.numel() == 0:
        return out
    packed = sparse24.from_flat(flat, o, k, torch.int8)
    module, stream = extension.module, extension.stream(x.device)
    amax = torch.zeros(x.shape[0], device=x.device)
    if x.numel():
        amax = torch.linalg.vector_norm(x.flatten(1), float("inf"), dim=1, dtype=torch.float32)
    if x_scale is None:
        image_scale = step = symmetric_scale(amax)
    else:
        step = torch.full_like(amax, x_scale)
        image_scale = torch.where(torch.isfinite(amax), step, float("nan"))  # an image with NaN or Inf comes out as NaN
    q = torch.empty_like(x, dtype=torch.int8)
    for image, _ in pieces(x.shape[0], 1, 8 * x[0].numel(), limit):  # quantize_affine goes through float32 and int32
        q[image] = quantize_affine(x[image], step[image].view(-1, 1, 1, 1))

    def product(rows: Tensor, image: slice) -> Tensor:
        of_images = image_scale[image]
        row_scale = of_images[:, None].expand(-1, rows.shape[0] // len(of_images)).flatten().contiguous()
        config = sparse24.chosen(rows.shape[0], o, x.device)
        return sparse24.launch(
            module, stream, rows, packed, o, bias=bias, activation=activation, config=config, out_dtype=x.dtype, row_scale=row_scale,
            col_scale=scale,
        )  # fmt: skip

    return _convolve(out, q, padding, (kernel_size, stride, dilation), product, limit)
