"""The Python side of 2:4 layers on CUDA, with the emulated kernels behind it and CPU tensors before it."""

from __future__ import annotations

import sys

import pytest
import torch
from support.cuda_emulation import needs_compiler
from support.cuda_sparse24 import emulated

from pycompress import nn as compressed
from pycompress.ops import int8_linear, int8_sparse24_linear, sparse24_linear
from pycompress.ops.cuda import extension, sparse24_float
from pycompress.ops.cuda.sparse24 import unsupported
from pycompress.ops.sparse24 import sparse24_compress, sparse24_mask, sparse24_to_dense

pytestmark = needs_compiler


@pytest.fixture
def emulated_device(monkeypatch):
    """CPU tensors are treated as if they were on a GPU."""
    for name in ("pycompress.ops.sparse24_linear", "pycompress.ops.int8_sparse24_linear", "pycompress.nn.sparse24_weight"):
        monkeypatch.setattr(sys.modules[name], "sparse24_kernel", lambda op, x, pattern, kernel: kernel or extension.NAME)
    monkeypatch.setattr(extension, "module", emulated())
    monkeypatch.setattr(extension, "stream", lambda device: 0)
    monkeypatch.setattr(extension, "multiprocessors", lambda device: 4)
    monkeypatch.setattr(extension, "capability", lambda index: (9, 0))


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5,), (2, 3), (70,), (0,)])
def test_floats_with_gradient(emulated_device, shape, dtype, pattern):
    n, k = 19, 45
    weight = random(n, k, seed=1)
    values, indices = sparse24_compress(weight, sparse24_mask(weight.abs(), pattern), pattern=pattern)
    x, bias = random(*shape, k, seed=2).to(dtype).requires_grad_(), random(n, seed=3)
    y = sparse24_linear(x, values, indices, bias, pattern=pattern, activation="relu")
    dense = sparse24_to_dense(values.to(dtype), indices, k, pattern=pattern).double()
    reference = x.detach().double().requires_grad_()
    want = torch.relu(reference @ dense.T + bias.double())
    assert y.dtype == dtype and y.shape == want.shape
    assert torch.allclose(y.double(), want, rtol=2**-7, atol=2e-2)
    y.backward(torch.ones_like(y))
    (want_gradient,) = torch.autograd.grad(want, reference, torch.ones_like(want))
    assert torch.allclose(x.grad.double(), want_gradient, rtol=2**-7, atol=3e-2)


@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
@pytest.mark.parametrize("x_scale", [None, 0.02])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int8_is_the_dense_layer(emulated_device, dtype, x_scale, pattern):
    n, k = 33, 77
    q = torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=torch.Generator().manual_seed(1))
    q = q * sparse24_mask(random(n, k, seed=4), pattern)
    scale, bias = torch.rand(n, generator=torch.Generator().manual_seed(2)) * 0.01, random(n, seed=3)
    x = random(4, 5, k, seed=5).to(dtype)
    x[1, 2, 3] = float("nan")
    got = int8_sparse24_linear(x, *sparse24_compress(q, pattern=pattern), scale, bias, pattern=pattern, x_scale=x_scale, activation="gelu")
    want = int8_linear(x, q, scale, bias, x_scale=x_scale, activation="gelu", kernel="reference")
    assert torch.allclose(got.float(), want.float(), rtol=2**-7 if dtype != torch.float32 else 1e-5, atol=1e-5, equal_nan=True)
    assert bool(got[1, 2].isnan().all())


def sparse_linear(k: int, n: int, pattern: str) -> torch.nn.Linear:
    linear = torch.nn.Linear(k, n)
    with torch.no_grad():
        linear.weight.copy_(random(n, k, seed=1) * sparse24_mask(random(n, k, seed=2), pattern))
        linear.weight[:, : k // 2 // 4 * 4].zero_()  # where a kept value is zero, its place must come back, too
    return linear


@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
@pytest.mark.parametrize("kind", [compressed.Int8Sparse24Linear, compressed.Sparse24Linear])
def test_a_layer_keeps_its_canonical_tensors(emulated_device, kind, pattern):
    layer = kind.from_float(sparse_linear(50, 20, pattern), pattern=pattern)
    assert layer.kernel == extension.NAME and layer.fallback_reason is None
    state = {name: t.clone() for name, t in layer.state_dict().items()}
    other = kind(50, 20, pattern=pattern)
    other.load_state_dict(state)
    x = random(3, 50, seed=3)
    assert torch.equal(other(x), layer(x))
    assert all(torch.equal(t, state[name]) for name, t in other.state_dict().items())
    dense = layer.to_dense()
    assert torch.allclose(layer(x), dense(x), atol=0.3 if kind is compressed.Int8Sparse24Linear else 1e-5)  # int8 activations


def test_16_bit_weights_are_made_once_and_go_with_the_weight(emulated_device, monkeypatch):
    layer, x = compressed.Sparse24Linear.from_float(sparse_linear(50, 20, "2:4")), random(3, 50, seed=3)
    packs, pack = [], sparse24_float.sparse24.pack
    monkeypatch.setattr(sparse24_float.sparse24, "pack", lambda values, *rest: packs.append(values.dtype) or pack(values, *rest))
    for dtype in (torch.bfloat16, torch.float16, torch.bfloat16, torch.float16):
        y = layer(x.to(dtype))
        assert y.dtype == dtype and torch.allclose(y.float(), layer(x), atol=0.05)
    assert packs == [torch.bfloat16, torch.float16] and layer.fallback_reason is None
    entries = len(sparse24_float._sixteen_bit)
    changed = {name: 2 * t if name in ("values", "bias") else t for name, t in layer.state_dict().items()}
    before = layer(x.bfloat16())
    layer.load_state_dict(changed)
    assert len(sparse24_float._sixteen_bit) == entries - 1  # nothing keeps the old one alive
    assert torch.allclose(layer(x.bfloat16()), 2 * before) and packs[2:] == [torch.bfloat16]
    layer.to(torch.float64)  # a move: weights stay float32
    assert torch.allclose(layer(x.bfloat16()), 2 * before) and packs[3:] == [torch.bfloat16]
    assert sorted(layer.state_dict()) == ["bias", "indices", "values"]


def test_no_packing_while_a_graph_is_captured(emulated_device, monkeypatch):
    layer, x = compressed.Sparse24Linear.from_float(sparse_linear(50, 20, "2:4")), random(3, 50, seed=3)
    want = layer(x.half())
    monkeypatch.setattr(extension, "capturing", lambda device: True)
    assert torch.equal(layer(x.half()), want) and layer(x).shape == (3, 20)
    with pytest.raises(RuntimeError, match=r"sparse24_linear: run the layer once in torch.bfloat16 before a CUDA graph is captured"):
        layer(x.bfloat16())


def test_compiled_as_one_graph(emulated_device):
    torch._dynamo.reset()
    layer = compressed.Sparse24Linear.from_float(sparse_linear(50, 20, "2:4"))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for x in (random(3, 50, seed=3), random(3, 50, seed=3).bfloat16(), random(40, 50, seed=4)):
        assert torch.equal(compiled(x), layer(x))


def test_reasons(monkeypatch):
    device = torch.device("cuda:0")
    monkeypatch.setattr(extension, "unsupported", lambda index: None)
    assert unsupported(device, "2:4") is None and unsupported(device, "1:4") is None
    assert unsupported(device, "2:8") == "pattern 2:8 on cuda:0, only 2:4 and 1:4"
    monkeypatch.setattr(extension, "unsupported", lambda index: "compute capability 7.5")
    assert unsupported(device, "2:4") == "on cuda:0: compute capability 7.5"
