"""2:4 linear layers on a GPU against dense bfloat16, torch's 2:4 (cuSPARSELt and CUTLASS) and our dense int8; few rows of float32 against
dense float32.

    python benchmarks/gpu/bench_sparse24.py [--cases 4096x4096x4096] [--write]

A case is M x N x K. The floor is the larger of two times: all bytes once at the bandwidth of a copy, and the products of the dense
bfloat16 layer at the speed of a large ``torch.mm`` measured here, halved (2:4) and halved again for int8.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from timing import copy_bandwidth, event_times, row, try_rival

from pycompress.ops import int8_linear
from pycompress.ops.cuda import sparse24 as cuda
from pycompress.ops.cuda import sparse24_float as cuda_float
from pycompress.ops.int8_sparse24_linear import int8_sparse24_linear_packed
from pycompress.ops.sparse24 import sparse24_compress, sparse24_mask
from pycompress.ops.sparse24_linear import sparse24_linear_packed

CASES = [
    (1, 4096, 4096),
    (16, 4096, 14336),
    (64, 4096, 4096),
    (512, 4096, 4096),
    (4096, 4096, 4096),
    (8192, 14336, 4096),
    (8192, 4096, 14336),
]


def product_speed() -> float:
    """Multiply-adds per millisecond of a large bfloat16 product."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    times, _ = event_times(lambda: a @ a, 10)
    return 8192**3 / statistics.median(times)


def torch_sparse(weight: torch.Tensor, x: torch.Tensor, backend: str) -> Callable[[], Any]:
    """torch's 2:4 through one of its backends, which wants M, N and K that are multiples of some power of two."""
    from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

    kind = SparseSemiStructuredTensorCUSPARSELT if backend == "cuSPARSELt" else SparseSemiStructuredTensorCUTLASS
    theirs = kind.from_dense(weight)
    return lambda: F.linear(x, theirs)


def cusparselt_int8(weight: torch.Tensor, x: torch.Tensor) -> Callable[[], Any]:
    """cuSPARSELt's int8 product alone, int32 out: without the quantization of rows and the scales that ours includes."""
    compressed, columns = torch._cslt_compress(weight), x.T
    return lambda: torch._cslt_sparse_mm(compressed, columns, out_dtype=torch.int32)


def float32_rivals(m: int, n: int, k: int) -> dict[str, Callable[[], Any]]:
    generator = torch.Generator(device="cuda").manual_seed(0)
    x, w = (torch.randn(*s, device="cuda", generator=generator) for s in ((m, k), (n, k)))
    table: dict[str, Callable[[], Any]] = {"torch fp32": lambda: F.linear(x, w)}
    for pattern in ("2:4", "1:4"):
        values, indices = sparse24_compress(w, sparse24_mask(w.abs(), pattern), pattern=pattern)
        flat = cuda_float.to_flat(cuda_float.pack(values, indices))
        for way, few in (("few rows", True), ("dense weight", False)):
            table[f"pycompress {pattern} fp32, {way}"] = lambda f=flat, p=pattern, few=few: cuda_float.linear(x, f, None, n, p, "none", few)
    return table


def rivals(m: int, n: int, k: int) -> tuple[dict[str, tuple[Callable[[], Any], float]], torch.Tensor]:
    """Name to function and fraction of the dense products that it must do; and the float result."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    x, w = (torch.randn(*s, device="cuda", generator=generator).bfloat16() for s in ((m, k), (n, k)))
    weight = w * sparse24_mask(w.abs())
    scale = weight.float().abs().amax(1) / 127
    q = (weight.float() / scale[:, None]).round().clamp(-127, 127).to(torch.int8)
    flat = cuda_float.to_flat(cuda_float.pack(*sparse24_compress(weight.float())))
    flat8 = cuda.to_flat(cuda.pack(*sparse24_compress(q), k))
    table: dict[str, tuple[Callable[[], Any], float]] = {
        "torch bf16": (lambda: F.linear(x, weight), 1.0),
        "pycompress 2:4 bf16": (lambda: sparse24_linear_packed(x, flat, None, n, k, "2:4", "none", cuda.extension.NAME), 0.5),
        "pycompress int8": (lambda: int8_linear(x, q, scale), 0.5),
        "pycompress 2:4 int8": (
            lambda: int8_sparse24_linear_packed(x, flat8, scale, None, n, k, "2:4", None, "none", cuda.extension.NAME),
            0.25,
        ),
    }
    for backend in ("cuSPARSELt", "CUTLASS"):
        if (theirs := try_rival(f"{backend} 2:4 bf16", lambda: torch_sparse(weight, x, backend))) is not None:  # noqa: B023
            table[f"{backend} 2:4 bf16"] = (theirs, 0.5)
    rows = (x.float() / (x.abs().amax(1, keepdim=True).float() / 127)).round().to(torch.int8)
    if (theirs := try_rival("cuSPARSELt 2:4 int8 product", lambda: cusparselt_int8(q, rows))) is not None:
        table["cuSPARSELt 2:4 int8 product"] = (theirs, 0.25)
    return table, F.linear(x.double()[:64], weight.double())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="", help="only cases whose name contains this")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_sparse24: needs a CUDA device")
    bandwidth, speed = copy_bandwidth(), product_speed()
    for m, n, k in CASES:
        name = f"{m}x{n}x{k}"
        if arguments.cases not in name:
            continue
        table, want = rivals(m, n, k)
        for rival, (step, share) in table.items():
            product = rival.endswith("product")  # its integers are not the float result
            error = float("nan") if product else float((step()[:64].double() - want).norm() / want.norm())
            weight_bytes = n * k * (1 if "int8" in rival else 2) * (0.5 if "2:4" in rival else 1.0) + (n * k / 8 if "2:4" in rival else 0)
            floor = max((weight_bytes + 2 * m * (n + k)) / bandwidth, share * m * n * k / speed)
            row("sparse24", name, rival, step, floor, error, arguments.write)
        if m <= 64:
            for rival, step in float32_rivals(m, n, k).items():
                kept = 4.25 / 2 if "2:4" in rival else 4.25 / 4 if "1:4" in rival else 4.0
                floor = (kept * n * k + 4 * m * (n + k)) / bandwidth
                row("sparse24_fp32", name, rival, step, floor, float("nan"), arguments.write)


if __name__ == "__main__":
    main()
