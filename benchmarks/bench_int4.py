"""int4 and int8 weights, float in and out: weight-only at small M, int8 x int4 at large M, against torch fp32 and our own int8.

    python benchmarks/bench_int4.py [--threads 2] [--rivals pycompress] [--cases cold] [--write]

Activations are random normal, weights and bias those of a fresh nn.Linear; the error column is that of rounding to 4 (or 8) bits. A
"cold" case rotates over layers whose fp32 weights together pass 1 GB, so that int4 weights do not fit the last-level cache either.
"""

from __future__ import annotations

import copy
import functools
import itertools
from typing import Any

import harness
import torch
from harness import Rival
from torch import nn

COLD_BYTES = 1 << 30


def case(m: int, k: int, n: int, cold: bool = False) -> dict[str, Any]:
    layers = max(2, COLD_BYTES // (4 * k * n)) if cold else 1
    return {"name": f"{m}x{k}x{n}{' cold' if cold else ''}", "m": m, "k": k, "n": n, "layers": layers}


CASES = [
    case(1, 4096, 4096, cold=True),
    case(4, 4096, 4096, cold=True),
    case(8, 4096, 4096, cold=True),
    case(32, 768, 3072),
    case(128, 768, 3072),
    case(512, 1024, 1024),
    case(1024, 1024, 4096),
    case(1, 64, 64),
]


def copies(layer, count: int) -> list[Any]:
    """The layer and equal ones in other memory, which is all that "cold" asks for and takes less time than as many different ones."""
    return [layer, *(copy.deepcopy(layer) for _ in range(count - 1))]


@functools.lru_cache(maxsize=1)
def _inputs(m: int, k: int, n: int) -> tuple[torch.Tensor, nn.Linear]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torch.randn(m, k), nn.Linear(k, n).requires_grad_(False)


def inputs(case: dict[str, Any]) -> tuple[torch.Tensor, nn.Linear]:
    return _inputs(case["m"], case["k"], case["n"])


def expected(case: dict[str, Any]) -> torch.Tensor:
    x, layer = inputs(case)
    return layer(x)


def macs(case: dict[str, Any]) -> float:
    return case["m"] * case["k"] * case["n"]


def in_turn(functions):
    """A function that calls the given ones in turn, the first one first."""
    turn = itertools.cycle(functions)
    return lambda: next(turn)()


def torch_fp32(case):
    x, layer = inputs(case)
    return in_turn([functools.partial(layer, x) for layer in copies(layer, case["layers"])])


def torch_bf16(case):
    """Half the bytes of fp32, for the memory-bound cases."""
    x, layer = inputs(case)
    half, x = copies(copy.deepcopy(layer).bfloat16(), case["layers"]), x.bfloat16()
    return in_turn([lambda layer=layer: layer(x) for layer in half])


def torch_int4(case):
    """PyTorch's own int4 weight-only kernel, bfloat16 activations, groups of 128 (private: this is what torchao calls on CPUs)."""
    from pycompress.ops.int4 import quantize_weight_int4, unpack_nibbles

    x, linear = inputs(case)
    x, k = x.bfloat16(), case["k"]

    def pack(layer):
        weight, scale, _ = quantize_weight_int4(layer.weight, 128)
        packed = torch._convert_weight_to_int4pack_for_cpu(unpack_nibbles(weight, k).int(), 1)
        # Its zero points are floats around the middle of the range: w = (u - 8) * scale + zero.
        qparams = torch.stack((scale.T, torch.zeros_like(scale.T)), dim=-1).contiguous().bfloat16()
        return packed, qparams, layer.bias.bfloat16()

    packs = copies(pack(linear), case["layers"])
    return in_turn([lambda p=p: torch._weight_int4pack_mm_for_cpu(x, p[0], 128, p[1]) + p[2] for p in packs])


def ours(kernel: str | None = None, layer_type: str = "Int8Linear", **options):
    def build(case):
        from pycompress import nn as compressed

        x, layer = inputs(case)
        kind = compressed.Int4Linear if "group_size" in options else getattr(compressed, layer_type)
        quantized = copies(kind.from_float(layer, **options), case["layers"])
        if kernel and quantized[0].kernel != kernel:
            raise RuntimeError(f"kernel {quantized[0].kernel} runs instead of {kernel}")
        return in_turn([functools.partial(layer, x) for layer in quantized])

    return build


AVX2 = {"PYCOMPRESS_ISA": "avx2"}
W4A8 = {"int8_activations": True}
RIVALS = {
    "torch fp32": Rival(torch_fp32),
    "torch bf16": Rival(torch_bf16),
    "torch int4 g128 (bf16)": Rival(torch_int4),
    "pycompress int8": Rival(ours()),
    "pycompress int8 weight-only": Rival(ours(layer_type="Int8WeightOnlyLinear")),
    "pycompress int4 g128": Rival(ours(group_size=128)),
    "pycompress int4 g32": Rival(ours(group_size=32)),
    "pycompress int4 g128 asymmetric": Rival(ours(group_size=128, symmetric=False)),
    "pycompress int8 x int4 g128": Rival(ours(group_size=128, **W4A8)),
    "pycompress int8 x int4 g32": Rival(ours(group_size=32, **W4A8)),
    "pycompress int8 avx2": Rival(ours("avx2"), env=AVX2),
    "pycompress int8 weight-only avx2": Rival(ours("avx2", "Int8WeightOnlyLinear"), env=AVX2),
    "pycompress int4 g128 avx2": Rival(ours("avx2", group_size=128), env=AVX2),
    "pycompress int4 g32 avx2": Rival(ours("avx2", group_size=32), env=AVX2),
    "pycompress int8 x int4 g128 avx2": Rival(ours("avx2", group_size=128, **W4A8), env=AVX2),
    "pycompress int8 x int4 g64 avx2": Rival(ours("avx2", group_size=64, **W4A8), env=AVX2),
    "pycompress int8 x int4 g32 avx2": Rival(ours("avx2", group_size=32, **W4A8), env=AVX2),
}

if __name__ == "__main__":
    harness.run("int4", cases=CASES, rivals=RIVALS, expected=expected, work=macs, baseline="torch fp32")
