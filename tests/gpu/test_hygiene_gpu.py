"""Memory, alignment and other tensors' devices on a real GPU, for every layer with CUDA kernels."""

from __future__ import annotations

import gc

import pytest
import torch

from pycompress import nn as compressed
from pycompress.ops.cuda import extension
from pycompress.ops.sparse24 import sparse24_mask

_reason = "no CUDA device" if not torch.cuda.is_available() else extension.unsupported(torch.cuda.current_device())
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(_reason is not None, reason=f"CUDA kernels do not run here: {_reason}")]

K, N = 1040, 520
LAYERS = [
    (compressed.Int8Linear, {}), (compressed.Int8WeightOnlyLinear, {}), (compressed.Int4Linear, {}),
    (compressed.Int4Linear, {"int8_activations": True}), (compressed.Sparse24Linear, {}), (compressed.Int8Sparse24Linear, {}),
]  # fmt: skip


@pytest.fixture(params=LAYERS, ids=lambda p: p[0].__name__ + "".join(p[1]))
def layer(request):
    kind, options = request.param
    linear = torch.nn.Linear(K, N)
    with torch.no_grad():
        linear.weight.mul_(sparse24_mask(linear.weight.abs()))
    return kind.from_float(linear, **options).cuda()


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).cuda()


@pytest.mark.parametrize("rows", [5, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_at_any_offset_and_stride(layer, dtype, rows):
    wide, tall = random(2 * rows, K + 11, seed=1).to(dtype), random(K, rows, seed=2).to(dtype)
    for view in (wide[:rows, 1 : K + 1], wide[::2, 3 : K + 3], tall.T, wide[:1, :K].expand(rows, K)):
        assert torch.equal(layer(view), layer(view.contiguous()))


def test_tensors_on_the_cpu_are_refused(layer):
    with pytest.raises(ValueError, match=r"x must be .*on cuda:0.*, got .*cpu"):
        layer(torch.randn(3, K))


def test_out_of_memory_leaves_nothing_behind(layer):
    """All memory but some megabytes is taken: a call that needs more raises torch's error, and the next one works."""
    few = random(4, K, seed=1)
    want = layer(few)
    rows = random(200_000, K, seed=2)  # 0.8 GB in, 0.4 GB out
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (64 << 20)) / total)
    try:
        before = torch.cuda.memory_allocated()
        with pytest.raises(torch.OutOfMemoryError):
            layer(rows)
        gc.collect()
        assert torch.cuda.memory_allocated() <= before
        assert torch.equal(layer(few), want)
        torch.cuda.synchronize()  # no error is pending
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_second_device(layer):
    x = random(5, K, seed=1)
    want = layer(x)
    layer.to("cuda:1")
    assert torch.equal(layer(x.to("cuda:1")).cpu(), want.cpu()) and torch.cuda.current_device() == 0
    with pytest.raises(ValueError, match="cuda:1"):
        layer(x)
