"""What every op does on a GPU beside its arithmetic: devices, memory, alignment, drivers. Emulated kernels, CPU tensors."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from support import cuda_ops
from support.cuda_emulation import needs_compiler

from pycompress.ops.cuda import extension

pytestmark = needs_compiler


@pytest.fixture
def module(monkeypatch):
    module = cuda_ops.use(monkeypatch)
    module.take_launches()  # of other tests
    return module


def x_of(rows: int = 3) -> torch.Tensor:
    return cuda_ops.random(rows, cuda_ops.K, seed=5)


@pytest.mark.parametrize("name", cuda_ops.NAMES)
def test_launches_are_on_the_tensor_s_device(module, name):
    """Every launch on the device that was handed over, which is current only meanwhile."""
    op = cuda_ops.table()[name]
    for rows in (3, 40):
        for device in (0, 1):
            module.device = device
            module.take_launches()
            op(x_of(rows))
            launches = module.take_launches()
            assert launches and set(launches) == {device} and module.current_devices() == {0}


@pytest.mark.parametrize("name", cuda_ops.NAMES)
def test_a_device_that_does_not_exist(module, name):
    op = cuda_ops.table()[name]
    module.device = 7
    with pytest.raises(RuntimeError, match=r"\w+( \(.*\))?: CUDA error: invalid device ordinal"):
        op(x_of())
    assert module.take_launches() == [] and module.current_devices() == {0}
    module.device = None
    assert op(x_of()) is not None  # the error was reported once and is gone


@pytest.mark.parametrize("name", cuda_ops.NAMES)
def test_out_of_memory_anywhere(module, monkeypatch, name):
    """Whichever allocation fails: torch's error comes out, nothing was launched, nothing is kept, and the next call is right."""
    op, x = cuda_ops.table()[name], x_of()
    want, before = op(x), x.clone()
    allocated: list[weakref.ref[torch.Tensor]] = []
    module.calls.clear()
    failing, empty = -1, torch.empty

    def counted(*arguments, **options):
        if len(allocated) == failing:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB (test)")
        tensor = empty(*arguments, **options)
        allocated.append(weakref.ref(tensor))
        return tensor

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", counted)
        assert torch.equal(op(x), want)
        count = len(allocated)
        assert count >= 1
        for failing in range(count):  # noqa: B007 - read by counted()
            allocated.clear()
            module.calls.clear()
            with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
                op(x)
            assert set(module.calls) <= {"KdLossCudaPlan"}, "a launch before all workspaces were there"
            gc.collect()
            assert not [1 for tensor in allocated if tensor() is not None], "a workspace outlived the call"
    assert torch.equal(x, before) and torch.equal(op(x), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", cuda_ops.NAMES)
def test_views_at_any_offset_and_stride(module, name, dtype):
    """Rows that start at no multiple of 16 bytes, lie apart, or are columns: the same result as for a fresh copy."""
    op, k = cuda_ops.table()[name], cuda_ops.K
    wide, tall = cuda_ops.random(7, k + 11, seed=6).to(dtype), cuda_ops.random(k, 7, seed=7).to(dtype)
    flat = cuda_ops.random(5 * k + 1, seed=8).to(dtype)
    for view in (wide[:, 1 : k + 1], wide[::2, 3 : k + 3], tall.T, flat[1:].view(5, k), wide[2:3, 5 : k + 5], wide[:1, :k].expand(4, k)):
        torch.testing.assert_close(op(view), op(view.clone(memory_format=torch.contiguous_format)), rtol=0, atol=0)


@pytest.mark.parametrize("name", cuda_ops.NAMES)
def test_the_extension_really_ran(module, name):
    """The tests above mean something: each op calls kernels, and never more than a few."""
    op, x = cuda_ops.table()[name], x_of()
    module.calls.clear()
    op(x)
    assert 1 <= len(module.calls) <= 3, module.calls


def test_reasons_are_asked_once_per_device(monkeypatch):
    asked = []
    monkeypatch.setattr(extension, "_known", {})
    monkeypatch.setattr(extension, "module", type("M", (), {"driver_version": staticmethod(lambda: 12040), "runtime_version": 13000}))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: asked.append(index) or ((9, 0), (7, 5))[index])
    for _ in range(2):
        assert extension.unsupported(0) == "a driver for CUDA 12.4, the kernels were built with 13.0"
        assert extension.unsupported(1) == "compute capability 7.5, the kernels need 8.0"
    assert asked == [0, 1]
    assert extension.fallback_reason("int8_matmul", torch.device("cuda:1")) == "on cuda:1: compute capability 7.5, the kernels need 8.0"
