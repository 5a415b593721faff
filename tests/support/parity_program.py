"""Builds and runs the parity program (no Python in it), for this machine or for another one."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def tool(*names: str) -> str:
    """The first of these programs that is installed; skips the test with the reason if there is none."""
    for name in names:
        if path := shutil.which(name):
            return path
    pytest.skip(f"needs {' or '.join(names)}, which is not installed")


def run(*command: str | Path, timeout: int = 600, **environment: str) -> str:
    """Output of a command that must succeed."""
    done = subprocess.run(
        [str(c) for c in command], env={**os.environ, **environment}, capture_output=True, text=True, timeout=timeout, check=False
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, f"{' '.join(str(c) for c in command)} ended with {done.returncode}:\n{output[-6000:]}"
    return output


def build(folder: Path, *options: str) -> Path:
    """The parity program, built in ``folder``. ``-O1`` halves the time to compile and changes no kernel's loads and stores."""
    cmake = tool("cmake")
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    run(cmake, "-S", ROOT, "-B", folder, *generator, "-DPYCOMPRESS_NATIVE_TESTS=ON", "-DCMAKE_BUILD_TYPE=Release", *options)
    run(cmake, "--build", folder, "--parallel", str(os.cpu_count() or 1))
    return folder / "pycompress_parity"
