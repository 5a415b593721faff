"""Removal has to give what zeroing gives: attention heads and permutations stay, normalisations are no reason to keep channels."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.prunable import mlp
from torch import nn

from pycompress.nn.base import get_note
from pycompress.pruning import Pruner, prune
from pycompress.pruning.graph import ChannelGraph
from pycompress.pruning.rehearsal import MixedChannels, Rehearsal

TOKENS = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class SelfAttention(nn.Module):
    """Heads of a size that is inferred, or as many heads as fit: neither crashes after channels are removed."""

    def __init__(self, heads=4, view=(4, -1)):
        super().__init__()
        self.view = view
        self.embed, self.norm = nn.Linear(6, 16), nn.LayerNorm(16)
        self.query, self.key, self.value, self.project = (nn.Linear(16, 16) for _ in range(4))
        self.up, self.down, self.head = nn.Linear(16, 20), nn.Linear(20, 16), nn.Linear(16, 3)
        for layer in (self.query, self.key):
            nn.init.normal_(layer.weight, std=0.02)  # untrained: attends to everything alike, which hides mixed heads

    def forward(self, x):
        x = self.embed(x)
        y = self.norm(x)
        query, key, value = (layer(y).view(2, 5, *self.view).transpose(1, 2) for layer in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(query, key, value, scale=0.5).transpose(1, 2).reshape(2, 5, -1)
        x = x + self.project(mixed)
        return self.head((x + self.down(self.up(x).relu())).mean(1))


@pytest.mark.parametrize("view", [(4, -1), (-1, 4)], ids=["heads", "as many as fit"])
@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_attention_heads_are_not_mixed(view, ratio):
    model = prune(SelfAttention(view=view), TOKENS, pattern="channel", ratio=ratio)
    assert {layer.out_features for layer in (model.query, model.key, model.value)} == {16}
    assert model.embed.out_features == 16 * (1 - ratio) and model.up.out_features == 20 * (1 - ratio)
    for layer in (model.query, model.key, model.value):
        assert "attention heads, ties them to their places" in get_note(layer)


def test_a_single_head_loses_channels():
    model = prune(SelfAttention(view=(1, -1)), TOKENS, pattern="channel", ratio=0.5)
    assert {layer.out_features for layer in (model.query, model.key, model.value)} == {8}


def test_nothing_left_to_prune_is_an_error_that_names_the_layers_and_the_reason():
    with pytest.raises(ValueError, match=r"got none \(.*'query'.*: removing channels gives other results than zeroing them"):
        Pruner(SelfAttention(), TOKENS, pattern="channel", ratio=0.5, ignore=["embed", "project", "up", "down"])


class MixedResidual(nn.Module):
    def __init__(self, mix):
        super().__init__()
        self.mix = mix
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.inner, self.head = nn.Conv2d(16, 6, 1), nn.Linear(6, 3)

    def forward(self, x):
        x = self.first(x)
        return self.head(self.inner(x + self.mix(self.second(x.relu()))).relu().mean((2, 3)))


@pytest.mark.parametrize("mix", [lambda y: y.flip(1), nn.ChannelShuffle(4), lambda y: y.roll(1, 1)], ids=["flip", "shuffle", "roll"])
@pytest.mark.parametrize("scale", [1.0, 0.0], ids=["", "branch that starts at zero"])
def test_a_permutation_beside_a_residual_connection(mix, scale):
    model = MixedResidual(mix)
    model.second.weight.data.mul_(scale)
    model.second.bias.data.mul_(scale)
    model = prune(model, IMAGE, pattern="channel", ratio=0.5)
    assert (model.first.out_channels, model.second.out_channels, model.inner.out_channels) == (16, 16, 3)
    assert "a permutation" in get_note(model.second)


def test_a_residual_connection_without_one_is_pruned():
    assert prune(MixedResidual(nn.Identity()), IMAGE, pattern="channel", ratio=0.5).second.out_channels == 8


class RMSNorm(nn.Module):
    """By hand, as in Llama."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class ByHand(RMSNorm):
    def forward(self, x):
        variance, mean = torch.var_mean(x, -1, keepdim=True, correction=0)
        return (x - mean) / (variance + 1e-5).sqrt() * self.weight


class Functional(RMSNorm):
    def forward(self, x):
        return F.rms_norm(x, normalized_shape=x.shape[-1:], weight=self.weight)


class Norms(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.first, self.norm, self.second, self.head = nn.Linear(6, 16), norm, nn.Linear(16, 12), nn.Linear(12, 2)

    def forward(self, x):
        return self.head(self.second(self.norm(self.first(x))).sigmoid())


SIGMOID_FIRST = nn.Sequential(nn.Sigmoid(), nn.LayerNorm(16))  # a zero does not stay one
NORMS = [nn.LayerNorm(16), Functional(16), nn.Softmax(-1), nn.LogSoftmax(-1), RMSNorm(16), ByHand(16), SIGMOID_FIRST]


@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: type(norm).__name__)
def test_a_normalisation_over_channels_is_no_reason_to_keep_them(norm):
    model = prune(Norms(copy.deepcopy(norm)), torch.randn(3, 6), pattern="channel", ratio=0.5)
    assert (model.first.out_features, model.second.out_features) == (8, 6)


def test_a_permutation_behind_a_normalisation_is_one():
    model = prune(Norms(nn.Sequential(nn.LayerNorm(16), nn.Flatten(1), Flip())), torch.randn(3, 6), pattern="channel", ratio=0.5)
    assert (model.first.out_features, model.second.out_features) == (16, 6)


class Flip(nn.Module):
    def forward(self, x):
        return x.flip(-1)


def test_own_weights_where_random_ones_are_not_valid():
    class Checked(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.rate = mlp(6, 12, 12, 2), nn.Parameter(torch.full((2, 2), 3.0))

        def forward(self, x):
            if (self.rate < 0).any():
                raise ValueError("rate must be positive")
            return self.net(x) * self.rate.sum()

    assert prune(Checked(), torch.randn(3, 6), pattern="channel", ratio=0.5).net[0].out_features == 6


def test_a_rehearsal_changes_neither_model_nor_random_state():
    model = SelfAttention()
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    rehearsal = Rehearsal(model, TOKENS)
    graph = ChannelGraph(model, TOKENS)
    value, embed = (next(group for group in graph.groups if name in group.outputs()) for name in ("value", "embed"))
    with pytest.raises(MixedChannels, match="ties them to their places"):
        rehearsal(graph.cut(value, [0, 5, 9, 11]))
    rehearsal(graph.cut(embed, [0, 5, 9, 11]))  # the failed one left nothing behind
    assert torch.equal(torch.rand(4), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("family", ["Bert", "ViT"])
def test_hugging_face_attention_keeps_its_heads(family):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    if family == "Bert":
        model = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=100, **sizes)).eval()
        x = {"input_ids": torch.randint(1, 90, (2, 12))}
    else:
        model = transformers.ViTForImageClassification(transformers.ViTConfig(image_size=16, patch_size=4, **sizes)).eval()
        x = {"pixel_values": torch.randn(2, 3, 16, 16)}
    linear = {name: layer.out_features for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    prune(model, x, pattern="channel", ratio=0.5)
    shrunk = {name for name, width in linear.items() if model.get_submodule(name).out_features < width}
    kept = set(linear) - shrunk
    inner = {name for name in linear if name.rpartition(".")[2] in ("query", "key", "value", "q_proj", "k_proj", "v_proj")}
    assert len(inner) == 3 and inner <= kept and any("intermediate" in name or "fc1" in name for name in shrunk)
    assert all("attention heads" in get_note(model.get_submodule(name)) for name in inner)
