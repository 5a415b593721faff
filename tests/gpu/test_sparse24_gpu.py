"""2:4 linear layers on a real GPU: what the emulator cannot show, first of all that mma.sp reads its metadata as we write it."""

from __future__ import annotations

import pytest
import torch

from pycompress import nn as compressed
from pycompress.ops import int8_linear, int8_sparse24_linear, sparse24_linear
from pycompress.ops.cuda import extension, sparse24_float
from pycompress.ops.cuda.sparse24 import CONFIGS, HOPPER, launch, pack, quantized, rows_of_bytes
from pycompress.ops.sparse24 import sparse24_compress, sparse24_mask, sparse24_to_dense

_reason = "no CUDA device" if not torch.cuda.is_available() else extension.unsupported(torch.cuda.current_device())
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(_reason is not None, reason=f"CUDA kernels do not run here: {_reason}")]


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).cuda()


def needs_hopper(config: str) -> None:
    if config == "hopper" and torch.cuda.get_device_capability() != HOPPER:
        pytest.skip("needs compute capability 9.0")


def int8_weight(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    q = torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=torch.Generator().manual_seed(1)).cuda()
    return q * sparse24_mask(random(n, k, seed=2)), torch.rand(n, generator=torch.Generator().manual_seed(3)).cuda() * 0.01


