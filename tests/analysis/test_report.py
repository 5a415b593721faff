from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import pycompress
from pycompress.analysis import Report, report
from pycompress.nn import Int8Conv2d, Int8Linear
from pycompress.nn.base import CompressedModule, set_note


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(16, 10)

    def forward(self, x):
        return self.fc(torch.relu(self.norm(self.conv(x))).flatten(1))


X = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))


def take(model=None, **options) -> Report:
    return report(Net() if model is None else model, X, budget=0.01, **options)


def test_totals_and_layers():
    found = take()
    assert [layer.name for layer in found.layers] == ["conv", "norm", "fc"]
    assert [layer.type for layer in found.layers] == ["Conv2d", "BatchNorm2d", "Linear"]
    assert {layer.format for layer in found.layers} == {"fp32 dense"}
    assert {layer.kernel for layer in found.layers} == {"torch"}
    assert found.model == "Net"
    assert found.params == sum(p.numel() for p in Net().parameters())
    assert found.bytes == sum(t.numel() * t.element_size() for t in Net().state_dict().values())
    assert found.macs == sum(layer.macs for layer in found.layers)
    assert found.latency.median > 0 and found.other_latency.median >= 0
    assert all(layer.latency.median > 0 for layer in found.layers)
    assert pycompress.report is report


def test_without_measuring_nothing_is_timed():
    found = take(measure=False)
    assert found.latency is None and found.other_latency is None
    assert all(layer.latency is None for layer in found.layers)
    assert "everything else" not in found.text()


def test_threads_appear_in_the_report():
    before = torch.get_num_threads()
    assert take(threads=before + 1).threads == before + 1
    assert torch.get_num_threads() == before


def test_int8_layers_name_format_kernel_and_size():
    net = Net().eval()
    net.fc = Int8Linear.from_float(net.fc)
    net.conv = Int8Conv2d.from_float(net.conv)
    before, found = take(Net(), measure=False), take(net)
    layers = {layer.name: layer for layer in found.layers}
    assert layers["fc"].format == "int8 dynamic"
    assert layers["fc"].kernel == net.fc.kernel
    assert layers["conv"].reason == net.conv.fallback_reason
    assert layers["fc"].bytes == 160 + 4 * 10 + 4 * 10  # int8 weights, scales, biases
    assert (found.params, found.macs) == (before.params, before.macs)
    assert found.bytes < before.bytes
    assert layers["fc"].calls == layers["conv"].calls == 1
    assert found.uncounted == ()


class Slow(CompressedModule):
    format = "int3"
    kernel = "reference"
    fallback_reason = "no AVX-512 here"

    def __init__(self):
        super().__init__()
        self.register_buffer("codes", torch.zeros(10, 16, dtype=torch.int8))

    def forward(self, x):
        return x @ self.codes.float().T

    def num_params(self):
        return 160

    def to_dense(self):
        return nn.Linear(16, 10, bias=False)


def test_reasons_are_shown_once_each():
    net = Net()
    net.fc = Slow()
    set_note(net.conv, "in_channels 1 is too few")
    set_note(net.norm, "in_channels 1 is too few")
    found = take(net, measure=False)
    assert [layer.reason for layer in found.layers] == ["in_channels 1 is too few"] * 2 + ["no AVX-512 here"]
    text = found.text()
    assert text.count("in_channels 1 is too few") == 1
    assert "\n[1] in_channels 1 is too few\n[2] no AVX-512 here" in text
    assert [line.split()[-1] for line in text.splitlines() if line.startswith(("conv", "norm", "fc"))] == ["[1]", "[1]", "[2]"]


class Mask(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mask", (torch.arange(160).view(10, 16) % 2).float())

    def forward(self, weight):
        return weight * self.mask


class FakeQuant(nn.Module):
    def forward(self, weight):
        return weight.round(decimals=2)


def test_formats_of_float_layers():
    net = Net().bfloat16()
    parametrize.register_parametrization(net.fc, "weight", Mask().bfloat16())
    parametrize.register_parametrization(net.conv, "weight", FakeQuant())
    found = report(net, X.bfloat16(), measure=False)
    layers = {layer.name: layer for layer in found.layers}
    assert layers["fc"].format == "bf16 masked 50 %"
    assert layers["fc"].type == "Linear"
    assert layers["conv"].format == "bf16 FakeQuant"
    assert layers["norm"].format == "bf16 dense"
    parametrize.register_parametrization(net.fc, "weight", FakeQuant())
    assert report(net, X.bfloat16(), measure=False).layers[-1].format == "bf16 masked 50 % + FakeQuant"


def test_text_is_an_aligned_table():
    text = str(take())
    lines = text.splitlines()
    assert lines[0].startswith("Net on cpu, ")
    header = lines[2]
    for column in ("layer", "format", "kernel", "params", "bytes", "MACs", "non-zero", "zeros", "ms", "note"):
        assert column in header
    total = next(line for line in lines if line.startswith("total"))
    assert total.index("218") + 3 == header.index("params") + 6, "numbers end where their header ends"
    assert "whole model, without hooks:" in text


def test_parts_that_do_not_run_or_cannot_be_counted_are_named():
    class Partly(Net):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))
            self.spare = nn.Linear(3, 3)

        def forward(self, x):
            return super().forward(x) * self.scale

    found = take(Partly())
    assert found.uncounted == ("",)
    assert "MACs not counted, totals lack them: (root)" in found.text()
    spare = next(line for line in found.text().splitlines() if line.startswith("spare"))
    assert spare.endswith("not called")
    assert found.layers[0].name == "" and found.layers[0].latency.median > 0


def test_json_holds_everything():
    found = take()
    data = json.loads(found.to_json())
    assert data["params"] == found.params
    assert data["layers"][0]["latency"]["median"] == found.layers[0].latency.median
    assert set(data) == set(Report.__dataclass_fields__)


@pytest.mark.parametrize(
    "inputs",
    [{"a": torch.ones(3, 4), "scale": 2.0}, (torch.ones(3, 4), 2.0), [torch.ones(3, 4)], torch.ones(3, 4)],
    ids=["dict", "tuple", "list", "tensor"],
)
def test_forms_of_inputs(inputs):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, a, scale=1.0):
            return {"out": (self.fc(a * scale), None)}

    assert report(Two(), inputs, budget=0).macs == 24


def test_compiled_models_are_reported_by_their_own_names():
    net = torch.compile(Net(), backend="eager")
    found = take(net)
    assert found.model == "Net"
    assert [layer.name for layer in found.layers] == ["conv", "norm", "fc"]


def test_a_model_without_parameters():
    found = report(nn.ReLU(), torch.ones(2), budget=0)
    assert (found.layers, found.params, found.macs) == ((), 0, 0)
    assert "total" in found.text()


@pytest.mark.parametrize(
    "args, options, error, text",
    [
        (("net", X), {}, TypeError, "report: model must be a torch.nn.Module, got str"),
        ((Net(), 5), {}, TypeError, "report: example_inputs must be a tensor, a tuple or a dict, got int"),
        ((Net(), X), {"budget": -1}, ValueError, "report: budget must be a non-negative number of seconds, got -1"),
        ((Net(), X), {"warmup": 1.5}, ValueError, "report: warmup must be a non-negative integer, got 1.5"),
        ((Net(), X), {"threads": 0}, ValueError, "report: threads must be a positive integer or None, got 0"),
    ],
)
def test_bad_arguments(args, options, error, text):
    with pytest.raises(error, match=text):
        report(*args, **options)
