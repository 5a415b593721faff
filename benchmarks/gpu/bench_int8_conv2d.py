"""int8 convolutions on a GPU, bfloat16 in and out, against torch bfloat16 (channels_last) and torch fp32, eager and compiled.

    python benchmarks/gpu/bench_int8_conv2d.py [--cases 32x64x56] [--configs] [--write]

A case is batch x channels x size - outputs, kernel, stride and groups. Ours run as they would in a model: dynamic (a scale per image),
static, and in the middle of a chain with int8 in and out. ``--configs`` adds every configuration of the chain. torch fp32 is what torch
does by default, which is TF32. The floor is the larger of two times: all bytes once at the bandwidth of a copy, and the products at
twice the speed (fp32: half) of a large bfloat16 ``torch.mm`` measured here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from bench_sparse24 import product_speed
from timing import copy_bandwidth, row

from pycompress.nn import Int8Conv2d
from pycompress.ops.cuda import int8_conv2d as cuda


class Case(NamedTuple):
    n: int
    c: int
    size: int
    o: int
    k: int
    stride: int = 1
    groups: int = 1

    def __str__(self) -> str:
        return f"{self.n}x{self.c}x{self.size}-{self.o}k{self.k}s{self.stride}g{self.groups}"


CASES = [
    *(Case(n, c, size, o, k, stride) for n in (1, 32) for c, size, o, k, stride in (
        (3, 224, 64, 7, 2), (64, 56, 64, 3, 1), (64, 56, 256, 1, 1), (128, 28, 128, 3, 1), (256, 56, 512, 1, 2), (256, 14, 256, 3, 1),
        (1024, 14, 256, 1, 1), (512, 7, 512, 3, 1),
    )),
    Case(32, 128, 56, 128, 3, 1, 32),
    Case(32, 96, 112, 96, 3, 2, 96),
    Case(32, 384, 14, 384, 3, 1, 384),
    Case(32, 96, 56, 96, 7, 1, 96),
]  # fmt: skip
ELEMENT = {"torch bf16": (2, 2, 2), "torch fp32": (4, 4, 4), "pycompress": (2, 1, 2), "pycompress chain": (1, 1, 1)}
"""Bytes of an element of x, weight and result."""


def rivals(case: Case, configs: bool) -> tuple[dict[str, Callable[[], Any]], torch.Tensor]:
    """Name to function, and the float result of the first image."""
    n, c, size, o, k, stride, groups = case
    with torch.random.fork_rng(devices=[0]):
        torch.manual_seed(0)
        dense = torch.nn.Conv2d(c, o, k, stride, k // 2, groups=groups, bias=False, device="cuda").requires_grad_(False)
        x = torch.randn(n, c, size, size, device="cuda").to(memory_format=torch.channels_last)
    half = torch.nn.Conv2d(c, o, k, stride, k // 2, groups=groups, bias=False, device="cuda").bfloat16().requires_grad_(False)
    half.load_state_dict(dense.state_dict())
    half = half.to(memory_format=torch.channels_last)
    x16, x_scale = x.bfloat16(), float(x.abs().max()) / 127
    want = F.conv2d(x[:1].double(), dense.weight.double(), None, stride, k // 2, 1, groups)
    out_scale = float(want.abs().max()) / 127
    dynamic, static = Int8Conv2d.from_float(dense), Int8Conv2d.from_float(dense, x_scale=x_scale)
    chained = static.with_int8_output(out_scale)
    q = (x / x_scale).round().clamp(-127, 127).to(torch.int8)
    table: dict[str, Callable[[], Any]] = {
        "torch bf16": lambda: half(x16),
        "torch bf16 compiled": torch.compile(lambda: half(x16)),
        "torch fp32": lambda: dense(x),
        "torch fp32 compiled": torch.compile(lambda: dense(x)),
        "pycompress dynamic": lambda: dynamic(x16),
        "pycompress static": lambda: static(x16),
        "pycompress chain": lambda: chained(q),
    }
    plan = cuda.layout(c, o, k, k, groups)
    for config, (_, _, unit) in cuda.CONFIGS.items():
        if configs and unit == plan.unit and not plan.depthwise:
            table[f"pycompress chain {config}"] = lambda config=config: forced(chained, q, config)
    return table, want


def forced(layer: Int8Conv2d, q: torch.Tensor, config: str) -> torch.Tensor:
    geometry = layer._geometry
    return cuda.conv2d(
        q, layer.packed, layer.scale, layer.bias, None, geometry, layer._x_scale, None, torch.int8, layer._out_scale, None, None, None,
        "none", out_size=geometry.out_size(*q.shape[2:]), channels_last=True, out_channels_last=True, config=config,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="", help="only cases whose name contains this")
    parser.add_argument("--configs", action="store_true", help="every configuration, not only the chosen one")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_int8_conv2d: needs a CUDA device")
    bandwidth, speed = copy_bandwidth(), product_speed()
    for case in CASES:
        if arguments.cases not in str(case):
            continue
        table, want = rivals(case, arguments.configs)
        scale = float(want.abs().max()) / 127
        for rival, step in table.items():
            y = step()[:1]
            error = float((y.double() * (scale if y.dtype == torch.int8 else 1) - want).norm() / want.norm())
            wide = next(bytes_ for name, bytes_ in reversed(ELEMENT.items()) if rival.startswith(name))
            weights = case.o * case.c // case.groups * case.k**2
            size = case.n * case.c * case.size**2 * wide[0] + weights * wide[1] + case.n * want.numel() * wide[2]
            floor = max(size / bandwidth, case.n * want[0, 0].numel() * weights * wide[1] / 2 / speed)  # 1, 2 or 4 bytes a weight
            row("int8_conv2d", str(case), rival, step, floor, error, arguments.write)


if __name__ == "__main__":
    main()
