from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from pycompress.analysis import cost
from pycompress.nn.base import CompressedModule


def by_name(model, inputs):
    return {layer.name: layer for layer in cost(model, inputs).layers}


def matmul_macs(model, inputs):
    """torch's own operator counter as the oracle."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            model.eval()(*inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    return counter.get_total_flops() // 2


LAYERS = {
    "linear": (nn.Linear(7, 5), (torch.randn(2, 3, 7),)),
    "linear on a vector": (nn.Linear(7, 5, bias=False), (torch.randn(7),)),
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1), (torch.randn(2, 4, 11),)),
    "conv2d grouped": (nn.Conv2d(6, 9, (3, 2), groups=3, dilation=2), (torch.randn(2, 6, 11, 13),)),
    "conv2d depthwise": (nn.Conv2d(5, 5, 3, groups=5), (torch.randn(1, 5, 7, 7),)),
    "conv2d without batch": (nn.Conv2d(3, 2, 3), (torch.randn(3, 7, 7),)),
    "conv3d": (nn.Conv3d(2, 3, 3), (torch.randn(1, 2, 5, 5, 5),)),
    "transposed conv": (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (torch.randn(2, 4, 5, 5),)),
    "attention": (nn.MultiheadAttention(12, 3, batch_first=True), (torch.randn(2, 5, 12), torch.randn(2, 7, 12), torch.randn(2, 7, 12))),
    "attention, other sizes": (
        nn.MultiheadAttention(12, 3, kdim=5, vdim=4),
        (torch.randn(5, 2, 12), torch.randn(7, 2, 5), torch.randn(7, 2, 4)),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_formulas_agree_with_the_operator_counter_of_torch(name):
    layer, inputs = LAYERS[name]
    counted = cost(layer, inputs)
    assert counted.macs == matmul_macs(layer, inputs) > 0
    assert counted.effective_macs == counted.macs
    assert counted.params == sum(p.numel() for p in layer.parameters())
    assert counted.uncounted == ()


def test_layers_known_by_hand():
    x = torch.randn(4, 6, 3, 3)
    assert cost(nn.BatchNorm2d(6), x).macs == x.numel()
    assert cost(nn.BatchNorm2d(6), x).bytes == 4 * 6 * 4 + 8  # weight, bias, mean, variance, and the int64 counter
    assert cost(nn.BatchNorm2d(6), x).params == 12
    assert cost(nn.GroupNorm(2, 6), x).macs == x.numel()
    assert cost(nn.LayerNorm(3), x).macs == x.numel()
    assert cost(nn.Embedding(10, 3), torch.zeros(2, 5, dtype=torch.long)).macs == 0
    assert cost(nn.Bilinear(2, 3, 4), (torch.randn(5, 2), torch.randn(5, 3))).macs == 5 * 2 * 3 * 4
    lstm = nn.LSTM(3, 4, num_layers=2, bidirectional=True)
    assert cost(lstm, torch.randn(7, 2, 3)).macs == 7 * 2 * sum(p.numel() for p in lstm.parameters() if p.dim() == 2)
    assert cost(nn.GRUCell(3, 4), torch.randn(2, 3)).macs == 2 * 3 * 4 * (3 + 4)


def test_empty_batch_counts_nothing():
    assert cost(nn.Linear(3, 2), torch.randn(0, 3)).macs == 0
    assert cost(nn.Conv2d(3, 2, 3), torch.randn(0, 3, 5, 5)).macs == 0


def test_transformer_matches_the_operator_counter_though_torch_has_a_fused_path():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    x = torch.randn(3, 7, 16)
    layers = by_name(model, x)
    assert sum(layer.macs for name, layer in layers.items() if "norm" not in name) == matmul_macs(model, (x,))
    assert "layers.0.self_attn.out_proj" not in layers, "attention is one row"
    assert all(layer.calls == 1 for layer in layers.values())
    assert torch.backends.mha.get_fastpath_enabled()


class Attention(nn.Module):
    """Matrix products that no layer owns."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return (q @ k.transpose(-1, -2)).softmax(-1) @ v + F.scaled_dot_product_attention(q[None], k[None], v[None])[0]


def test_functional_products_belong_to_the_module_that_runs_them():
    x = torch.randn(2, 5, 8)
    layers = by_name(Attention(), x)
    assert layers["qkv"].macs == 2 * 5 * 8 * 24
    assert layers[""].macs == 2 * (2 * 2 * 5 * 5 * 8)
    assert layers[""].params == 0


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return x * self.scale


