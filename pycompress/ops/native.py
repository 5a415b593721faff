"""The compiled extension, if there is one: what it offers, why it is missing, and how it is forced.

Environment, read once at import:

- ``PYCOMPRESS_DISABLE_NATIVE=1``  every op runs its PyTorch reference
- ``PYCOMPRESS_REQUIRE_NATIVE=1``  a missing extension is an ImportError instead of a fallback
- ``PYCOMPRESS_ISA=scalar``        no kernel above this instruction set is chosen; an unavailable one raises
"""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType

import torch

REFERENCE = "reference"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Element types by their number in csrc/core/types.h."""
ACTIVATIONS = {None: 0, "none": 0, "relu": 1, "gelu": 2, "silu": 3, "relu6": 4, "hardswish": 5}
"""Fused activations by their number in csrc/core/types.h."""


def _flag(name: str) -> bool:
    return os.environ.get(name, "0").lower() not in ("", "0", "false", "no")


def _libtorch_cpu() -> str:
    """The libtorch_cpu that this process has loaded ("" on systems where the extension uses its own threads)."""
    folder = Path(torch.__file__).parent / "lib"
    found = [folder / name for name in ("libtorch_cpu.so", "libtorch_cpu.dylib") if (folder / name).exists()]
    return str(found[0]) if found else ""


def _load() -> tuple[ModuleType | None, str | None]:
    isa, disabled, required = os.environ.get("PYCOMPRESS_ISA", ""), _flag("PYCOMPRESS_DISABLE_NATIVE"), _flag("PYCOMPRESS_REQUIRE_NATIVE")
    if disabled and (required or isa):
        raise ImportError("PYCOMPRESS_DISABLE_NATIVE=1 contradicts PYCOMPRESS_REQUIRE_NATIVE and PYCOMPRESS_ISA; unset one of them")
    if disabled:
        return None, "switched off by PYCOMPRESS_DISABLE_NATIVE=1"
    try:
        from .. import _C
    except ImportError as error:
        reason = f"the extension pycompress._C is not installed or does not load ({error})"
        if required or isa:
            raise ImportError(f"PYCOMPRESS_REQUIRE_NATIVE or PYCOMPRESS_ISA is set, but {reason}") from error
        return None, reason
    _C.attach_torch(_libtorch_cpu())
    _C.set_pool_threads(torch.get_num_threads())
    _C.force_isa(isa)
    return _C, None


module, missing_reason = _load()
"""The extension module or None, and the reason why it is None."""


# Read once into a plain dict: Dynamo traces a look-up, but not a call into the extension.
_KERNELS: dict[str, tuple[str, ...]] = {
    name.removesuffix("_kernels"): tuple(getattr(module, name)()) for name in dir(module) if name.endswith("_kernels")
}
# Ops that share the kernels of another one.
for _op, _shared in (
    ("int8_linear", "int8_matmul"),
    ("int4_linear", "int4_matmul"),
    ("linear_kd_loss", "kd_loss"),
    ("sparse24_conv2d", "sparse24_linear"),
    ("int8_sparse24_conv2d", "int8_sparse24_linear"),
):
    if _shared in _KERNELS:
        _KERNELS[_op] = _KERNELS[_shared]


def kernels(op: str) -> list[str]:
    """Names of the kernels that can run ``op`` here, best first; the last one is always ``"reference"``."""
    return [*_KERNELS.get(op, ()), REFERENCE]


def resolve(op: str, kernel: str | None, where: str = "") -> str:
    """The kernel that a call with ``kernel=`` runs: the best one for None. Raises ``ValueError`` for an unknown name."""
    names = kernels(op)
    if kernel is None:
        return names[0]
    if kernel not in names:
        raise ValueError(f"{where or op}: kernel must be one of {', '.join(names)} on this machine, got {kernel!r}")
    return kernel


def fallback_reason(op: str) -> str | None:
    """Why ``op`` runs its reference here, or None if a native kernel runs."""
    if kernels(op)[0] != REFERENCE:
        return None
    return missing_reason or f"the extension has no kernel for {op}"
