"""sensitivity and rewind."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.prunable import IMAGE, Residual, mlp
from torch import nn

from pycompress.pruning import Pruner, Sensitivity, prune, rewind, sensitivity


def network_with_a_useless_layer():
    model = mlp(6, 10, 6)
    with torch.no_grad():
        model[0].weight[:, 3:] = 0  # zeros first: half of this layer costs nothing
    return model


def test_finds_the_layer_that_can_lose_more():
    model = network_with_a_useless_layer()
    x = torch.randn(64, 6)
    target = model(x).detach()
    before = copy.deepcopy(model.state_dict())
    table = sensitivity(model, x, lambda m: -F.mse_loss(m(x), target).item(), ratios=(0.5, 0.25, 0.75), progress=False)
    assert table.baseline == 0
    assert list(table.scores) == ["0", "2"] and list(table.scores["0"]) == [0.25, 0.5, 0.75]
    assert table.scores["0"][0.5] == 0 > table.scores["2"][0.25]
    assert table.ratios(max_drop=0.0) == {"0": 0.5}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    expected = prune(copy.deepcopy(model), x, ratio={"2": 0.5})
    assert table.scores["2"][0.5] == -F.mse_loss(expected(x), target).item()
    prune(model, x, ratio=table.ratios(0.0))
    assert int((model[0].weight == 0).sum()) == 30 and int((model[2].weight == 0).sum()) == 0


def test_channels_that_have_to_stay_are_left_out():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ChannelShuffle(2), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 2, 1))
    table = sensitivity(model, torch.randn(IMAGE), lambda m: 0.0, ratios=(0.5, 0.2), pattern="channel", progress=False)
    assert list(table.scores) == ["2"]


def test_channels_by_group_with_data_and_ignored_modules():
    model, x, y = Residual(), torch.randn(IMAGE), torch.tensor([0, 1])
    seen = []
    table = sensitivity(
        model,
        x,
        lambda m: seen.append(m) or -F.cross_entropy(m(x), y).item(),
        ratios=[0.5],
        pattern="channel",
        criterion="taylor",
        ignore=model.conv1,
        data=iter([(x, y)]),
        loss_fn=F.cross_entropy,
    )
    assert len(table.scores) == 2 and "conv1" not in table.scores  # the stem's group and the last block's
    assert len(seen) == 3 and model not in seen
    pruned = prune(model, x, pattern="channel", ratio=table.ratios(float("inf")))
    assert (pruned.stem.out_channels, pruned.conv3.out_channels, pruned.conv1.out_channels) == (4, 6, 10)


def test_ratios_stop_at_the_first_drop():
    table = Sensitivity(0.9, {"a": {0.25: 0.9, 0.5: 0.7, 0.75: 0.9}, "b": {0.25: float("nan")}, "c": {0.25: 0.95, 0.5: 0.89}})
    assert table.ratios(0.02) == {"a": 0.25, "c": 0.5}
    assert table.ratios(0.0) == {"a": 0.25, "c": 0.25}
    with pytest.raises(ValueError, match="max_drop must allow at least one layer its lowest ratio, got -1"):
        table.ratios(-1)


def test_table():
    assert str(Sensitivity(0.9, {"conv": {0.5: 0.85}})).splitlines() == ["layer      50%", "conv   -0.0500"]


def test_errors():
    x = torch.randn(2, 6)
    for arguments, text in [
        ({"pattern": "2:4"}, "pattern must be 'unstructured' or 'channel', whose ratio can vary, got '2:4'"),
        ({"ratios": []}, "ratios must hold at least one number"),
        ({"ratios": [1.0]}, r"sensitivity: ratio must be in \[0, 1\), got 1.0"),
        ({"ignore": ["nothing"]}, "ignore entry 'nothing' matches no module"),
        ({"ignore": [nn.ReLU()]}, "ignore entry a ReLU matches no module"),
    ]:
        with pytest.raises(ValueError, match=text):
            sensitivity(mlp(6, 3), x, lambda m: 0.0, **arguments)


@pytest.mark.parametrize("when", ["before", "after"])
def test_rewind_keeps_masks_and_brings_early_weights_back(when):
    model = Residual()
    x = torch.randn(IMAGE)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    early = copy.deepcopy(model.state_dict())
    pruner = Pruner(model, x, ratio=0.8, schedule="exponential", steps=3, ignore=["short"])
    if when == "after":
        early = copy.deepcopy(model.state_dict())
    for _ in range(3):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        F.cross_entropy(model(x), torch.tensor([0, 1])).backward()
        optimizer.step()
        pruner.step()
        masks = {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith(".mask")}
        assert rewind(model, early) is model
        assert all(torch.equal(dict(model.named_buffers())[name], mask) for name, mask in masks.items())
    assert model.bn1.num_batches_tracked == 0
    ticket = pruner.convert()
    for name, p in ticket.named_parameters():
        kept = p != 0
        assert torch.equal(p[kept], weights[name][kept])
    assert int((ticket.conv1.weight == 0).sum()) == round(0.8 * 720)


def test_rewind_refuses_a_state_that_does_not_fit():
    model = mlp(6, 3)
    Pruner(model, torch.randn(2, 6), ratio=0.5)
    before = copy.deepcopy(model.state_dict())
    for state, text in [
        ({}, r"rewind: state must hold '0.(weight|bias)' with shape .*, got none"),
        (mlp(6, 4).state_dict(), r"rewind: state must hold '0.(weight|bias)' with shape .*, got shape \(4,"),
    ]:
        with pytest.raises(ValueError, match=text):
            rewind(model, state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
