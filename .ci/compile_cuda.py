#!/usr/bin/env python3
"""Compiles every .cu file for sm_80 and sm_90a, and fails on spilled registers and on tensor-core kernels without tensor-core instructions.

    python .ci/compile_cuda.py [FILE ...]        # needs nvcc; a few minutes on two cores

Spills come from ptxas. Tensor-core instructions are looked for in the machine code (IMMA, HMMA) where ``cuobjdump`` is there, else in the
PTX (mma.sync, mma.sp), which ptxas has then accepted.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = ("80", "90a")
TENSOR_CORES = {"int8_gemm": ("IMMA", r"mma\.sync"), "weight_few": ("HMMA", r"mma\.sync"), "sparse24": ("(IMMA|HMMA).SP", r"mma\.sp")}
"""Part of a file's name -> what its machine code, or else its PTX, must contain."""


def compile_one(source: Path) -> list[str]:
    """What is wrong with a file, one line each."""
    start, problems = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as folder:
        gencode = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
        command = ["nvcc", "-std=c++17", "-O3", "--fmad=false", "-I", "csrc", *gencode, "-Xptxas", "-v", "--keep", "--keep-dir", folder]
        run = subprocess.run([*command, "-c", str(source), "-o", f"{folder}/out.o"], cwd=ROOT, capture_output=True, text=True, check=False)
        if run.returncode != 0:
            return [f"{source.name}: nvcc failed\n{run.stderr}"]
        functions = re.findall(
            r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads", run.stderr, re.S
        )
        if len({arch for _, arch, _, _ in functions}) != len(ARCHITECTURES):
            problems.append(f"{source.name}: ptxas reported kernels for {sorted({a for _, a, _, _ in functions})} only")
        problems += [
            f"{source.name}: {name} for {arch} spills {stores} bytes" for name, arch, stores, loads in functions if stores + loads != "00"
        ]
        problems += missing_instructions(source, Path(folder))
    print(f"{source.name}: {len(functions)} kernels, {time.perf_counter() - start:.0f} s", flush=True)
    return problems


def missing_instructions(source: Path, folder: Path) -> list[str]:
    wanted = next((patterns for part, patterns in TENSOR_CORES.items() if part in source.name), None)
    if wanted is None:
        return []
    if shutil.which("cuobjdump"):
        listing = subprocess.run(["cuobjdump", "-sass", f"{folder}/out.o"], capture_output=True, text=True, check=True).stdout
        pattern, found = wanted[0], re.search(wanted[0], listing) is not None
    else:
        texts = [path.read_text() for path in folder.glob("*.ptx")]
        pattern, found = wanted[1], bool(texts) and all(re.search(wanted[1], text) for text in texts)
    return [] if found else [f"{source.name}: no {pattern} in its code"]


def main() -> int:
    sources = [Path(name).resolve() for name in sys.argv[1:]] or sorted(ROOT.glob("csrc/*/*.cu"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        problems = [line for found in pool.map(compile_one, sources) for line in found]
    print("\n".join(problems) or f"{len(sources)} files compiled for {', '.join('sm_' + a for a in ARCHITECTURES)} without spills")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
