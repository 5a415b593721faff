"""A user's program, for mypy only (`make lint`): the public names take and return what the documentation says."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

import pycompress as pc
from pycompress.analysis import Comparison, Report, compare
from pycompress.distillation import History
from pycompress.nn import CompressedModule, Int8Conv2d, Int8Linear
from pycompress.ops import int8_linear, int8_matmul, quantize_weight

Batches = Iterable[tuple[Tensor, Tensor]]


def quantization(model: nn.Module, data: Batches, x: Tensor) -> nn.Module:
    dynamic: nn.Module = pc.quantize(model, pc.Int8Dynamic())
    mixed: nn.Module = pc.quantize(dynamic, {"encoder.*": pc.Int8Static(observer="mse")}, data=data, ignore=["head", nn.Conv2d])
    quantizer = pc.Quantizer(pc.Int8Static(), ignore=[mixed])
    prepared = quantizer.prepare(model, x, qat=True)
    quantizer.calibrate(prepared, data)
    return quantizer.convert(prepared)


def pruning(model: nn.Module, x: Tensor) -> nn.Module:
    smaller: nn.Module = pc.prune(model, x, pattern="channel", ratio={"conv*": 0.5}, ignore=[nn.Linear])
    pruner = pc.Pruner(smaller, (x,), pattern="2:4", schedule=lambda progress: progress, steps=3)
    changed: bool = pruner.step().structure_changed
    return pruner.convert() if changed else smaller


def distillation(student: nn.Module, teacher: nn.Module, data: Batches) -> float:
    loss = pc.KDLoss(temperature=2.0, soft_weight=1.0, hard_weight=0.0)
    history: History = pc.Distiller(student, [teacher, teacher], loss).fit(data, epochs=1, val_loader=data, seed=1, progress=False)
    best = history.best
    return 0.0 if best is None or best.metric is None else best.metric


def facts(model: nn.Module, x: Tensor) -> str:
    report: Report = pc.report(model, {"x": x}, threads=1)
    page: Path = report.html("report.html")
    comparison: Comparison = compare([("a", model), ("b", report)], x)
    return f"{report}{comparison.text()}{page.name}{report.params + report.bytes}"


def files(model: nn.Module) -> nn.Module:
    path: Path = pc.save(model, "small.safetensors")
    return pc.load(path, model)


def layers_and_ops(x: Tensor, linear: nn.Linear, conv: nn.Conv2d) -> Tensor:
    layers: list[CompressedModule] = [Int8Linear.from_float(linear, activation="relu"), Int8Conv2d.from_float(conv, x_scale=0.1)]
    reasons: list[str | None] = [layer.fallback_reason for layer in layers]
    weight, scale = quantize_weight(linear.weight)
    total: Tensor = int8_matmul(weight, weight, kernel="reference")
    return int8_linear(x, weight, scale, linear.bias, activation="gelu") + torch.tensor(len(reasons)) + total.sum()
