"""The CUDA kernels of 2:4 linear layers on the host, against the dense product; packing against CUTLASS's layout."""

from __future__ import annotations

import pytest
import torch
from support.cuda_emulation import ORDERS, needs_compiler
from support.cuda_sparse24 import emulated
from support.guard import guarded

from pycompress.ops.activation import ACTIVATE
from pycompress.ops.cuda.sparse24 import CONFIGS, HOPPER, Packed, choose, launch, pack, rows_of_bytes, unpack
from pycompress.ops.int8_linear import int8_linear_reference
from pycompress.ops.sparse24 import sparse24_compress, sparse24_mask
from pycompress.ops.sparse24_cutlass import sparse24_to_cutlass

DTYPES = [torch.int8, torch.bfloat16, torch.float16]


def random(*shape: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.int8:
        return torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
    return torch.randn(*shape, generator=generator).to(dtype)


def sparse_weight(n: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    weight = random(n, k, seed=1, dtype=dtype)
    return weight * sparse24_mask(random(n, k, seed=2, dtype=torch.float32))


def guarded_pack(weight: torch.Tensor) -> Packed:
    return Packed(*(guarded(t) for t in pack(*sparse24_compress(weight), weight.shape[1])))


@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(1, 4), (3, 5), (16, 64), (65, 130), (128, 256), (200, 36)])
def test_packing_is_reversible(n, k, dtype, pattern):
    weight = random(n, k, seed=1, dtype=dtype) * (random(n, k, seed=5, dtype=torch.float32) > 0)  # kept zeros keep their places
    values, indices = sparse24_compress(weight, sparse24_mask(random(n, k, seed=2, dtype=torch.float32), pattern), pattern=pattern)
    packed = pack(values, indices, k, pattern)
    assert packed.values.shape[0] % 128 == 0 and packed.values.shape[1] * packed.values.element_size() == 32 * packed.meta.shape[0]
    back = unpack(packed, n, k, pattern)
    assert torch.equal(back[0], values) and torch.equal(back[1], indices)


@pytest.mark.parametrize("dtype", DTYPES)
def test_words_are_those_of_cutlass(dtype):
    """CUTLASS keeps the words of one instruction next to each other, as well; rows of its tiles are neighbouring channels, ours are not."""
    n, k = 128, 256
    values, indices = sparse24_compress(sparse_weight(n, k, dtype))
    channel = torch.arange(n)  # which channel our tiles have where CUTLASS has this one
    tile, half, g = channel % 64 // 16, channel % 16 // 8, channel % 8
    ours = channel // 64 * 64 + 8 * g + 2 * tile + half
    _, meta = sparse24_to_cutlass(values[ours], indices[ours])
    small = dtype == torch.int8
    steps = k // (64 if small else 32)
    # ColumnMajorInterleaved<2>: two columns of words for all rows, then the next two.
    flat = meta.contiguous().view(-1)
    if small:
        theirs = flat.view(steps, n // 64, 128)
    else:
        theirs = flat.view(torch.int32).view(steps, n // 64, 64)
    assert torch.equal(theirs, pack(values, indices, k).meta)


@needs_compiler
@pytest.mark.parametrize("config", list(CONFIGS))
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 4), (3, 17, 36), (16, 64, 64), (33, 130, 200), (70, 72, 520), (129, 136, 320)])
def test_int8(m, n, k, config):
    x, weight = random(m, k, seed=3, dtype=torch.int8), sparse_weight(n, k, torch.int8)
    row_scale, col_scale = (
        torch.rand(m, generator=torch.Generator().manual_seed(4)),
        0.01 * torch.rand(n, generator=torch.Generator().manual_seed(5)),
    )
    bias = random(n, seed=6, dtype=torch.float32)
    want = (x.double() @ weight.double().T) * (row_scale[:, None] * col_scale).double() + bias.double()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        got = launch(
            emulated(), 0, rows_of_bytes(guarded(x)), guarded_pack(weight), n, bias=guarded(bias), activation="none", config=config,
            out_dtype=dtype, row_scale=guarded(row_scale), col_scale=guarded(col_scale),
        )  # fmt: skip
        assert got.dtype == dtype
        assert torch.allclose(
            got.double(), want, rtol={torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype], atol=1e-3
        )


@needs_compiler
@pytest.mark.parametrize("activation", list(ACTIVATE))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", list(CONFIGS))
@pytest.mark.parametrize(("m", "n", "k"), [(2, 9, 7), (17, 65, 136), (66, 130, 96)])
def test_floats(m, n, k, config, dtype, activation):
    x, weight, bias = random(m, k, seed=3, dtype=dtype), sparse_weight(n, k, dtype), random(n, seed=6, dtype=torch.float32)
    want = ACTIVATE[activation](x.double() @ weight.double().T + bias.double())
    got = launch(
        emulated(), 0, rows_of_bytes(guarded(x)), guarded_pack(weight), n, bias=guarded(bias), activation=activation, config=config,
        out_dtype=dtype,
    )  # fmt: skip
    assert torch.allclose(got.double(), want, rtol={torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype], atol=1e-3)


