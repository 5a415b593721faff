"""int4 weights with int8 activations: the CUDA kernels on the host, bit for bit the documented order of sums."""

from __future__ import annotations

import ctypes
import ctypes.util

import pytest
import torch
from support.cuda_emulation import ORDERS, needs_compiler
from support.cuda_weight_only import emulated
from support.guard import guarded

from pycompress.ops import int4, native
from pycompress.ops.affine import quantize_affine, symmetric_scale
from pycompress.ops.cuda import extension
from pycompress.ops.cuda.int4_int8 import CONFIGS, choose, linear
from pycompress.ops.cuda.weight_only import FEW_ROWS, pack_int4
from pycompress.ops.int4_linear import int4_linear_reference

FEW = [name for name in CONFIGS if name.startswith("few")]


@pytest.fixture(autouse=True)
def _emulated(monkeypatch, request):
    if "plan" in request.node.name:
        return
    monkeypatch.setattr(extension, "module", emulated())
    monkeypatch.setattr(extension, "stream", lambda device: 0)
    monkeypatch.setattr(extension, "multiprocessors", lambda device: 4)


def floats(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def problem(n: int, k: int, group_size: int, asymmetric: bool):
    generator = torch.Generator().manual_seed(2)
    u = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=generator)
    shape = (n, int4.num_groups(k, group_size))
    scale = torch.rand(shape, generator=generator) * 0.1
    zero = torch.randint(0, 16, shape, dtype=torch.uint8, generator=generator) if asymmetric else None
    return int4.pack_nibbles(u), scale, zero


def in_order(x: torch.Tensor, tensors, bias: torch.Tensor | None, group_size: int) -> torch.Tensor:
    """float32 results with every fma where docs/int4.md has it, by libm's fmaf."""
    fmaf = ctypes.CDLL(ctypes.util.find_library("m")).fmaf
    fmaf.restype, fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3
    weight, scale, zero = tensors
    (m, k), n = x.shape, weight.shape[0]
    row_scale = symmetric_scale(x.float().abs().amax(1, keepdim=True))
    q = quantize_affine(x.float(), row_scale).long()
    per_k = 8 if zero is None else int4.per_element(zero.long(), k, group_size)
    w = int4.unpack_nibbles(weight, k).long() - per_k
    parts = torch.stack([q[:, g : g + group_size] @ w[:, g : g + group_size].T for g in range(0, k, group_size)])
    out = torch.empty(m, n)
    for row in range(m):
        for column in range(n):
            a = 0.0
            for g in range(parts.shape[0]):
                a = fmaf(float(parts[g, row, column]), float(scale[column, g]), a)
            out[row, column] = fmaf(a, float(row_scale[row, 0]), 0.0 if bias is None else float(bias[column]))
    return out


@needs_compiler
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("group_size", int4.GROUP_SIZES)
@pytest.mark.parametrize(("config", "m", "n", "k"), [
    *(("few_8x8", *s) for s in ((1, 1, 1), (9, 21, 1300))), ("few_8x16", 5, 43, 333), ("few_16x8", 19, 17, 1153),
    ("few_16x16", 16, 70, 160), ("64x64", 1, 1, 1), ("64x64", 67, 65, 650), ("128x128", 3, 8, 33), ("128x128", 130, 136, 200),
])  # fmt: skip
def test_the_bits_of_the_documented_order(config, m, n, k, group_size, asymmetric):
    tensors, x, bias = problem(n, k, group_size, asymmetric), floats(m, k, seed=3), floats(n, seed=4) if m > 1 else None
    got = linear(x, guarded(pack_int4(*tensors, k, group_size)), bias, n, group_size, asymmetric, "none", config)
    assert torch.equal(got, in_order(x, tensors, bias, group_size))


@needs_compiler
@pytest.mark.skipif(native.module is None, reason="no CPU kernels in this installation")
@pytest.mark.parametrize("activation", ["none", "relu", "relu6", "hardswish"])
def test_the_bits_of_the_cpu(activation):
    from pycompress.ops import int4_linear

    for asymmetric in (False, True):
        tensors, x, bias = problem(45, 1000, 64, asymmetric), floats(20, 1000, seed=3), floats(45, seed=4)
        want = int4_linear(
            x, *tensors, bias, group_size=64, int8_activations=True, activation=activation, kernel=native.kernels("int4_matmul")[0]
        )
        for config in CONFIGS:
            assert torch.equal(linear(x, pack_int4(*tensors, 1000, 64), bias, 45, 64, asymmetric, activation, config), want)


