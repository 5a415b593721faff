"""Weight-only linear layers, and int4 weights with int8 activations, on a GPU, bfloat16 in and out, against torch bfloat16 and torchao
where it is installed.

    python benchmarks/gpu/bench_weight_only.py [--cases 1x14336x4096] [--write]

A case is M x N x K; the layers are int8 with a scale per output and int4 with a scale (and zero point) per 128 inputs. The floor is the
larger of two times: all bytes once at the bandwidth of a copy, and the products at the speed of a large bfloat16 ``torch.mm`` (twice
that with int8 activations).
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

from pycompress.nn import Int4Linear, Int8WeightOnlyLinear
from pycompress.ops.cuda import int4_int8, weight_only

CASES = [
    (1, 4096, 4096),
    (1, 14336, 4096),
    (1, 4096, 14336),
    (4, 14336, 4096),
    (16, 4096, 4096),
    (16, 14336, 4096),
    (16, 28672, 8192),
    (32, 14336, 4096),
    (128, 14336, 4096),
    (2048, 14336, 4096),
]
BYTES = {"int4, int8 activations": 0.5 + 4 / 128, "int8": 1.0, "int4": 0.5 + 4 / 128, "int4 asymmetric": 0.5 + 5 / 128, "bf16": 2.0}


def torchao(dense: torch.nn.Linear, kind: str, x: torch.Tensor) -> Callable[[], Any]:
    """Their layer, compiled as they ask for."""
    from torchao import quantization

    if kind == "int8":
        config = quantization.Int8WeightOnlyConfig()
    elif kind == "int4":
        config = quantization.Int4WeightOnlyConfig(group_size=128)
    else:
        config = quantization.Int8DynamicActivationInt4WeightConfig(group_size=128)
    model = torch.nn.Sequential(copy.deepcopy(dense))
    quantization.quantize_(model, config)
    compiled = torch.compile(model)
    return lambda: compiled(x)


def rivals(m: int, n: int, k: int) -> tuple[dict[str, tuple[str, Callable[[], Any]]], torch.Tensor]:
    """Name to format and function; and the float result."""
    with torch.random.fork_rng(devices=[0]):
        torch.manual_seed(0)
        dense = torch.nn.Linear(k, n, bias=False, device="cuda").bfloat16().requires_grad_(False)
        x = torch.randn(m, k, device="cuda").bfloat16()
    layers = {
        "int8": Int8WeightOnlyLinear.from_float(dense),
        "int4": Int4Linear.from_float(dense),
        "int4 asymmetric": Int4Linear.from_float(dense, symmetric=False),
        "int4, int8 activations": Int4Linear.from_float(dense, int8_activations=True),
    }
    table: dict[str, tuple[str, Callable[[], Any]]] = {"torch bf16": ("bf16", lambda: dense(x))}
    for name, layer in layers.items():
        table[f"pycompress {name}"] = (name, lambda layer=layer: layer(x))
    int8 = layers["int8"]
    for config, (rows, _) in weight_only.CONFIGS.items():
        if m <= 2 * rows:
            table[f"  int8 {config}"] = ("int8", lambda c=config: weight_only.linear_int8(x, int8.packed, int8.scale, None, c))
    activations = layers["int4, int8 activations"]
    for config, (rows, _) in int4_int8.CONFIGS.items():
        if m <= 2 * rows or not config.startswith("few"):
            table[f"  int4 x int8 {config}"] = (
                "int4, int8 activations",
                lambda c=config: int4_int8.linear(x, activations.packed, None, n, 128, False, "none", c),
            )
    for kind in ("int8", "int4", "int4, int8 activations"):
        if (theirs := try_rival(f"torchao {kind}", lambda: torchao(dense, kind, x))) is not None:  # noqa: B023
            table[f"torchao {kind}"] = (kind, theirs)
    return table, F.linear(x.double()[:64], dense.weight.double())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="", help="only cases whose name contains this")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_weight_only: needs a CUDA device")
    bandwidth, speed = copy_bandwidth(), product_speed()
    for m, n, k in CASES:
        name = f"{m}x{n}x{k}"
        if arguments.cases not in name:
            continue
        table, want = rivals(m, n, k)
        for rival, (kind, step) in table.items():
            error = float((step()[:64].double() - want).norm() / want.norm())
            products = m * n * k / speed / (2 if kind == "int4, int8 activations" else 1)
            floor = max((n * k * BYTES[kind] + 2 * m * (n + k)) / bandwidth, products)
            row("weight_only", name, rival, step, floor, error, arguments.write)


if __name__ == "__main__":
    main()
