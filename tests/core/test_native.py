"""The extension itself: present where it must be, forced as asked, on torch's threads."""

import os
import subprocess
import sys

import pytest
import torch

from pycompress import ops
from pycompress.ops import native

needs_native = pytest.mark.skipif(native.module is None, reason="this run has no extension on purpose (PYCOMPRESS_DISABLE_NATIVE)")


def python(code, **environment):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYCOMPRESS_")}
    return subprocess.run([sys.executable, "-c", code], env={**clean, **environment}, capture_output=True, text=True, timeout=120)


def test_extension_is_there_unless_switched_off():
    """A broken build would make every other test compare the reference with itself."""
    if os.environ.get("PYCOMPRESS_DISABLE_NATIVE", "0") == "1":
        assert native.module is None
        assert "PYCOMPRESS_DISABLE_NATIVE" in native.missing_reason
        assert native.kernels("int8_matmul") == ["reference"]
    elif os.environ.get("PYCOMPRESS_EXPECT_NATIVE", "1") == "1":
        assert native.module is not None, native.missing_reason
        assert "scalar" in native.kernels("int8_matmul")


@needs_native
def test_vector_kernel_is_best_where_the_cpu_has_one():
    if not os.environ.get("PYCOMPRESS_ISA") and "avx2" in native.module.isa_available():
        assert native.kernels("int8_matmul")[0] != "scalar"
        assert "avx2" in native.kernels("int8_matmul")


@needs_native
@pytest.mark.parametrize("op", [name for name in ops.__all__ if f"{name}_reference" in ops.__all__])
def test_every_op_with_a_reference_has_kernels(op):
    """Those that run the kernels of another op, too: the doctor lists them."""
    assert native.kernels(op)[0] != "reference" and native.fallback_reason(op) is None


@needs_native
def test_forced_isa():
    code = "from pycompress.ops import native; print(native.kernels('int8_matmul'))"
    assert python(code, PYCOMPRESS_ISA="scalar").stdout.strip() == "['scalar', 'reference']"
    if "avx2" in native.module.isa_available():
        assert python(code, PYCOMPRESS_ISA="avx2").stdout.strip() == "['avx2', 'scalar', 'reference']"
    bad = python(code, PYCOMPRESS_ISA="avx9")
    assert bad.returncode != 0
    assert "PYCOMPRESS_ISA must be one of scalar" in bad.stderr
    assert "got 'avx9'" in bad.stderr


def test_disabled_extension_and_contradictions():
    code = "from pycompress.ops import native; print(native.kernels('int8_matmul'), native.missing_reason)"
    assert "['reference'] switched off by PYCOMPRESS_DISABLE_NATIVE=1" in python(code, PYCOMPRESS_DISABLE_NATIVE="1").stdout
    assert "contradicts" in python(code, PYCOMPRESS_DISABLE_NATIVE="1", PYCOMPRESS_REQUIRE_NATIVE="1").stderr
    assert "contradicts" in python(code, PYCOMPRESS_DISABLE_NATIVE="1", PYCOMPRESS_ISA="scalar").stderr


def test_missing_extension_is_a_fallback_or_an_error():
    hide = "import sys; sys.modules['pycompress._C'] = None\n"
    code = hide + "from pycompress.ops import native; print(native.kernels('int8_matmul'), native.missing_reason)"
    fallback = python(code)
    assert "['reference'] the extension pycompress._C is not installed or does not load" in fallback.stdout
    required = python(code, PYCOMPRESS_REQUIRE_NATIVE="1")
    assert required.returncode != 0
    assert "PYCOMPRESS_REQUIRE_NATIVE or PYCOMPRESS_ISA is set, but the extension" in required.stderr


@needs_native
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_borrows_torchs_threads_and_loads_no_other_runtime():
    code = """
import torch
def runtimes():
    names = {line.split()[-1].rsplit('/', 1)[-1] for line in open('/proc/self/maps') if '.so' in line}
    return sorted(n for n in names if any(t in n for t in ('gomp', 'libomp', 'iomp', 'tbb')))
x = torch.randn(300, 300); x @ x
before = runtimes()
from pycompress.ops import native, int8_matmul
a = torch.ones(600, 600, dtype=torch.int8)
for n in (1, 2, 3):
    torch.set_num_threads(n)
    assert native.module.num_threads() == n, (n, native.module.num_threads())
    assert int8_matmul(a, a)[0, 0] == 600
assert native.module.thread_backend() in ('torch', 'gomp'), native.module.thread_backend()
assert runtimes() == before, (before, runtimes())
print('fine')
"""
    result = python(code)
    assert result.stdout.strip() == "fine", result.stderr


@needs_native
def test_all_thread_backends_give_the_same_result():
    code = """
import torch
from pycompress.ops import native, int8_matmul
native.module.attach_torch('')          # as on a system where torch's threads cannot be found
native.module.set_pool_threads(3)
assert native.module.thread_backend() == 'pool' and native.module.num_threads() == 3
g = torch.Generator().manual_seed(0)
for m, n, k in [(1, 2000, 300), (400, 300, 200), (7, 5, 3)]:
    a, b = (torch.randint(-128, 128, (s, k), dtype=torch.int8, generator=g) for s in (m, n))
    for _ in range(20):
        assert torch.equal(int8_matmul(a, b), (a.long() @ b.long().T).int())
import threading
def call():
    for _ in range(20):
        assert int8_matmul(a, b).shape == (7, 5)
ts = [threading.Thread(target=call) for _ in range(6)]; [t.start() for t in ts]; [t.join() for t in ts]
print('fine')
"""
    result = python(code)
    assert result.stdout.strip() == "fine", result.stderr


@needs_native
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_neither_hangs_nor_differs():
    code = """
import os, torch
from pycompress.ops import int8_matmul, native
torch.set_num_threads(2)
a = torch.randint(-128, 128, (300, 300), dtype=torch.int8)
expected = int8_matmul(a, a).numpy().tobytes()  # starts the parent's worker threads
pid = os.fork()
if pid == 0:
    os._exit(0 if native.module.num_threads() == 1 and int8_matmul(a, a).numpy().tobytes() == expected else 1)
assert os.waitpid(pid, 0)[1] == 0
print('fine')
"""
    result = python(code)
    assert result.stdout.strip() == "fine", result.stderr


@needs_native
def test_serial_inside_a_data_loader_worker():
    code = """
import torch
from torch.utils.data import DataLoader, Dataset
from pycompress.ops import int8_matmul
a = torch.randint(-128, 128, (200, 200), dtype=torch.int8)
expected = int8_matmul(a, a)
class Data(Dataset):
    def __len__(self): return 6
    def __getitem__(self, i): return torch.equal(int8_matmul(a, a), expected)
if __name__ == '__main__':
    assert all(bool(ok) for ok in DataLoader(Data(), num_workers=2))
    print('fine')
"""
    result = python(code)
    assert result.stdout.strip() == "fine", result.stderr


@needs_native
def test_extension_links_no_openmp_and_no_torch():
    from pathlib import Path

    binary = Path(native.module.__file__).read_bytes()
    for name in (b"libgomp", b"libiomp", b"libomp.so", b"libtorch", b"libc10"):
        assert name + b".so" not in binary, name


def test_ops_need_torch_only_once():
    assert torch.ops.pycompress.int8_matmul is not None
