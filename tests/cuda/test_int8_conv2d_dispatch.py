"""The Python side of int8 convolutions on CUDA, with the emulated kernels behind it and CPU tensors before it."""

from __future__ import annotations

import sys

import pytest
import torch
from support.cuda_emulation import needs_compiler
from support.cuda_int8_conv2d import emulated
from torch._subclasses.fake_tensor import FakeTensorMode

from pycompress.nn import Int8Conv1d, Int8Conv2d
from pycompress.ops import int8_conv2d
from pycompress.ops.cuda import extension
from pycompress.ops.int8_conv2d import kernel_for


@pytest.fixture
def emulated_device(monkeypatch):
    """CPU tensors are treated as if they were on a GPU."""
    for name in ("pycompress.ops.int8_conv2d", "pycompress.nn.int8_conv2d"):
        monkeypatch.setattr(sys.modules[name], "kernel_for", lambda x, kernel, where="": kernel or extension.NAME)
    monkeypatch.setattr(extension, "module", emulated())
    monkeypatch.setattr(extension, "stream", lambda device: 0)
    monkeypatch.setattr(extension, "multiprocessors", lambda device: 4)


def problem(o=12, c=8, groups=1):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-128, 128, (o, c // groups, 3, 3), dtype=torch.int8, generator=generator)
    return weight, torch.rand(o, generator=generator) * 0.01, torch.randn(o, generator=generator)


def image(*shape, seed=2):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@needs_compiler
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_the_op_runs_it_and_has_gradients(emulated_device, groups):
    weight, scale, bias = problem(8, 8, groups)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = image(2, 8, 6, 7).to(memory_format=memory_format).requires_grad_()
        residual = image(2, 8, 6, 7, seed=3).requires_grad_()
        for options in ({}, {"x_scale": 0.02}, {"x_scale": 0.02, "x_zero_point": 5}):
            options |= {"padding": 1, "groups": groups, "activation": "silu", "residual": residual}
            y = int8_conv2d(x, weight, scale, bias, **options)
            want = int8_conv2d(x, weight, scale, bias, kernel="reference", **options)
            torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
            assert y.stride() == want.stride()
            for got, expected in zip(*(torch.autograd.grad(t.sum(), (x, residual)) for t in (y, want)), strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@needs_compiler
def test_compiled_as_one_graph(emulated_device):
    torch._dynamo.reset()
    weight, scale, bias = problem()
    x = image(2, 8, 6, 7)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        compiled = torch.compile(lambda t: int8_conv2d(t, weight, scale, bias, padding=1), fullgraph=True, backend="aot_eager")
        value = x.to(memory_format=memory_format)
        assert torch.equal(compiled(value), int8_conv2d(value, weight, scale, bias, padding=1))
    layer = Int8Conv2d.from_float(torch.nn.Conv2d(8, 12, 3), x_scale=0.03, out_scale=0.05)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


@needs_compiler
@pytest.mark.parametrize("groups", [1, 4, 8])
def test_a_layer_keeps_its_canonical_weight(emulated_device, groups):
    conv = torch.nn.Conv2d(8, 16 if groups == 4 else 8, 3, padding=1, groups=groups)
    layer = Int8Conv2d.from_float(conv)
    assert layer.kernel == extension.NAME and layer.fallback_reason is None
    state = {name: t.clone() for name, t in layer.state_dict().items()}
    assert state["weight"].shape == conv.weight.shape
    other = Int8Conv2d(**layer.config())
    other.load_state_dict(state)
    x = image(2, 8, 9, 9)
    assert torch.equal(other(x), layer(x)) and torch.equal(other.int_weight, layer.int_weight)
    assert (layer(x) - conv(x)).norm() < 0.02 * conv(x).norm()
    assert torch.equal(layer(x[0]), layer(x[:1])[0])


@needs_compiler
def test_chains_stay_in_int8_and_in_place(emulated_device, monkeypatch):
    """The second layer reads the first one's result where it lies: nothing is quantised, and a contiguous float comes out for a
    contiguous image."""
    first = Int8Conv2d.from_float(torch.nn.Conv2d(3, 32, 3), x_scale=0.03, out_scale=0.02, activation="relu")
    second = Int8Conv2d.from_float(torch.nn.Conv2d(32, 32, 3, padding=1), x_scale=0.02)
    x, r = image(1, 3, 8, 8), torch.randint(-128, 128, (1, 32, 6, 6), dtype=torch.int8)
    q = first(x)
    assert q.dtype == torch.int8 and q.is_contiguous(memory_format=torch.channels_last)
    calls = []

    class Watched:
        def __getattr__(self, name):
            calls.append(name)
            return getattr(emulated(), name)

    monkeypatch.setattr(extension, "module", Watched())
    y = second(q, residual=r, residual_scale=0.05)
    assert "int8_conv2d_cuda" in calls and "int8_conv2d_quantize" not in calls
    assert second(q).is_contiguous() and y.dtype == torch.float32
    monkeypatch.setattr(extension, "module", emulated())
    want = int8_conv2d(
        int8_conv2d(x, first.int_weight, first.scale, first.bias, x_scale=0.03, out_scale=0.02, activation="relu", kernel="reference"),
        second.int_weight, second.scale, second.bias, padding=1, x_scale=0.02, residual=r, residual_scale=0.05, kernel="reference",
    )  # fmt: skip
    torch.testing.assert_close(y, want.contiguous() if y.is_contiguous() else want, rtol=1e-5, atol=1e-5)


@needs_compiler
def test_one_dimension(emulated_device):
    conv = torch.nn.Conv1d(6, 10, 5, stride=2, padding=2, groups=2)
    layer = Int8Conv1d.from_float(conv, activation="relu")
    assert layer.kernel == extension.NAME
    x = image(2, 6, 31)
    assert (layer(x) - conv(x).relu()).norm() < 0.02 * conv(x).norm()
    assert layer(x[0]).shape == (10, 16)


@needs_compiler
def test_out_of_memory_leaves_nothing_behind(emulated_device, monkeypatch):
    """Whichever allocation fails: torch's error comes out, nothing was launched, and the next call is right."""
    weight, scale, bias = problem()
    x, empty, calls = image(2, 8, 6, 7), torch.empty, []
    want = int8_conv2d(x, weight, scale, bias)

    class Watched:
        def __getattr__(self, name):
            calls.append(name)
            return getattr(emulated(), name)

    def failing(*arguments, **options):
        if not left:
            raise torch.OutOfMemoryError("CUDA out of memory (test)")
        left.pop()
        return empty(*arguments, **options)

    for count in range(2):  # the result, the workspace
        left = [None] * count
        with monkeypatch.context() as patch:
            patch.setattr(extension, "module", Watched())
            patch.setattr(torch, "empty", failing)
            with pytest.raises(torch.OutOfMemoryError):
                int8_conv2d(x, weight, scale, bias)
    assert set(calls) <= {"int8_conv2d_max_partials"}
    assert torch.equal(int8_conv2d(x, weight, scale, bias), want)


@pytest.mark.parametrize("options", [{}, {"static": True, "int8_output": True}])
def test_a_layer_on_a_gpu_is_one_node(monkeypatch, options):
    """Fake CUDA tensors, as torch.export sees them."""
    monkeypatch.setattr(sys.modules["pycompress.nn.int8_conv2d"], "kernel_for", lambda *_: extension.NAME)
    monkeypatch.setattr(extension, "unsupported", lambda index: None)
    layer = Int8Conv2d(8, 12, (3, 3), (2, 2), (1, 1), **options)
    with FakeTensorMode():
        for name, buffer in list(layer._buffers.items()):
            if buffer is not None:
                layer._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda")
        assert layer.kernel == extension.NAME and layer.fallback_reason is None
        program = torch.export.export(layer, (torch.empty(2, 8, 9, 7, dtype=torch.float16, device="cuda"),))
        with pytest.raises(ValueError, match="x must be on cuda:0 like weight, got cpu"):
            layer(torch.empty(2, 8, 9, 7))
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    assert [str(node.target) for node in nodes] == ["pycompress.int8_conv2d.default"]
    y = nodes[0].meta["val"]
    assert (y.device, y.dtype, tuple(y.shape)) == (torch.device("cuda:0"), torch.int8 if options else torch.float16, (2, 12, 5, 4))


class OnCuda:
    """What the choice of a kernel looks at of a tensor on a GPU."""

    device = torch.device("cuda:0")


def test_the_choice_and_its_reasons(monkeypatch):
    monkeypatch.setattr(extension, "unsupported", lambda index: None)
    assert kernel_for(OnCuda(), None) == "cuda" and kernel_for(OnCuda(), "reference") == "reference"
    monkeypatch.setattr(extension, "unsupported", lambda index: "compute capability 7.5")
    assert kernel_for(OnCuda(), None) == "reference"
    assert extension.fallback_reason("int8_conv2d", OnCuda.device) == "on cuda:0: compute capability 7.5"
    with pytest.raises(ValueError, match="int8_conv2d: kernel 'cuda' cannot run on cuda:0: compute capability 7"):
        kernel_for(OnCuda(), "cuda")
    weight, scale, _ = problem()
    with pytest.raises(ValueError, match="kernel must be one of"):
        int8_conv2d(image(1, 8, 5, 5), weight, scale, kernel="cuda")
