#!/usr/bin/env python3
"""Compiles every .cu file for sm_80 and sm_90a (those for Hopper only for that), and fails on spilled registers, on warnings that the
compiler serialises wgmma or ignores setmaxnreg, and on tensor-core kernels that lack tensor-core instructions or go through local memory.

    python .ci/compile_cuda.py [FILE ...]        # needs nvcc; a few minutes on two cores

Spills come from ptxas. The rest is looked for in the machine code (IMMA, HMMA, IGMMA; LDL, STL) of each architecture where ``cuobjdump``
is on the PATH or installed (pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm), else in the PTX (mma.sync, mma.sp, wgmma), which
ptxas has then accepted.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = ("80", "90a")
TENSOR_CORES = {
    "int8_gemm_hopper": ("IGMMA", r"wgmma\.mma_async"),
    "int8_gemm": ("IMMA", r"mma\.sync"),
    "int4_int8": ("IMMA", r"mma\.sync"),
    "int8_conv2d_gemm": ("IMMA", r"mma\.sync"),
    "weight_few": ("HMMA", r"mma\.sync"),
    "sparse24_hopper": (r"(IGMMA|HGMMA)\.SP", r"wgmma\.mma_async\.sp"),
    "sparse24": ("(IMMA|HMMA).SP", r"mma\.sp"),
}
"""Part of a file's name -> what its machine code, or else its PTX, must contain; the first that fits."""
COPY_ENGINE = ("UTMALDG", r"cp\.async\.bulk\.tensor")
"""What kernels for Hopper contain, too."""
WARNINGS = re.compile(r".*(?:C7508|C7510|wgmma|setmaxnreg).*")
"""Lines of ptxas about instructions of Hopper that do not do what they are there for."""


def architectures(source: Path) -> tuple[str, ...]:
    """As in cmake/cuda.cmake."""
    return ("90a",) if "_hopper_" in source.name else ARCHITECTURES


def compile_one(source: Path) -> list[str]:
    """What is wrong with a file, one line each."""
    start, problems = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as folder:
        gencode = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures(source)]
        command = ["nvcc", "-std=c++17", "-O3", "--fmad=false", "-I", "csrc", *gencode, "-Xptxas", "-v", "--keep", "--keep-dir", folder]
        run = subprocess.run([*command, "-c", str(source), "-o", f"{folder}/out.o"], cwd=ROOT, capture_output=True, text=True, check=False)
        if run.returncode != 0:
            return [f"{source.name}: nvcc failed\n{run.stderr}"]
        functions = re.findall(
            r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads", run.stderr, re.S
        )
        if len({arch for _, arch, _, _ in functions}) != len(architectures(source)):
            problems.append(f"{source.name}: ptxas reported kernels for {sorted({a for _, a, _, _ in functions})} only")
        problems += [
            f"{source.name}: {name} for {arch} spills {stores} bytes" for name, arch, stores, loads in functions if stores + loads != "00"
        ]
        problems += [f"{source.name}: {line}" for line in sorted(set(WARNINGS.findall(run.stderr)))]
        problems += missing_instructions(source, Path(folder))
    print(f"{source.name}: {len(functions)} kernels, {time.perf_counter() - start:.0f} s", flush=True)
    return problems


def missing_instructions(source: Path, folder: Path) -> list[str]:
    wanted = [next((patterns for part, patterns in TENSOR_CORES.items() if part in source.name), None)]
    if wanted == [None]:
        return []
    if "_hopper_" in source.name:
        wanted.append(COPY_ENGINE)
    if TOOLS is None:
        texts = [path.read_text() for path in folder.glob("*.ptx")]
        return [f"{source.name}: no {ptx} in its PTX" for _, ptx in wanted if not texts or not all(re.search(ptx, text) for text in texts)]
    problems = []
    for arch in architectures(source):
        command = [f"{TOOLS}/cuobjdump", "-sass", "-arch", f"sm_{arch}", f"{folder}/out.o"]
        environment = {**os.environ, "PATH": f"{TOOLS}{os.pathsep}{os.environ['PATH']}"}  # where it looks for nvdisasm
        listing = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
        problems += [f"{source.name}: no {sass} in its machine code for sm_{arch}" for sass, _ in wanted if not re.search(sass, listing)]
        if local := re.findall(r"\b(?:LDL|STL)\b", listing):
            problems.append(f"{source.name}: {len(local)} accesses to local memory in its machine code for sm_{arch}")
    return problems


def find_tools() -> str | None:
    """The folder of cuobjdump, of a CUDA toolkit or of the wheels."""
    if found := shutil.which("cuobjdump"):
        return str(Path(found).parent)
    return next((str(path.parent) for path in Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin/cuobjdump")), None)


TOOLS = find_tools()


def main() -> int:
    sources = [Path(name).resolve() for name in sys.argv[1:]] or sorted(ROOT.glob("csrc/*/*.cu"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        problems = [line for found in pool.map(compile_one, sources) for line in found]
    checked = "PTX" if TOOLS is None else "machine code"
    compiled = ", ".join("sm_" + arch for arch in ARCHITECTURES)
    print("\n".join(problems) or f"{len(sources)} files compiled for {compiled} without spills, {checked} checked")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
