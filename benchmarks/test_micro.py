"""Calls so small that the cost of calling counts, with pytest-benchmark: its table, histograms and comparison of runs.

    pytest benchmarks/test_micro.py --benchmark-group-by=group --benchmark-sort=name
    pytest benchmarks/test_micro.py --benchmark-autosave; pytest benchmarks/test_micro.py --benchmark-compare

One thread, as the other benchmarks. `make bench` runs it; the tests of the library never time anything.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import pycompress as pc
from pycompress.nn import Int4Linear, Int8Conv2d, Int8Linear, Int8WeightOnlyLinear, Sparse24Linear
from pycompress.ops import kd_loss
from pycompress.ops.sparse24 import sparse24_mask

LINEAR = {
    "nn.Linear": lambda layer: layer,
    "Int8Linear": Int8Linear.from_float,
    "Int8Linear static": lambda layer: Int8Linear.from_float(layer, x_scale=0.03),
    "Int8WeightOnlyLinear": Int8WeightOnlyLinear.from_float,
    "Int4Linear": lambda layer: Int4Linear.from_float(layer, group_size=32),
    "Sparse24Linear": lambda layer: Sparse24Linear.from_float(layer, sparse24_mask(layer.weight)),
}
CONVOLUTION = {
    "nn.Conv2d": lambda layer: layer,
    "Int8Conv2d": Int8Conv2d.from_float,
    "Int8Conv2d static": lambda layer: Int8Conv2d.from_float(layer, x_scale=0.03),
    "Int8Conv2d to int8": lambda layer: Int8Conv2d.from_float(layer, x_scale=0.03, out_scale=0.05),
}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)


def layer_and_input(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> tuple[nn.Module, torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval().requires_grad_(False), torch.randn(shape)


@pytest.mark.parametrize(("rows", "features"), [(1, 64), (1, 256), (8, 256)])
@pytest.mark.parametrize("kind", LINEAR)
def test_linear(benchmark, kind, rows, features):
    benchmark.group = f"linear {rows} x {features} x {features}"
    layer, x = layer_and_input(lambda: nn.Linear(features, features), (rows, features))
    benchmark(LINEAR[kind](layer), x)


@pytest.mark.parametrize("size", [7, 14])
@pytest.mark.parametrize("kind", CONVOLUTION)
def test_convolution(benchmark, kind, size):
    benchmark.group = f"convolution 1 x 16 x {size} x {size}, 3 x 3"
    layer, x = layer_and_input(lambda: nn.Conv2d(16, 16, 3, padding=1), (1, 16, size, size))
    benchmark(CONVOLUTION[kind](layer), x)


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("kind", ["torch", "pycompress"])
def test_distillation_loss(benchmark, kind, classes):
    benchmark.group = f"distillation loss 32 x {classes}"
    student, teacher = torch.randn(2, 32, classes, generator=torch.Generator().manual_seed(0))
    if kind == "torch":
        loss = nn.KLDivLoss(reduction="batchmean")
        benchmark(lambda: loss((student / 4).log_softmax(1), (teacher / 4).softmax(1)) * 16)
    else:
        benchmark(lambda: kd_loss(student, teacher, temperature=4.0, soft_weight=1.0, hard_weight=0.0))


@pytest.mark.parametrize("kind", ["float", "int8"])
def test_network_of_small_layers(benchmark, kind):
    benchmark.group = "1 x 64 -> 64 -> 64 -> 10"
    make = lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))  # noqa: E731
    model, x = layer_and_input(make, (1, 64))
    benchmark(pc.quantize(model, pc.Int8Dynamic()) if kind == "int8" else model, x)
