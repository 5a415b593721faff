"""The Python side of 2:4 layers on CUDA, with the emulated kernels behind it and CPU tensors before it."""

from __future__ import annotations

import sys

import pytest
import torch
from support.cuda_emulation import needs_compiler
from support.cuda_sparse24 import emulated

from pycompress import nn as compressed
from pycompress.ops import int8_linear, int8_sparse24_linear, sparse24_linear
from pycompress.ops.cuda import extension
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


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5,), (2, 3), (70,), (0,)])
def test_floats_with_gradient(emulated_device, shape, dtype):
    n, k = 19, 45
    weight = random(n, k, seed=1)
    values, indices = sparse24_compress(weight, sparse24_mask(weight.abs()))
    x, bias = random(*shape, k, seed=2).to(dtype).requires_grad_(), random(n, seed=3)
    y = sparse24_linear(x, values, indices, bias, activation="relu")
    dense = sparse24_to_dense(values.to(dtype), indices, k).double()
    reference = x.detach().double().requires_grad_()
    want = torch.relu(reference @ dense.T + bias.double())
    assert y.dtype == dtype and y.shape == want.shape
    assert torch.allclose(y.double(), want, rtol=2**-7, atol=2e-2)
    y.backward(torch.ones_like(y))
    (want_gradient,) = torch.autograd.grad(want, reference, torch.ones_like(want))
    assert torch.allclose(x.grad.double(), want_gradient, rtol=2**-7, atol=3e-2)


@pytest.mark.parametrize("x_scale", [None, 0.02])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int8_is_the_dense_layer(emulated_device, dtype, x_scale):
    n, k = 33, 77
    q = torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=torch.Generator().manual_seed(1))
    q = q * sparse24_mask(random(n, k, seed=4))
    scale, bias = torch.rand(n, generator=torch.Generator().manual_seed(2)) * 0.01, random(n, seed=3)
    x = random(4, 5, k, seed=5).to(dtype)
    x[1, 2, 3] = float("nan")
    got = int8_sparse24_linear(x, *sparse24_compress(q), scale, bias, x_scale=x_scale, activation="gelu")
    want = int8_linear(x, q, scale, bias, x_scale=x_scale, activation="gelu", kernel="reference")
    assert torch.allclose(got.float(), want.float(), rtol=2**-7 if dtype != torch.float32 else 1e-5, atol=1e-5, equal_nan=True)
    assert bool(got[1, 2].isnan().all())


def test_a_layer_keeps_its_canonical_tensors(emulated_device):
    linear = torch.nn.Linear(50, 20)
    with torch.no_grad():
        linear.weight.copy_(random(20, 50, seed=1) * sparse24_mask(random(20, 50, seed=2)))
    layer = compressed.Int8Sparse24Linear.from_float(linear)
    assert layer.kernel == extension.NAME
    state = {name: t.clone() for name, t in layer.state_dict().items()}
    other = compressed.Int8Sparse24Linear(50, 20)
    other.load_state_dict(state)
    x = random(3, 50, seed=3)
    assert torch.equal(other(x), layer(x))
    assert all(torch.equal(t, state[name]) for name, t in other.state_dict().items())
    dense = layer.to_dense()
    assert torch.allclose(layer(x), dense(x), atol=0.3)  # int8 activations


def test_reasons(monkeypatch):
    device = torch.device("cuda:0")
    monkeypatch.setattr(extension, "unsupported", lambda index: None)
    assert unsupported("int8_sparse24_linear", device, torch.float32, "2:4") is None
    assert unsupported("sparse24_linear", device, torch.bfloat16, "2:4") is None
    assert "only bfloat16 and float16" in unsupported("sparse24_linear", device, torch.float32, "2:4")
    assert "only 2:4" in unsupported("sparse24_linear", device, torch.float16, "1:4")
    assert "sparse24_conv2d on cuda:0" in unsupported("sparse24_conv2d", device, torch.float16, "2:4")
    monkeypatch.setattr(extension, "unsupported", lambda index: "compute capability 7.5")
    assert unsupported("sparse24_linear", device, torch.float16, "2:4") == "on cuda:0: compute capability 7.5"
