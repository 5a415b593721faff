"""Whole networks for images, float in and out: ResNet-18 and MobileNetV2 at 224 x 224, random weights.

    pip install onnx onnxruntime
    python benchmarks/bench_vision.py [--threads 2] [--rivals pycompress] [--write]

The error column is relative to torch fp32; with random weights it compares rivals and says nothing about accuracy.
"""

from __future__ import annotations

import functools
import os
import tempfile
from typing import Any

import harness
import torch
import vision_models
from harness import Rival

NETWORKS = {"resnet18": (vision_models.resnet18, 1.814e9), "mobilenet_v2": (vision_models.mobilenet_v2, 0.301e9)}
"""Network and multiply-accumulates per image."""
CASES = [
    {"name": "resnet18 x 1", "network": "resnet18", "batch": 1},
    {"name": "mobilenet_v2 x 1", "network": "mobilenet_v2", "batch": 1},
    {"name": "resnet18 x 8", "network": "resnet18", "batch": 8},
    {"name": "mobilenet_v2 x 8", "network": "mobilenet_v2", "batch": 8},
]


@functools.cache
def network(name: str) -> torch.nn.Module:
    return vision_models.settled(NETWORKS[name][0])


@functools.cache
def images(batch: int) -> torch.Tensor:
    return torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(1))


@functools.cache
def _expected(name: str, batch: int) -> torch.Tensor:
    return network(name)(images(batch))


def expected(case: dict[str, Any]) -> torch.Tensor:
    return _expected(case["network"], case["batch"])


def macs(case: dict[str, Any]) -> float:
    return case["batch"] * NETWORKS[case["network"]][1]


def in_torch(change=lambda model: model, channels_last: bool = False):
    def build(case):
        x, model = images(case["batch"]), change(network(case["network"]))
        if channels_last:
            x, model = x.to(memory_format=torch.channels_last), model.to(memory_format=torch.channels_last)
        return lambda: model(x)

    return build


def ours(static: bool = True, **options):
    def change(model):
        import pycompress as pc

        config = pc.Int8Static() if static else pc.Int8Dynamic()
        return pc.quantize(model, config, data=[images(4)] if static else None, **options)

    return change


def onnxruntime(quantized: bool):
    def build(case):
        import onnxruntime as ort
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

        class Reader(CalibrationDataReader):
            def __init__(self) -> None:
                self.batches = iter([{"x": images(4).numpy()}])

            def get_next(self):
                return next(self.batches, None)

        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        with tempfile.TemporaryDirectory() as folder:
            path, out = os.path.join(folder, "f.onnx"), os.path.join(folder, "q.onnx")
            axes = {"x": {0: "batch"}}
            arguments = {"input_names": ["x"], "output_names": ["y"], "dynamic_axes": axes, "dynamo": False}
            torch.onnx.export(network(case["network"]), (images(1),), path, **arguments)
            if quantized:
                quantize_static(path, out, Reader(), quant_format=QuantFormat.QDQ, per_channel=True)
            session = ort.InferenceSession(out if quantized else path, options, providers=["CPUExecutionProvider"])
        given = {"x": images(case["batch"]).numpy()}
        return lambda: torch.from_numpy(session.run(None, given)[0])

    return build


RIVALS = {
    "torch fp32": Rival(in_torch()),
    "torch fp32 channels_last": Rival(in_torch(channels_last=True)),
    "ORT fp32": Rival(onnxruntime(False)),
    "ORT static int8": Rival(onnxruntime(True)),
    "pycompress static": Rival(in_torch(ours())),
    "pycompress static channels_last": Rival(in_torch(ours(), channels_last=True)),
    "pycompress static, fuse=False": Rival(in_torch(ours(fuse=False))),
    "pycompress dynamic channels_last": Rival(in_torch(ours(static=False), channels_last=True)),
    "pycompress static channels_last, avx2": Rival(in_torch(ours(), channels_last=True), env={"PYCOMPRESS_ISA": "avx2"}),
}

if __name__ == "__main__":
    harness.run("vision", cases=CASES, rivals=RIVALS, expected=expected, work=macs, baseline="torch fp32")
