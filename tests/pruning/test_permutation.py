"""Channel permutation before N:M: the network computes the same and keeps more magnitude."""

from __future__ import annotations

import itertools
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pycompress as pc
from pycompress.pruning import permute_channels
from pycompress.pruning.permutation_search import kept_magnitude, search_order


def test_search_never_loses_and_finds_the_best_of_eight():
    """With two groups of four the best order is known by trying all 35; swaps reach it or come within 1 %."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        magnitude = torch.rand(6, 8, generator=generator) ** 3
        order = search_order(magnitude, 2, 4, max_rounds=50)
        assert sorted(order.tolist()) == list(range(8))
        found = kept_magnitude(magnitude[:, order], 2, 4)
        splits = [[*s, *(set(range(8)) - set(s))] for s in itertools.combinations(range(8), 4)]
        best = max(kept_magnitude(magnitude[:, s], 2, 4) for s in splits)
        assert kept_magnitude(magnitude, 2, 4) <= found <= best * (1 + 1e-6) and found >= 0.99 * best


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (2, 8), (3, 4)])
def test_no_swap_is_left(n, m):
    magnitude = torch.rand(5, 3 * m + 2, generator=torch.Generator().manual_seed(2))
    order = search_order(magnitude, n, m, max_rounds=1000)
    assert order[3 * m :].tolist() == [3 * m, 3 * m + 1]
    kept = kept_magnitude(magnitude[:, order], n, m)
    for a, b in itertools.combinations(range(3 * m), 2):
        swapped = order.clone()
        swapped[[a, b]] = order[[b, a]]
        assert kept_magnitude(magnitude[:, swapped], n, m) <= kept * (1 + 1e-6)


def test_search_finds_a_hidden_order():
    """Strong channels next to each other, where 2:4 loses half of them; spread out it loses none."""
    strong = torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0]).expand(3, -1)
    assert kept_magnitude(strong, 2, 4) == 12
    assert kept_magnitude(strong[:, search_order(strong, 2, 4, max_rounds=99)], 2, 4) == 24


@pytest.mark.parametrize("shape", [(3, 4), (3, 7), (0, 16), (3, 0)])
def test_search_with_nothing_to_swap(shape):
    assert search_order(torch.rand(shape), 2, 4, max_rounds=9).tolist() == list(range(shape[1]))


def test_cut_into_blocks_finds_the_same(monkeypatch):
    from pycompress.pruning import permutation_search

    magnitude = torch.rand(9, 40, generator=torch.Generator().manual_seed(3))
    whole = search_order(magnitude, 2, 4, max_rounds=99)
    monkeypatch.setattr(permutation_search, "BLOCK", 7)
    assert torch.equal(search_order(magnitude, 2, 4, max_rounds=99), whole)


class Bottleneck(nn.Module):
    """1x1 - depthwise - 1x1 with a residual, flattened into a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.up = nn.Conv2d(16, 32, 1)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.act = nn.PReLU(32)
        self.down = nn.Conv2d(32, 16, 1)
        self.head = nn.Linear(16 * 9, 5)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.down(self.act(self.depthwise(self.up(x))))
        return self.head(F.adaptive_avg_pool2d(x, 3).flatten(1))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.ln, self.b, self.c = nn.Linear(10, 24), nn.LayerNorm(24), nn.Linear(24, 24), nn.Linear(24, 6)

    def forward(self, x):
        h = self.ln(self.a(x))
        return self.c(h + torch.tanh(self.b(h)))


