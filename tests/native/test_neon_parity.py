"""The NEON kernels, cross-compiled and run under qemu-user; on an ARM machine test_native_parity.py runs them for real."""

import platform

import pytest
from support.parity_program import build, run, tool

KERNELS = {
    "int8_matmul": "neon_i8mm neon_dotprod neon",
    "int8_conv2d": "neon_i8mm neon_dotprod neon",
    "int4_matmul": "neon_i8mm neon_dotprod neon",
    "int8_weight": "neon",
    "int8_sparse24": "neon_dotprod neon",
    "sparse24_gemm": "neon",
    "kd_loss": "neon",
}


@pytest.mark.skipif(platform.machine() == "aarch64", reason="this machine runs NEON itself: test_native_parity.py")
def test_neon_kernels_agree_under_qemu(tmp_path):
    compiler, qemu = tool("aarch64-linux-gnu-g++"), tool("qemu-aarch64", "qemu-aarch64-static")
    system = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={compiler}"]
    program = build(tmp_path, *system, "-DCMAKE_CXX_FLAGS_RELEASE=-O2", "-DCMAKE_EXE_LINKER_FLAGS=-static")
    output = run(qemu, "-cpu", "max", program, "--one-thread")  # how threads share the work is the same everywhere
    for op, kernels in KERNELS.items():
        assert f"{op} kernels: {kernels} scalar\n" in output
    assert output.rstrip().endswith("\n0 failures")
