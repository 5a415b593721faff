"""save, load, and the outputs are the same to the bit."""

from __future__ import annotations

import copy
import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import pycompress
from pycompress.io import load, read_manifest, save
from pycompress.nn import LAYERS, Int8Conv2d, Int8Linear
from pycompress.nn.base import CompressedModule, get_note, set_note
from pycompress.nn.surgery import replace


class Net(nn.Module):
    def __init__(self, width=8, heads=4):
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.act = nn.ReLU()
        self.depthwise = nn.Conv2d(width, width, 3, groups=width)
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.fc = nn.Linear(width, 10)

    def forward(self, x):
        x = self.depthwise(self.act(self.norm(self.conv(x)))).flatten(2).transpose(1, 2)
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        return self.fc(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width).mean(1))


X = torch.randn(3, 1, 6, 6, generator=torch.Generator().manual_seed(0))


def trained(model, x=X):
    """Weights and running statistics that no constructor gives."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    model.train()(x)
    return model.eval()


def check(model, skeleton, path, x=X):
    """Round trip; returns what was loaded."""
    before = {name: (t.clone(), id(t)) for name, t in skeleton.state_dict(keep_vars=True).items()}
    modes = [module.training for module in skeleton.modules()]
    types = [type(module) for module in skeleton.modules()]
    save(model, path)
    loaded = load(path, skeleton)
    with torch.no_grad():
        expected, got = model.eval()(x), loaded(x)
    assert torch.equal(got, expected)
    assert got.dtype == expected.dtype
    assert not any(module.training for module in loaded.modules())
    after = {name: (t, id(t)) for name, t in skeleton.state_dict(keep_vars=True).items()}
    assert [module.training for module in skeleton.modules()] == modes
    assert [type(module) for module in skeleton.modules()] == types
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name][0], after[name][0]) and before[name][1] == after[name][1], name
    mine = {id(t) for t in loaded.state_dict(keep_vars=True).values()}
    assert not mine & {entry[1] for entry in after.values()}, "the loaded model shares no tensor with the skeleton"
    return loaded


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def test_dense(path):
    model = trained(Net())
    loaded = check(model, Net(), path)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert loaded.norm.num_batches_tracked == 1
    assert all(p.requires_grad for p in loaded.parameters())
    assert (pycompress.save, pycompress.load) == (save, load)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_on_a_float32_skeleton(path, dtype):
    loaded = check(trained(Net()).to(dtype), Net(), path, X.to(dtype))
    assert {p.dtype for p in loaded.parameters()} == {dtype}


def test_a_skeleton_without_memory(path):
    with torch.device("meta"):
        skeleton = Net()
    model = trained(Net())
    save(model, path)
    assert torch.equal(load(path, skeleton)(X), model(X))
    assert all(p.is_meta for p in skeleton.parameters())


def test_quantized_is_smaller(path, tmp_path):
    model = trained(Net(width=64))
    save(model, tmp_path / "dense.safetensors")
    model.conv = Int8Conv2d.from_float(model.conv)
    model.fc = Int8Linear.from_float(model.fc, x_scale=0.01, x_zero_point=-3)
    model.qkv = Int8Linear.from_float(model.qkv, activation="relu")
    loaded = check(model, Net(width=64), path)
    assert [type(m).__name__ for m in (loaded.conv, loaded.fc, loaded.qkv)] == ["Int8Conv2d", "Int8Linear", "Int8Linear"]
    assert path.stat().st_size < 0.45 * (tmp_path / "dense.safetensors").stat().st_size


def shrunk(model):
    """What structured pruning leaves: fewer channels, one head less, the attributes of the layers set accordingly."""
    keep = slice(0, 6)
    for layer in (model.conv, model.depthwise):
        layer.out_channels, layer.weight = 6, nn.Parameter(layer.weight.detach()[keep])
    model.depthwise.in_channels = model.depthwise.groups = 6
    model.depthwise.bias = nn.Parameter(model.depthwise.bias.detach()[keep])
    for name in ("weight", "bias"):
        setattr(model.norm, name, nn.Parameter(getattr(model.norm, name).detach()[keep]))
    model.norm.running_mean, model.norm.running_var = model.norm.running_mean[keep], model.norm.running_var[keep]
    model.norm.num_features = 6
    rows = torch.cat([torch.arange(6) + 8 * part for part in range(3)])
    model.qkv.weight = nn.Parameter(model.qkv.weight.detach()[rows][:, keep])
    model.qkv.bias = nn.Parameter(model.qkv.bias.detach()[rows])
    model.qkv.in_features, model.qkv.out_features = 6, 18
    model.fc.weight, model.fc.in_features = nn.Parameter(model.fc.weight.detach()[:, keep]), 6
    model.heads = 3
    return model


def test_pruned_is_smaller_and_python_attributes_follow(path, tmp_path):
    save(trained(Net()), tmp_path / "dense.safetensors")
    loaded = check(shrunk(trained(Net())), Net(), path)
    assert loaded.heads == 3
    assert (loaded.depthwise.groups, loaded.norm.num_features, loaded.fc.in_features) == (6, 6, 6)
    assert loaded.fc.weight.shape == (10, 6)
    assert path.stat().st_size < (tmp_path / "dense.safetensors").stat().st_size


def test_pruned_and_quantized(path):
    model = shrunk(trained(Net()))
    model.depthwise = Int8Conv2d.from_float(model.depthwise)
    model.qkv = Int8Linear.from_float(model.qkv)
    check(model, Net(), path)


def test_a_model_shrunk_by_torch_pruning(path):
    tp = pytest.importorskip("torch_pruning")
    model = nn.Sequential(
        *(nn.Conv2d(1, 8, 3), nn.GroupNorm(2, 8), nn.PReLU(8), nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8)),
        *(nn.Flatten(), nn.Linear(32, 6), nn.LayerNorm(6), nn.Linear(6, 5)),
    )
    skeleton, model = copy.deepcopy(model), trained(model)
    tp.pruner.BasePruner(model, X, tp.importance.MagnitudeImportance(), pruning_ratio=0.5, ignored_layers=[model[8]]).step()
    assert (model[1].num_channels, model[3].groups, model[7].normalized_shape) == (4, 4, (3,))
    assert check(model, skeleton, path)[6].weight.shape == (3, 16)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.block = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.again = self.block
        self.head = nn.Linear(4, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("a", torch.arange(4.0))
        self.b = self.a

    def forward(self, ids):
        return self.head(self.again(self.block(self.embed(ids) + self.a)) * self.b)


IDS = torch.tensor([[1, 5, 10]])


def test_tied_tensors_and_shared_modules(path):
    model = trained(Tied(), IDS)
    loaded = check(model, Tied(), path, IDS)
    assert loaded.head.weight is loaded.embed.weight
    assert loaded.again is loaded.block
    assert len(list(loaded.parameters())) == len(list(model.parameters()))
    assert sorted(read_manifest(path)["tensors"]) == ["a", "block.0.bias", "block.0.weight", "embed.weight"]
    model.block[0] = Int8Linear.from_float(model.block[0])
    assert check(model, Tied(), path, IDS).again[0] is not None


def test_untied_in_the_file_is_untied_in_the_model(path):
    model = trained(Tied(), IDS)
    model.head.weight = nn.Parameter(model.head.weight.detach() * 2)
    loaded = check(model, Tied(), path, IDS)
    assert loaded.head.weight is not loaded.embed.weight


class Mask(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight):
        return weight * self.mask


def test_masked_weights_are_written_with_their_zeros(path):
    model = trained(Net())
    parametrize.register_parametrization(model.fc, "weight", Mask((torch.rand(10, 8) > 0.5).float()))
    loaded = check(model, Net(), path)
    assert not parametrize.is_parametrized(loaded.fc)
    assert torch.equal(loaded.fc.weight == 0, model.fc.weight == 0)
    assert parametrize.is_parametrized(model.fc), "the saved model keeps its mask"


def test_a_skeleton_with_parametrizations_of_its_own(path):
    def make():
        return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), nn.Linear(3, 2))

    x = torch.randn(2, 4)
    skeleton = make()
    loaded = check(trained(make(), x), skeleton, path, x)
    assert parametrize.is_parametrized(skeleton[0])
    assert skeleton(x).shape == (2, 2)
    assert set(loaded.state_dict()) == {"0.weight", "0.bias", "1.weight", "1.bias"}


def test_memory_layouts_survive(path):
    model = trained(Net()).to(memory_format=torch.channels_last)
    with torch.no_grad():
        model.qkv.weight = nn.Parameter(model.qkv.weight.t().contiguous().t())  # transposed in memory
    loaded = check(model, Net(), path, X.to(memory_format=torch.channels_last))
    for name, tensor in model.state_dict().items():
        assert loaded.state_dict()[name].stride() == tensor.stride(), name
    assert loaded.qkv.weight.stride() == (1, 24)
    assert loaded.depthwise.weight.stride() == (9, 1, 3, 1), "channels_last, though the one channel leaves it open"


def test_slices_and_expanded_tensors_are_packed(path):
    model = nn.Linear(8, 10)
    model.weight, model.bias = nn.Parameter(torch.randn(10, 16)[:, ::2]), nn.Parameter(torch.randn(1).expand(10))
    save(model, path)
    loaded = load(path, nn.Linear(8, 10))
    assert torch.equal(loaded.weight, model.weight) and torch.equal(loaded.bias, model.bias)
    assert loaded.weight.is_contiguous() and loaded.bias.is_contiguous()
    assert path.stat().st_size < 1500


@pytest.mark.parametrize("dims", [(0, 1, 2, 3), (3, 1, 0, 2), (1, 0, 3, 2), (2, 3, 0, 1)])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 3, 1, 5), (2, 1, 1, 1), (0, 3, 4, 1)])
def test_every_permutation_of_memory(path, shape, dims):
    model = nn.Module()
    model.t = nn.Parameter(torch.randn(shape).permute(dims))
    skeleton = nn.Module()
    skeleton.t = nn.Parameter(torch.zeros(1, 1, 1, 1))
    save(model, path)
    loaded = load(path, skeleton)
    assert torch.equal(loaded.t, model.t)
    for size, stride, expected in zip(loaded.t.shape, loaded.t.stride(), model.t.stride(), strict=True):
        assert size < 2 or 0 in shape or stride == expected


def test_views_of_one_memory_are_written_separately(path):
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            both = torch.randn(2, 4)
            self.register_buffer("low", both[0])
            self.register_buffer("high", both[1])
            self.register_buffer("all", both)
            self.register_buffer("same", both.detach())
            self.register_buffer("empty", torch.zeros(0, 3))
            self.register_buffer("void", torch.zeros(0))
            self.register_buffer("scalar", torch.tensor(3, dtype=torch.int16))
            self.register_buffer("yes", torch.tensor([True, False]))
            self.register_buffer("byte", torch.arange(5, dtype=torch.uint8))

        def forward(self, x):
            return x + self.low + self.high + self.all + self.same + self.scalar + self.yes.sum() + self.byte.sum() + self.empty.sum()

    loaded = check(Views(), Views(), path, torch.randn(2, 4))
    assert loaded.empty.shape == (0, 3)


class Rotary(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("table", torch.arange(4) / 3, persistent=False)
        self.register_buffer("cache", None, persistent=False)

    def forward(self, x):
        if self.cache is None or len(self.cache) != len(x):
            self.cache = torch.ones(len(x), 1, dtype=self.table.dtype)
            self.register_buffer("late", torch.ones(2), persistent=False)
        return self.fc(x * self.table) * self.cache


def test_buffers_outside_the_state_dict(path):
    x = torch.randn(2, 4)
    model = trained(Rotary(), x).bfloat16()
    loaded = check(model, Rotary(), path, x.bfloat16())
    assert loaded.table.dtype == torch.bfloat16
    assert "table" not in loaded.state_dict()
    with torch.device("meta"):
        skeleton = Rotary()
    assert torch.equal(load(path, skeleton)(x.bfloat16()), model(x.bfloat16()))


def test_recurrent_attention_and_normalisation_layers(path):
    class Zoo(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(6, 6, num_layers=2, bidirectional=True, batch_first=True)
            self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
            self.norms = nn.ModuleList([nn.LayerNorm(12), nn.GroupNorm(3, 12), nn.RMSNorm(12), nn.BatchNorm1d(12, affine=False)])
            self.up = nn.ConvTranspose1d(12, 4, 3, groups=2)
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x):
            y = self.lstm(x)[0]
            y = self.attention(y, y, y)[0] * self.scale
            y = self.norms[2](self.norms[0](y)).transpose(1, 2)
            return self.up(self.norms[3](self.norms[1](y)))

    x = torch.randn(2, 5, 6)
    check(trained(Zoo(), x), Zoo(), path, x)


def test_folded_batch_norm_and_fused_activation(path):
    model = trained(Net())
    model.conv.bias = nn.Parameter(torch.randn(8))
    model.norm, model.act = nn.Identity(), nn.Identity()
    model.conv = Int8Conv2d.from_float(model.conv, activation="relu")
    loaded = check(model, Net(), path)
    assert type(loaded.norm) is nn.Identity
    model = trained(Net())
    model.conv.bias, model.fc.bias = nn.Parameter(torch.randn(8)), None
    model.act = nn.GELU(approximate="tanh")
    model.depthwise = nn.Conv2d(8, 8, (1, 2), stride=2, padding="valid", padding_mode="reflect")
    loaded = check(model, Net(), path)
    assert loaded.fc.bias is None
    assert loaded.act.approximate == "tanh"


class Other(nn.Conv2d):
    pass


def test_padding_that_differs_from_the_skeletons(path):
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=2, padding_mode="circular"))
    skeleton = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular"))
    assert check(model, skeleton, path)[0].padding == (2, 2)
    skeleton = nn.Sequential(Other(1, 2, 3, padding=2, padding_mode="circular"))
    assert type(check(model, skeleton, path)[0]) is nn.Conv2d


def test_compiled_and_parallel_wrappers_are_seen_through(path):
    model = trained(Net())
    save(torch.compile(model, backend="eager"), path)
    assert torch.equal(load(path, Net())(X), model(X))
    save(nn.DataParallel(model), path)
    assert torch.equal(load(path, torch.compile(Net(), backend="eager"))(X), model(X))


def test_frozen_parameters_stay_frozen(path):
    skeleton = Net()
    skeleton.fc.weight.requires_grad_(False)
    assert [name for name, p in check(trained(Net()), skeleton, path).named_parameters() if not p.requires_grad] == ["fc.weight"]


def test_a_single_layer_needs_no_skeleton(path):
    layer = Int8Linear.from_float(nn.Linear(5, 3))
    save(layer, path)
    x = torch.randn(2, 5)
    assert torch.equal(load(path)(x), layer(x))
    assert torch.equal(load(path, nn.Linear(9, 9))(x), layer(x))
    plain = nn.Linear(5, 3)
    save(plain, path)
    assert torch.equal(load(path, nn.Linear(1, 1))(x), plain(x))


def test_files_name_the_dtype_of_a_weight_only_if_it_is_not_float32(path):
    save(Int8Linear.from_float(nn.Linear(5, 3)), path)  # as every file before the field existed
    assert "weight_dtype" not in read_manifest(path)["modules"][""]
    assert load(path).weight.dtype == torch.float32
    save(Int8Linear.from_float(nn.Linear(5, 3).bfloat16()), path)
    assert read_manifest(path)["modules"][""]["weight_dtype"] == "BF16"


def test_the_reasons_of_layers_come_back(path):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.tanh, self.lstm, self.last = nn.Linear(16, 16), nn.Tanh(), nn.LSTM(16, 16), nn.Linear(16, 4)

        def forward(self, x):
            return self.last(self.lstm(self.tanh(self.first(x)))[0])

    def reasons(model):
        return {layer.name: layer.reason for layer in pycompress.report(model, x, measure=False).layers}

    x = torch.randn(3, 16)
    model = pycompress.quantize(Mixed().eval(), pycompress.Int8Dynamic(), ignore=["last"])
    set_note(model.first, "a reason of a compressed layer")
    skeleton = Mixed()
    set_note(skeleton.tanh, "of some other time")
    loaded = check(model, skeleton, path, x)
    assert reasons(loaded) == reasons(model)
    assert get_note(model.lstm) and get_note(loaded.lstm) == get_note(model.lstm)
    assert get_note(loaded.last) == "left as it is: named in ignore"
    assert get_note(loaded.first) == "a reason of a compressed layer" and get_note(loaded.tanh) is None
    assert get_note(skeleton.tanh) == "of some other time"


def test_metadata(path):
    given = {"accuracy": 0.987, "classes": ["a", "\u00e4 \U0001f41d"], "nested": {"x": None}}
    save(Net(), path, metadata=given)
    manifest = read_manifest(path)
    assert manifest["metadata"] == given
    assert manifest["architecture"].endswith("Net")


def test_the_same_model_gives_the_same_bytes(path, tmp_path):
    model = trained(Net())
    save(model, path)
    save(model, tmp_path / "b")
    assert path.read_bytes() == (tmp_path / "b").read_bytes()


def test_a_loaded_model_outlives_its_file(path):
    model = trained(Net())
    save(model, path)
    loaded = load(path, Net())
    path.write_bytes(b"")
    assert torch.equal(loaded(X), model(X))
    assert all(t.data_ptr() % 16 == 0 for t in loaded.parameters())


def test_loaded_models_train(path):
    save(trained(Net()), path)
    loaded = load(path, Net()).train()
    loaded(X).sum().backward()
    assert all(p.grad is not None for p in loaded.parameters())


def test_saving_changes_nothing(path):
    model = trained(Net()).train()
    modes = [m.training for m in model.modules()]
    before = copy.deepcopy(model.state_dict())
    save(model, path)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


# ---- every registered compressed layer ----


def sparse24(layer):
    """The layer with the first two of every four weights zero."""
    with torch.no_grad():
        flat = layer.weight.view(layer.weight.shape[0], -1, 4)
        flat[:, :, :2] = 0
    return layer


FLOAT_LAYERS = [
    (nn.Linear(16, 12), torch.randn(5, 16)),
    (nn.Linear(17, 5, bias=False), torch.randn(5, 17)),
    (nn.Conv2d(4, 8, 3, padding=1, stride=2), torch.randn(2, 4, 7, 7)),
    (nn.Conv2d(8, 8, 3, groups=8, bias=False), torch.randn(2, 8, 7, 7)),
    (nn.Embedding(13, 8), torch.tensor([0, 12, 3])),
    (nn.Conv1d(4, 8, 3, padding=1), torch.randn(2, 4, 9)),
    (sparse24(nn.Linear(16, 12)), torch.randn(5, 16)),
    (sparse24(nn.Conv2d(4, 8, 3, padding=1)), torch.randn(2, 4, 7, 7)),
]


@pytest.mark.parametrize("name", list(LAYERS))
def test_every_registered_layer_makes_the_round_trip(name, path):
    made = 0
    for float_layer, x in FLOAT_LAYERS:
        if isinstance(float_layer, nn.Conv1d) != (name == "Int8Conv1d"):
            continue  # a 1-d convolution has its own layer
        try:
            layer = LAYERS[name].from_float(float_layer)
        except (TypeError, ValueError, AttributeError):  # not a layer for this kind of float layer
            continue
        made += 1
        loaded = check(nn.Sequential(layer), nn.Sequential(float_layer), path, x)
        assert type(loaded[0]) is type(layer)
        assert loaded[0].config() == layer.config()
        for key, tensor in layer.state_dict().items():
            assert torch.equal(loaded[0].state_dict()[key], tensor), key
        with torch.device("meta"):  # where others make their tensors does not matter
            loaded = load(path, nn.Sequential(nn.Identity()))
        assert torch.equal(loaded(x), layer(x))
    assert made, f"no float layer in FLOAT_LAYERS suits {name}"


def test_simulated_activations_are_warned_about_and_load_on_a_model_made_the_same_way(path, recwarn):
    config, x = pycompress.FakeQuant(activation_bits=8), torch.randn(2, 8)
    original = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    simulated = pycompress.quantize(original, config)
    with pytest.warns(
        UserWarning, match=r"save: '0\.input_quantizer' simulates quantized activations in float: to load this file"
    ) as caught:
        save(simulated, path)
    assert len(caught) == 1 and caught[0].filename == __file__
    with pytest.raises(ValueError, match=r"the skeleton has no module '0\.input_quantizer'"):
        load(path, original)
    assert torch.equal(load(path, pycompress.quantize(original, config))(x), simulated(x))
    recwarn.clear()
    save(pycompress.quantize(original, pycompress.FakeQuant(bits=4)), path)
    assert not recwarn.list and load(path, original) is not None


# ---- what a file cannot hold ----


class Unknown(CompressedModule):
    def config(self):
        return {}


class Extra(nn.Linear):
    def get_extra_state(self):
        return {"a": 1}


@pytest.mark.parametrize(
    "model, options, error, text",
    [
        ("net", {}, TypeError, "save: model must be a torch.nn.Module, got str"),
        (nn.Sequential(Unknown()), {}, TypeError, "save: compressed layer '0' must be registered in pycompress.nn.LAYERS, got Unknown"),
        (nn.Sequential(Extra(1, 1)), {}, TypeError, r"save: module '0' \(Extra\) has extra state"),
        (nn.ParameterList([torch.zeros(2, dtype=torch.complex64)]), {}, TypeError, "save: tensor '0' must be dense .* got torch.complex64"),
        (nn.Linear(1, 1, device="meta"), {}, ValueError, "save: tensor 'weight' is on the meta device"),
        (nn.LazyLinear(3), {}, ValueError, "save: tensor 'weight' has no shape yet"),
        (nn.Linear(1, 1), {"metadata": [1]}, TypeError, "save: metadata must be a dict or None, got list"),
        (nn.Linear(1, 1), {"metadata": {1: 2}}, TypeError, "save: metadata must have strings as keys"),
        (nn.Linear(1, 1), {"metadata": {"a": nn.ReLU}}, TypeError, "save: metadata must be what JSON can hold"),
    ],
)
def test_what_cannot_be_saved(model, options, error, text, path):
    path.write_text("old")
    with pytest.raises(error, match=text):
        save(model, path, **options)
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("when", ["write", "sync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_no_other(when, path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    path.write_text("old")
    if when == "write":
        monkeypatch.setattr("pycompress.io.writer.save_file", lambda tensors, name, metadata: (name.write_bytes(b"half"), fail()))
    else:
        monkeypatch.setattr(os, {"sync": "fsync", "replace": "replace"}[when], fail)
    with pytest.raises(OSError, match="disk full"):
        save(Net(), path)
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == [path.name]


def test_replace_keeps_working_on_a_loaded_model(path):
    save(trained(Net()), path)
    loaded = load(path, Net())
    replace(loaded, loaded.fc, Int8Linear.from_float(loaded.fc))
    assert loaded(X).shape == (3, 10)


@pytest.mark.parametrize("name", ["Sparse24Linear", "Int8Sparse24Linear", "Sparse24Conv2d", "Int8Sparse24Conv2d"])
def test_layers_with_one_of_four_weights_make_the_round_trip(name, path):
    float_layer = nn.Conv2d(4, 8, 3, padding=1) if name.endswith("Conv2d") else nn.Linear(36, 12)
    with torch.no_grad():
        float_layer.weight.view(float_layer.weight.shape[0], -1, 4)[:, :, [0, 1, 3]] = 0
    layer = LAYERS[name].from_float(float_layer, pattern="1:4")
    x = torch.randn(2, 4, 7, 7) if name.endswith("Conv2d") else torch.randn(5, 36)
    loaded = check(nn.Sequential(layer), nn.Sequential(float_layer), path, x)
    assert loaded[0].pattern == "1:4"
