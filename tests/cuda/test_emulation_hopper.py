"""The emulator's copy engine, mbarrier and wgmma, before anything else is shown with them."""

from __future__ import annotations

import ctypes
import re

import pytest
import torch
from support.cuda_emulation import ORDERS, library, needs_compiler
from support.guard import guarded

pytestmark = needs_compiler

FAULTS = ["none", "no_fence", "no_wait", "no_commit", "early_overwrite", "odd_lane", "half_group", "wrong_stride"]
"""Of the matrix product, by their numbers in hopper_self_test.cu."""


@pytest.fixture(scope="module", params=list(ORDERS))
def lib(request):
    loaded = library("tests/cuda_emulation/hopper_self_test.cu")
    loaded.emulation_set_order.argtypes = [ctypes.c_uint64]
    loaded.emulation_set_order(ORDERS[request.param])
    for name in ("fetch", "pipeline", "multiply", "hopper_fault"):
        getattr(loaded, f"run_{name}").restype = ctypes.c_char_p
    loaded.run_fetch.argtypes = [ctypes.c_void_p, *[ctypes.c_int64] * 3, *[ctypes.c_int] * 5, ctypes.c_void_p]
    loaded.order = request.param
    return loaded


def at(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def int8(*shape: int, seed: int) -> torch.Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize(("x", "y"), [(0, 0), (112, 0), (0, 13), (128, 13), (-16, -3), (640, 0), (0, 99)])
def test_boxes_and_zeros_outside(lib, x, y, blocks):
    matrix = guarded(int8(20, 208, seed=1))  # 192 bytes count, the rest of a row does not
    out = torch.zeros(blocks, 16, 128, dtype=torch.int8)
    assert lib.run_fetch(at(matrix), 20, 192, 208, 16, x, y, blocks, 1, at(out)) == b""
    want = torch.zeros(16, 128, dtype=torch.int8)
    for row in range(16):
        for byte in range(128):
            if 0 <= y + row < 20 and 0 <= x + byte < 192:
                want[row, byte] = matrix[y + row, x + byte]
    assert all(torch.equal(block, want) for block in out)


def test_a_copy_that_nobody_waits_for(lib):
    matrix, out = int8(16, 128, seed=1), torch.zeros(16, 128, dtype=torch.int8)
    message = lib.run_fetch(at(matrix), 16, 128, 128, 16, 0, 0, 1, 0, at(out)).decode()
    if lib.order == "forward":
        assert bool((out == -1).all()) and "copies are on their way" in message
    elif lib.order == "backward":
        assert torch.equal(out, matrix) and message == ""


def test_a_pipeline(lib):
    matrix, out = torch.randint(0, 99, (88, 128), dtype=torch.uint8), torch.zeros(32, dtype=torch.int32)
    assert lib.run_pipeline(at(matrix), 11, 1, at(out)) == b""
    want = matrix.int().view(88, 8, 4, 4).sum((0, 3), dtype=torch.int32).flatten()
    assert torch.equal(out, want)
    message = lib.run_pipeline(at(matrix), 11, 0, at(out)).decode()
    assert message or not torch.equal(out, want)  # stages were overwritten before they were read


@pytest.mark.parametrize("swizzle", [0, 1, 2, 3])
@pytest.mark.parametrize("n", [128, 256])
def test_products(lib, n, swizzle):
    a, b, out = int8(64, 128, seed=1), int8(n, 128, seed=2), torch.zeros(64, n, dtype=torch.int32)
    a[0], b[0] = -128, -128
    assert lib.run_multiply(at(a), at(b), n, swizzle, 0, at(out)) == b""
    want = (a.double() @ b.double().T).int()
    assert torch.equal(out, want)
    message = lib.run_multiply(at(a), at(b), n, swizzle, FAULTS.index("wrong_stride"), at(out)).decode()
    assert "out of shared memory" in message or not torch.equal(out, want)


@pytest.mark.parametrize(
    ("fault", "texts"),
    [
        ("no_fence", ("no wgmma.fence since its sums last were the thread's",)),
        ("no_wait", ("leaves the kernel without a wait",)),
        ("no_commit", ("leaves the kernel without a wait",)),
        ("early_overwrite", ("changed while it was in use",)),
        ("odd_lane", ("descriptors must be the same in all lanes",)),
        ("half_group", ("deadlock: 64 threads wait in wgmma",)),
    ],
)
def test_faulty_products(lib, fault, texts):
    a, b, out = int8(64, 128, seed=1), int8(128, 128, seed=2), torch.zeros(64, 128, dtype=torch.int32)
    message = lib.run_multiply(at(a), at(b), 128, 1, FAULTS.index(fault), at(out)).decode()
    assert all(text in message for text in texts), message
    if fault in ("no_wait", "no_commit"):
        assert not torch.equal(out, (a.double() @ b.double().T).int())


@pytest.mark.parametrize(
    ("kernel", "text"),
    [
        ("uses_no_barrier", "used before it was initialised"),
        ("waits_for_ever", r"deadlock: 32 threads wait in mbarrier at line \d+"),
        ("arrives_too_often", "more threads arrive than"),
        ("barrier_without_fence", "not followed by fence.mbarrier_init"),
        ("sets_registers_alone", "deadlock: 32 threads wait in setmaxnreg"),
        ("no_tensor_map", "something that cuTensorMapEncodeTiled did not make"),
        ("odd_stride", r"test: the driver refused a tensor map for sizes 128 8 and strides 136 \(CUDA driver error 1\)"),
        ("copy_to_odd_place", "must be aligned to 128 bytes"),
        ("copy_past_the_end", "ends behind shared memory"),
    ],
)
def test_what_would_hang_or_corrupt_is_reported(lib, kernel, text):
    matrix = int8(8, 144, seed=1)
    message = lib.run_hopper_fault(kernel.encode(), at(matrix)).decode()
    assert re.search(text, message), message


def test_an_old_driver_has_no_tensor_maps(lib):
    lib.emulation_set_tensor_maps(0)
    try:
        assert b"test: the driver has no cuTensorMapEncodeTiled" in lib.run_hopper_fault(b"odd_stride", at(int8(8, 144, seed=1)))
    finally:
        lib.emulation_set_tensor_maps(1)
