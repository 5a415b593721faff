"""The Python side of int8 layers on CUDA, with the emulated kernels behind it and CPU tensors before it."""

from __future__ import annotations

import sys

import pytest
import torch
from support.cuda_emulation import needs_compiler
from support.cuda_int8 import emulated

from pycompress.nn import Int8Linear
from pycompress.ops import int8_linear, int8_matmul, native
from pycompress.ops.cuda import extension
from pycompress.ops.cuda.int8_linear import unsupported
from pycompress.ops.int8_matmul import kernel_for


@pytest.fixture
def emulated_device(monkeypatch):
    """CPU tensors are treated as if they were on a GPU."""
    for name in ("pycompress.ops.int8_matmul", "pycompress.ops.int8_linear", "pycompress.nn.int8_linear"):
        monkeypatch.setattr(sys.modules[name], "kernel_for", lambda x, kernel, where="": kernel or extension.NAME)
    monkeypatch.setattr(extension, "module", emulated())
    monkeypatch.setattr(extension, "stream", lambda device: 0)
    monkeypatch.setattr(extension, "multiprocessors", lambda device: 4)
    monkeypatch.setattr(extension, "capability", lambda index: (9, 0))


def problem(n=21, k=45):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=generator)
    return weight, torch.rand(n, generator=generator) * 0.01, torch.randn(n, generator=generator)


@needs_compiler
def test_the_ops_run_it(emulated_device):
    weight, scale, bias = problem()
    a = torch.randint(-128, 128, (5, 45), dtype=torch.int8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(int8_matmul(a, weight), int8_matmul(a, weight, kernel="reference"))
    x = torch.randn(2, 3, 45, generator=torch.Generator().manual_seed(2)).requires_grad_()
    for options in ({}, {"asymmetric": True}, {"x_scale": 0.02}, {"x_scale": 0.02, "x_zero_point": 5}):
        y = int8_linear(x, weight, scale, bias, activation="relu", **options)
        want = int8_linear(x, weight, scale, bias, activation="relu", kernel="reference", **options)
        torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad(want.sum(), x)[0], rtol=1e-5, atol=1e-5)


@needs_compiler
def test_compiled_as_one_graph(emulated_device):
    torch._dynamo.reset()
    weight, scale, bias = problem()
    x = torch.randn(3, 45, generator=torch.Generator().manual_seed(2))
    compiled = torch.compile(lambda t: int8_linear(t, weight, scale, bias), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), int8_linear(x, weight, scale, bias))


@needs_compiler
@pytest.mark.parametrize("k", [45, 64])
def test_a_layer_keeps_its_canonical_weight(emulated_device, k):
    linear = torch.nn.Linear(k, 20)
    layer = Int8Linear.from_float(linear)
    assert layer.kernel == extension.NAME and layer.fallback_reason is None
    state = {name: t.clone() for name, t in layer.state_dict().items()}
    assert state["weight"].shape == (20, k)
    other = Int8Linear(k, 20)
    other.load_state_dict(state)
    x = torch.randn(3, k, generator=torch.Generator().manual_seed(3))
    assert torch.equal(other(x), layer(x)) and torch.equal(other.int_weight, layer.int_weight)
    assert (layer(x) - linear(x)).norm() < 0.02 * linear(x).norm()


class OnCuda:
    """What the choice of a kernel looks at of a tensor on a GPU."""

    device = torch.device("cuda:0")


def test_the_choice_and_its_reasons(monkeypatch):
    monkeypatch.setattr(extension, "unsupported", lambda index: None)
    assert unsupported(OnCuda.device) is None
    assert kernel_for(OnCuda(), None) == "cuda" and kernel_for(OnCuda(), "reference") == "reference"
    monkeypatch.setattr(extension, "unsupported", lambda index: "compute capability 7.5")
    assert kernel_for(OnCuda(), None) == "reference"
    with pytest.raises(ValueError, match="int8_linear: kernel 'cuda' cannot run on cuda:0: compute capability 7"):
        kernel_for(OnCuda(), "cuda", "int8_linear")
    with pytest.raises(ValueError, match="kernel must be one of"):
        int8_matmul(torch.ones(2, 3, dtype=torch.int8), torch.ones(2, 3, dtype=torch.int8), kernel="cuda")
    for kernel in native.kernels("int8_matmul")[:-1]:
        with pytest.raises(ValueError, match="needs a CPU tensor, got one on cuda:0"):
            kernel_for(OnCuda(), kernel)
