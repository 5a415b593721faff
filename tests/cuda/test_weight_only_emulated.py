"""The CUDA kernels of int8_weight_linear and int4_linear on the host, every configuration against the reference."""

from __future__ import annotations

import pytest
import torch
from support.cuda_emulation import ORDERS, needs_compiler
from support.cuda_weight_only import emulated
from support.guard import guarded

from pycompress.ops import int4, native
from pycompress.ops.cuda import extension
from pycompress.ops.cuda.weight_only import (
    CONFIGS,
    FEW_ROWS,
    choose,
    dequantize_int4,
    linear_int4,
    linear_int8,
    pack_int4,
    packed_bytes_int4,
    pad_int8,
    unpack_int4,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CLOSE = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


@pytest.fixture(autouse=True)
def _emulated(monkeypatch, request):
    if "plan" in request.node.name:
        return
    monkeypatch.setattr(extension, "module", emulated())
    monkeypatch.setattr(extension, "stream", lambda device: 0)
    monkeypatch.setattr(extension, "multiprocessors", lambda device: 4)


def floats(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def int8_problem(n: int, k: int):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=generator), torch.rand(n, generator=generator) * 0.01


def int4_problem(n: int, k: int, group_size: int, asymmetric: bool):
    generator = torch.Generator().manual_seed(2)
    u = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=generator)
    shape = (n, int4.num_groups(k, group_size))
    scale = torch.rand(shape, generator=generator) * 0.1
    zero = torch.randint(0, 16, shape, dtype=torch.uint8, generator=generator) if asymmetric else None
    return int4.pack_nibbles(u), scale, zero


def close(got: torch.Tensor, x: torch.Tensor, dense: torch.Tensor, bias: torch.Tensor | None, activation=lambda y: y) -> None:
    """Against float64, relative to the sum of absolute terms, which is what rounding is relative to."""
    want = x.double() @ dense.double().T + (0 if bias is None else bias.double())
    size = x.double().abs() @ dense.double().abs().T + (0 if bias is None else bias.double().abs())
    assert got.dtype == x.dtype and got.shape == want.shape
    assert bool(((got.double() - activation(want)).abs() <= CLOSE[x.dtype] * size + 1e-30).all())


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", list(CONFIGS))
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (7, 33, 130), (19, 70, 1111)])
def test_int8(config, m, n, k, dtype):
    weight, scale = int8_problem(n, k)
    x, bias = floats(m, k, seed=3).to(dtype), floats(n, seed=4) if m > 1 else None
    close(linear_int8(x, guarded(pad_int8(weight)), scale, bias, config), x, weight * scale[:, None].double(), bias)


@needs_compiler
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize(("config", "m", "n", "k", "dtype"), [
    ("8x8", 1, 1, 1, torch.float32), ("8x32", 5, 43, 333, torch.float32), ("8x8", 9, 21, 1300, torch.bfloat16),
    ("16x16", 19, 17, 200, torch.float16), ("16x64", 16, 70, 160, torch.bfloat16), ("16x64", 3, 8, 130, torch.float32),
])  # fmt: skip
def test_int4(config, m, n, k, dtype, group_size, asymmetric):
    tensors = int4_problem(n, k, group_size, asymmetric)
    x, bias = floats(m, k, seed=3).to(dtype), floats(n, seed=4)
    packed = guarded(pack_int4(*tensors, k, group_size))
    got = linear_int4(x, packed, bias, n, group_size, asymmetric, "relu", config)
    close(got, x, int4.dequantize_int4(*tensors, k, group_size), bias, torch.relu)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 136, 260])
def test_weights_are_written_out_as_the_reference_has_them(k, dtype):
    weight, scale = int8_problem(11, k)
    x = torch.eye(k).to(dtype)
    want = (weight.float() * scale[:, None]).to(dtype)
    assert torch.equal(linear_int8(x, weight, scale, None, "library"), want.T)
    for group_size, asymmetric in ((32, True), (64, False), (128, True)):
        tensors = int4_problem(11, k, group_size, asymmetric)
        got = dequantize_int4(pack_int4(*tensors, k, group_size), 11, k, group_size, asymmetric, dtype)
        assert torch.equal(got, int4.dequantize_int4(*tensors, k, group_size).to(dtype))


