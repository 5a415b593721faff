"""2:4 convolutions on CUDA, with the emulated kernels behind them and CPU tensors before them."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from support.cuda_emulation import needs_compiler
from support.cuda_sparse24 import emulated

from pycompress import nn as compressed
from pycompress.ops import int8_sparse24_conv2d, sparse24_conv2d
from pycompress.ops.cuda import extension
from pycompress.ops.cuda import sparse24_conv2d as cuda
from pycompress.ops.sparse24 import sparse24_compress, sparse24_mask

GEOMETRIES = [
    {"kernel_size": (3, 3), "padding": (1, 1)},
    {"kernel_size": (1, 1), "stride": (2, 2)},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)},
]


@pytest.fixture
def emulated_device(monkeypatch):
    """CPU tensors are treated as if they were on a GPU."""
    for name in ("ops.sparse24_conv2d", "ops.int8_sparse24_conv2d", "nn.sparse24_weight"):
        monkeypatch.setattr(sys.modules[f"pycompress.{name}"], "sparse24_kernel", lambda op, x, pattern, kernel: kernel or extension.NAME)
    monkeypatch.setattr(extension, "module", emulated())
    monkeypatch.setattr(extension, "stream", lambda device: 0)
    monkeypatch.setattr(extension, "multiprocessors", lambda device: 4)
    monkeypatch.setattr(extension, "capability", lambda index: (8, 0))


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def int8_weight(n: int, k: int, pattern: str) -> torch.Tensor:
    q = torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=torch.Generator().manual_seed(1))
    return q * sparse24_mask(random(n, k, seed=4), pattern)


@needs_compiler
@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_floats_with_gradient(emulated_device, geometry, dtype, pattern):
    o, c, k = 11, 5, 5 * geometry["kernel_size"][0] * geometry["kernel_size"][1]
    mask = sparse24_mask(random(o, k, seed=2), pattern)
    values, indices = sparse24_compress(random(o, k, seed=1), mask, pattern=pattern)
    weight = (random(o, k, seed=1) * mask).to(dtype).double().view(o, c, *geometry["kernel_size"])
    x, bias = random(3, c, 7, 6, seed=3).to(dtype).requires_grad_(), random(o, seed=4)
    got = sparse24_conv2d(x, values, indices, bias, pattern=pattern, activation="relu", **geometry)
    reference = x.detach().double().requires_grad_()
    others = {name: value for name, value in geometry.items() if name != "kernel_size"}
    want = F.conv2d(reference, weight, bias.double(), **others).relu()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    assert got.dtype == dtype and got.is_contiguous()
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=4 * tolerance)
    got.sum().backward()
    (gradient,) = torch.autograd.grad(want.sum(), reference)
    torch.testing.assert_close(x.grad.double(), gradient, rtol=4 * tolerance, atol=8 * tolerance)


@needs_compiler
@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
@pytest.mark.parametrize("x_scale", [None, 0.03])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_int8_is_the_reference(emulated_device, geometry, channels_last, x_scale, pattern):
    o, c, k = 11, 5, 5 * geometry["kernel_size"][0] * geometry["kernel_size"][1]
    values, indices = sparse24_compress(int8_weight(o, k, pattern), pattern=pattern)
    scale, bias, x = torch.rand(o, generator=torch.Generator().manual_seed(2)) * 0.01, random(o, seed=3), random(4, c, 7, 6, seed=5)
    x[1, 2, 3, 3], x[3, 0, 0, 0] = float("nan"), float("-inf")
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    for dtype in (torch.float32, torch.bfloat16):
        arguments = (x.to(dtype), values, indices, scale, bias)
        options = {"pattern": pattern, "x_scale": x_scale, "activation": "silu", **geometry}
        got, want = (int8_sparse24_conv2d(*arguments, kernel=kernel, **options) for kernel in (None, "reference"))
        assert got.dtype == want.dtype and got.stride() == want.stride() and bool(got[[1, 3]].isnan().all())
        tolerance = 1e-6 if dtype == torch.float32 else 2**-7
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance / 10, equal_nan=True)


@needs_compiler
@pytest.mark.parametrize("limit", [1, 3000, 20000])
def test_pieces_are_the_whole_and_bounded(emulated_device, monkeypatch, limit):
    buffers, unfold = [], cuda.unfold
    monkeypatch.setattr(cuda, "unfold", lambda *arguments: buffers.append(arguments[-1]) or unfold(*arguments))
    o, c = 9, 8
    x, q, scale = random(5, c, 9, 7, seed=5), int8_weight(o, c * 9, "2:4"), torch.ones(o)
    flat = cuda.sparse24.to_flat(cuda.sparse24.pack(*sparse24_compress(q), c * 9))
    run = lambda limit: cuda.int8_conv2d(  # noqa: E731
        x, flat, scale, None, torch.empty(5, o, 9, 7), [3, 3], [1, 1], [1, 1], [1, 1], None, "none", limit
    )
    whole = run(1 << 30)
    count, buffers[:] = len(buffers), []
    assert count == 1 and torch.equal(run(limit), whole)
    row_bytes = 7 * 80
    assert len(buffers) == {1: 45, 3000: 10, 20000: 2}[limit] and all(b is buffers[0] for b in buffers)
    assert buffers[0].numel() <= max(limit, row_bytes)


@needs_compiler
@pytest.mark.parametrize("kind", [compressed.Sparse24Conv2d, compressed.Int8Sparse24Conv2d])
def test_layers_keep_their_canonical_tensors_and_compile(emulated_device, kind):
    conv = torch.nn.Conv2d(5, 6, 3, padding=1)
    with torch.no_grad():
        conv.weight.mul_(sparse24_mask(conv.weight.flatten(1).abs()).view_as(conv.weight))
    layer = kind.from_float(conv)
    assert layer.kernel == extension.NAME and layer.fallback_reason is None
    state = {name: t.clone() for name, t in layer.state_dict().items()}
    other = kind(5, 6, (3, 3), padding=(1, 1))
    other.load_state_dict(state)
    x = random(2, 5, 6, 6, seed=3)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for dtype in (torch.float32, torch.bfloat16):
        y = layer(x.to(dtype))
        torch.testing.assert_close(y.float(), conv(x), rtol=0.05, atol=0.05)
        assert torch.equal(other(x.to(dtype)), y) and torch.equal(compiled(x.to(dtype)), y)
    assert all(torch.equal(t, state[name]) for name, t in other.state_dict().items())


@needs_compiler
def test_empty(emulated_device):
    values, indices = sparse24_compress(int8_weight(6, 45, "2:4"))
    for shape in ((0, 5, 6, 6), (2, 5, 6, 6)):
        y = int8_sparse24_conv2d(torch.zeros(shape), values, indices, torch.ones(6), kernel_size=3)
        assert y.shape == (shape[0], 6, 4, 4) and bool((y == 0).all())
    half = torch.zeros(0, 5, 6, 6, dtype=torch.float16)
    assert sparse24_conv2d(half, values.float(), indices, kernel_size=3).shape == (0, 6, 4, 4)


@pytest.mark.parametrize(
    ("images", "rows", "row_bytes", "limit"), [(1, 1, 1, 1), (5, 7, 100, 350), (5, 7, 100, 1500), (3, 4, 10, 9), (2, 3, 0, 5)]
)
def test_pieces_cover_everything_once(images, rows, row_bytes, limit):
    seen = torch.zeros(images, rows, dtype=torch.int64)
    for i, r in cuda.pieces(images, rows, row_bytes, limit):
        assert (i.stop - i.start) * (r.stop - r.start) * row_bytes <= max(limit, row_bytes)
        seen[i, r] += 1
    assert bool((seen == 1).all())
