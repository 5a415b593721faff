"""2:4 convolutions on a GPU against dense bfloat16 (cuDNN, channels_last and not).

    python benchmarks/gpu/bench_sparse24_conv2d.py [--cases 512] [--write]

A case is a batch of 32 images, 3 x 3 kernels: channels and image size of ResNet-18. The floor is the larger of two times: all bytes once
at the bandwidth of a copy, and the products of the dense layer at the speed of a large ``torch.mm`` measured here, halved (2:4) and halved
again for int8. It does not count the unfolded images, which ours writes and reads.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from bench_sparse24 import product_speed
from timing import copy_bandwidth, row

from pycompress.nn import Int8Sparse24Conv2d, Sparse24Conv2d
from pycompress.ops.sparse24 import sparse24_mask

BATCH = 32
CASES = [(64, 56), (128, 28), (256, 14), (512, 7)]


def rivals(channels: int, size: int) -> tuple[dict[str, tuple[Callable[[], Any], float, float]], torch.Tensor]:
    """Name to function, fraction of the dense products, and bytes of a weight; and the float result of the first two images."""
    with torch.random.fork_rng(devices=[0]):
        torch.manual_seed(0)
        conv = torch.nn.Conv2d(channels, channels, 3, padding=1, bias=False).requires_grad_(False)
        conv.weight.mul_(sparse24_mask(conv.weight.flatten(1).abs()).view_as(conv.weight))
        x = torch.randn(BATCH, channels, size, size).cuda().bfloat16()
    sparse, int8 = Sparse24Conv2d.from_float(conv).cuda(), Int8Sparse24Conv2d.from_float(conv).cuda()
    dense, last = conv.cuda().bfloat16(), x.contiguous(memory_format=torch.channels_last)
    dense_last = torch.nn.Conv2d(channels, channels, 3, padding=1, bias=False, device="cuda").bfloat16().requires_grad_(False)
    dense_last.weight.copy_(dense.weight)
    dense_last.to(memory_format=torch.channels_last)
    table: dict[str, tuple[Callable[[], Any], float, float]] = {
        "torch bf16 channels_last": (lambda: dense_last(last), 1.0, 2.0),
        "torch bf16": (lambda: dense(x), 1.0, 2.0),
        "pycompress 2:4 bf16": (lambda: sparse(x), 0.5, 1.125),
        "pycompress 2:4 int8": (lambda: int8(x), 0.25, 0.625),
    }
    return table, torch.nn.functional.conv2d(x[:2].double(), dense.weight.double(), padding=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="", help="only cases whose name contains this")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_sparse24_conv2d: needs a CUDA device")
    bandwidth, speed = copy_bandwidth(), product_speed()
    for channels, size in CASES:
        name = f"{channels} channels, {size} x {size}"
        if arguments.cases not in name:
            continue
        table, want = rivals(channels, size)
        weights, pixels = 9 * channels**2, BATCH * size * size
        for rival, (step, share, weight_bytes) in table.items():
            error = float((step()[:2].double() - want).norm() / want.norm())
            floor = max((weights * weight_bytes + 4 * pixels * channels) / bandwidth, share * pixels * weights / speed)
            row("sparse24_conv2d", name, rival, step, floor, error, arguments.write)


if __name__ == "__main__":
    main()
