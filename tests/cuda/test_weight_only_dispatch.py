"""The Python side of weight-only layers on CUDA, with the emulated kernels behind it and CPU tensors before it."""

from __future__ import annotations

import sys

import pytest
import torch
from support.cuda_emulation import needs_compiler
from support.cuda_weight_only import emulated

from pycompress.nn import Int4Linear, Int8WeightOnlyLinear
from pycompress.ops import int4_linear, int8_weight_linear, quantize_weight, quantize_weight_int4
from pycompress.ops.cuda import extension


@pytest.fixture
def emulated_device(monkeypatch):
    """CPU tensors are treated as if they were on a GPU."""
    for name in (
        "pycompress.ops.int8_weight_linear",
        "pycompress.ops.int4_linear",
        "pycompress.nn.int8_weight_only",
        "pycompress.nn.int4_linear",
    ):
        monkeypatch.setattr(sys.modules[name], "kernel_for", lambda op, x, kernel, where: kernel or extension.NAME)
    monkeypatch.setattr(extension, "module", emulated())
    monkeypatch.setattr(extension, "stream", lambda device: 0)
    monkeypatch.setattr(extension, "multiprocessors", lambda device: 4)


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check(run, x: torch.Tensor) -> None:
    """``run(x, kernel)``: values and gradients are the reference's."""
    x.requires_grad_()
    got, want = run(x, None), run(x, "reference")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (got, want)), rtol=1e-4, atol=1e-4)


@needs_compiler
@pytest.mark.parametrize("rows", [(), (2, 3), (40,)])  # 40: the library's product
def test_the_ops_run_it(emulated_device, rows):
    n, k = 21, 45
    weight, bias = random(n, k, seed=1), random(n, seed=2)
    q, scale = quantize_weight(weight)
    check(lambda x, kernel: int8_weight_linear(x, q, scale, bias, kernel=kernel), random(*rows, k, seed=3))
    for symmetric in (True, False):
        tensors = quantize_weight_int4(weight, 32, symmetric)
        for int8_activations in (False, True):
            options = {"group_size": 32, "activation": "silu", "int8_activations": int8_activations}
            check(lambda x, kernel: int4_linear(x, *tensors, bias, kernel=kernel, **options), random(*rows, k, seed=3))  # noqa: B023


@needs_compiler
def test_compiled_as_one_graph(emulated_device):
    torch._dynamo.reset()
    q, scale = quantize_weight(random(8, 45, seed=1))
    tensors = quantize_weight_int4(random(8, 45, seed=1), 64)
    x = random(3, 45, seed=2)

    def both(t):
        return int8_weight_linear(t, q, scale), *(int4_linear(t, *tensors, group_size=64, int8_activations=on) for on in (False, True))

    for got, want in zip(torch.compile(both, fullgraph=True, backend="aot_eager")(x), both(x), strict=True):
        assert torch.equal(got, want)


@needs_compiler
@pytest.mark.parametrize("k", [45, 64])
@pytest.mark.parametrize(("kind", "options"), [(Int8WeightOnlyLinear, {}), (Int4Linear, {}), (Int4Linear, {"int8_activations": True})])
def test_layers_keep_their_canonical_tensors(emulated_device, kind, options, k):
    linear = torch.nn.Linear(k, 20)
    layer = kind.from_float(linear, **options)
    assert layer.kernel == extension.NAME and layer.fallback_reason is None and layer.num_params() == 20 * k + 20
    state = {name: t.clone() for name, t in layer.state_dict().items()}
    assert state["weight"].shape == ((20, k) if kind is Int8WeightOnlyLinear else (20, -(-k // 2)))
    other = kind(k, 20, **options)
    other.load_state_dict(state)
    x = random(3, k, seed=3)
    assert torch.equal(other(x), layer(x)) and all(torch.equal(t, state[name]) for name, t in other.state_dict().items())
    tolerance = 0.03 if options else 1e-5  # int8 activations
    assert torch.allclose(layer(x), layer.to_dense()(x), rtol=tolerance, atol=tolerance)
    if kind is Int8WeightOnlyLinear:  # a dtype without a kernel
        assert torch.allclose(layer(x.double()), layer(x).double(), rtol=1e-5, atol=1e-5)


class OnCuda:
    """What the choice of a kernel looks at of a tensor on a GPU."""

    device = torch.device("cuda:0")


def test_the_choice_and_its_reasons(monkeypatch):
    kernel_for = extension.kernel_for
    monkeypatch.setattr(extension, "unsupported", lambda index: None)
    assert kernel_for("int4_matmul", OnCuda(), None, "f") == "cuda" and kernel_for("int4_matmul", OnCuda(), "reference", "f") == "reference"
    monkeypatch.setattr(extension, "unsupported", lambda index: "compute capability 7.5")
    assert kernel_for("int4_matmul", OnCuda(), None, "f") == "reference"
    assert extension.fallback_reason("int4_matmul", OnCuda.device) == "on cuda:0: compute capability 7.5"
    with pytest.raises(ValueError, match="f: kernel 'cuda' cannot run on cuda:0: compute capability 7"):
        kernel_for("int4_matmul", OnCuda(), "cuda", "f")
    with pytest.raises(ValueError, match="int4_linear: kernel must be one of"):
        int4_linear(torch.ones(2, 32), *quantize_weight_int4(torch.ones(3, 32), 32), group_size=32, kernel="cuda")
