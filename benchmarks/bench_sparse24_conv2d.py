"""2:4 and 1:4 sparse convolution, fp32 and int8, against dense fp32 (torch, ONNX Runtime) and dense int8 (ours, ONNX Runtime).

    python benchmarks/bench_sparse24_conv2d.py [--threads 2] [--rivals sparse,ORT] [--cases 1:4] [--write]

Shapes are those of ResNets; the weights of a fresh nn.Conv2d, pruned by magnitude to the pattern in the case's name. Every rival computes
with them, the dense ones with the zeros. Scales of activations are dynamic, but for ONNX Runtime's, which come from the input itself.
"""

from __future__ import annotations

import functools
from typing import Any

import bench_int8_conv2d as dense
import harness
import torch
from harness import Rival

SHAPES = [
    (1, 64, 56, 64, 3),
    (1, 128, 28, 128, 3),
    (1, 256, 14, 256, 3),
    (1, 512, 7, 512, 3),
    (8, 256, 14, 256, 3),
    (1, 256, 56, 64, 1),
    (1, 256, 14, 1024, 1),
]


def case(pattern: str, *shape: int) -> dict[str, Any]:
    made = dense.case(*shape)
    return {**made, "name": f"{made['name']} {pattern}", "pattern": pattern}


CASES = [case(pattern, *shape) for pattern in ("2:4", "1:4") for shape in SHAPES]


@functools.lru_cache(maxsize=1)
def _pruned(n: int, c: int, h: int, o: int, k: int, stride: int, groups: int, pattern: str):
    from pycompress.ops import sparse24_mask

    x, conv = dense._layer.__wrapped__(n, c, h, o, k, stride, groups)
    conv.weight.mul_(sparse24_mask(conv.weight.flatten(1).abs(), pattern).view_as(conv.weight))
    return x, conv


def layer(case: dict[str, Any]) -> tuple[torch.Tensor, torch.nn.Conv2d]:
    return _pruned(*(case[key] for key in ("n", "c", "h", "o", "k", "stride", "groups", "pattern")))


dense.layer = layer  # the dense rivals get the pruned weights, too


def sparse(kind: str, kernel: str):
    """``Sparse24Conv2d`` or ``Int8Sparse24Conv2d``; PYCOMPRESS_ISA in the rival's environment picks the kernel."""

    def build(case):
        import pycompress.nn

        x, conv = layer(case)
        packed = getattr(pycompress.nn, kind).from_float(conv, pattern=case["pattern"])
        if packed.kernel != kernel:
            raise RuntimeError(f"kernel {packed.kernel} runs instead of {kernel}")
        return lambda: packed(x)

    return build


AVX2 = dense.AVX2
RIVALS = {
    "torch fp32": Rival(dense.torch_fp32(False)),
    "ORT fp32": Rival(dense.onnxruntime(False)),
    "ORT static int8": Rival(dense.onnxruntime(True)),
    "dense int8 avx512_vnni": Rival(dense.ours(False, kernel="avx512_vnni")),
    "sparse int8 avx512_vbmi": Rival(sparse("Int8Sparse24Conv2d", "avx512_vbmi")),
    "sparse fp32 avx512": Rival(sparse("Sparse24Conv2d", "avx512")),
    # restricted to AVX2 where a rival can be (ONNX Runtime cannot)
    "torch fp32, avx2": Rival(dense.torch_fp32(False), AVX2),
    "dense int8 avx2": Rival(dense.ours(False, kernel="avx2"), AVX2),
    "sparse int8 avx2": Rival(sparse("Int8Sparse24Conv2d", "avx2"), AVX2),
    "sparse fp32 avx2": Rival(sparse("Sparse24Conv2d", "avx2"), AVX2),
}

if __name__ == "__main__":
    harness.run("sparse24_conv2d", cases=CASES, rivals=RIVALS, expected=dense.expected, work=dense.macs, baseline="torch fp32")
