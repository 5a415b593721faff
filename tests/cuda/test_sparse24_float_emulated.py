"""The CUDA kernels of 2:4 and 1:4 weights in float32 on the host, against the dense product in float64."""

from __future__ import annotations

import pytest
import torch
from support.cuda_emulation import ORDERS, needs_compiler
from support.cuda_sparse24 import emulated
from support.guard import guarded

from pycompress.ops.activation import ACTIVATE
from pycompress.ops.cuda import extension
from pycompress.ops.cuda.sparse24_float import FEW_ROWS, choose, dense, from_flat, linear, pack, packed_bytes, to_flat, unpack
from pycompress.ops.sparse24 import sparse24_compress, sparse24_mask, sparse24_to_dense

PATTERNS = ["2:4", "1:4"]


@pytest.fixture(autouse=True)
def _emulated(monkeypatch, request):
    if "plan" in request.node.name:
        return
    monkeypatch.setattr(extension, "module", emulated())
    monkeypatch.setattr(extension, "stream", lambda device: 0)
    monkeypatch.setattr(extension, "multiprocessors", lambda device: 4)
    monkeypatch.setattr(extension, "capability", lambda index: (8, 0))


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sparse(n: int, k: int, pattern: str) -> tuple[torch.Tensor, torch.Tensor]:
    return sparse24_compress(random(n, k, seed=1), sparse24_mask(random(n, k, seed=2), pattern), pattern=pattern)


@needs_compiler
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 1, 1), (1, 9, 4), (2, 5, 1030), (3, 17, 36), (5, 64, 65), (8, 13, 200), (19, 6, 1111), (40, 33, 77)]
)
def test_few_rows(m, n, k, pattern):
    values, indices = sparse(n, k, pattern)
    x, bias = random(m, k, seed=3), random(n, seed=4) if m > 1 else None
    got = linear(guarded(x), guarded(to_flat(pack(values, indices))), bias, n, pattern, "relu", True)
    weight = sparse24_to_dense(values, indices, k, pattern=pattern).double()
    want = torch.relu(x.double() @ weight.T + (0 if bias is None else bias.double()))
    size = x.double().abs() @ weight.abs().T + (0 if bias is None else bias.double().abs())
    # A lane adds its terms one after the other, then five steps of a warp and four warps.
    terms = -(-k // 4) / 64 + 12
    assert bool(((got.double() - want).abs() <= terms * 2.0**-24 * size + 1e-30).all())


@needs_compiler
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("k", [1, 4, 36, 131])
def test_the_dense_weight_and_the_library(k, pattern):
    values, indices = sparse(11, k, pattern)
    flat = guarded(to_flat(pack(values, indices)))
    weight = sparse24_to_dense(values, indices, k, pattern=pattern)
    assert torch.equal(dense(flat, 11, k, pattern), weight)
    x, bias = random(50, k, seed=3), random(11, seed=4)
    for activation, function in ACTIVATE.items():
        got = linear(x, flat, bias, 11, pattern, activation)
        torch.testing.assert_close(got, function(torch.nn.functional.linear(x, weight, bias)))
        torch.testing.assert_close(linear(x, flat, bias, 11, pattern, activation, True), got, rtol=1e-5, atol=1e-5)


@needs_compiler
def test_nan_behind_k_and_other_rows_stay_out():
    values, indices = sparse(8, 40, "2:4")
    wide = torch.full((4, 48), float("nan"))
    wide[:, :40] = random(4, 40, seed=3)
    flat = to_flat(pack(values, indices))
    assert bool(linear(wide[:, :40], flat, None, 8, "2:4", "none").isfinite().all())
    wide[1, 3] = float("inf")
    got = linear(wide[:, :40], flat, None, 8, "2:4", "none")
    assert bool(got[[0, 2, 3]].isfinite().all())


@needs_compiler
@pytest.mark.parametrize("order", ["backward", "shuffled"])
def test_no_order_of_threads_matters(order):
    values, indices = sparse(40, 3000, "2:4")
    x, flat = random(12, 3000, seed=3), to_flat(pack(values, indices))
    want = linear(x, flat, None, 40, "2:4", "none")
    emulated().set_order(ORDERS[order])
    try:
        assert torch.equal(linear(x, flat, None, 40, "2:4", "none"), want)
    finally:
        emulated().set_order(ORDERS["forward"])


@needs_compiler
@pytest.mark.parametrize("shape", [(0, 5, 8), (3, 0, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_empty(shape, dtype):
    m, n, k = shape
    flat = to_flat(pack(*sparse(n, k, "2:4")))
    assert linear(random(m, k, seed=3).to(dtype), flat, None, n, "2:4", "none").shape == (m, n)
    assert dense(flat, n, k, "2:4").shape == (n, k)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 5), (16, 64), (7, 130)])
def test_plan_packs_and_unpacks(n, k, pattern):
    values, indices = sparse(n, k, pattern)
    flat = to_flat(pack(values, indices))
    assert flat.numel() == packed_bytes(n, k, pattern)
    back = unpack(from_flat(flat, n, k, pattern), k, pattern)
    assert torch.equal(back[0], values) and torch.equal(back[1], indices)


def test_plan_streams_few_rows_only():
    assert choose(1) and choose(FEW_ROWS) and not choose(FEW_ROWS + 1)