@needs_compiler
@pytest.mark.parametrize("order", list(ORDERS))
@pytest.mark.parametrize("config", list(CONFIGS))
def test_orders_of_threads(config, order):
    module = emulated()
    x, weight = random(20, 700, seed=3, dtype=torch.bfloat16), sparse_weight(70, 700, torch.bfloat16)
    module.set_order(ORDERS[order])
    try:
        got = launch(
            module, 0, rows_of_bytes(x), pack(*sparse24_compress(weight), 700), 70, bias=None, activation="none", config=config,
            out_dtype=torch.bfloat16,
        )  # fmt: skip
    finally:
        module.set_order(0)
    assert torch.allclose(got.double(), x.double() @ weight.double().T, rtol=2**-8, atol=1e-3)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("order", list(ORDERS))
def test_hopper_goes_on_over_several_tiles(order, dtype):
    m, n, k = 270, 530, 700  # more tiles than clusters, stages that do not divide the steps, a block of a cluster without channels
    x, weight = random(m, k, seed=3, dtype=dtype), sparse_weight(n, k, dtype)
    scales = {}
    if dtype == torch.int8:
        scales = {"row_scale": 0.01 * torch.arange(1, m + 1), "col_scale": torch.rand(n, generator=torch.Generator().manual_seed(5))}
    want = x.double() @ weight.double().T
    if scales:
        want = want * (scales["row_scale"][:, None] * scales["col_scale"]).double()
    emulated().set_order(ORDERS[order])
    try:
        got = launch(
            emulated(), 0, rows_of_bytes(x), pack(*sparse24_compress(weight), k), n, bias=None, activation="none", config="hopper",
            out_dtype=torch.float32 if scales else dtype, **scales,
        )  # fmt: skip
    finally:
        emulated().set_order(0)
    tolerance = 2.0**-22 if scales else 2.0**-8
    assert torch.allclose(got.double(), want, rtol=tolerance, atol=0 if scales else 1e-3)


@needs_compiler
def test_hopper_says_why_it_cannot_run():
    x, packed = random(3, 64, seed=3, dtype=torch.bfloat16), guarded_pack(sparse_weight(4, 64, torch.bfloat16))
    options = {"bias": None, "activation": "none", "config": "hopper", "out_dtype": torch.bfloat16}
    emulated().set_tensor_maps(0)
    try:
        with pytest.raises(RuntimeError, match="sparse24_linear: the driver has no cuTensorMapEncodeTiled; kernels for Hopper need one"):
            launch(emulated(), 0, x, packed, 4, **options)
    finally:
        emulated().set_tensor_maps(1)
    with pytest.raises(ValueError, match="sparse24_linear: kernels for Hopper count tokens, channels and k in 32 bits"):
        emulated().sparse24_gemm("hopper", 2**30, 4, 128, 2, *[0] * 3, 1, *[0] * 10)


@needs_compiler
def test_nan_behind_k_stays_out():
    wide = torch.full((4, 48), float("nan"), dtype=torch.bfloat16)
    wide[:, :40] = random(4, 40, seed=3, dtype=torch.bfloat16)
    weight = sparse_weight(8, 40, torch.bfloat16)
    x = wide[:, :40]  # rows aligned to 16 bytes, NaN behind them
    assert rows_of_bytes(x) is x
    for config in CONFIGS:
        got = launch(emulated(), 0, x, guarded_pack(weight), 8, bias=None, activation="none", config=config, out_dtype=torch.bfloat16)
        assert torch.allclose(got.double(), x.double() @ weight.double().T, rtol=2**-8, atol=1e-3)


@needs_compiler
def test_the_same_sums_as_the_reference_of_int8():
    x, weight = random(5, 128, seed=3, dtype=torch.float32), sparse_weight(24, 128, torch.int8)
    scale = torch.rand(24, generator=torch.Generator().manual_seed(5)) * 0.01
    row_scale = x.abs().amax(1) / 127
    q = (x * (1 / row_scale)[:, None]).round().clamp(-127, 127).to(torch.int8)
    got = launch(
        emulated(), 0, q, guarded_pack(weight), 24, bias=None, activation="relu", config="few", out_dtype=torch.float32,
        row_scale=row_scale, col_scale=scale,
    )  # fmt: skip
    assert torch.allclose(got, int8_linear_reference(x, weight, scale, activation="relu"), rtol=1e-6, atol=1e-6)


@needs_compiler
def test_configurations_agree_with_the_header():
    assert emulated().sparse24_configs() == CONFIGS
    with pytest.raises(ValueError, match="unknown configuration huge"):
        emulated().sparse24_gemm("huge", *[0] * 18)


def test_choice():
    assert {choose(m, 4096, 132) for m in (1, 16, 64)} == {"few"}
    assert choose(65, 4096, 132) == "64x64" and choose(4096, 4096, 132) == "128x128"
    assert choose(4096, 4096, 132, HOPPER) == "hopper" and choose(64, 4096, 132, HOPPER) == "few"
    assert choose(4096, 4096, 132, (10, 0)) == choose(2**30, 4096, 132, HOPPER) == "128x128"
