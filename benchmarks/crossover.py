"""From which size on int8 layers are faster than float ones, per kernel: the numbers of ``pycompress/quantization/crossover.py``.

    taskset -c 1 python benchmarks/crossover.py            # one thread, a minute or two

For each kernel and kind of layer the smallest size from which on int8 gains at all measured inputs (the worst of them is shown).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

ISAS = ("avx512_vnni", "avx_vnni", "avx2", "scalar")


def layers():
    from torch import nn

    for features in (16, 32, 48, 64, 96, 128, 192, 256, 512, 1024):
        yield "linear", nn.Linear(features, features)
    for channels in (4, 8, 16, 32, 64, 128):
        yield "convolution", nn.Conv2d(channels, channels, 3, padding=1)
    for channels in (8, 16, 32, 64, 128, 256):
        yield "depthwise", nn.Conv2d(channels, channels, 3, padding=1, groups=channels)


def measure() -> None:
    import torch

    from pycompress.nn import Int8Conv2d, Int8Linear
    from pycompress.nn.speed import speed_up
    from pycompress.quantization.crossover import default_shapes

    torch.set_num_threads(1)
    for kind, layer in layers():
        layer = layer.eval()
        converted = (Int8Linear if kind == "linear" else Int8Conv2d).from_float(layer)
        inputs = [torch.randn(shape) for shape in default_shapes(layer)]
        worst = min(sorted(speed_up(layer, converted, [x]) for _ in range(9))[4] for x in inputs)
        print(f"{converted.kernel:12s} {kind:12s} {layer.weight.numel():8d} weights  {worst:.2f}x", flush=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["--worker"]:
        measure()
    else:
        for isa in ISAS:
            subprocess.run(
                [sys.executable, __file__, "--worker"], env={**os.environ, "PYCOMPRESS_ISA": isa, "OMP_NUM_THREADS": "1"}, check=True
            )
