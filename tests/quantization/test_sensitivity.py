"""Sensitivity per layer, and precision chosen by it."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.quantizable import convnet, mlp, normal, seeded
from torch import Tensor, nn

from pycompress.quantization import FakeQuant, Int8Dynamic, Int8Static, LayerSensitivity, mixed_precision, quantize, sensitivity
from pycompress.quantization.mixed_precision import allocate


def fragile() -> nn.Module:
    """The middle layer has one huge weight per row, which ruins the resolution of the others."""
    model = mlp()
    with torch.no_grad():
        model[2].weight[:, 0] = 50.0
        model[0].bias[0] = -1e4  # and that input is always 0
    return model


def test_names_the_fragile_layer():
    model, data = fragile(), [normal(32, 7)]
    entries = sensitivity(model, FakeQuant(bits=5), data)
    assert entries[0].layer == "2"
    assert {entry.layer: entry.weights for entry in entries} == {"0": 112, "2": 256, "4": 48}
    assert all(entry.loss >= 0 for entry in entries)


@pytest.mark.parametrize("config", [FakeQuant(bits=4), Int8Static(), Int8Dynamic()], ids=repr)
def test_is_the_error_of_quantizing_that_layer_alone(config):
    model, data = mlp(), [normal(16, 7), normal(9, 7, seed=1)]
    entries = {entry.layer: entry.loss for entry in sensitivity(model, config, data)}
    for name in ("0", "2", "4"):
        alone = quantize(model, {name: config}, data=data)
        error = sum((alone(x) - model(x)).double().square().sum() for x in data) / sum(model(x).double().square().sum() for x in data)
        assert entries[name] == pytest.approx(float(error.detach()), rel=1e-2)


def test_evaluate_decides():
    model, x = mlp(), normal(64, 7)
    labels = model(x).argmax(1)
    calls: list[float] = []

    def accuracy(candidate: nn.Module) -> float:
        assert not candidate.training and not torch.is_grad_enabled()
        calls.append(float((candidate(x).argmax(1) == labels).float().mean()))
        return calls[-1]

    entries = sensitivity(model.train(), FakeQuant(bits=2), [x], evaluate=accuracy)
    assert calls[0] == 1.0 and len(calls) == 4
    assert [entry.loss for entry in entries] == sorted((1 - accuracy for accuracy in calls[1:]), reverse=True)
    assert model.training


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> dict[str, object]:
        y = self.linear(x)
        return {"logits": y, "parts": (y.argmax(1), [2 * y])}


def test_outputs_of_any_structure():
    assert sensitivity(seeded(Two()), FakeQuant(bits=3), normal(5, 4))[0].loss > 0
    with pytest.raises(TypeError, match="the model must return tensors, got NoneType"):
        sensitivity(seeded(Two()), FakeQuant(bits=3), normal(5, 4), forward=lambda model, x: None)


def test_batches_with_labels_and_convolutions():
    data = [(normal(4, 3, 9, 7), torch.zeros(4)) for _ in range(2)]
    entries = sensitivity(convnet(), [Int8Static(), FakeQuant(bits=3)], (batch for batch in data), ignore=["3"])
    assert sorted((entry.layer, entry.config.bits) for entry in entries) == [("0", 3), ("0", 8), ("7", 3), ("7", 8)]
    assert [entry.loss for entry in entries] == sorted((entry.loss for entry in entries), reverse=True)


def test_mixed_precision_keeps_the_budget_and_beats_uniform():
    model, data, x = fragile(), [normal(64, 7)], normal(200, 7, seed=5)
    configs = [FakeQuant(bits=bits) for bits in (2, 4, 6, 8)]
    chosen = mixed_precision(model, configs, data, bits=6)
    sizes = {"0": 112, "2": 256, "4": 48}
    assert sum(config.bits * sizes[name] for name, config in chosen.items()) <= 6 * sum(sizes.values())
    assert chosen["2"].bits >= chosen["0"].bits

    def error(config) -> float:
        return float(((quantize(model, config)(x) - model(x)).norm() / model(x).norm()).detach())

    assert error(chosen) < error(FakeQuant(bits=6))


def entries_for(losses: dict[str, dict[int, float]], weights: dict[str, int]) -> list[LayerSensitivity]:
    return [
        LayerSensitivity(name, FakeQuant(bits=bits), loss, weights[name]) for name, found in losses.items() for bits, loss in found.items()
    ]


def test_allocation_is_the_best_of_all_choices():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        size = torch.randint(10, 200, (4,), generator=generator).tolist()
        fragility = torch.rand(4, generator=generator).tolist()
        names = "abcd"
        weights = dict(zip(names, size, strict=True))
        losses = {name: {bits: f * 4.0**-bits for bits in (2, 3, 4, 6, 8)} for name, f in zip(names, fragility, strict=True)}
        best = min(
            sum(losses[name][b] for name, b in zip(names, choice, strict=True))
            for choice in itertools.product((2, 3, 4, 6, 8), repeat=4)
            if sum(b * weights[name] for name, b in zip(names, choice, strict=True)) <= 4 * sum(size)
        )
        chosen = allocate(entries_for(losses, weights), 4)
        assert sum(config.bits * weights[name] for name, config in chosen.items()) <= 4 * sum(size)
        found = sum(losses[name][config.bits] for name, config in chosen.items())
        assert found == pytest.approx(best, rel=1e-12)


def test_allocation_of_large_layers_keeps_the_budget():
    """Costs are rounded to units here; with the smallest budget there is one choice."""
    weights = {str(i): 1_000_003 + i for i in range(30)}
    losses = {name: {bits: 2.0**-bits for bits in (2, 4, 8)} for name in weights}
    entries = entries_for(losses, weights)
    assert {config.bits for config in allocate(entries, 2).values()} == {2}
    used = sum(config.bits * weights[name] for name, config in allocate(entries, 5).items())
    assert 4.9 * sum(weights.values()) < used <= 5 * sum(weights.values())
    uneven = [*entries, LayerSensitivity("big", FakeQuant(bits=8), 0.0, 10**9)]
    with pytest.raises(ValueError, match=r"bits must be at least 7\.83, which the smallest choices take, got 4"):
        allocate(uneven, 4)


def test_allocation_spends_what_is_left():
    losses = {"a": {2: 1.0, 4: 0.5, 8: 0.1}, "b": {2: 0.9, 4: 0.2, 8: 0.0}}
    chosen = allocate(entries_for(losses, {"a": 10, "b": 10}), 6)
    assert {name: config.bits for name, config in chosen.items()} == {"a": 8, "b": 4}
    chosen = allocate(entries_for(losses, {"a": 10, "b": 10}), 100)
    assert {name: config.bits for name, config in chosen.items()} == {"a": 8, "b": 8}


def test_a_config_that_loses_with_more_bits_is_not_taken():
    losses = {"a": {4: 0.1, 8: 0.3}}
    assert allocate(entries_for(losses, {"a": 10}), 8)["a"].bits == 4


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda m: sensitivity(m, [], [normal(1, 7)]), "configs must hold at least one config, got none"),
        (lambda m: sensitivity(m, Int8Static(), []), "data must hold at least one batch, got none"),
        (lambda m: mixed_precision(m, [FakeQuant()], [normal(1, 7)], bits=8), "configs must hold two or more to choose from, got 1"),
        (lambda m: mixed_precision(m, [FakeQuant(), FakeQuant(bits=4)], [normal(1, 7)], bits=3), "bits must be at least 4.*got 3"),
        (lambda m: mixed_precision(m, [FakeQuant(), FakeQuant(bits=4)], [normal(1, 7)], bits=float("nan")), "bits must be at least 4"),
    ],
)
def test_errors(call, text):
    with pytest.raises(ValueError, match=text):
        call(mlp())
