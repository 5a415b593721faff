"""Build CUDA sources for the host under the emulator in tests/cuda_emulation, and load them."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
HEADERS = ROOT / "tests" / "cuda_emulation"
_compiler = shutil.which("g++")

needs_compiler = pytest.mark.skipif(
    _compiler is None or sys.platform != "linux", reason="the CUDA emulator is built with g++ on Linux; there is none here"
)

ALIGNED = ("-fsanitize=alignment", "-fno-sanitize-recover=alignment")
"""A misaligned access, harmless on this processor, is an error on a GPU."""

ORDERS = {"forward": 0, "backward": 1, "shuffled": 20261124}
"""In which order the threads of a block take their turns: a missing barrier that one order hides shows in another."""


def library(*sources: str | Path, arch: int = 90, flags: Sequence[str] = ()) -> ctypes.CDLL:
    """The sources (relative to the repository) as a shared library; ``arch`` is what ``__CUDA_ARCH__`` / 10 is."""
    return ctypes.CDLL(str(_build(tuple(str(s) for s in sources), arch, tuple(flags))))


def extension(name: str, *sources: str | Path, arch: int = 90, flags: Sequence[str] = ()) -> ModuleType:
    """The sources as a Python extension module called ``name``; one of them is its ``PYBIND11_MODULE``.

    ``flags``: ``ALIGNED`` also ends the process at a misaligned access, for tests whose arrays are aligned as torch's are.
    """
    pybind11 = pytest.importorskip("pybind11", reason="the bindings of CUDA ops are built with pybind11")
    include = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    path = _build(tuple(str(s) for s in sources), arch, (*include, *flags))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def _build(sources: tuple[str, ...], arch: int, flags: tuple[str, ...]) -> Path:
    """Compiled once per content: kept in the temporary folder under a hash of everything that goes in.

    Undefined behaviour ends the process with a text.
    """
    assert _compiler is not None
    command = [
        _compiler, "-std=c++17", "-O1", "-g1", "-shared", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique", "-ffp-contract=off",
        "-Wall", "-Wno-unknown-pragmas", "-fsanitize=undefined", "-fno-sanitize=vptr,alignment", "-fno-sanitize-recover=undefined",
        f"-D__CUDA_ARCH__={arch * 10}", "-DPYCOMPRESS_CUDA_EMULATION=1", f"-I{HEADERS}", f"-I{ROOT / 'csrc'}", *flags,
    ]  # fmt: skip
    digest = hashlib.sha256(" ".join(command).encode())
    for path in sorted(
        [*HEADERS.glob("*.h"), *(ROOT / "tests/cuda").glob("*.h"), *(ROOT / "csrc").rglob("*.*h"), *(ROOT / s for s in sources)]
    ):
        digest.update(str(path).encode() + path.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"pycompress-emulation-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    target = folder / f"{digest.hexdigest()[:24]}.so"
    import fcntl  # not on Windows, where needs_compiler skips

    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # pytest's workers want the same library at the same time
        if not target.exists():
            temporary = target.with_suffix(".part")
            paths = [str(ROOT / s) for s in sources]
            result = subprocess.run([*command, "-x", "c++", *paths, "-o", str(temporary)], capture_output=True, text=True)
            assert result.returncode == 0, f"g++ failed on {', '.join(sources)}:\n{result.stderr[-6000:]}"
            os.replace(temporary, target)
    return target