class Cat(nn.Module):
    """Channels side by side: the reader sees the second set behind the first."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(6, 12), nn.Linear(20, 4)

    def forward(self, x):
        return self.c(torch.cat([F.relu(self.a(x)), torch.tanh(self.b(x))], 1))


def make(kind: type[nn.Module], shape: tuple[int, ...]) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = kind().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm, nn.PReLU)):
            module.weight.data.uniform_(0.2, 2)
    return model, torch.randn(shape)


MODELS = {"bottleneck": (Bottleneck, (2, 3, 8, 8)), "mlp": (Mlp, (4, 10)), "cat": (Cat, (4, 6))}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
def test_function_stays_and_magnitude_grows(name, pattern):
    model, x = make(*MODELS[name])
    before, weights = model(x), {key: value.clone() for key, value in model.state_dict().items()}
    identities = {key: id(value) for key, value in model.named_parameters()}
    summary = permute_channels(model, x, pattern=pattern)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    assert any(not torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert identities == {key: id(value) for key, value in model.named_parameters()}
    assert summary.after > summary.before
    moved = [group for group in summary.groups if group.reason is None]
    assert moved and all(group.after > group.before for group in moved)
    assert f"{summary.before:.2%} -> {summary.after:.2%}" in str(summary)


def test_reported_share_is_what_pruning_keeps():
    model, x = make(*MODELS["mlp"])
    total = sum(float(layer.weight.detach().abs().sum()) for layer in model.modules() if isinstance(layer, nn.Linear))
    pruner = pc.Pruner(model, x, pattern="2:4", permute=True)
    pruner.step()
    kept = sum(float(layer.weight.detach().abs().sum()) for layer in model.modules() if isinstance(layer, nn.Linear))
    assert pruner.permutation is not None and kept / total == pytest.approx(pruner.permutation.after, rel=1e-5)


def test_prune_with_permutation_keeps_more():
    model, x = make(*MODELS["mlp"])
    plain, permuted = (pc.prune(deepcopy(model), x, pattern="2:4", permute=permute) for permute in (False, True))
    size = [sum(float(p.abs().sum()) for key, p in m.state_dict().items() if p.is_floating_point()) for m in (plain, permuted)]
    assert size[1] > size[0]


def test_off_by_default():
    model, x = make(*MODELS["mlp"])
    weights = deepcopy(model.state_dict())
    pruner = pc.Pruner(model, x, pattern="2:4")
    pruner.undo()
    assert pruner.permutation is None and all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


class Shuffled(nn.Module):
    """The reader sees the channels in reverse, which no layer's shape tells."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.b(F.relu(self.a(x)).flip(1))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 4), nn.Linear(8, 16)
        self.c.weight = self.a.weight

    def forward(self, x):
        return self.b(F.relu(self.a(x))) + self.b(self.c(x))


class Weird(nn.Module):
    """Position matters between the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 4)
        self.register_buffer("ramp", torch.linspace(0.1, 3, 16))

    def forward(self, x):
        return self.b(self.a(x) * self.ramp)


@pytest.mark.parametrize(("kind", "width"), [(Shuffled, 6), (Tied, 8), (Weird, 6)])
def test_channels_that_cannot_move_stay(kind, width):
    torch.manual_seed(0)
    model, x = kind().eval(), torch.randn(3, width)
    weights = deepcopy(model.state_dict())
    summary = permute_channels(model, x)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert summary.groups and all(group.reason for group in summary.groups)
    assert summary.before == summary.after


def test_ignored_readers_do_not_count():
    model, x = make(*MODELS["mlp"])
    summary = permute_channels(model, x, ignore=["c"])
    assert all("c" not in group.readers for group in summary.groups)


def test_resume_takes_the_order_from_the_model():
    model, x = make(*MODELS["mlp"])
    twin = deepcopy(model)
    pruner = pc.Pruner(model, x, pattern="2:4", permute=True, steps=2)
    pruner.step()
    again = pc.Pruner(twin, x, pattern="2:4", permute=True, steps=2)
    again.load_state_dict(pruner.state_dict())
    twin.load_state_dict(model.state_dict())
    for p in (pruner, again):
        p.step()
    assert torch.equal(pruner.convert()(x), again.convert()(x))
    with pytest.raises(ValueError, match="permute must be as in the saved pruner"):
        pc.Pruner(make(*MODELS["mlp"])[0], x, pattern="2:4", steps=2).load_state_dict(
            pc.Pruner(make(*MODELS["mlp"])[0], x, pattern="2:4", steps=2, permute=True).state_dict()
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "channel"}, "permute_channels: pattern must be 'N:M' with numbers"),
        ({"pattern": "unstructured"}, "permute_channels: pattern must be 'N:M' with numbers"),
        ({"max_rounds": 0}, "permute_channels: max_rounds must be a positive integer, got 0"),
        ({"ignore": [nn.Linear]}, "permute_channels: model must have a layer to prune"),
    ],
)
def test_errors(options, message):
    model, x = make(*MODELS["mlp"])
    with pytest.raises(ValueError, match=message):
        permute_channels(model, x, **options)


@pytest.mark.parametrize("options", [{"pattern": "unstructured", "ratio": 0.5}, {"pattern": "channel", "ratio": 0.5}])
def test_pruner_takes_permute_for_patterns_of_neighbours_only(options):
    model, x = make(*MODELS["mlp"])
    with pytest.raises(ValueError, match="Pruner: permute must be True or False, and False but for N:M patterns"):
        pc.Pruner(model, x, permute=True, **options)
    with pytest.raises(ValueError, match="Pruner: permute must be True or False"):
        pc.Pruner(model, x, pattern="2:4", permute=1)


def test_masked_weights_are_refused():
    model, x = make(*MODELS["mlp"])
    pc.Pruner(model, x, pattern="2:4")
    with pytest.raises(ValueError, match=r"permute_channels: moving .* needs plain weights"):
        permute_channels(model, x)
