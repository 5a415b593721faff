"""Channel removal: right channels, right shapes, the same function as with the channels cut off from everything that reads them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.prunable import IMAGE, Attention, Concat, Decoder, Gated, Grouped, Mobile, Residual, TwoOutputs, mlp, train_statistics
from torch import nn

from pycompress.nn.base import get_note
from pycompress.pruning import CRITERIA, Pruner, prune
from pycompress.pruning.graph import ChannelGraph, apply_cuts

X = torch.randn(IMAGE, generator=torch.Generator().manual_seed(0))
MODELS = [Residual, Concat, Mobile, Grouped, Gated, Decoder, TwoOutputs]


def outputs(model, x=X):
    y = model.eval()(x)
    return list(y.values()) if isinstance(y, dict) else [y]


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def cut_off(model, cuts):
    """The oracle: the same network with its shapes, where no layer reads the removed channels any more."""
    modules = dict(model.named_modules())
    for (name, side), (_, indices) in cuts.items():
        layer = modules[name]
        if side == "in" and isinstance(layer, nn.Linear):
            layer.weight[:, indices] = 0
        elif side == "in" and isinstance(layer, nn.Conv2d):
            per_group = layer.in_channels // layer.groups
            for index in indices:
                group, inner = divmod(index, per_group)
                outs = layer.out_channels // layer.groups
                layer.weight[group * outs : (group + 1) * outs, inner] = 0
        elif side == "in" and isinstance(layer, nn.ConvTranspose2d):
            layer.weight[indices] = 0


@pytest.mark.parametrize("make", MODELS)
def test_each_group_removed_alone_equals_the_network_that_does_not_read_it(make):
    model = train_statistics(make())
    graph = ChannelGraph(model, X)
    checked = 0
    for group in graph.groups:
        if group.fixed is not None or group.channels == group.unit:
            continue
        size = group.channels // group.unit
        positions = [0, size - 1] if size > 2 else [0]
        channels = [p + k * size for k in range(group.unit) for p in positions]
        cuts = graph.cut(group, channels)
        small, same = copy.deepcopy(model), copy.deepcopy(model)
        apply_cuts(small, cuts)
        cut_off(same, cuts)
        assert parameters(small) < parameters(model)
        for got, expected, original in zip(outputs(small), outputs(same), outputs(model), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
            assert not torch.allclose(got, original, rtol=1e-4, atol=1e-5)  # the channels mattered
        checked += 1
    assert checked >= 2 or (make is TwoOutputs and checked == 1)


@pytest.mark.parametrize("make", MODELS)
def test_all_groups_together(make):
    model = train_statistics(make())
    reference = copy.deepcopy(model)
    pruner = Pruner(model, X, pattern="channel", ratio=0.4, scope="local")
    pruner.step()
    (cuts,) = pruner._engine.history
    cut_off(reference, cuts)
    for got, expected in zip(outputs(pruner.convert()), outputs(reference), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("criterion", [name for name in CRITERIA if not CRITERIA[name].needs])
def test_shapes_stay_and_gradients_flow(make, scope, criterion):
    model = make()
    if criterion == "bn_scale" and make in (Grouped, Gated, Decoder, TwoOutputs):
        with pytest.raises(ValueError, match="criterion BatchNormScale cannot score the channels of"):
            prune(model, X, pattern="channel", ratio=0.5, scope=scope, criterion=criterion)
        return
    ignore = {Residual: ["stem", "conv2", "head"], Mobile: ["squeeze"], Concat: ["mix"]}[make] if criterion == "bn_scale" else ()
    before = [y.shape for y in outputs(model)]
    size = parameters(model)
    model = prune(model, X, pattern="channel", ratio=0.5, scope=scope, criterion=criterion, ignore=ignore)
    assert [y.shape for y in outputs(model)] == before
    assert parameters(model) < size
    sum(y.sum() for y in outputs(model.train())).backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


def test_ratio_is_the_share_of_channels_of_every_layer():
    model = prune(Residual(), X, pattern="channel", ratio=0.5)
    assert (model.stem.out_channels, model.conv1.out_channels, model.conv2.out_channels) == (4, 5, 4)
    assert (model.conv3.out_channels, model.short.out_channels, model.head.in_features) == (6, 6, 24)
    assert (model.bn1.num_features, model.bn2.num_features) == (5, 4)
    assert model.head.out_features == 5


def test_ratio_zero_changes_nothing():
    model = Residual()
    state = copy.deepcopy(model.state_dict())
    assert not Pruner(model, X, pattern="channel", ratio=0.0).step().structure_changed
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_local_removes_the_channels_with_the_lowest_scores():
    model = mlp(4, 6, 3)
    with torch.no_grad():
        strength = torch.tensor([3.0, 0.1, 2.0, 0.2, 5.0, 0.3])
        model[0].weight.copy_(strength[:, None].expand(6, 4))
        model[2].weight.copy_(strength.expand(3, 6))
    prune(model, torch.randn(2, 4), pattern="channel", ratio=0.5)
    assert torch.equal(model[0].weight[:, 0], torch.tensor([3.0, 2.0, 5.0]))
    assert torch.equal(model[2].weight[0], torch.tensor([3.0, 2.0, 5.0]))


def test_equal_scores_do_not_change_the_count():
    model = mlp(4, 9, 9, 3)
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    prune(model, torch.randn(2, 4), pattern="channel", ratio=0.45, scope="global")
    assert (9 - model[0].out_features) + (9 - model[2].out_features) == round(0.45 * 18)


def test_global_takes_more_from_the_layer_that_matters_less():
    model = mlp(4, 10, 10, 3)
    with torch.no_grad():
        model[0].weight.copy_(torch.ones(10, 4))
        model[2].weight.copy_(torch.cat([torch.full((8, 10), 1e-3), torch.ones(2, 10) * 10]))
        model[4].weight.copy_(torch.cat([torch.full((3, 8), 1e-3), torch.ones(3, 2) * 10], 1))
    prune(model, torch.randn(2, 4), pattern="channel", ratio=0.4, scope="global")
    assert (model[0].out_features, model[2].out_features) == (10, 2)


def test_global_compares_layers_of_different_scale():
    widths = []
    for scale in (1, 1000):
        torch.manual_seed(3)
        model = mlp(4, 20, 20, 3)
        model[2].weight.data.mul_(1 / scale)
        model[4].weight.data.mul_(1 / scale)  # the second group's scores, out and in
        prune(model, torch.randn(2, 4), pattern="channel", ratio=0.5, scope="global", criterion="geometric_median")
        widths.append((model[0].out_features, model[2].out_features))
    assert widths[0] == widths[1]


@pytest.mark.parametrize("scope", ["local", "global"])
def test_every_layer_keeps_a_channel(scope):
    model = prune(Concat(), X, pattern="channel", ratio=0.99, scope=scope)
    assert min(model.left.out_channels, model.right.out_channels, model.mix.out_channels) >= 1
    assert model(X).shape == (2, 4)


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("round_to", [1, 2, 4, 5])
def test_round_to(scope, round_to):
    model = mlp(6, 20, 40, 3)
    prune(model, torch.randn(2, 6), pattern="channel", ratio=0.35, scope=scope, round_to=round_to)
    for layer, before in ((model[0], 20), (model[2], 40)):
        assert layer.out_features % round_to == 0
        if scope == "local":
            assert 0 <= layer.out_features - (before - round(0.35 * before)) < round_to


def test_round_to_larger_than_the_layer_keeps_it():
    model = mlp(6, 5, 40, 3)
    prune(model, torch.randn(2, 6), pattern="channel", ratio=0.5, round_to=8)
    assert (model[0].out_features, model[2].out_features) == (5, 24)


def test_ignored_layers_keep_their_outputs_and_what_shares_them():
    model = prune(Residual(), X, pattern="channel", ratio=0.5, ignore=["conv2"])
    assert (model.stem.out_channels, model.conv2.out_channels, model.conv2.in_channels, model.conv1.out_channels) == (8, 8, 5, 5)


def test_ratios_by_name():
    model = prune(Residual(), X, pattern="channel", ratio={"conv1": 0.7, "short": 0.25})
    assert (model.conv1.out_channels, model.short.out_channels, model.stem.out_channels) == (3, 9, 8)
    with pytest.raises(ValueError, match=r"ratio must be the same for layers that share channels, got \{.*'conv3': 0.1.*\}"):
        Pruner(Residual(), X, pattern="channel", ratio={"conv3": 0.1, "short": 0.2})
    with pytest.raises(ValueError, match="ratio names 'head', but its channels are an output of the model"):
        Pruner(Residual(), X, pattern="channel", ratio={"head": 0.1, "short": 0.2})


def test_groups_of_equal_size():
    model = prune(Grouped(), X, pattern="channel", ratio=0.5)
    assert model.grouped.groups == 3
    assert (model.first.out_channels, model.grouped.in_channels, model.grouped.out_channels) == (6, 6, 9)
    assert model.grouped.weight.shape == (9, 2, 3, 3)


def test_depthwise_follows():
    model = prune(Mobile(), X, pattern="channel", ratio=0.5)
    assert model.depthwise.groups == model.depthwise.in_channels == model.expand.out_channels == model.excite.out_channels == 8


def test_halves_that_belong_together_leave_together():
    model = prune(Gated(), X, pattern="channel", ratio=0.5)
    assert (model.both.out_channels, model.mix.in_channels) == (10, 5)


class Shuffled(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.a, self.norm, self.b, self.head = nn.Conv2d(3, 12, 1), norm, nn.Conv2d(12, 8, 1), nn.Linear(8, 2)

    def forward(self, x):
        x = self.norm(self.a(x))
        batch, channels, *rest = x.shape
        x = x.view(batch, 2, channels // 2, *rest).transpose(1, 2).reshape(batch, channels, *rest)
        return self.head(self.b(x).relu().mean((2, 3)))


@pytest.mark.parametrize("norm", [nn.Identity(), nn.BatchNorm2d(12), nn.InstanceNorm2d(12)])
def test_shuffled_channels_stay_though_all_shapes_would_fit(norm):
    model = prune(Shuffled(copy.deepcopy(norm)), X, pattern="channel", ratio=0.5)
    assert (model.a.out_channels, model.b.out_channels) == (12, 4)
    assert get_note(model.a).startswith("keeps its channels: removing channels gives other results than zeroing them: a permutation")
    with pytest.raises(ValueError, match="ratio names 'a', but removing channels gives other results than zeroing them"):
        Pruner(Shuffled(copy.deepcopy(norm)), X, pattern="channel", ratio={"a": 0.5, "b": 0.5})


def test_channels_that_a_reshape_mixes_with_positions_stay():
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.PixelShuffle(2), nn.Conv2d(4, 8, 1), nn.Conv2d(8, 2, 1))
    model = prune(model, X, pattern="channel", ratio=0.5)
    assert (model[0].out_channels, model[2].out_channels) == (16, 4)


class Negative(nn.Module):
    def forward(self, x):
        return x.clamp(max=0)


@pytest.mark.parametrize("bias", [-50, 50])
@pytest.mark.parametrize("activation", [nn.ReLU(), Negative(), nn.Hardtanh(), nn.Sigmoid(), nn.Softmax(-1), nn.Identity()])
@pytest.mark.parametrize("norm", [nn.LayerNorm(16), nn.Identity()])
def test_normalisation_over_channels_and_dead_units_are_no_reason_to_refuse(norm, activation, bias):
    model = nn.Sequential(nn.Linear(4, 16), copy.deepcopy(norm), activation, nn.Linear(16, 2))
    model[0].bias.data[:6] = bias
    assert prune(model, torch.randn(2, 4), pattern="channel", ratio=0.5)[0].out_features == 8


def test_a_weak_branch_of_a_concatenation_keeps_a_channel():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right, self.whole = nn.Linear(4, 6), nn.Linear(4, 10), nn.Linear(4, 16)
            self.head = nn.Linear(16, 3)

        def forward(self, x):
            return self.head(torch.cat([self.left(x), self.right(x)], 1) + self.whole(x))

    for scope in ("local", "global"):
        model = Branches()
        with torch.no_grad():
            for layer in (model.left.weight, model.whole.weight[:6], model.head.weight[:, :6]):
                layer.mul_(1e-3)
        prune(model, torch.randn(2, 4), pattern="channel", ratio=0.5, scope=scope)
        assert (model.left.out_features, model.right.out_features, model.whole.out_features) == (1, 7, 8)


class Norms(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, padding=1)
        self.group_norm = nn.GroupNorm(4, 12)
        self.prelu = nn.PReLU(12)
        self.second = nn.Conv2d(12, 8, 1)
        self.instance_norm = nn.InstanceNorm2d(8, affine=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.instance_norm(self.second(self.prelu(self.group_norm(self.conv(x))))).relu().mean((2, 3)))


def test_group_norm_keeps_its_groups():
    model = prune(Norms(), X, pattern="channel", ratio=0.4)
    assert (model.group_norm.num_groups, model.group_norm.num_channels) == (4, 8)
    assert model.prelu.num_parameters == 8 and model.instance_norm.num_features == 5
    assert model(X).shape == (2, 2)


def test_outputs_are_protected_and_the_report_can_say_why():
    model = TwoOutputs()
    prune(model, X, pattern="channel", ratio=0.5)
    assert (model.inner.out_channels, model.feature.out_channels, model.head.out_features) == (3, 8, 3)
    assert get_note(model.feature) == "keeps its channels: its channels are an output of the model"


def test_residual_of_the_models_input_cannot_shrink_and_the_error_names_the_layer():
    class FromInput(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.head(x + self.b(self.a(x).relu()))

    model = FromInput()
    with pytest.raises(
        RuntimeError, match=r"must run with fewer channels, got RuntimeError: .*the channels of 'b' have to stay: put them in ignore"
    ):
        Pruner(model, torch.randn(2, 6), pattern="channel", ratio=0.5)
    assert model.a.out_features == 8
    assert prune(model, torch.randn(2, 6), pattern="channel", ratio=0.5, ignore=["b"]).a.out_features == 4


def test_transformer_with_heads_in_the_code():
    model = Attention()
    x = torch.randn(2, 5, 6)
    with pytest.raises(RuntimeError, match="'qkv'"):
        Pruner(model, x, pattern="channel", ratio=0.5)
    model = prune(model, x, pattern="channel", ratio=0.5, ignore=["qkv"])
    assert (model.embed.out_features, model.up.out_features, model.qkv.in_features, model.qkv.out_features) == (8, 10, 8, 24)
    assert model.position.shape == (1, 5, 8) and isinstance(model.position, nn.Parameter)
    assert model.norm.normalized_shape == (8,)
    assert model(x).shape == (2, 3)


def test_multihead_attention_keeps_its_width():
    class WithHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.attention = nn.Linear(6, 8), nn.MultiheadAttention(8, 2, batch_first=True)
            self.up, self.head = nn.Linear(8, 12), nn.Linear(12, 2)

        def forward(self, x):
            x = self.embed(x)
            return self.head(self.up(self.attention(x, x, x, need_weights=False)[0]).relu().mean(1))

    model = prune(WithHeads(), torch.randn(2, 5, 6), pattern="channel", ratio=0.5)
    assert (model.embed.out_features, model.up.out_features) == (8, 6)
    assert model(torch.randn(2, 5, 6)).shape == (2, 2)


def test_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.up, self.down, self.head = nn.Embedding(11, 8), nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 11)
            self.head.weight = self.embed.weight

        def forward(self, tokens):
            x = self.embed(tokens)
            return self.head(x + self.down(self.up(x).relu()))

    tokens = torch.randint(11, (2, 5))
    model = prune(Tied(), tokens, pattern="channel", ratio=0.5)
    assert model.head.weight is model.embed.weight and model.head.in_features == 8
    assert model.up.out_features == 8
    assert "shares its parameters" in get_note(model.down)


def test_frozen_parameters_are_pruned_and_stay_frozen():
    model = Residual()
    for parameter in model.conv1.parameters():
        parameter.requires_grad_(False)
    prune(model, X, pattern="channel", ratio=0.5)
    assert model.conv1.out_channels == 5
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {"conv1.weight"}


def test_train_and_eval_modes_stay():
    model = Residual()
    model.bn1.eval()
    prune(model, X, pattern="channel", ratio=0.5)
    assert model.training and model.conv1.training and not model.bn1.training


def test_gradual_shrinks_at_every_event_and_says_so():
    model = mlp(4, 20, 3)
    x, y = torch.randn(32, 4), torch.randint(3, (32,))
    pruner = Pruner(model, x, pattern="channel", ratio=0.5, schedule="linear", steps=5)
    widths = []
    for _ in range(5):
        update = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        F.cross_entropy(model(x), y).backward()
        update.step()
        step = pruner.step()
        assert step.structure_changed
        widths.append(model[0].out_features)
    assert widths == [18, 16, 14, 12, 10]
    assert step.done and pruner.convert() is model
    assert pruner.summary().layers[0].shape == (10, 4)
    assert "20x4 -> 10x4" in str(pruner.summary())


def test_an_event_that_rounds_to_nothing_changes_no_structure():
    pruner = Pruner(mlp(4, 4, 3), torch.randn(2, 4), pattern="channel", ratio=0.25, schedule="linear", steps=4)
    assert [pruner.step().structure_changed for _ in range(4)] == [False, False, True, False]


def test_small_network_is_an_ordinary_one():
    model = prune(Residual(), X, pattern="channel", ratio=0.5).eval()
    twin = Residual()
    with pytest.raises(RuntimeError, match="size mismatch"):
        twin.load_state_dict(model.state_dict())
    exported = torch.export.export(model, (X,)).module()
    torch.testing.assert_close(exported(X), model(X))
    assert torch.equal(copy.deepcopy(model)(X), model(X))


def test_masks_after_channels():
    model = prune(Residual(), X, pattern="channel", ratio=0.5)
    model = prune(model, X, pattern="2:4")
    assert model.conv1.weight.shape == (5, 4, 3, 3) and int((model.conv1.weight == 0).sum()) == 5 * 36 // 2


def test_inputs_in_a_tuple_and_in_a_dict():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(4, 6), nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, first, second, scale=1.0):
            return self.head((self.a(first) + self.b(second)).relu() * scale)

    first, second = torch.randn(2, 4), torch.randn(2, 3)
    for inputs in ((first, second), [first, second], {"first": first, "second": second, "scale": 2.0}):
        assert prune(Two(), inputs, pattern="channel", ratio=0.5).a.out_features == 3
