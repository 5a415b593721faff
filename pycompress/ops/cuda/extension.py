"""The CUDA extension, if there is one: whether its kernels run on a device, and if not, why.

``PYCOMPRESS_DISABLE_NATIVE=1`` switches it off like every native kernel. Nothing here touches a GPU before a CUDA tensor asks.
"""

from __future__ import annotations

import os
from types import ModuleType

import torch

from .. import native

NAME = "cuda"
"""The kernel name of every op's CUDA kernels, beside the CPU's and ``"reference"``."""
MIN_CAPABILITY = (8, 0)


def _load() -> tuple[ModuleType | None, str | None]:
    if os.environ.get("PYCOMPRESS_DISABLE_NATIVE", "0").lower() not in ("", "0", "false", "no"):
        return None, "switched off by PYCOMPRESS_DISABLE_NATIVE=1"
    try:
        from ... import _C_cuda  # type: ignore[attr-defined,unused-ignore]
    except ImportError as error:
        return None, f"the extension pycompress._C_cuda is not installed or does not load ({error}); build it with PYCOMPRESS_CUDA=1"
    return _C_cuda, None


module, missing_reason = _load()
"""The extension module or None, and the reason why it is None."""


def unsupported_reason(capability: tuple[int, int], driver: int, runtime: int) -> str | None:
    """Why kernels cannot run on a device of this compute capability, or None. Versions as CUDA has them: 1000 * major + 10 * minor.

    A driver runs every toolkit of its own major version (CUDA compatibility guide, minor version compatibility).
    """
    if capability < MIN_CAPABILITY:
        return "compute capability {}.{}, the kernels need {}.{}".format(*capability, *MIN_CAPABILITY)
    if driver // 1000 < runtime // 1000:
        has, needs = (f"{v // 1000}.{v % 1000 // 10}" for v in (driver, runtime))
        return f"a driver for CUDA {has}, the kernels were built with {needs}"
    return None


@torch.compiler.assume_constant_result
def unsupported(index: int) -> str | None:
    """Why the kernels do not run on CUDA device ``index`` of this process, or None."""
    if module is None:
        return missing_reason
    if index not in _known:
        _known[index] = unsupported_reason(torch.cuda.get_device_capability(index), module.driver_version(), module.runtime_version)
    return _known[index]


_known: dict[int, str | None] = {}


@torch.compiler.assume_constant_result
def capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def kernel_for(op: str, x: torch.Tensor, kernel: str | None, where: str) -> str:
    """The kernel for a tensor: ``NAME`` on a GPU that the kernels run on, those of ``native`` on the CPU only. ``where`` names the caller
    in errors."""
    if x.device.type == "cuda" and kernel in (None, NAME):
        reason = unsupported(x.device.index or 0)
        if reason is None or kernel is None:
            return NAME if reason is None else native.REFERENCE
        raise ValueError(f"{where}: kernel {kernel!r} cannot run on {x.device}: {reason}")
    name = native.resolve(op, kernel, where)
    if x.device.type == "cpu" or name == native.REFERENCE:
        return name
    if kernel is not None:
        raise ValueError(f"{where}: kernel {kernel!r} needs a CPU tensor, got one on {x.device}")
    return native.REFERENCE


def fallback_reason(op: str, device: torch.device) -> str:
    """Why ``op`` runs its reference on a device."""
    if device.type == "cuda":
        return f"on {device}: {unsupported(device.index or 0)}"
    return native.fallback_reason(op) or f"no native kernel for {device.type} tensors"


def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def stream(device: torch.device) -> int:
    """The address of the stream that torch uses now on this device."""
    return torch.cuda.current_stream(device).cuda_stream


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on torch's current stream."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def wait(device: torch.device) -> None:
    """Until the work on torch's current stream is done: for what is made once and then used by every stream."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
