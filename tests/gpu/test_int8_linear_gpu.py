"""int8 products and linear layers on a real GPU: every configuration, exact, captured, on other streams and devices."""

from __future__ import annotations

import pytest
import torch

from pycompress.nn import Int8Linear
from pycompress.ops import int8_linear, int8_matmul
from pycompress.ops.cuda import extension
from pycompress.ops.cuda.int8_linear import CONFIGS, HOPPER, linear, matmul, pack

_reason = "no CUDA device" if not torch.cuda.is_available() else extension.unsupported(torch.cuda.current_device())
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(_reason is not None, reason=f"CUDA kernels do not run here: {_reason}")]


def int8(*shape: int, seed: int) -> torch.Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed)).cuda()


def needs_hopper(config: str) -> None:
    if config.startswith("hopper") and torch.cuda.get_device_capability() != HOPPER:
        pytest.skip("needs compute capability 9.0")


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).cuda()


@pytest.mark.parametrize("config", list(CONFIGS))
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (7, 33, 130), (16, 4096, 4096), (513, 1000, 1111), (4096, 4096, 4096)])
def test_sums_are_exact(m, n, k, config):
    needs_hopper(config)
    m = min(m, CONFIGS[config][0]) if config.startswith("few") else m
    a, b = int8(m, k, seed=1), int8(n, k, seed=2)
    assert torch.equal(matmul(a, b, config), (a.double() @ b.double().T).int())


@pytest.mark.parametrize("config", ["64x64", "128x256", "few_16x8", "hopper_128x256", "hopper_128x128"])
def test_the_largest_sum(config):
    needs_hopper(config)
    a, b = (torch.full((3, 131071), -128, dtype=torch.int8, device="cuda") for _ in range(2))
    assert bool((matmul(a, b, config) == 128 * 128 * 131071).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quantization", [{}, {"asymmetric": True}, {"x_scale": 0.02}, {"x_scale": 0.02, "x_zero_point": -77}])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 4096, 4096), (17, 65, 136), (300, 1000, 1111)])
def test_layer_equals_the_reference(m, n, k, quantization, dtype):
    weight, bias = int8(n, k, seed=1), random(n, seed=2)
    scale = torch.rand(n, generator=torch.Generator().manual_seed(3)).cuda() * 0.01
    x = random(m, k, seed=4).to(dtype)
    options = {"x_scale": None, "x_zero_point": None, "asymmetric": False} | quantization
    got = linear(x, pack(weight), scale, bias, n, k, *options.values(), "gelu")
    want = int8_linear(x, weight, scale, bias, activation="gelu", kernel="reference", **options)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    assert torch.allclose(got.float(), want.float(), rtol=tolerance, atol=tolerance * float(want.float().abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", ["hopper_128x256", "hopper_128x128"])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (257, 1000, 1111), (4096, 4096, 4096), (5000, 4100, 1040)])
def test_hopper_kernels_equal_the_others(m, n, k, config, dtype):
    needs_hopper(config)
    weight, bias, x = int8(n, k, seed=1), random(n, seed=2), random(m, k, seed=4).to(dtype)
    scale = torch.rand(n, generator=torch.Generator().manual_seed(3)).cuda() * 0.01
    for activation in ("none", "gelu", "hardswish"):
        arguments = (x, pack(weight), scale, bias, n, k, None, None, True, activation)
        assert torch.equal(linear(*arguments, config), linear(*arguments, "128x128"))  # the same sums and the same arithmetic


def test_hopper_kernels_elsewhere_are_an_error():
    if torch.cuda.get_device_capability() == HOPPER:
        pytest.skip("a Hopper GPU")
    with pytest.raises(RuntimeError, match="int8_matmul: CUDA error"):
        matmul(int8(64, 64, seed=1), int8(64, 64, seed=2), "hopper_128x128")


def test_layer_moves_captures_streams_and_compiles():
    layer = Int8Linear.from_float(torch.nn.Linear(520, 300))
    x = random(33, 520, seed=2)
    on_cpu, state = layer(x.cpu()), {name: t.clone() for name, t in layer.state_dict().items()}
    layer.cuda()
    assert layer.kernel == extension.NAME and layer.fallback_reason is None
    assert all(torch.equal(t.cpu(), state[name]) for name, t in layer.state_dict().items())
    torch.cuda.set_sync_debug_mode("error")
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            y = layer(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.allclose(y.cpu(), on_cpu, rtol=1e-4, atol=1e-4)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer(x)
    graph.replay()
    assert torch.equal(captured, y)
    assert torch.allclose(torch.compile(layer, fullgraph=True)(x), y)


def test_ops_choose_it_and_give_gradients():
    a, b = int8(40, 100, seed=1), int8(24, 100, seed=2)
    assert torch.equal(int8_matmul(a, b), int8_matmul(a, b, kernel="reference"))
    x = random(40, 100, seed=3).requires_grad_()
    scale = torch.full((24,), 0.01, device="cuda")
    y = int8_linear(x, b, scale, activation="silu", kernel=extension.NAME)
    want = int8_linear(x, b, scale, activation="silu", kernel="reference")
    assert torch.allclose(y, want, rtol=1e-5, atol=1e-4)
    first, second = (torch.autograd.grad(out.sum(), x)[0] for out in (y, want))
    assert torch.allclose(first, second, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="must be on cuda:0 like weight, got cpu"):
        int8_linear(x.cpu(), b, scale)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_second_device():
    a, b = int8(40, 100, seed=1).to("cuda:1"), int8(24, 100, seed=2).to("cuda:1")
    assert torch.equal(matmul(a, b).cpu(), (a.double() @ b.double().T).int().cpu()) and torch.cuda.current_device() == 0
