"""Networks with residuals, depthwise convolutions and squeeze-excite: every layer int8, close to float, and saved and loaded unchanged."""

import copy

import pytest
import torch
from support.vision import MODELS, make
from torch import nn

import pycompress as pc
from pycompress.nn.base import CompressedModule, get_note

CONFIGS = [pc.Int8Dynamic(), pc.Int8Static(), pc.Int8Static(symmetric=True), pc.Int8WeightOnly()]


def relative_error(got, expected):
    return float((got - expected).detach().norm() / expected.detach().norm())


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_every_layer_becomes_int8_and_the_output_stays(name, config, tmp_path):
    model, x = make(name)
    expected, before = model(x), copy.deepcopy(model.state_dict())
    small = pc.quantize(model, config, data=[x] if isinstance(config, pc.Int8Static) else None)
    left = [n for n, m in small.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d, nn.BatchNorm2d))]
    assert left == []
    got = small(x)
    assert relative_error(got, expected) < 0.06
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert (
        torch.equal(small(x.to(memory_format=torch.channels_last)), got)
        or relative_error(small(x.to(memory_format=torch.channels_last)), got) < 0.01
    )  # pooling may sum in another order, which moves a rounding
    path = tmp_path / "small.safetensors"
    pc.save(small, path)
    assert torch.equal(pc.load(path, MODELS[name]())(x), got)
    parameters = sum(p.numel() for p in model.parameters())
    assert sum(m.num_bytes() for m in small.modules() if isinstance(m, CompressedModule)) < 2 * parameters


@pytest.mark.parametrize("name", MODELS)
def test_quantization_aware_training_runs_and_converts(name):
    model, x = make(name)
    quantizer = pc.Quantizer(pc.Int8Static())
    prepared = quantizer.prepare(model, x, qat=True)
    optimizer = torch.optim.SGD(prepared.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        prepared.train()(x).square().mean().backward()
        optimizer.step()
    simulated = prepared.eval()(x)
    converted = quantizer.convert(prepared)
    assert relative_error(converted(x), simulated) < 0.02


def test_a_shared_layer_is_one_layer():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(8, 8, 3, padding=1)
            self.second = self.first

        def forward(self, x):
            return self.second(self.first(x).relu())

    torch.manual_seed(0)
    model, x = Twice().eval(), torch.randn(2, 8, 9, 9)
    small = pc.quantize(model, pc.Int8Static(), data=[x])
    assert small.first is small.second
    assert relative_error(small(x), model(x)) < 0.03


def test_attention_of_torch_stays_with_its_reason():
    torch.manual_seed(0)
    model, x = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval(), torch.randn(2, 5, 32)
    small = pc.quantize(model, pc.Int8Dynamic())
    assert "nn.MultiheadAttention uses this weight directly" in get_note(small.self_attn.out_proj)
    assert type(small.linear1).__name__ == "Int8Linear" and relative_error(small(x), model(x)) < 0.02
