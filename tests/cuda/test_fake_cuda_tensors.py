"""CUDA tensors without a GPU: fake ones. What torch.compile and torch.export see, and what is refused before anything happens."""

from __future__ import annotations

import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pycompress import nn as compressed
from pycompress import ops
from pycompress.ops.cuda import extension

LAYERS = [
    (compressed.Int8Linear, {}), (compressed.Int8WeightOnlyLinear, {}), (compressed.Int4Linear, {"symmetric": False}),
    (compressed.Int4Linear, {"int8_activations": True}), (compressed.Sparse24Linear, {}), (compressed.Sparse24Linear, {"pattern": "1:4"}),
    (compressed.Int8Sparse24Linear, {}),
]  # fmt: skip


pytestmark = pytest.mark.skipif(
    torch.version.cuda is not None and not torch.cuda.is_available(), reason="a torch built for CUDA asks the driver for fake tensors, too"
)


@pytest.fixture(autouse=True)
def _runs_on_every_gpu(monkeypatch):
    monkeypatch.setattr(extension, "unsupported", lambda index: None)


def on_fake_gpu(layer: torch.nn.Module) -> torch.nn.Module:
    """A layer in the layout of the CUDA kernels, with contents unknown. To be called inside a FakeTensorMode."""
    for name, buffer in list(layer._buffers.items()):
        if buffer is not None:
            layer._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda")
    return layer


def packed_for_cuda(kind, arguments, options, monkeypatch) -> torch.nn.Module:
    for name in ("int8_linear", "int8_weight_only", "int4_linear"):
        monkeypatch.setattr(sys.modules[f"pycompress.nn.{name}"], "kernel_for", lambda *_, **__: extension.NAME)
    monkeypatch.setattr(sys.modules["pycompress.nn.sparse24_weight"], "sparse24_kernel", lambda *_: extension.NAME)
    layer = kind(*arguments, **options)
    monkeypatch.undo()
    monkeypatch.setattr(extension, "unsupported", lambda index: None)
    return layer


def exported(layer: torch.nn.Module, x: torch.Tensor) -> tuple[list[str], torch.Tensor]:
    """The names of the ops in the exported graph, and the fake result."""
    program = torch.export.export(layer, (x,))
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    return [str(node.target) for node in calls], calls[-1].meta["val"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "options"), LAYERS)
def test_a_linear_layer_is_one_node(monkeypatch, kind, options, dtype):
    layer = packed_for_cuda(kind, (64, 40), options, monkeypatch)
    with FakeTensorMode():
        on_fake_gpu(layer)
        assert layer.kernel == extension.NAME and layer.fallback_reason is None
        names, y = exported(layer, torch.empty(2, 3, 64, dtype=dtype, device="cuda"))
    assert len(names) == 1 and names[0].startswith("pycompress.") and names[0].endswith("_linear.default")
    assert (y.device, y.dtype, tuple(y.shape)) == (torch.device("cuda:0"), dtype, (2, 3, 40)) and y.is_contiguous()


@pytest.mark.parametrize("kind", [compressed.Sparse24Conv2d, compressed.Int8Sparse24Conv2d])
def test_a_convolution_is_one_node(monkeypatch, kind):
    layer = packed_for_cuda(kind, (8, 12, (3, 3), (2, 2), (1, 1)), {}, monkeypatch)
    with FakeTensorMode():
        names, y = exported(on_fake_gpu(layer), torch.empty(2, 8, 9, 7, dtype=torch.float16, device="cuda"))
    assert len(names) == 1 and names[0].endswith("sparse24_conv2d.default")
    assert (y.device, y.dtype, tuple(y.shape)) == (torch.device("cuda:0"), torch.float16, (2, 12, 5, 4))


@pytest.mark.parametrize(("kind", "options"), LAYERS)
def test_layers_refuse_tensors_on_the_cpu(monkeypatch, kind, options):
    layer = packed_for_cuda(kind, (64, 40), options, monkeypatch)
    with FakeTensorMode():
        on_fake_gpu(layer)
        with pytest.raises(ValueError, match=r"x must be .*on cuda:0.*, got .*cpu"):
            layer(torch.empty(3, 64))


def weights(device: str) -> dict[str, tuple]:
    """Name -> the op, and its tensors behind x by name."""

    def t(*shape: int, dtype: torch.dtype = torch.float32, on: str = device) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device=on)

    int4 = {"weight": t(8, 32, dtype=torch.uint8), "scale": t(8, 2), "zero_point": t(8, 2, dtype=torch.uint8), "bias": t(8)}
    sparse = {"indices": t(8, 8, dtype=torch.uint8)}
    return {
        "int8_linear": (ops.int8_linear, {"weight": t(8, 64, dtype=torch.int8), "scale": t(8), "bias": t(8)}, {}),
        "int8_weight_linear": (ops.int8_weight_linear, {"weight": t(8, 64, dtype=torch.int8), "scale": t(8), "bias": t(8)}, {}),
        "int4_linear": (ops.int4_linear, int4, {"group_size": 32}),
        "int4_linear int8": (ops.int4_linear, int4, {"group_size": 32, "int8_activations": True}),
        "sparse24_linear": (ops.sparse24_linear, {"values": t(8, 32), **sparse, "bias": t(8)}, {}),
        "int8_sparse24_linear": (
            ops.int8_sparse24_linear, {"values": t(8, 32, dtype=torch.int8), **sparse, "scale": t(8), "bias": t(8)}, {},
        ),
    }  # fmt: skip


OPS = ["int8_linear", "int8_weight_linear", "int4_linear", "int4_linear int8", "sparse24_linear", "int8_sparse24_linear"]


@pytest.mark.parametrize("odd", ["x", "first", "last"])
@pytest.mark.parametrize("name", OPS)
def test_tensors_on_two_devices_are_refused_before_anything(monkeypatch, name, odd):
    """One tensor on the CPU, whichever: a ValueError that names both devices, and no kernel, real or reference, was asked."""
    monkeypatch.setattr(extension, "module", None)  # any launch would fail with another error
    with FakeTensorMode():
        op, tensors, options = weights("cuda")[name]
        x = torch.empty(3, 64, device="cpu" if odd == "x" else "cuda")
        if odd != "x":
            which = list(tensors)[0 if odd == "first" else -1]
            tensors = tensors | {which: torch.empty(tensors[which].shape, dtype=tensors[which].dtype)}
        with pytest.raises(ValueError, match=rf"^{name.split()[0]}: \w+ must be on (cuda:0|cpu) like \w+, got (cuda:0|cpu)$"):
            op(x, **tensors, **options)