@needs_compiler
@pytest.mark.parametrize("config", list(CONFIGS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_types_and_an_activation(config, dtype):
    tensors, x, bias = problem(37, 300, 128, True), floats(11, 300, seed=3).to(dtype), floats(37, seed=4)
    got = linear(x, pack_int4(*tensors, 300, 128), bias, 37, 128, True, "gelu", config)
    want = int4_linear_reference(x, *tensors, bias, group_size=128, int8_activations=True, activation="gelu")
    assert got.dtype == dtype
    torch.testing.assert_close(got, want, rtol=2.0**-7 if dtype == torch.bfloat16 else 2.0**-10, atol=1e-4)


@needs_compiler
@pytest.mark.parametrize("config", list(CONFIGS))
def test_the_largest_sums_are_exact(config):
    """Every product at its extreme: what sums of kMagic and the widening must hold."""
    for u, zero in ((0, 15), (15, 0)):
        k = 256
        weight, scale = int4.pack_nibbles(torch.full((9, k), u, dtype=torch.uint8)), torch.ones(9, 2)
        zeros = torch.full((9, 2), zero, dtype=torch.uint8)
        x = torch.full((4, k), 127.0)
        x[1::2] = -127.0
        got = linear(x, pack_int4(weight, scale, zeros, k, 128), None, 9, 128, True, "none", config)
        want = torch.tensor([127.0, -127.0, 127.0, -127.0])[:, None] * (u - zero) * k
        assert torch.equal(got, want.expand(4, 9))


@needs_compiler
@pytest.mark.parametrize("config", list(CONFIGS))
def test_rows_with_nan_or_inf_are_nan(config):
    tensors, x = problem(20, 100, 64, True), floats(5, 100, seed=6)
    x[0, 99], x[1, 0], x[2, 50] = float("nan"), float("inf"), float("-inf")
    got = linear(x, pack_int4(*tensors, 100, 64), None, 20, 64, True, "none", config)
    assert bool(got[:3].isnan().all()) and bool(got[3:].isfinite().all())


@needs_compiler
@pytest.mark.parametrize("order", ["backward", "shuffled"])
@pytest.mark.parametrize("config", ["few_8x16", "64x64"])
def test_no_order_of_threads_matters(config, order):
    tensors, x = problem(40, 3000, 64, True), floats(12, 3000, seed=3)
    packed = pack_int4(*tensors, 3000, 64)
    want = linear(x, packed, None, 40, 64, True, "none", config)
    emulated().set_order(ORDERS[order])
    try:
        assert torch.equal(linear(x, packed, None, 40, 64, True, "none", config), want)
    finally:
        emulated().set_order(ORDERS["forward"])


@needs_compiler
@pytest.mark.parametrize("shape", [(0, 5, 8), (3, 0, 8), (3, 5, 0)])
def test_empty(shape):
    m, n, k = shape
    bias, packed = floats(n, seed=4), pack_int4(*problem(n, k, 32, True), k, 32)
    for config in (None, *CONFIGS):
        assert torch.equal(linear(floats(m, k, seed=3), packed, bias, n, 32, True, "none", config), bias.expand(m, n))


@needs_compiler
def test_views_and_three_dimensions():
    tensors = problem(10, 48, 32, True)
    packed = pack_int4(*tensors, 48, 32)
    for x in (floats(5, 49, seed=3)[:, 1:], floats(48, 5, seed=3).T, floats(10, 48, seed=3)[::2], floats(2, 3, 48, seed=3)):
        flat = x.reshape(-1, 48)
        assert torch.equal(linear(x, packed, None, 10, 32, True, "none").view(-1, 10), in_order(flat, tensors, None, 32))


@needs_compiler
def test_configurations_agree_with_the_header():
    assert emulated().int4_int8_configs() == CONFIGS
    with pytest.raises(ValueError, match="unknown configuration 9x9"):
        linear(torch.ones(1, 16), pack_int4(*problem(4, 16, 32, False), 16, 32), None, 4, 32, False, "none", "9x9")


def test_plan_streams_few_rows_only():
    for n in (1, 1000, 128_256):
        for m in (1, 8, 9, 16, 17, FEW_ROWS):
            assert choose(m, n, 132) in FEW and CONFIGS[choose(m, n, 132)][0] == (8 if m <= 8 else 16)
        assert choose(FEW_ROWS + 1, n, 132) not in FEW