@pytest.mark.parametrize("config", list(CONFIGS))
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 4), (3, 17, 36), (16, 4096, 4096), (70, 72, 520), (513, 1000, 1111), (4096, 4096, 4096)])
def test_int8_sums_are_exact(m, n, k, config):
    needs_hopper(config)
    weight, scale = int8_weight(n, k)
    x = random(m, k, seed=4)
    stream = torch.cuda.current_stream().cuda_stream
    q, row_scale = quantized(extension.module, stream, x, None)
    got = launch(
        extension.module, stream, q, pack(*sparse24_compress(weight), k), n, bias=None, activation="none", config=config,
        out_dtype=torch.float32, row_scale=row_scale, col_scale=scale,
    )  # fmt: skip
    want = (q[:, :k].double() @ weight.double().T) * (row_scale[:, None].double() * scale.double())
    assert torch.allclose(got.double(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", list(CONFIGS))
@pytest.mark.parametrize(("m", "n", "k"), [(2, 9, 7), (17, 65, 136), (513, 1000, 1111), (2048, 4096, 4096)])
def test_floats(m, n, k, config, dtype):
    needs_hopper(config)
    weight = (random(n, k, seed=1) * sparse24_mask(random(n, k, seed=2))).to(dtype)
    x, bias = random(m, k, seed=3).to(dtype), random(n, seed=4)
    got = launch(
        extension.module, torch.cuda.current_stream().cuda_stream, rows_of_bytes(x), pack(*sparse24_compress(weight), k), n, bias=bias,
        activation="none", config=config, out_dtype=dtype,
    )  # fmt: skip
    want = x.double() @ weight.double().T + bias.double()
    assert float((got.double() - want).norm()) <= 2**-8 * float(want.norm())


def test_function_gradient_stream_and_no_synchronisation():
    weight = random(300, 520, seed=1)
    values, indices = sparse24_compress(weight, sparse24_mask(weight.abs()))
    x = random(130, 520, seed=2).bfloat16().requires_grad_()
    y = sparse24_linear(x, values, indices, activation="silu", kernel=extension.NAME)
    dense = sparse24_to_dense(values.bfloat16(), indices, 520).float()
    reference = x.detach().float().requires_grad_()
    want = torch.nn.functional.silu(reference @ dense.T)
    assert torch.allclose(y.float(), want, rtol=2e-2, atol=0.2)
    y.backward(torch.ones_like(y))
    (gradient,) = torch.autograd.grad(want, reference, torch.ones_like(want))
    assert float((x.grad.float() - gradient).norm()) <= 1e-2 * float(gradient.norm())


def sparse_linear(pattern: str) -> torch.nn.Linear:
    linear = torch.nn.Linear(520, 300)
    with torch.no_grad():
        linear.weight.mul_(sparse24_mask(linear.weight.abs(), pattern))
    return linear


@pytest.mark.parametrize("rows", [3, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
@pytest.mark.parametrize("kind", [compressed.Int8Sparse24Linear, compressed.Sparse24Linear])
def test_layer_moves_captures_and_compiles(kind, pattern, dtype, rows):
    layer = kind.from_float(sparse_linear(pattern), pattern=pattern)
    x = random(rows, 520, seed=2).to(dtype)
    on_cpu, state = layer(x.cpu()), {name: t.clone() for name, t in layer.state_dict().items()}
    layer.cuda()
    assert layer.kernel == extension.NAME and layer.fallback_reason is None
    assert all(torch.equal(t.cpu(), state[name]) for name, t in layer.state_dict().items())
    layer(x)  # packs the weight for 16-bit activations
    torch.cuda.set_sync_debug_mode("error")
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            y = layer(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2  # the CPU keeps float32 weights
    assert torch.allclose(y.cpu().float(), on_cpu.float(), rtol=tolerance, atol=tolerance)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer(x)
    graph.replay()
    assert torch.equal(captured, y)
    assert torch.allclose(torch.compile(layer, fullgraph=True)(x), y)


def test_a_16_bit_weight_is_not_packed_into_a_graph():
    layer = compressed.Sparse24Linear.from_float(sparse_linear("2:4")).cuda()
    x, graph = random(3, 520, seed=2).half(), torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="run the layer once"), torch.cuda.graph(graph):
        layer(x)
    torch.cuda.synchronize()
    assert layer(x).isfinite().all()


@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (3, 17, 36), (8, 4096, 4096), (19, 1000, 1111), (513, 1000, 1111)])
def test_float32(m, n, k, pattern):
    weight = random(n, k, seed=1) * sparse24_mask(random(n, k, seed=2), pattern)
    values, indices = sparse24_compress(weight, pattern=pattern)
    x, bias, flat = random(m, k, seed=3), random(n, seed=4), sparse24_float.to_flat(sparse24_float.pack(values, indices))
    want = x.double() @ weight.double().T + bias.double()
    for few in (True, False):
        got = sparse24_float.linear(x, flat, bias, n, pattern, "none", few)
        assert float((got.double() - want).norm()) <= 2**-20 * float((x.abs().double() @ weight.abs().double().T).norm())
    assert torch.equal(sparse24_float.dense(flat, n, k, pattern), weight)


@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [compressed.Int8Sparse24Conv2d, compressed.Sparse24Conv2d])
def test_convolutions(kind, dtype, pattern):
    conv = torch.nn.Conv2d(33, 70, 3, stride=2, padding=1)
    with torch.no_grad():
        conv.weight.mul_(sparse24_mask(conv.weight.flatten(1).abs(), pattern).view_as(conv.weight))
    layer = kind.from_float(conv, pattern=pattern)
    x = random(5, 33, 40, 31, seed=2).to(dtype)
    on_cpu = layer(x.cpu()).float()
    layer.cuda()
    assert layer.kernel == extension.NAME and layer.fallback_reason is None
    y = layer(x)
    tolerance = 2e-2 if dtype != torch.float32 or kind is compressed.Sparse24Conv2d else 1e-4  # TF32, by torch's default
    assert torch.allclose(y.cpu().float(), on_cpu, rtol=tolerance, atol=tolerance)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer(x)
    graph.replay()
    assert torch.allclose(captured, y) and torch.allclose(torch.compile(layer, fullgraph=True)(x), y)


def test_int8_function_is_the_dense_one():
    weight, scale = int8_weight(300, 1000)
    x = random(100, 1000, seed=2).half()
    got = int8_sparse24_linear(x, *sparse24_compress(weight), scale, kernel=extension.NAME)
    want = int8_linear(x, weight, scale, kernel="reference")
    assert torch.allclose(got.float(), want.float(), rtol=2**-9, atol=1e-3)
