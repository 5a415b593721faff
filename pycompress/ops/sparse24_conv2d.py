"""``sparse24_conv2d``: convolution on N:M sparse float weights, on the kernels of ``sparse24_linear``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native
from .activation import ACTIVATE, activation_gradient, check_activation
from .cuda import sparse24_conv2d as cuda_conv2d
from .cuda.extension import NAME as CUDA
from .library import define, dispatched
from .sparse24 import sparse24_to_dense, unchecked_to_dense
from .sparse24_linear import OP, check_float_weight
from .sparse24_packing import NATIVE_PATTERNS, pack_sparse24, sparse24_kernel, unpack_sparse24

Pair = tuple[int, int]


def sparse24_conv2d_reference(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    bias: Tensor | None = None,
    *,
    kernel_size: Pair,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    pattern: str = "2:4",
    activation: str | None = None,
) -> Tensor:
    """What every kernel computes: ``F.conv2d`` on the dense weight, summed in float64."""
    dense = sparse24_to_dense(values, indices, x.shape[1] * kernel_size[0] * kernel_size[1], pattern=pattern)
    return _convolve(x, dense, bias, kernel_size, stride, padding, dilation, activation or "none")


def _convolve(x, dense, bias, kernel_size, stride, padding, dilation, activation):
    weight = dense.double().view(dense.shape[0], x.shape[1], *kernel_size)
    y = F.conv2d(x.double(), weight, None if bias is None else bias.double(), stride, padding, dilation)
    return ACTIVATE[activation](y.float()).to(x.dtype)


def sparse24_conv2d(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    bias: Tensor | None = None,
    *,
    kernel_size: int | Pair,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    pattern: str = "2:4",
    activation: str | None = None,
    kernel: str | None = None,
) -> Tensor:
    """2-d convolution, groups = 1, on N:M sparse float32 weights.

    - ``x``: (B, C, H, W) float32, bfloat16 or float16
    - ``values``, ``indices``: ``sparse24_compress(weight.flatten(1))`` of a weight (O, C, kh, kw): the groups of four run over the
      kernel positions of a channel, then over channels
    - ``kernel``: forces one of ``native.kernels("sparse24_linear")``, "cuda" on a GPU (the weight is rounded to the dtype of a
      bfloat16 or float16 ``x`` there)

    Returns (B, O, H', W') in the dtype of ``x``. Equals ``act(F.conv2d(x, weight, bias, stride, padding, dilation))``.
    The image is unfolded piece by piece while it is multiplied. Raises as ``sparse24_linear``.

    >>> values, indices = sparse24_compress(conv.weight.flatten(1), sparse24_mask(conv.weight.flatten(1).abs()))
    >>> y = sparse24_conv2d(x, values, indices, conv.bias, kernel_size=3, padding=1)
    """
    where = "sparse24_conv2d"
    kernel_size, stride, padding, dilation = (
        (v, v) if isinstance(v, int) else (v[0], v[1]) for v in (kernel_size, stride, padding, dilation)
    )
    check_image(where, x)
    k = x.shape[1] * kernel_size[0] * kernel_size[1]
    check_float_weight(where, values, indices, bias, k, pattern, x.device)
    check_activation(where, activation)
    name = sparse24_kernel(OP, x, pattern, kernel)
    packed = pack_sparse24(values, indices, k, pattern, name)
    bias = None if bias is None else bias.float().contiguous()
    return sparse24_conv2d_packed(
        x, packed, bias, values.shape[0], kernel_size, stride, padding, dilation, pattern, activation or "none", name
    )


def check_image(where: str, x: Tensor) -> None:
    if not isinstance(x, Tensor) or x.dtype not in native.DTYPES:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{where}: x must be a float32, bfloat16 or float16 tensor, got {got}")
    if x.dim() != 4:
        raise ValueError(f"{where}: x must be (B, C, H, W), got shape {tuple(x.shape)}")


def output_size(
    x: Tensor, kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair, where: str = "sparse24_conv2d"
) -> tuple[int, int]:
    """(H', W'). Raises ``ValueError`` where the kernel does not fit into the padded image."""
    sizes = [(x.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel_size[i] - 1) - 1) // stride[i] + 1 for i in range(2)]
    if min(sizes) < 1:
        raise ValueError(f"{where}: kernel_size {tuple(kernel_size)} must fit into the padded image, got x {tuple(x.shape)}")
    return sizes[0], sizes[1]


def padded(image: Tensor, padding: Pair) -> Tensor:
    """(..., H, W) with zeros around it, contiguous: what the kernels unfold as they go."""
    return F.pad(image, (padding[1], padding[1], padding[0], padding[0])).contiguous() if any(padding) else image.contiguous()


def sparse24_conv2d_packed(x, packed, bias, o, kernel_size, stride, padding, dilation, pattern, activation, kernel) -> Tensor:
    """``sparse24_conv2d`` on a weight from ``pack_sparse24``, without checks: for layers, which made the pack."""
    geometry = (list(kernel_size), list(stride), list(padding), list(dilation))
    output_size(x, kernel_size, stride, padding, dilation)
    if torch.is_grad_enabled() and x.requires_grad:
        return _WithGradient.apply(x, packed, bias, o, *geometry, pattern, activation, kernel)
    return (_op if dispatched(x) else _run)(x, packed, bias, o, *geometry, pattern, activation, kernel)


class _WithGradient(torch.autograd.Function):
    """Gradient of ``x``; the weight is frozen."""

    @staticmethod
    def forward(ctx, x, packed, bias, o, kernel_size, stride, padding, dilation, pattern, activation, kernel):
        ctx.save_for_backward(x, packed, bias)
        ctx.arguments = (o, kernel_size, stride, padding, dilation, pattern, activation, kernel)
        return (_op if dispatched(x) else _run)(x, packed, bias, *ctx.arguments)

    @staticmethod
    def backward(ctx, grad):
        x, packed, bias = ctx.saved_tensors
        o, kernel_size, stride, padding, dilation, pattern, activation, kernel = ctx.arguments
        if activation != "none":
            before = sparse24_conv2d_packed(x, packed, bias, *ctx.arguments[:-2], "none", kernel)
            grad = activation_gradient(activation, before, grad)
        k = x.shape[1] * kernel_size[0] * kernel_size[1]
        values, indices = unpack_sparse24(packed, o, k, pattern, torch.float32, kernel)
        if kernel == CUDA:
            values = values.to(x.dtype).float()  # the weight that was multiplied with
        weight = unchecked_to_dense(values, indices, k, pattern).view(o, x.shape[1], *kernel_size)
        dx = torch.nn.grad.conv2d_input(x.shape, weight, grad.float(), stride, padding, dilation)
        return (dx.to(x.dtype), *[None] * 10)


def _run(x, packed, bias, o, kernel_size, stride, padding, dilation, pattern, activation, kernel):
    b, c = x.shape[:2]
    k = c * kernel_size[0] * kernel_size[1]
    if kernel == native.REFERENCE:
        values, indices = unpack_sparse24(packed, o, k, pattern, torch.float32, kernel)
        return _convolve(x, unchecked_to_dense(values, indices, k, pattern), bias, kernel_size, stride, padding, dilation, activation)
    h, w = output_size(x, kernel_size, stride, padding, dilation)
    if kernel == CUDA:
        out = torch.empty(b, o, h, w, dtype=x.dtype, device=x.device)
        return cuda_conv2d.conv2d(x.detach(), packed, bias, out, kernel_size, stride, padding, dilation, pattern, activation)
    image = padded(x.detach().float(), padding)
    geometry = (c, *image.shape[2:], *kernel_size, *stride, *dilation, w)
    out = torch.empty(b, o, h, w)
    for i in range(b):
        native.module.sparse24_conv2d(
            kernel,
            o,
            h * w,
            NATIVE_PATTERNS[pattern],
            image[i].data_ptr(),
            geometry,
            packed.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            native.ACTIVATIONS[activation],
            out[i].data_ptr(),
        )
    return out.to(x.dtype)


def _fake(x, packed, bias, o, kernel_size, stride, padding, dilation, pattern, activation, kernel):
    return x.new_empty((x.shape[0], o, *output_size(x, kernel_size, stride, padding, dilation)))


_op = define(
    "sparse24_conv2d(Tensor x, Tensor packed, Tensor? bias, int o, int[] kernel_size, int[] stride, int[] padding, int[] dilation, "
    "str pattern, str activation, str kernel) -> Tensor",
    _run,
    _fake,
)
