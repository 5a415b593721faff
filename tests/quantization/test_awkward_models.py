"""Models and arguments that used to fail in torch, or to be taken for something else: a copy, a reason or an error of one's own."""

from __future__ import annotations

import pytest
import torch
from support.quantizable import normal, seeded
from torch import nn
from torch.nn.utils import prune

import pycompress as pc
from pycompress.nn.base import get_note
from pycompress.quantization import FakeQuant, cross_layer_equalization, fold_batch_norm, sensitivity, smoothquant
from pycompress.quantization.copying import copy_model


def linears() -> nn.Sequential:
    return seeded(nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4)))


def pruned() -> nn.Sequential:
    model = linears()
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    return model


def weight_normed() -> nn.Sequential:
    model = linears()
    nn.utils.weight_norm(model[0])
    return model


def spectral_normed() -> nn.Sequential:
    model = linears()
    nn.utils.spectral_norm(model[0])
    model(normal(2, 6))
    return model


@pytest.mark.filterwarnings("ignore:.*weight_norm", "ignore:.*spectral_norm", "ignore:cross_layer_equalization. nothing to do")
@pytest.mark.parametrize("make", [pruned, weight_normed, spectral_normed])
def test_weights_that_a_hook_computes(make):
    """torch's deepcopy refuses them."""
    model, x = make().eval(), normal(5, 6)
    before, weight = model(x), model[0].weight
    small = pc.quantize(model, pc.Int8Dynamic(), example_inputs=x)
    assert "its weight is not a parameter (" in get_note(small[0]) and type(small[2]).__name__ == "Int8Linear"
    assert (small(x) - before).norm() < 0.05 * before.norm() and torch.equal(model(x), before)
    twin = copy_model(model)
    with torch.no_grad():
        next(twin[0].parameters()).zero_()
        next(parameter for parameter in twin[0].parameters() if parameter.dim() == 2).zero_()
    assert not torch.equal(twin(x), before) and torch.equal(model(x), before) and weight.requires_grad
    for function in (fold_batch_norm, cross_layer_equalization):
        assert torch.equal(function(model)(x), before)


def test_a_model_on_meta():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4))
    with pytest.raises(ValueError, match=r"quantize: weight of layer '0' must have values, got a meta tensor; give it .*to_empty"):
        pc.quantize(model, pc.Int8Dynamic())
    with pytest.raises(ValueError, match="prepare: weight of layer '0' must have values"):
        pc.Quantizer(pc.Int8Dynamic()).prepare(model)


@pytest.mark.parametrize("pattern", ["haed", "0.*", "1.weight"])
def test_a_pattern_of_a_mapping_that_matches_nothing(pattern):
    config = {"*": pc.Int8Dynamic(), pattern: pc.Int4WeightOnly()}
    with pytest.raises(ValueError, match=f"quantize: config entry '{pattern}' matches no module of the model".replace("*", r"\*")):
        pc.quantize(linears(), config)
    with pytest.raises(ValueError, match="prepare: config entry"):
        pc.Quantizer(config).prepare(linears())


def test_types_of_a_mapping_may_match_nothing():
    small = pc.quantize(linears(), {nn.Linear: pc.Int8Dynamic(), nn.Conv2d: pc.Int8Dynamic(), "2": pc.Int8WeightOnly()})
    assert type(small[2]).__name__ == "Int8WeightOnlyLinear"


def test_ignore_may_be_a_generator():
    quantizer, model = pc.Quantizer(pc.Int8Dynamic(), ignore=(name for name in ["2"])), linears()
    for _ in range(2):
        assert type(quantizer.convert(quantizer.prepare(model))[2]) is nn.Linear


def test_ignore_of_sensitivity_may_be_a_generator():
    entries = sensitivity(linears(), [FakeQuant(bits=2), FakeQuant(bits=4)], [normal(5, 6)], ignore=(name for name in ["2"]))
    assert [entry.layer for entry in entries] == ["0", "0"]


def test_the_reason_of_a_layer_that_was_meant_comes_first():
    model = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 8)).double()
    with pytest.raises(ValueError, match=r"\(1: the int8 layers take float32, bfloat16 and float16, its weight is .*64 and 1 more\)"):
        pc.quantize(model, pc.Int8Dynamic())
    with pytest.raises(ValueError, match=r"\(0: Int8Dynamic has no layer for Embedding\)"):
        pc.quantize(nn.Sequential(nn.Embedding(5, 8)), pc.Int8Dynamic())


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear, self.never = nn.LayerNorm(6), nn.Linear(6, 6), nn.LayerNorm(6)

    def forward(self, x):
        y = self.norm(x)
        return y + self.linear(y)


def test_smoothquant_with_nothing_to_do():
    data = [normal(5, 6)]
    with pytest.warns(UserWarning, match=r"smoothquant: nothing to do.* \(norm: its output is not read by nn.Linear layers alone; never: "):
        model = smoothquant(seeded(Residual()), data)
    assert get_note(model.norm) == "not smoothed: its output is not read by nn.Linear layers alone"
    assert get_note(model.never) == "not smoothed: it was not called"
    with pytest.warns(UserWarning, match=r"\(the model has no LayerNorm or RMSNorm\)"):
        pc.quantize(linears(), pc.Int8Dynamic(), data=data, algorithms=["smoothquant"])


def test_cross_layer_equalization_with_nothing_to_do():
    class Untraceable(Residual):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    relu = seeded(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)))
    for model, ignore, reason in (
        (linears(), (), "no two of its layers have only ReLU"),
        (seeded(Untraceable()), (), "torch.fx cannot trace it"),
        (relu, ["2"], "ignore names one of each pair"),
    ):
        with pytest.warns(UserWarning, match=rf"cross_layer_equalization: nothing to do, the model stays as it is \({reason}"):
            cross_layer_equalization(model, ignore=ignore)