@needs_compiler
def test_float32_loses_nothing_to_its_three_parts():
    x = floats(4, 64, seed=5) * 2.0 ** torch.arange(-60, 68, 2)[None, :64].float()
    x[0, 0], x[1, 1], x[2, 2] = 3.4028234e38, -3.4e38, 2.0**-90
    weight = torch.eye(64, dtype=torch.int8)
    assert torch.equal(linear_int8(x, weight, torch.ones(64), None, "8x8"), x)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", ["8x32", "library"])
def test_rows_with_nan_or_inf_are_nan(config, dtype):
    tensors = int4_problem(20, 100, 64, True)
    x = floats(5, 100, seed=6).to(dtype)
    x[0, 99], x[1, 0], x[2, 50] = float("nan"), float("inf"), float("-inf")
    got = linear_int4(x, pack_int4(*tensors, 100, 64), None, 20, 64, True, "none", config)
    assert bool(got[:3].isnan().all()) and bool(got[3:].isfinite().all())


@needs_compiler
@pytest.mark.parametrize("order", ["backward", "shuffled"])
def test_no_order_of_threads_matters(order):
    weight, scale = int8_problem(40, 700)
    x = floats(12, 700, seed=3)
    want = linear_int8(x, weight, scale, None, "16x16")
    emulated().set_order(ORDERS[order])
    try:
        assert torch.equal(linear_int8(x, weight, scale, None, "16x16"), want)
    finally:
        emulated().set_order(ORDERS["forward"])


@needs_compiler
@pytest.mark.parametrize("shape", [(0, 5, 8), (3, 0, 8), (3, 5, 0)])
def test_empty(shape):
    m, n, k = shape
    bias = floats(n, seed=4)
    want = bias.expand(m, n)
    assert torch.equal(linear_int8(floats(m, k, seed=3), *int8_problem(n, k), bias), want)
    packed = pack_int4(*int4_problem(n, k, 32, True), k, 32)
    assert torch.equal(linear_int4(floats(m, k, seed=3), packed, bias, n, 32, True, "none"), want)


@needs_compiler
def test_views_and_three_dimensions():
    weight, scale = int8_problem(10, 48)
    for x in (floats(5, 49, seed=3)[:, 1:], floats(48, 5, seed=3).T, floats(10, 48, seed=3)[::2], floats(2, 3, 48, seed=3)):
        close(linear_int8(x, weight[:, :48], scale, None), x, weight * scale[:, None].double(), None)


@needs_compiler
def test_configurations_agree_with_the_header():
    assert emulated().weight_few_configs() == CONFIGS
    with pytest.raises(ValueError, match="unknown configuration"):
        linear_int8(torch.ones(1, 16), *int8_problem(4, 16), None, "9x9")


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("group_size", int4.GROUP_SIZES)
@pytest.mark.parametrize("k", [0, 1, 33, 128, 300])
def test_plan_packs_int4_and_unpacks_it(k, group_size, asymmetric):
    tensors = int4_problem(5, k, group_size, asymmetric)
    packed = pack_int4(*tensors, k, group_size)
    assert packed.dtype == torch.uint8 and packed.numel() == packed_bytes_int4(5, k, group_size, asymmetric)
    for got, want in zip(unpack_int4(packed, 5, k, group_size, asymmetric), tensors, strict=True):
        assert got is want if want is None else torch.equal(got, want)


def test_plan_streams_few_rows_only():
    for n in (1, 1000, 128_256):
        for m in (1, 8, 9, 16, 17, FEW_ROWS):
            rows, _ = CONFIGS[choose(m, n, 132)]
            assert rows == (8 if m <= 8 else 16)
        assert choose(FEW_ROWS + 1, n, 132) is None
    aligned = torch.zeros(4, 32, dtype=torch.int8)
    assert pad_int8(aligned) is aligned and pad_int8(torch.zeros(4, 33, dtype=torch.int8)).shape == (4, 48)
    assert native.DTYPES.keys() == set(DTYPES)
