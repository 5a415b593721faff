"""int4 weights with int8 activations on a real GPU: every configuration, exact inside groups, captured, on other streams."""

from __future__ import annotations

import pytest
import torch

from pycompress.nn import Int4Linear
from pycompress.ops import int4_linear, quantize_weight_int4
from pycompress.ops.cuda import extension
from pycompress.ops.cuda.int4_int8 import CONFIGS, linear
from pycompress.ops.cuda.weight_only import pack_int4

_reason = "no CUDA device" if not torch.cuda.is_available() else extension.unsupported(torch.cuda.current_device())
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(_reason is not None, reason=f"CUDA kernels do not run here: {_reason}")]


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).cuda()


@pytest.mark.parametrize(("group_size", "symmetric"), [(32, False), (64, True), (128, True), (128, False)])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (7, 33, 130), (19, 4096, 4096), (513, 1000, 1111), (2048, 4096, 4096)])
def test_all_configurations_give_the_same_bits(m, n, k, group_size, symmetric):
    tensors = quantize_weight_int4(random(n, k, seed=1), group_size, symmetric)
    x, bias, packed = random(m, k, seed=2), random(n, seed=3), pack_int4(*tensors, k, group_size)
    got = {config: linear(x, packed, bias, n, group_size, not symmetric, "none", config) for config in CONFIGS}
    assert all(torch.equal(y, got["64x64"]) for y in got.values())
    want = int4_linear(x, *tensors, bias, group_size=group_size, int8_activations=True, kernel="reference")
    assert torch.allclose(got["64x64"], want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_the_bits_of_the_cpu(rows):
    tensors = quantize_weight_int4(random(300, 1000, seed=1), 64, False)
    x = random(rows, 1000, seed=2)
    got = int4_linear(x, *tensors, group_size=64, int8_activations=True, kernel=extension.NAME)
    want = int4_linear(x.cpu(), *(t.cpu() for t in tensors), group_size=64, int8_activations=True)
    assert torch.allclose(got.cpu(), want, rtol=1e-6, atol=1e-5)  # equal where the CPU has a native kernel


@pytest.mark.parametrize("rows", [2, 100])
def test_layer_moves_captures_streams_and_compiles(rows):
    layer = Int4Linear.from_float(torch.nn.Linear(520, 300), int8_activations=True, symmetric=False)
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
    assert torch.allclose(y.cpu(), on_cpu, rtol=1e-5, atol=1e-5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer(x)
    graph.replay()
    assert torch.equal(captured, y)
    assert torch.equal(torch.compile(layer, fullgraph=True)(x), y)
