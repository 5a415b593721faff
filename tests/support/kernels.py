"""Kernel names for parametrisation, as this test run sees them (native, PYCOMPRESS_ISA, or no extension)."""

from pycompress.ops import native


def native_kernels(op: str) -> list[str]:
    """Every kernel of an op but the reference; empty only if the extension is missing, which test_native.py judges."""
    return native.kernels(op)[:-1]


def all_kernels(op: str) -> list[str]:
    return native.kernels(op)
