"""int8 linear layers on a GPU, bfloat16 in and out with quantization per token, against torch bfloat16, ``torch._int_mm`` with scales,
and torchao compiled.

    python benchmarks/gpu/bench_int8_linear.py [--cases 4096x4096x4096] [--write]

A case is M x N x K. The floor is the larger of two times: all bytes once at the bandwidth of a copy, and the products at twice the speed of
a large bfloat16 ``torch.mm`` measured here.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from bench_sparse24 import product_speed
from timing import copy_bandwidth, row, try_rival

from pycompress.nn import Int8Linear

CASES = [
    (1, 4096, 4096),
    (16, 4096, 14336),
    (64, 4096, 4096),
    (100, 1000, 1111),
    (512, 4096, 4096),
    (4096, 4096, 4096),
    (8192, 14336, 4096),
]


def int_mm(x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """What a user of torch's private product writes. It wants M > 16, and K and N that are multiples of 8."""
    amax = x.abs().amax(1, keepdim=True).float().clamp_min(1e-12) / 127
    rows = (x.float() / amax).round().to(torch.int8)
    return (torch._int_mm(rows, q.T).float() * (amax * scale)).to(x.dtype)


def torchao(dense: torch.nn.Linear, x: torch.Tensor) -> Callable[[], Any]:
    """Their int8 layer with dynamic int8 activations, compiled as they ask for."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = torch.nn.Sequential(copy.deepcopy(dense))
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    compiled = torch.compile(model)
    return lambda: compiled(x)


def rivals(m: int, n: int, k: int) -> tuple[dict[str, Callable[[], Any]], torch.Tensor]:
    with torch.random.fork_rng(devices=[0]):
        torch.manual_seed(0)
        dense = torch.nn.Linear(k, n, bias=False, device="cuda").bfloat16().requires_grad_(False)
        x = torch.randn(m, k, device="cuda").bfloat16()
    layer = Int8Linear.from_float(dense)
    q, scale = layer.int_weight.contiguous(), layer.scale
    table: dict[str, Callable[[], Any]] = {"torch bf16": lambda: dense(x), "pycompress int8": lambda: layer(x)}
    if m > 16 and n % 8 == 0 and k % 8 == 0:
        table["torch._int_mm"] = lambda: int_mm(x, q, scale)
        table["torch._int_mm compiled"] = torch.compile(lambda: int_mm(x, q, scale))
    if (theirs := try_rival("torchao int8", lambda: torchao(dense, x))) is not None:
        table["torchao int8"] = theirs
    return table, F.linear(x.double()[:64], dense.weight.double())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="", help="only cases whose name contains this")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_int8_linear: needs a CUDA device")
    bandwidth, speed = copy_bandwidth(), product_speed()
    for m, n, k in CASES:
        name = f"{m}x{n}x{k}"
        if arguments.cases not in name:
            continue
        table, want = rivals(m, n, k)
        for rival, step in table.items():
            error = float((step()[:64].double() - want).norm() / want.norm())
            wide = 2 if rival == "torch bf16" else 1
            floor = max((n * k * wide + 2 * m * (n + k)) / bandwidth, m * n * k * wide / 2 / speed)
            row("int8_linear", name, rival, step, floor, error, arguments.write)


if __name__ == "__main__":
    main()
