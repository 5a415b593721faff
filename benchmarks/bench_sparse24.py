"""2:4 and 1:4 sparse linear, fp32 and int8, against our own dense int8, torch fp32 and ONNX Runtime.

    python benchmarks/bench_sparse24.py [--threads 2] [--rivals sparse,ORT] [--cases 1024] [--write]

The weights are those of a fresh nn.Linear, pruned by magnitude; every rival computes with them, the dense ones with the zeros. In cases
named "1:4" the weights are pruned to 1:4; there "as 2:4" runs them on the 2:4 kernels, with a zero beside each value.
MAC/c counts the multiply-accumulates of the dense problem. A "cold" case rotates over layers whose fp32 weights together pass 256 MB.
"""

from __future__ import annotations

import functools
from typing import Any

import bench_int8_linear as dense
import harness
import torch
from bench_int8_linear import case, in_turn, macs
from harness import Rival


def quarter(*args, **kwargs) -> dict[str, Any]:
    """The same case with 1:4 weights."""
    made = case(*args, **kwargs)
    return {**made, "name": made["name"] + " 1:4", "pattern": "1:4"}


CASES = [
    case(1, 4096, 4096),
    case(1, 4096, 4096, cold=True),
    case(8, 1024, 1024),
    case(16, 1024, 1024),
    case(32, 768, 3072),
    case(96, 768, 3072),
    case(128, 768, 3072),
    case(512, 1024, 1024),
    case(1024, 1024, 4096),
    case(4096, 1024, 1024),
    case(3136, 64, 256),
    quarter(1, 4096, 4096),
    quarter(1, 4096, 4096, cold=True),
    quarter(16, 1024, 1024),
    quarter(32, 768, 3072),
    quarter(128, 768, 3072),
    quarter(512, 1024, 1024),
    quarter(1024, 1024, 4096),
]


@functools.lru_cache(maxsize=1)
def _pruned(m: int, k: int, n: int, layers: int, pattern: str):
    from pycompress.ops import sparse24_mask

    x, linears = dense._layers.__wrapped__(m, k, n, layers)
    for linear in linears:
        linear.weight.mul_(sparse24_mask(linear.weight.abs(), pattern))
    return x, linears


def inputs(case: dict[str, Any]):
    return _pruned(case["m"], case["k"], case["n"], case["layers"], case.get("pattern", "2:4"))


dense.inputs = inputs  # the dense rivals get the pruned weights, too


def expected(case: dict[str, Any]) -> torch.Tensor:
    x, layers = inputs(case)
    return layers[0](x)


def sparse(kind: str, kernel: str, as_24: bool = False):
    """``Sparse24Linear`` or ``Int8Sparse24Linear``; PYCOMPRESS_ISA in the rival's environment picks the kernel. ``as_24``: only 1:4."""

    def build(case):
        import pycompress.nn

        pattern = case.get("pattern", "2:4")
        if as_24 and pattern == "2:4":
            raise RuntimeError("the weights are 2:4")
        x, layers = inputs(case)
        packed = [getattr(pycompress.nn, kind).from_float(layer, pattern="2:4" if as_24 else pattern) for layer in layers]
        if packed[0].kernel != kernel:
            raise RuntimeError(f"kernel {packed[0].kernel} runs instead of {kernel}")
        return in_turn([functools.partial(layer, x) for layer in packed])

    return build


AVX2 = {"PYCOMPRESS_ISA": "avx2"}
AVX_VNNI = {"PYCOMPRESS_ISA": "avx_vnni"}
RIVALS = {
    "torch fp32": Rival(dense.torch_fp32),
    "ORT fp32": Rival(dense.onnxruntime(False)),
    "ORT int8": Rival(dense.onnxruntime(True)),
    "dense int8 avx512_vnni": Rival(dense.ours("avx512_vnni")),
    "dense int8 avx_vnni": Rival(dense.ours("avx_vnni"), AVX_VNNI),
    "dense int8 avx2": Rival(dense.ours("avx2"), AVX2),
    "sparse int8 avx512_vbmi": Rival(sparse("Int8Sparse24Linear", "avx512_vbmi")),
    "sparse int8 avx512_vnni": Rival(sparse("Int8Sparse24Linear", "avx512_vnni"), {"PYCOMPRESS_ISA": "avx512_vnni"}),
    "sparse int8 avx_vnni": Rival(sparse("Int8Sparse24Linear", "avx_vnni"), AVX_VNNI),
    "sparse int8 avx2": Rival(sparse("Int8Sparse24Linear", "avx2"), AVX2),
    "sparse fp32 avx512": Rival(sparse("Sparse24Linear", "avx512")),
    "sparse fp32 avx2": Rival(sparse("Sparse24Linear", "avx2"), AVX2),
    "as 2:4 int8 avx512_vbmi": Rival(sparse("Int8Sparse24Linear", "avx512_vbmi", as_24=True)),
    "as 2:4 int8 avx2": Rival(sparse("Int8Sparse24Linear", "avx2", as_24=True), AVX2),
    "as 2:4 fp32 avx512": Rival(sparse("Sparse24Linear", "avx512", as_24=True)),
    "as 2:4 fp32 avx2": Rival(sparse("Sparse24Linear", "avx2", as_24=True), AVX2),
}

if __name__ == "__main__":
    harness.run("sparse24", cases=CASES, rivals=RIVALS, expected=expected, work=macs, baseline="torch fp32")
