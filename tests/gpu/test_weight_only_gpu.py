"""Weight-only linear layers on a real GPU: every configuration, captured, on other streams and devices."""

from __future__ import annotations

import pytest
import torch

from pycompress.nn import Int4Linear, Int8WeightOnlyLinear
from pycompress.ops import int4, int4_linear, int8_weight_linear, quantize_weight, quantize_weight_int4
from pycompress.ops.cuda import extension
from pycompress.ops.cuda.weight_only import CONFIGS, LIBRARY, dequantize_int4, linear_int4, linear_int8, pack_int4, pad_int8

_reason = "no CUDA device" if not torch.cuda.is_available() else extension.unsupported(torch.cuda.current_device())
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(_reason is not None, reason=f"CUDA kernels do not run here: {_reason}")]

CLOSE = {torch.float32: 2.0**-19, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
SHAPES = [(1, 1, 1), (3, 33, 130), (16, 4096, 4096), (29, 1000, 1111)]


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).cuda()


def close(got: torch.Tensor, x: torch.Tensor, dense: torch.Tensor, bias: torch.Tensor) -> None:
    want = x.double() @ dense.double().T + bias.double()
    size = x.double().abs() @ dense.double().abs().T + bias.double().abs()
    assert bool(((got.double() - want).abs() <= CLOSE[x.dtype] * size + 1e-30).all())


@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize("config", list(CONFIGS))
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_int8(m, n, k, config, dtype):
    q, scale = quantize_weight(random(n, k, seed=1))
    x, bias = random(m, k, seed=2).to(dtype), random(n, seed=3)
    close(linear_int8(x, pad_int8(q), scale, bias, config), x, q * scale[:, None].double(), bias)


@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize(("group_size", "symmetric"), [(32, False), (64, True), (128, True), (128, False)])
@pytest.mark.parametrize("config", list(CONFIGS))
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_int4(m, n, k, config, group_size, symmetric, dtype):
    tensors = quantize_weight_int4(random(n, k, seed=1), group_size, symmetric)
    x, bias = random(m, k, seed=2).to(dtype), random(n, seed=3)
    packed, dense = pack_int4(*tensors, k, group_size), int4.dequantize_int4(*tensors, k, group_size)
    close(linear_int4(x, packed, bias, n, group_size, not symmetric, "none", config), x, dense, bias)
    assert torch.equal(dequantize_int4(packed, n, k, group_size, not symmetric, dtype), dense.to(dtype))


@pytest.mark.parametrize("config", ["8x32", LIBRARY])
def test_rows_with_nan_or_inf_are_nan(config):
    tensors = quantize_weight_int4(random(64, 256, seed=1), 64, False)
    for dtype in CLOSE:
        x = random(5, 256, seed=2).to(dtype)
        x[0, 255], x[1, 0], x[2, 50] = float("nan"), float("inf"), float("-inf")
        y = linear_int4(x, pack_int4(*tensors, 256, 64), None, 64, 64, True, "none", config)
        assert bool(y[:3].isnan().all()) and bool(y[3:].isfinite().all())


@pytest.mark.parametrize("kind", [Int8WeightOnlyLinear, Int4Linear])
@pytest.mark.parametrize("rows", [2, 100])
def test_layers_move_capture_stream_and_compile(kind, rows):
    layer = kind.from_float(torch.nn.Linear(520, 300))
    x = random(rows, 520, seed=2)
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
    assert torch.allclose(captured, y)
    assert torch.allclose(torch.compile(layer, fullgraph=True)(x), y)


def test_ops_choose_it_and_give_gradients():
    weight = random(24, 100, seed=1)
    q, scale = quantize_weight(weight)
    tensors = quantize_weight_int4(weight, 32, False)
    for run in (
        lambda x, kernel: int8_weight_linear(x, q, scale, kernel=kernel),
        lambda x, kernel: int4_linear(x, *tensors, group_size=32, activation="gelu", kernel=kernel),
    ):
        for rows in (4, 60):
            x = random(rows, 100, seed=3).requires_grad_()
            y, want = run(x, extension.NAME), run(x, "reference")
            assert torch.allclose(y, want, rtol=1e-4, atol=1e-4)
            first, second = (torch.autograd.grad(out.sum(), x)[0] for out in (y, want))
            assert torch.allclose(first, second, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="must be on cuda:0 like weight, got cpu"):
        int8_weight_linear(random(2, 100, seed=3).cpu(), q, scale)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_second_device():
    q, scale = (t.to("cuda:1") for t in quantize_weight(random(24, 100, seed=1)))
    x = random(3, 100, seed=2).to("cuda:1")
    assert torch.allclose(int8_weight_linear(x, q, scale), int8_weight_linear(x, q, scale, kernel="reference"), atol=1e-4)
    assert torch.cuda.current_device() == 0
