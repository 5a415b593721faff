"""What every packed layer promises to a model that was written for the float layer."""

import copy
import pickle

import pytest
import torch
from torch import nn

import pycompress as pc
from pycompress.nn import (
    Int4Embedding,
    Int4Linear,
    Int8Conv1d,
    Int8Conv2d,
    Int8Embedding,
    Int8Linear,
    Int8Sparse24Conv2d,
    Int8Sparse24Linear,
    Int8WeightOnlyConv2d,
    Int8WeightOnlyLinear,
    Sparse24Conv2d,
    Sparse24Linear,
)
from pycompress.nn.channels_last_max_pool import ChannelsLastMaxPool2d
from pycompress.nn.relu_unless_int8 import ReLUUnlessInt8
from pycompress.ops import sparse24_mask


def layers(dtype=torch.float32):
    torch.manual_seed(0)
    linear, conv1, conv2 = (layer.to(dtype) for layer in (nn.Linear(40, 24), nn.Conv1d(8, 12, 3), nn.Conv2d(8, 12, 3)))
    yield from ((kind.from_float(linear), linear) for kind in (Int8Linear, Int8WeightOnlyLinear, Int4Linear))
    yield from ((kind.from_float(conv2), conv2) for kind in (Int8Conv2d, Int8WeightOnlyConv2d))
    yield Int8Conv1d.from_float(conv1), conv1
    for kind, layer in ((Sparse24Linear, linear), (Int8Sparse24Linear, linear), (Sparse24Conv2d, conv2), (Int8Sparse24Conv2d, conv2)):
        yield kind.from_float(layer, sparse24_mask(layer.weight.flatten(1).abs()).view_as(layer.weight)), layer


@pytest.mark.parametrize(("layer", "original"), list(layers()), ids=lambda m: type(m).__name__)
def test_weight_is_what_the_layer_multiplies_with(layer, original):
    """Models cast their inputs to ``layer.weight.dtype``: integers there would destroy the input without a word."""
    assert layer.weight.dtype == torch.float32 and layer.weight.device == original.weight.device
    assert layer.weight.shape == original.weight.shape == torch.Size(layer.weight_shape)
    assert torch.equal(layer.weight, layer.to_dense().weight)
    x = torch.randn(2, *original.weight.shape[1:2], *[5] * (original.weight.dim() - 2), generator=torch.Generator().manual_seed(0))
    assert torch.equal(layer(x.to(layer.weight.dtype)), layer(x))
    state = torch.random.get_rng_state()
    assert layer.weight is not None and torch.equal(torch.random.get_rng_state(), state)
    assert "int_weight" not in layer.state_dict() and not isinstance(layer.weight, nn.Parameter)


HALF_LAYERS = [(layer, original) for dtype in (torch.bfloat16, torch.float16) for layer, original in layers(dtype)]


@pytest.mark.parametrize(("layer", "original"), HALF_LAYERS, ids=lambda m: type(m).__name__)
def test_weight_has_the_dtype_of_the_original(layer, original, tmp_path):
    dtype, shape = original.weight.dtype, (2, *original.weight.shape[1:2], *[5] * (original.weight.dim() - 2))
    with torch.device("meta"):
        skeleton = nn.Sequential(nn.Identity())
    pc.save(nn.Sequential(layer), tmp_path / "model.safetensors")
    loaded = pc.load(tmp_path / "model.safetensors", skeleton)[0]
    for each in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
        assert each.weight.dtype == each.to_dense().weight.dtype == dtype
        assert torch.equal(each.weight, layer.weight) and torch.equal(each.weight, each.to_dense().weight)
        assert each(torch.ones(shape, dtype=each.weight.dtype)).dtype == dtype
    scale = layer.state_dict().get("scale")
    assert scale is None or scale.dtype == torch.float32


@pytest.mark.parametrize(("layer", "original"), list(layers()), ids=lambda m: type(m).__name__)
def test_the_dtype_of_weight_follows_casts(layer, original):
    layer = copy.deepcopy(layer)
    exact, state = layer.weight, layer.state_dict()
    for cast in (nn.Module.half, nn.Module.bfloat16, lambda m: m.to("cpu"), lambda m: m.to(torch.float16), nn.Module.share_memory):
        dtype = cast(copy.deepcopy(original).to(layer.weight.dtype)).weight.dtype
        assert cast(layer) is layer and layer.weight.dtype == dtype
        assert torch.equal(layer.weight, exact.to(dtype))
    assert torch.equal(layer.float().weight, exact), "a cast rounds what is shown, not what is stored"
    assert all(torch.equal(layer.state_dict()[name], tensor) for name, tensor in state.items())
    assert layer.half().to("meta").weight.dtype == torch.float16


EMBEDDINGS = [Int8Embedding(9, 4), Int4Embedding(9, 4)]


@pytest.mark.parametrize("layer", [*(layer for layer, _ in layers()), *EMBEDDINGS], ids=lambda m: type(m).__name__)
def test_the_input_may_be_given_by_the_name_that_torch_gives_it(layer):
    x = torch.ones(2, *layer.weight.shape[1:2], *[5] * (layer.weight.dim() - 2), dtype=torch.long if "Embedding" in repr(layer) else None)
    assert torch.equal(layer(input=x), layer(x))


def test_so_it_may_for_the_layers_that_stand_where_an_activation_or_a_pooling_was():
    x = torch.randn(1, 64, 6, 6)
    assert torch.equal(ReLUUnlessInt8()(input=x), x.relu())
    assert torch.equal(ChannelsLastMaxPool2d(2)(input=x), nn.MaxPool2d(2)(x))


class Keyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.relu, self.linear = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Linear(4, 8)

    def forward(self, x):
        return self.linear(input=self.relu(input=self.conv(input=x)).mean((2, 3)))


@pytest.mark.parametrize("config", [pc.Int8Dynamic(), pc.Int8Static(), pc.Int8WeightOnly(), pc.Int4WeightOnly(group_size=32)])
def test_a_model_that_calls_its_layers_by_keyword(config):
    torch.manual_seed(0)
    model, x = Keyword().eval(), torch.randn(2, 3, 8, 8)
    quantized = pc.quantize(model, config, data=[x], example_inputs=x, progress=False)
    assert (quantized(x) - model(x)).norm() < 0.2 * model(x).norm()


@pytest.mark.parametrize(("layer", "original"), list(layers()), ids=lambda m: type(m).__name__)
def test_assigned_half_tensors_become_what_the_kernels_read(layer, original):
    """The tensors that stay float32 on ``.half()`` do so when a state in half precision is loaded, too."""
    state = {name: t.half() if t.is_floating_point() and name not in layer.canonical else t for name, t in layer.state_dict().items()}
    copied, assigned = copy.deepcopy(layer), copy.deepcopy(layer)
    copied.load_state_dict(state)
    assigned.load_state_dict(state, assign=True)
    x = torch.randn(2, *original.weight.shape[1:2], *[5] * (original.weight.dim() - 2))
    assert torch.equal(assigned(x), copied(x)) and torch.isfinite(assigned(x)).all()
