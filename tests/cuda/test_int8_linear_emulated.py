"""The CUDA kernels of int8_matmul and int8_linear on the host, every configuration against the reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.cuda_emulation import ORDERS, needs_compiler
from support.cuda_int8 import emulated
from support.guard import guarded

from pycompress.ops.cuda import extension
from pycompress.ops.cuda.int8_linear import CONFIGS, HOPPER, INT32, choose, linear, matmul, pack, packed_bytes, padded, unpack
from pycompress.ops.int8_linear import int8_linear_reference
from pycompress.ops.int8_matmul import int8_matmul_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CLOSE = {torch.float32: 2.0**-21, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
"""The reference multiplies and adds, a kernel has one fma; then both round to the dtype."""


@pytest.fixture(autouse=True)
def _emulated(monkeypatch, request):
    if "plan" in request.node.name:
        return
    monkeypatch.setattr(extension, "module", emulated())
    monkeypatch.setattr(extension, "stream", lambda device: 0)
    monkeypatch.setattr(extension, "multiprocessors", lambda device: 4)
    monkeypatch.setattr(extension, "capability", lambda index: (8, 0))


def int8(*shape: int, seed: int) -> torch.Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


def floats(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def compare(x, weight, config=None, *, bias=True, activation="none", x_scale=None, x_zero_point=None, asymmetric=False):
    n, k = weight.shape
    scale = torch.rand(n, generator=torch.Generator().manual_seed(7)) * 0.01
    offset = floats(n, seed=8) if bias else None
    options = {"x_scale": x_scale, "x_zero_point": x_zero_point, "asymmetric": asymmetric}
    got = linear(x, guarded(pack(weight)), scale, offset, n, k, x_scale, x_zero_point, asymmetric, activation, config)
    want = int8_linear_reference(x, weight, scale, offset, activation=activation, **options)
    assert got.dtype == want.dtype and got.shape == want.shape
    size = float(want.float().nan_to_num().abs().max()) if want.numel() else 0.0
    assert torch.allclose(got.float(), want.float(), rtol=CLOSE[x.dtype], atol=CLOSE[x.dtype] * size, equal_nan=True)
    return got


@needs_compiler
@pytest.mark.parametrize("config", list(CONFIGS))
@pytest.mark.parametrize("shape", [(1, 1, 1), (16, 7, 16), (13, 33, 130), (31, 41, 700)])
def test_sums_are_exact(config, shape):
    m, n, k = shape
    m = min(m, CONFIGS[config][0])
    a, b = int8(m, k, seed=1), int8(n, k, seed=2)
    assert torch.equal(matmul(a, b, config), int8_matmul_reference(a, b))


@needs_compiler
@pytest.mark.parametrize("config", ["128x256", "128x128", "64x128", "64x64", "hopper_128x256", "hopper_128x128"])
def test_sums_are_exact_over_several_tiles(config):
    bm, bn = CONFIGS[config]
    a, b = int8(2 * bm + 3, 333, seed=1), int8(bn + 9, 333, seed=2)
    assert torch.equal(matmul(a, b, config), int8_matmul_reference(a, b))


@needs_compiler
@pytest.mark.parametrize("order", ["backward", "shuffled"])
@pytest.mark.parametrize("config", ["64x64", "few_32x16"])
def test_no_order_of_threads_matters(config, order):
    a, b = int8(30, 700, seed=1), int8(50, 700, seed=2)
    emulated().set_order(ORDERS[order])
    try:
        assert torch.equal(matmul(a, b, config), int8_matmul_reference(a, b))
    finally:
        emulated().set_order(ORDERS["forward"])


@needs_compiler
@pytest.mark.parametrize("order", ["forward", "backward", "shuffled"])
@pytest.mark.parametrize("config", ["hopper_128x256", "hopper_128x128"])
@pytest.mark.parametrize("shape", [(260, 600, 333), (130, 1100, 90), (260, 257, 1290)])
def test_pipelines_that_go_on_over_several_tiles(config, order, shape):
    m, n, k = shape  # more tiles than blocks, stages that do not divide the steps, clusters with a block that has no rows
    a, b = int8(m, k, seed=1), int8(n, k, seed=2)
    emulated().set_order(ORDERS[order])
    try:
        assert torch.equal(matmul(a, b, config), int8_matmul_reference(a, b))
        scale, sums = torch.rand(n, generator=torch.Generator().manual_seed(7)) * 0.01, b.sum(1, dtype=torch.int32)
        row_scale, row_zero = torch.rand(m), torch.arange(m, dtype=torch.int32)
        got, a, b = torch.empty(m, n), F.pad(a, (0, padded(k) - k)), F.pad(b, (0, padded(k) - k))
        emulated().int8_gemm(
            config, m, n, padded(k), a.data_ptr(), padded(k), b.data_ptr(), padded(k), row_scale.data_ptr(), row_zero.data_ptr(),
            scale.data_ptr(), sums.data_ptr(), 0, 0, got.data_ptr(), 0, 0, 0,
        )  # fmt: skip
        want = (a.double() @ b.double().T - row_zero.double()[:, None] * sums.double()) * row_scale.double()[:, None] * scale.double()
        assert torch.allclose(got.double(), want, rtol=2.0**-21, atol=0)
    finally:
        emulated().set_order(ORDERS["forward"])


@needs_compiler
@pytest.mark.parametrize("config", list(CONFIGS))
def test_nothing_outside_of_the_matrices_is_touched(config):
    for m, n, k in ((13, 33, 144), (5, 8, 16)):
        a, b, out = guarded(int8(m, k, seed=1)), guarded(int8(n, k, seed=2)), guarded(torch.zeros(m, n, dtype=torch.int32))
        emulated().int8_gemm(config, m, n, k, a.data_ptr(), k, b.data_ptr(), k, 0, 0, 0, 0, 0, 0, out.data_ptr(), INT32, 0, 0)
        assert torch.equal(out, int8_matmul_reference(a, b))


@needs_compiler
def test_hopper_configurations_say_why_they_cannot_run():
    a, b = int8(3, 16, seed=1), int8(4, 16, seed=2)
    emulated().set_tensor_maps(0)
    try:
        with pytest.raises(RuntimeError, match="int8_matmul: the driver has no cuTensorMapEncodeTiled; kernels for Hopper need one"):
            matmul(a, b, "hopper_128x128")
    finally:
        emulated().set_tensor_maps(1)
    with pytest.raises(ValueError, match="int8_matmul: kernels for Hopper count rows, columns and k in 32 bits"):
        emulated().int8_gemm("hopper_128x256", 2**30, 4, 16, a.data_ptr(), 16, b.data_ptr(), 16, 0, 0, 0, 0, 0, 0, 0, INT32, 0, 0)


@needs_compiler
def test_extremes_stay_exact():
    a, b = torch.full((3, 5000), -128, dtype=torch.int8), torch.full((9, 5000), -128, dtype=torch.int8)
    for config in ("64x64", "few_16x8", "hopper_128x256", "hopper_128x128"):
        assert torch.equal(matmul(a, b, config), int8_matmul_reference(a, b))


@needs_compiler
def test_views_that_are_not_aligned():
    a, b = int8(20, 100, seed=1)[1:, 3:70], int8(67, 24, seed=2).t()
    assert torch.equal(matmul(a, b), int8_matmul_reference(a, b))
    x = floats(9, 101, seed=3)[:, 1:]
    compare(x, int8(5, 100, seed=4))
    compare(floats(100, 9, seed=3).t(), int8(5, 100, seed=4))


@needs_compiler
@pytest.mark.parametrize("quantization", [{}, {"asymmetric": True}, {"x_scale": 0.02}, {"x_scale": 0.02, "x_zero_point": -77}])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", ["64x64", "128x256", "few_16x8", "hopper_128x256", "hopper_128x128"])
def test_layer(config, dtype, quantization):
    compare(floats(11, 77, seed=1).to(dtype), int8(21, 77, seed=2), config, **quantization)


@needs_compiler
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "relu6", "hardswish"])
@pytest.mark.parametrize("config", ["64x128", "few_32x16", "hopper_128x256", "hopper_128x128"])
def test_activations(config, activation):
    compare(floats(17, 64, seed=1) * 3, int8(40, 64, seed=2), config, activation=activation, bias=False)


@needs_compiler
@pytest.mark.parametrize("config", ["128x128", "hopper_128x256", "hopper_128x128"])
@pytest.mark.parametrize("n", [136, 134, 131])
def test_vector_stores_reach_every_output(config, n):
    for dtype in DTYPES:  # N a multiple of eight outputs, of two, of none; M not of the tile
        compare(floats(70, 48, seed=1).to(dtype), int8(n, 48, seed=2), config)


@needs_compiler
@pytest.mark.parametrize("quantization", [{}, {"asymmetric": True}, {"x_scale": 0.5, "x_zero_point": 3}])
def test_rows_with_nan_inf_zero_and_tiny_values(quantization):
    x = floats(8, 50, seed=1)
    x[0, 3], x[1, 4], x[2, 5] = float("nan"), float("inf"), float("-inf")
    x[3], x[4], x[5] = 0, 2.0**-120, x[5].abs()
    x[6] = -x[6].abs()
    got = compare(x, int8(10, 50, seed=2), **quantization)
    assert bool(got[:3].isnan().all()) and bool(got[3:].isfinite().all())


@needs_compiler
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("k", [1, 15, 2100, 25000])  # a warp per row, a block per row, rows too long for shared memory
def test_lengths_of_rows(k, asymmetric):
    compare(floats(3, k, seed=1), int8(4, k, seed=2), asymmetric=asymmetric)
    compare(floats(3, k, seed=1).bfloat16(), int8(4, k, seed=2), asymmetric=asymmetric)


@needs_compiler
@pytest.mark.parametrize("shape", [(0, 5, 8), (3, 0, 8), (3, 5, 0)])
def test_empty(shape):
    m, n, k = shape
    for config in (None, "hopper_128x256", "hopper_128x128"):
        compare(floats(m, k, seed=1), int8(n, k, seed=2), config)
        a, b = int8(m, k, seed=1), int8(n, k, seed=2)
        assert torch.equal(matmul(a, b, config), int8_matmul_reference(a, b))


@needs_compiler
def test_inputs_of_three_dimensions():
    assert compare(floats(2, 3, 20, seed=1), int8(6, 20, seed=2)).shape == (2, 3, 6)


@needs_compiler
def test_more_rows_than_a_few_are_refused():
    with pytest.raises(RuntimeError, match="too many rows"):
        matmul(int8(17, 16, seed=1), int8(4, 16, seed=2), "few_16x16")


@needs_compiler
def test_configurations_agree_with_the_header():
    assert emulated().int8_gemm_configs() == CONFIGS
    with pytest.raises(ValueError, match="unknown configuration"):
        matmul(int8(1, 16, seed=1), int8(4, 16, seed=2), "256x256")


@pytest.mark.parametrize("k", [0, 1, 16, 33])
def test_plan_packs_weights_and_unpacks_them(k):
    weight = int8(5, k, seed=1)
    packed = pack(weight)
    assert packed.dtype == torch.int8 and packed.numel() == packed_bytes(5, k) and padded(k) % 16 == 0
    assert torch.equal(unpack(packed, 5, k), weight)
    assert torch.equal(packed[5 * padded(k) : 5 * padded(k) + 20].view(torch.int32), weight.sum(1, dtype=torch.int32))


def test_plan_takes_a_configuration_that_holds_the_rows():
    for m in (1, 16, 17, 32, 33, 100, 4096, 100_000):
        for n in (1, 128, 4096, 128_256):
            for capability in ((8, 0), HOPPER, (10, 0)):
                name = choose(m, n, 132, capability)
                assert not name.startswith("few") or m <= CONFIGS[name][0]
                assert not name.startswith("hopper") or capability == HOPPER
    assert choose(8192, 8192, 132) == "128x256"
    assert choose(40, 128, 132) == "64x64"
    assert choose(8192, 8192, 132, HOPPER) == choose(4096, 14336, 132, HOPPER) == "hopper_128x256"
    assert choose(512, 4096, 132, HOPPER) == "hopper_128x128"
    assert choose(2**30, 4096, 132, HOPPER) == "128x256"  # more rows than they count
