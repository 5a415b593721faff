"""2:4 pruning and int8 together: in one go, around training with masks and fake quantization in either order, saved and loaded."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from support.kernels import native_kernels
from torch import nn

import pycompress as pc
from pycompress.nn import Int8Conv2d, Int8Linear, Int8Sparse24Conv2d, Int8Sparse24Linear, Sparse24Conv2d, Sparse24Linear, sparse24_choice
from pycompress.nn.base import get_note
from pycompress.nn.sparse24_choice import zeros_pattern
from pycompress.ops import sparse24_mask
from pycompress.quantization import Int8WeightOnly, Quantizer

pytestmark = pytest.mark.skipif(not native_kernels("int8_sparse24_linear"), reason="without a native kernel nothing is packed")

X = torch.randn(4, 32, 6, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(32, 64, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(64)
        self.point = nn.Conv2d(64, 256, 1)
        self.up = nn.Linear(256, 128)
        self.head = nn.Linear(128, 5)

    def forward(self, x):
        x = self.point(self.norm(self.conv(x)).relu()).relu().mean((2, 3))
        return self.head(self.up(x).relu())


@pytest.fixture
def net():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = Net()
        model.norm.running_mean.normal_()
        model.norm.running_var.uniform_(0.5, 2)
    return model.eval()


@pytest.fixture(autouse=True)
def gains(monkeypatch):
    """The sparse kernels win wherever they are tried: what the machine measures is tested elsewhere."""
    monkeypatch.setattr(sparse24_choice, "gain", lambda *_: 1.5)
    monkeypatch.setattr(sparse24_choice, "conv_gain", lambda *_: 1.5)


def kinds(model):
    return [type(getattr(model, name)) for name in ("conv", "point", "up", "head")]


SPARSE_INT8 = [Int8Sparse24Conv2d, Int8Sparse24Conv2d, Int8Sparse24Linear, Int8Linear]


@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
def test_pruner_packs_convolutions_and_linear_layers(net, pattern):
    pruner = pc.Pruner(net, X, pattern=pattern)
    pruner.step()
    masked = net(X)
    model = pruner.convert()
    assert kinds(model) == [Sparse24Conv2d, Sparse24Conv2d, Sparse24Linear, nn.Linear]
    assert {model.conv.pattern, model.up.pattern} == {pattern}
    torch.testing.assert_close(model(X), masked, rtol=1e-4, atol=1e-4)
    assert get_note(model.head) == f"{pattern} zeros stay in a dense weight: 128 x 5 is too small to gain"


@pytest.mark.parametrize(
    ("config", "data"),
    [(pc.Int8Dynamic(), None), (pc.Int8Static(symmetric=True), [X, X[:2]])],
)
@pytest.mark.parametrize("ignore", [(), ["head"]])
def test_prune_then_quantize(net, config, data, ignore, tmp_path):
    pruned = pc.prune(net, X, pattern="2:4", ignore=ignore)
    assert isinstance(pruned.up, Sparse24Linear)
    model = pc.quantize(pruned, config, data=data)
    assert kinds(model) == SPARSE_INT8
    assert isinstance(model.norm, nn.Identity)  # folded through the packed convolution
    assert isinstance(pruned.up, Sparse24Linear)  # the given model is not touched
    # The same integers as int8 on the dense layers.
    dense = copy.deepcopy(pruned)
    for name in ("conv", "point", "up"):
        setattr(dense, name, getattr(dense, name).to_dense())
    sparse24_choice.gain = sparse24_choice.conv_gain = lambda *_: 0.5  # undone by the fixture
    dense = pc.quantize(dense, config, data=data)
    assert kinds(dense) == [Int8Conv2d, Int8Conv2d, Int8Linear, Int8Linear]
    assert get_note(dense.up) == "2:4 zeros run on the dense kernel: the sparse kernel runs at 0.50x of the dense layer's speed here"
    for name in ("conv", "point", "up"):
        assert torch.equal(getattr(model, name).weight, getattr(dense, name).weight)
    torch.testing.assert_close(model(X), dense(X), rtol=1e-4, atol=1e-4)
    # A file knows it all.
    pc.save(model, tmp_path / "small.safetensors")
    loaded = pc.load(tmp_path / "small.safetensors", Net())
    assert kinds(loaded) == SPARSE_INT8
    assert torch.equal(loaded(X), model(X))
    formats = {row.name: row.format for row in pc.report(model, X).layers}
    assert {formats["conv"], formats["up"]} == {f"2:4 int8 {'static' if data else 'dynamic'}"}


def test_a_packed_float_model_is_saved_and_loaded(net, tmp_path):
    model = pc.prune(net, X, pattern="2:4")
    pc.save(model, tmp_path / "sparse.safetensors")
    loaded = pc.load(tmp_path / "sparse.safetensors", Net())
    assert kinds(loaded) == [Sparse24Conv2d, Sparse24Conv2d, Sparse24Linear, nn.Linear]
    assert torch.equal(loaded(X), model(X))


def test_a_zero_point_needs_the_dense_kernel_and_says_so(net):
    model = pc.quantize(pc.prune(net, X, pattern="2:4"), pc.Int8Static(), data=[X])
    assert kinds(model) == [Int8Conv2d, Int8Conv2d, Int8Linear, Int8Linear]
    assert "has no zero point, ask for symmetric activations" in get_note(model.up)


@pytest.mark.parametrize(("attach", "convert"), list(itertools.product(["prune first", "quantize first"], repeat=2)))
def test_training_with_masks_and_fake_quantization_in_either_order(net, attach, convert):
    config = pc.Int8Static(symmetric=True)
    quantizer = Quantizer(config)
    if attach == "prune first":
        pruner = pc.Pruner(net, X, pattern="2:4")
        model = quantizer.prepare(net, X, qat=True, inplace=True)
    else:
        model = quantizer.prepare(net, X, qat=True, inplace=True)
        quantizer.calibrate(model, [X])  # the pruner calls the model
        pruner = pc.Pruner(model, X, pattern="2:4")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(X), torch.tensor([0, 1, 2, 3])).backward()
        optimizer.step()
        pruner.step()
    model.eval()
    simulated = model(X)
    if convert == "prune first":
        model = quantizer.convert(pruner.convert())
    else:
        model = quantizer.convert(model, inplace=True)
        pruner.convert()
    assert kinds(model) == SPARSE_INT8
    torch.testing.assert_close(model(X), simulated, rtol=1e-4, atol=1e-4)


def test_packed_layers_cannot_be_trained(net):
    with pytest.raises(ValueError, match=r"'conv'|conv: a Sparse24Conv2d cannot be trained; .* Pruner.convert after Quantizer.convert"):
        Quantizer(pc.Int8Dynamic(), ignore=["head"]).prepare(pc.prune(net, X, pattern="2:4"), X, qat=True)


def test_other_configs_leave_packed_layers_with_a_note(net):
    model = pc.quantize(pc.prune(net, X, pattern="2:4"), Int8WeightOnly())
    assert isinstance(model.up, Sparse24Linear)
    assert get_note(model.up) == "left as it is: Int8WeightOnly has no layer for Sparse24Linear"


def test_a_fused_activation_stays():
    linear = nn.Linear(160, 128)
    with torch.no_grad():
        linear.weight.mul_(sparse24_mask(linear.weight.abs()))
    model = nn.Sequential(Sparse24Linear.from_float(linear, activation="relu"), nn.Linear(128, 4))
    model = pc.quantize(model, pc.Int8Dynamic())
    assert isinstance(model[0], Sparse24Linear)
    assert "its activation 'relu' is fused into it" in get_note(model[0])


def test_single_layer_and_algorithms():
    layer, x = nn.Linear(160, 128), torch.randn(30, 160, generator=torch.Generator().manual_seed(1))
    layer = pc.prune(layer, x, pattern="2:4")
    assert isinstance(layer, Sparse24Linear)
    for algorithm in ("gptq", "adaround", "bias_correction", "smoothquant"):  # they change no zero
        quantized = pc.quantize(layer, pc.Int8Dynamic(), data=[x], example_inputs=x, algorithms=[algorithm])
        assert isinstance(quantized, Int8Sparse24Linear)
        torch.testing.assert_close(quantized(x), layer(x), rtol=0, atol=0.05)


def test_ignored_packed_layers_stay_packed(net):
    pruned = pc.prune(net, X, pattern="2:4")
    model = pc.quantize(pruned, pc.Int8Dynamic(), ignore=[pruned.up])
    assert kinds(model) == [Int8Sparse24Conv2d, Int8Sparse24Conv2d, Sparse24Linear, Int8Linear]
    model = Quantizer(pc.Int8Dynamic(), ignore=[pruned.up]).prepare(pruned, X)
    assert isinstance(model.up, Sparse24Linear)


@pytest.mark.parametrize(
    ("row", "pattern"),
    [([1, 2, 0, 0, 0, 0, 3, 4], "2:4"), ([0, 2, 0, 0, 0, 0, 3], "1:4"), ([1, 2, 3, 0], None), ([1, 1], None), ([0] * 8, "1:4")],
)
def test_zeros_pattern(row, pattern):
    assert zeros_pattern(torch.tensor([row])) == pattern