class Handmade(nn.Module):
    """A linear layer of a type nobody knows, with half of its weight zero."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.cat([torch.ones(3, 2), torch.zeros(3, 2)], 1))

    def forward(self, x):
        return x @ self.weight


def test_unknown_layers_are_counted_by_operator_or_listed():
    model = nn.Sequential(nn.Linear(4, 3), Odd(), Handmade())
    counted = cost(model, torch.randn(5, 4))
    first, odd, handmade = counted.layers
    assert odd.macs is None and odd.effective_macs is None
    assert counted.uncounted == ("1",)
    assert (handmade.macs, handmade.effective_macs, handmade.sparsity) == (5 * 3 * 4, 5 * 3 * 2, 0.5)
    assert counted.macs == first.macs + handmade.macs


def test_zero_weights_lower_the_effective_count_only():
    conv = nn.Conv2d(4, 8, 3, groups=2)
    with torch.no_grad():
        conv.weight[:, :, 0] = 0
    layer = by_name(conv, torch.randn(1, 4, 6, 6))[""]
    assert layer.sparsity == pytest.approx(1 / 3)
    assert layer.effective_macs * 3 == layer.macs * 2


class Mask(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight):
        return weight * self.mask


def test_masks_are_seen_through():
    linear = nn.Linear(6, 4)
    parametrize.register_parametrization(linear, "weight", Mask((torch.arange(24).view(4, 6) % 4 == 0).float()))
    counted = cost(linear, torch.randn(3, 6))
    (layer,) = counted.layers
    assert (layer.params, layer.bytes) == (28, 112), "neither the mask nor the hidden original is counted"
    assert layer.sparsity == 0.75
    assert (layer.macs, layer.effective_macs) == (72, 18)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.block = nn.Linear(4, 4)
        self.again = self.block
        self.head = nn.Linear(4, 11, bias=False)
        self.head.weight = self.embed.weight
        self.unused = nn.Linear(2, 2)

    def forward(self, ids):
        return self.head(self.again(self.block(self.embed(ids))))


def test_tied_and_shared_count_once_in_the_totals():
    counted = cost(Tied(), torch.zeros(1, 3, dtype=torch.long))
    layers = {layer.name: layer for layer in counted.layers}
    assert counted.params == sum(p.numel() for p in Tied().parameters()) == 44 + 20 + 6
    assert layers["head"].params == 44 and layers["head"].tied_to == "embed"
    assert "again" not in layers and layers["block"].calls == 2
    assert layers["block"].macs == 2 * 3 * 16
    assert layers["unused"].calls == 0 and layers["unused"].macs == 0
    assert counted.uncounted == ()


class Ternary(CompressedModule):
    format = "ternary"

    def __init__(self, out_features, in_features):
        super().__init__()
        self.register_buffer("signs", torch.zeros(out_features, in_features, dtype=torch.int8))
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, x):
        return x @ self.to_dense()[0].weight.T

    def num_params(self):
        return self.signs.numel()

    def to_dense(self):
        dense = nn.Linear(self.signs.shape[1], self.signs.shape[0], bias=False)
        dense.weight.data = self.signs * self.scale
        return nn.Sequential(dense, nn.ReLU())


def test_compressed_layers_count_as_the_dense_layer_they_stand_for():
    layer = Ternary(4, 6)
    layer.signs[:2] = 1
    counted = cost(nn.Sequential(layer), torch.randn(3, 6))
    (row,) = counted.layers
    assert (row.params, row.bytes) == (24, 28)
    assert (row.macs, row.effective_macs, row.sparsity) == (72, 36, 0.5)


class Anything(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 2)

    def forward(self, *, x, flag=None):
        return {"y": [self.a(input=x)], "flag": flag}


def test_helpers_inside_a_layer_are_not_counted():
    linear = nn.Linear(4, 3)
    linear.observer = nn.Module()
    linear.observer.register_buffer("low", torch.zeros(3))
    linear.observer.scale = nn.Parameter(torch.ones(1))
    linear.adapter = nn.Linear(4, 2)
    counted = cost(nn.Sequential(linear), torch.randn(2, 4))
    assert [layer.name for layer in counted.layers] == ["0", "0.adapter"]
    assert counted.params == 15 + 10


def test_keyword_inputs_and_any_output():
    assert cost(Anything(), {"x": torch.randn(4, 3), "flag": "yes"}).macs == 24


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"cost: model must be a torch.nn.Module, got int"):
        cost(3, torch.ones(1))
    with pytest.raises(TypeError, match="cost: example_inputs must be a tensor, a tuple or a dict, got int"):
        cost(nn.Linear(1, 1), 3)
    with pytest.raises(TypeError, match="argument names as keys, got 1"):
        cost(nn.Linear(1, 1), {1: torch.ones(1)})
