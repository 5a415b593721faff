"""The emulator of CUDA's execution model, before anything else is shown with it."""

from __future__ import annotations

import ctypes

import pytest
import torch
from support.cuda_emulation import ORDERS, library, needs_compiler

pytestmark = needs_compiler


@pytest.fixture(scope="module", params=list(ORDERS))
def lib(request):
    loaded = library("tests/cuda_emulation/self_test.cu")
    loaded.emulation_set_order.argtypes = [ctypes.c_uint64]
    loaded.emulation_set_order(ORDERS[request.param])
    for name in ("sums", "reverse", "racy_reverse", "count", "votes", "cluster_sums", "deferred_copy", "faulty"):
        getattr(loaded, f"run_{name}").restype = ctypes.c_char_p
    loaded.order = request.param
    return loaded


def at(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def integers(*shape: int) -> torch.Tensor:
    return torch.randint(-100, 100, shape, dtype=torch.int32, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("threads", [32, 96, 1024])
def test_shuffles_and_static_shared_memory_add_up(lib, threads):
    values, out = integers(5, 333), torch.zeros(5, dtype=torch.int32)
    assert lib.run_sums(at(values), 5, 333, threads, at(out)) == b""
    assert torch.equal(out, values.sum(1, dtype=torch.int32))


def test_dynamic_shared_memory_and_barrier(lib):
    values, out = integers(128), torch.zeros(128, dtype=torch.int32)
    assert lib.run_reverse(at(values), 128, at(out)) == b""
    assert torch.equal(out, values.flip(0))


def test_missing_barrier_shows_as_poison(lib):
    values, out = integers(128), torch.zeros(128, dtype=torch.int32)
    assert lib.run_racy_reverse(at(values), 128, at(out)) == b""
    assert (out == -1).any() and not torch.equal(out, values.flip(0))


def test_atomics_and_the_last_block(lib):
    values = torch.randint(0, 7, (4 * 64,), dtype=torch.int32, generator=torch.Generator().manual_seed(3))
    histogram, tickets, last = torch.zeros(7, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), torch.full((1,), -1, dtype=torch.int32)
    assert lib.run_count(at(values), 4, at(histogram), at(tickets), at(last)) == b""
    assert torch.equal(histogram.long(), values.bincount(minlength=7))
    assert int(last) == 3 and int(tickets) == 0


def test_votes_masks_and_widths(lib):
    out = torch.zeros(4, 32, dtype=torch.int32)
    assert lib.run_votes(at(out)) == b""
    lane = torch.arange(32)
    assert [v & 0xFFFFFFFF for v in out[0].tolist()] == [0xAAAAAAAA] * 32
    assert out[1].tolist() == [sum(range(16))] * 16 + [sum(range(16, 32))] * 16
    assert out[2].tolist() == torch.where(lane >= 3, lane - 3, lane).tolist()
    assert out[3].tolist() == torch.where(lane % 8 + 5 < 8, lane + 5, lane).tolist()


@pytest.mark.parametrize("size", [1, 2, 8])
def test_clusters_share_static_and_dynamic_memory(lib, size):
    clusters = 3
    out = torch.zeros(clusters, size, 32, dtype=torch.int32)
    assert lib.run_cluster_sums(clusters, size, at(out)) == b""
    block = torch.arange(clusters * size).view(clusters, size, 1)
    want = (101 * block + torch.arange(32)).sum(1, keepdim=True).repeat(1, size, 1)
    want[:, -1] = 0  # it took away what block 0 wrote into its memory
    assert torch.equal(out.long(), want)


def test_asynchronous_copies_happen_when_they_are_waited_for(lib):
    values, out = integers(128), torch.zeros(128, dtype=torch.int32)
    assert lib.run_deferred_copy(at(values), at(out), 1) == b""
    assert torch.equal(out.view(32, 4), values.view(32, 4).flip(0))
    assert lib.run_deferred_copy(at(values), at(out), 0) == b""
    assert (out == -1).all()


def test_shared_memory_starts_as_poison(lib):
    out = torch.zeros(32, dtype=torch.int32)
    assert lib.run_faulty(b"reads_unwritten_shared", at(out)) == b""
    assert out.tolist() == [1] * 32


@pytest.mark.parametrize(
    ("kernel", "texts"),
    [
        ("half_barrier", ("deadlock: 16 threads wait in __syncthreads at line", "16 threads have left the kernel")),
        ("divergent_barrier", ("divergent __syncthreads at line", "block (0, 0, 0) thread (")),
        ("lonely_shuffle", ("deadlock: 31 threads wait in __shfl_xor_sync", "1 threads have left")),
        ("foreign_mask", ("is not in its own mask",)),
        ("writes_past_shared", ("a write outside of dynamic shared memory (32 bytes)",)),
        ("too_many_threads", ("block",)),
        ("too_much_shared", ("more dynamic shared memory than was asked for",)),
        ("odd_cluster", ("cluster",)),
    ],
)
def test_what_would_hang_or_corrupt_is_reported(lib, kernel, texts):
    out = torch.zeros(32, dtype=torch.int32)
    message = lib.run_faulty(kernel.encode(), at(out)).decode()
    assert all(text in message for text in texts), message
    assert lib.run_reverse(at(out), 32, at(out)) == b""  # and the next launch works


@pytest.mark.parametrize(("bf16", "dtype"), [(1, torch.bfloat16), (0, torch.float16)])
def test_half_precision_rounds_as_torch(lib, bf16, dtype):
    generator = torch.Generator().manual_seed(5)
    values = torch.randn(400, generator=generator) * 2.0 ** torch.randint(-30, 20, (400,), generator=generator)
    values = torch.cat([values, torch.tensor([0.0, -0.0, 65504.0, 65519.9, 65520.0, 1e30, float("inf"), -float("inf"), 2.0**-25, 3e-8])])
    lib.to_half_and_back.restype, lib.to_half_and_back.argtypes = ctypes.c_float, [ctypes.c_float, ctypes.c_int]
    got = torch.tensor([lib.to_half_and_back(v, bf16) for v in values.tolist()])
    assert torch.equal(got, values.to(dtype).float())
    assert lib.to_half_and_back(float("nan"), bf16) != lib.to_half_and_back(float("nan"), bf16)
