"""A run that is cut off and resumed prunes and trains exactly as one that was not."""

import io

import pytest
import torch
import torch.nn.functional as F
from support.prunable import Residual, mlp

from pycompress.pruning import Pruner

X, Y = torch.randn(32, 3, 8, 8), torch.randint(5, (32,))
SETTINGS = [
    {"pattern": "unstructured", "ratio": 0.8, "criterion": "magnitude"},
    {"pattern": "unstructured", "ratio": 0.8, "criterion": "random", "scope": "global"},
    {"pattern": "unstructured", "ratio": {"conv*": 0.5, "head": 0.7}, "criterion": "obd"},
    {"pattern": "2:4", "criterion": "wanda"},
    {"pattern": "channel", "ratio": 0.5, "criterion": "random"},
    {"pattern": "channel", "ratio": 0.5, "criterion": "taylor", "round_to": 2},
]


def start(settings):
    torch.manual_seed(7)
    model = Residual()
    return model, Pruner(model, X[:2], steps=4, frequency=2, schedule="linear", seed=3, **settings)


def optimizer_for(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def train(model, pruner, optimizer, first, last):
    for i in range(first, last):
        batch = slice(4 * (i % 8), 4 * (i % 8) + 4)
        optimizer.zero_grad()
        F.cross_entropy(model(X[batch]), Y[batch]).backward()
        optimizer.step()
        if pruner.step().structure_changed:
            optimizer = optimizer_for(model)
    return optimizer


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("cut", [0, 3, 5, 8])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_resume(settings, cut):
    model, pruner = start(settings)
    train(model, pruner, optimizer_for(model), 0, 9)
    expected = pruner.convert().state_dict()

    model, pruner = start(settings)
    optimizer = train(model, pruner, optimizer_for(model), 0, cut)
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "pruner": pruner.state_dict()})
    summary = pruner.summary()

    model, pruner = start(settings)
    pruner.load_state_dict(saved["pruner"])
    model.load_state_dict(saved["model"])
    optimizer = optimizer_for(model)
    optimizer.load_state_dict(saved["optimizer"])
    assert pruner.summary() == summary
    train(model, pruner, optimizer, cut, 9)
    got = pruner.convert().state_dict()
    assert list(got) == list(expected)
    assert all(torch.equal(got[name], value) for name, value in expected.items())


def test_state_holds_copies():
    model = mlp(6, 3)
    pruner = Pruner(model, torch.randn(2, 6), ratio=0.5, criterion="wanda", steps=2)
    model(torch.randn(4, 6))
    state = pruner.state_dict()
    before = state["statistics"]["input_squares"]["0"].clone()
    model(torch.randn(4, 6))
    pruner.step()
    assert torch.equal(state["statistics"]["input_squares"]["0"], before)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"steps": 5}, "steps must be as in the saved pruner, 4, got 5"),
        ({"ratio": 0.6}, "ratios must be as in the saved pruner"),
        ({"criterion": "lamp"}, "criterion must be as in the saved pruner, 'magnitude', got 'lamp'"),
        ({"ignore": ["head"]}, "ratios must be as in the saved pruner"),
    ],
)
def test_other_settings_are_refused(change, text):
    settings = {"ratio": 0.5, "steps": 4}
    state = Pruner(Residual(), X[:2], **settings).state_dict()
    other = Pruner(Residual(), X[:2], **{**settings, **change})
    with pytest.raises(ValueError, match=text):
        other.load_state_dict(state)


def test_broken_state_is_refused_and_changes_nothing():
    model, pruner = start(SETTINGS[4])
    train(model, pruner, optimizer_for(model), 0, 4)
    state = pruner.state_dict()
    model, fresh = start(SETTINGS[4])
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    for removed in ([[["nowhere", "out", -1, [0]]]], [[["conv1", "out", -1, [0]]]], [[["conv1"]]], 3):
        with pytest.raises(ValueError, match=r"Pruner.load_state_dict: state must fit the model"):
            fresh.load_state_dict({**state, "removed": removed})
        assert {name: value.shape for name, value in model.state_dict().items()} == shapes
    statistics = {**state["statistics"], "gradient": {"nowhere": torch.ones(1)}}
    with pytest.raises(ValueError, match="got statistics of 'nowhere', which is not pruned here"):
        fresh.load_state_dict({**state, "statistics": statistics})
    with pytest.raises(ValueError, match=r"state must be what state_dict\(\) returns, got one without 'config'"):
        fresh.load_state_dict({})
    fresh.load_state_dict(state)
    with pytest.raises(RuntimeError, match="a pruner that has not removed channels yet is needed"):
        fresh.load_state_dict(state)
