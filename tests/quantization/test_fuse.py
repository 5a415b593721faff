"""Activations fused into layers, and int8 between convolutions: the same numbers as without, in fewer passes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from support.vision import BasicBlock
from torch import Tensor, nn

import pycompress as pc
from pycompress.nn import Int8Conv1d, Int8Conv2d, Int8Linear
from pycompress.nn.channels_last_max_pool import ChannelsLastMaxPool2d
from pycompress.nn.relu_unless_int8 import ReLUUnlessInt8
from pycompress.ops.int8_conv2d import TRACEABLE_MARKS
from pycompress.quantization.activations import activation_of

STATIC = [pc.Int8Static(), pc.Int8Static(symmetric=True)]


def seeded(make, shape: tuple[int, ...]) -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().eval()
    return model, torch.randn(shape, generator=torch.Generator().manual_seed(1))


def both(model: nn.Module, config, x: Tensor, **options) -> tuple[nn.Module, nn.Module]:
    """The model without and with fusion."""
    data = [x] if isinstance(config, (pc.Int8Static, dict)) else None
    return tuple(pc.quantize(model, config, data=data, fuse=fuse, **options) for fuse in (False, True))  # type: ignore[return-value]


def kinds(model: nn.Module) -> list[str]:
    return [type(module).__name__ for module in model]


def chains(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if getattr(module, "int8_output", False)]


@pytest.mark.parametrize("config", [pc.Int8Dynamic(), pc.Int8Dynamic(symmetric=False), *STATIC, pc.Int4WeightOnly()], ids=repr)
@pytest.mark.parametrize(
    ("activation", "name"),
    [(nn.ReLU(), "relu"), (nn.GELU(), "gelu"), (nn.SiLU(), "silu"), (nn.ReLU6(), "relu6"), (nn.Hardswish(), "hardswish")],
)
@torch.no_grad()
def test_activation_behind_linear(config, activation, name):
    model, x = seeded(lambda: nn.Sequential(nn.Linear(64, 33), copy.deepcopy(activation), nn.Dropout(), nn.Linear(33, 5)), (7, 64))
    plain, fused = both(model, config, x)
    assert [type(module) for module in fused] == [type(plain[0]), nn.Identity, nn.Dropout, type(plain[3])]
    assert (fused[0].activation, fused[3].activation) == (name, "none")
    torch.testing.assert_close(fused[0](x), activation(plain[0](x)), rtol=1e-5, atol=1e-6)
    if name == "relu":
        assert torch.equal(fused(x), plain(x))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("config", STATIC, ids=repr)
@pytest.mark.parametrize(
    "activation",
    [[nn.ReLU()], [nn.ReLU6()], [nn.SiLU()], [nn.Hardswish()], [nn.Identity(), nn.ReLU(inplace=True), nn.Identity()], []],
    ids=repr,
)
@torch.no_grad()
def test_int8_between_convolutions_is_the_same_to_the_bit(activation, config, layout):
    def make():
        depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        return nn.Sequential(nn.Conv2d(3, 12, 3), *copy.deepcopy(activation), depthwise, *copy.deepcopy(activation), nn.Conv2d(12, 7, 1))

    model, x = seeded(make, (2, 3, 9, 11))
    x = 4 * x.to(memory_format=layout)  # beyond 6
    plain, fused = both(model, config, x)
    assert len(chains(fused)) == 2 and not chains(plain)
    expected, got = plain(x), fused(x)
    assert got.dtype == torch.float32 and got.stride() == expected.stride()
    if activation == [] or not isinstance(activation[0], (nn.SiLU, nn.Hardswish)):
        assert torch.equal(got, expected)
    else:
        torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05)  # another last bit may round the other way
    assert fused[0](x).dtype == torch.int8


@pytest.mark.parametrize("config", STATIC, ids=repr)
@torch.no_grad()
def test_a_residual_block_stays_int8_inside(config):
    """The block calls one ReLU behind both convolutions; the second result is added to floats."""
    model, x = seeded(lambda: nn.Sequential(BasicBlock(8, 8, 1), BasicBlock(8, 16, 2)), (2, 8, 10, 10))
    plain, fused = both(model, config, x)
    assert chains(fused) == ["0.conv1", "1.conv1"]
    assert type(fused[0].relu) is ReLUUnlessInt8 and fused[0].relu.inplace
    assert torch.equal(fused(x), plain(x)) and torch.equal(fused(x[:0]), plain(x[:0]))
    last = x.to(memory_format=torch.channels_last)
    assert torch.equal(fused(last), plain(last)) and fused(last).stride() == plain(last).stride()


@torch.no_grad()
def test_conv1d_and_single_images():
    model, x = seeded(lambda: nn.Sequential(nn.Conv1d(4, 6, 3), nn.ReLU(), nn.Conv1d(6, 5, 3)), (3, 4, 20))
    plain, fused = both(model, pc.Int8Static(), x)
    assert isinstance(fused[0], Int8Conv1d) and chains(fused) == ["0"]
    assert torch.equal(fused(x), plain(x)) and fused(x).stride() == plain(x).stride()
    model, x = seeded(lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3)), (4, 9, 9))
    plain, fused = both(model, pc.Int8Static(), x)
    assert torch.equal(fused(x), plain(x)) and fused(x).is_contiguous()


class Branches(nn.Module):
    """One result, several readers: ``read`` says which."""

    def __init__(self, read: str) -> None:
        super().__init__()
        self.first, self.left, self.right = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.act, self.read = nn.ReLU(), read

    def forward(self, x: Tensor) -> Tensor:
        before = self.first(x)
        y = self.act(before)
        if self.read == "convolutions":
            return self.left(y) + self.right(y)
        if self.read == "float":
            return self.left(y) + y
        if self.read == "before the activation":
            return self.left(y) + before
        return self.left(F.relu(before))  # "function": F.relu reads it, too


@pytest.mark.parametrize(
    ("read", "int8", "relu"),
    [("convolutions", True, True), ("float", False, True), ("before the activation", False, False), ("function", False, False)],
)
@torch.no_grad()
def test_who_reads_decides(read, int8, relu):
    model, x = seeded(lambda: Branches(read), (2, 3, 8, 8))
    plain, fused = both(model, pc.Int8Static(), x)
    assert chains(fused) == (["first"] if int8 else [])
    assert fused.first.activation == ("relu" if relu else "none") and type(fused.act) is (nn.Identity if relu else nn.ReLU)
    assert torch.equal(fused(x), plain(x))


@torch.no_grad()
def test_readers_with_other_scales_get_floats():
    model, x = seeded(lambda: Branches("convolutions"), (2, 3, 8, 8))
    config = {"*": pc.Int8Static(), "right": pc.Int8Static(observer="percentile", observer_options={"percentile": 90})}
    plain, fused = both(model, config, x)
    assert fused.left.x_scale != fused.right.x_scale
    assert chains(fused) == [] and fused.first.activation == "relu" and torch.equal(fused(x), plain(x))


@pytest.mark.parametrize("scale", [0.5, 8.0])
@torch.no_grad()
def test_relu6_in_a_chain(scale):
    """Where the grid ends at 6 or below, rounding clips and a ReLU does; where the observer looks beyond it, a ReLU would let 6.05 pass."""
    model, x = seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU6(), nn.Conv2d(8, 4, 1)), (2, 3, 8, 8))
    plain, fused = both(model, pc.Int8Static(), scale * x)
    assert chains(fused) == ["0"] and fused[0].activation == "relu"
    assert torch.equal(fused(20 * x), plain(20 * x))

    converted = []
    for fuse in (False, True):
        quantizer = pc.Quantizer(pc.Int8Static(), fuse=fuse)
        prepared = quantizer.prepare(model)
        quantizer.calibrate(prepared, scale * x)
        prepared[2].input_quantizer.scale.fill_(6.1 / 255)
        prepared[2].input_quantizer.zero_point.fill_(-128)
        converted.append(quantizer.convert(prepared))
    assert chains(converted[1]) == ["0"] and converted[1][0].activation == "relu6"
    assert torch.equal(converted[1](20 * x), converted[0](20 * x))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.act = nn.Linear(16, 16), nn.Linear(16, 16), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.second(self.act(self.first(x))))


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(16, 16), nn.GELU())
        self.shared = self.block[1]

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(self.block(x)) if x.sum() > 0 else self.block(x)


class Hooked(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(16, 16), nn.GELU())
        self[1].register_forward_hook(lambda module, args, out: out + 1)


class OwnReLU(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(min=-1)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (Twice, {}),
        (Untraceable, {}),
        (Hooked, {}),
        (lambda: nn.Sequential(nn.Linear(16, 16), nn.GELU(approximate="tanh")), {}),
        (lambda: nn.Sequential(nn.Linear(16, 16), OwnReLU()), {}),
        (lambda: nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.ReLU()), {}),
        (lambda: nn.Sequential(nn.Linear(16, 16), nn.ReLU()), {"ignore": ["1"]}),
        (lambda: nn.Sequential(nn.Linear(16, 16), nn.ReLU()), {"ignore": nn.ReLU}),
        (lambda: nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)), {"ignore": ["0"]}),
    ],
)
@torch.no_grad()
def test_what_stays(make, options):
    model, x = seeded(make, (6, 16))
    plain, fused = both(model, pc.Int8Dynamic(), x, **options)
    assert [type(module) for module in fused.modules()] == [type(module) for module in plain.modules()]
    assert torch.equal(fused(x), plain(x))


def test_parts_of_an_untraceable_model():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Sequential(nn.Linear(16, 16), nn.ReLU())

        def forward(self, x):
            return self.block(x) if x.sum() > 0 else x

    model, x = seeded(Model, (6, 16))
    assert type(pc.quantize(model, pc.Int8Dynamic()).block[1]) is nn.ReLU  # without a run nobody knows who calls the block
    fused = pc.quantize(model, pc.Int8Dynamic(), example_inputs=x.abs())
    assert isinstance(fused.block[0], Int8Linear) and fused.block[0].activation == "relu" and type(fused.block[1]) is nn.Identity


def test_ignored_modules_are_found_in_the_copy():
    model, x = seeded(lambda: nn.Sequential(nn.Linear(16, 16), nn.ReLU()), (6, 16))
    quantizer = pc.Quantizer(pc.Int8Dynamic(), ignore=[model[1]])
    assert type(quantizer.convert(quantizer.prepare(model, x))[1]) is nn.ReLU


@torch.no_grad()
def test_simulation_and_execution_agree_through_a_chain():
    model, x = seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3)), (2, 3, 9, 9))
    quantizer = pc.Quantizer(pc.Int8Static())
    prepared = quantizer.prepare(model, x)
    quantizer.calibrate(prepared, x)
    converted = quantizer.convert(prepared)
    inner = prepared[1](prepared[0](x))
    assert torch.equal(converted[0](x).int(), prepared[2].input_quantizer.integers(inner))
    torch.testing.assert_close(converted(x), prepared(x), rtol=1e-4, atol=1e-5)


def test_a_wanted_gradient_goes_through():
    """Integers carry none, so the chain hands floats on, which round to the same integers."""
    model, x = seeded(lambda: nn.Sequential(BasicBlock(8, 8, 1)), (2, 8, 10, 10))
    plain, fused = both(model, pc.Int8Static(), x)
    gradients = []
    for one in (plain, fused):
        leaf = x.clone().requires_grad_()
        y = one(leaf)
        y.square().sum().backward()
        gradients.append(leaf.grad)
        assert torch.equal(y.detach(), plain(x))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
    assert gradients[0].abs().sum() > 0


@torch.no_grad()
def test_files_pickles_and_copies(tmp_path):
    model, x = seeded(lambda: nn.Sequential(BasicBlock(8, 8, 1), nn.Conv2d(8, 4, 1), nn.SiLU()), (2, 8, 10, 10))
    fused = pc.quantize(model, pc.Int8Static(), data=[x])
    pc.save(fused, tmp_path / "fused.safetensors")
    skeleton, _ = seeded(lambda: nn.Sequential(BasicBlock(8, 8, 1), nn.Conv2d(8, 4, 1), nn.SiLU()), (1,))
    for other in (pc.load(tmp_path / "fused.safetensors", skeleton), copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert torch.equal(other(x), fused(x)) and chains(other) == chains(fused)


@torch.no_grad()
def test_export_keeps_the_layout():
    model, x = seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3)), (2, 3, 9, 9))
    fused = pc.quantize(model, pc.Int8Static(), data=[x])
    for layout in (torch.contiguous_format, torch.channels_last):
        inputs = x.to(memory_format=layout)
        expected, got = fused(inputs), torch.export.export(fused, (inputs,)).module()(inputs)
        assert torch.equal(got, expected)
        assert got.stride() == expected.stride() or not TRACEABLE_MARKS


def test_bfloat16_layers_hand_floats_on():
    """A result made of int8 is float32, which the next bfloat16 layer would refuse."""
    model, x = seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3)).bfloat16(), (2, 3, 9, 9))
    fused = pc.quantize(model, pc.Int8Static(), data=[x.bfloat16()])
    assert chains(fused) == [] and fused[0].activation == "relu" and fused(x.bfloat16()).dtype == torch.bfloat16


def test_with_int8_output_checks_its_scale():
    layer = Int8Conv2d.from_float(nn.Conv2d(3, 4, 1))
    with pytest.raises(ValueError, match=r"Int8Conv2d.with_int8_output: out_scale must be a finite number .*, got nan"):
        layer.with_int8_output(float("nan"))


def test_fuse_must_be_a_bool():
    with pytest.raises(TypeError, match="fuse must be True or False, got 'no'"):
        pc.quantize(nn.Linear(4, 4), pc.Int8Dynamic(), fuse="no")
    with pytest.raises(TypeError, match="Quantizer: fuse must be True or False, got 1"):
        pc.Quantizer(pc.Int8Dynamic(), fuse=1)


def test_activations_of_transformers():
    activations = pytest.importorskip("transformers.activations")
    assert activation_of(activations.GELUActivation()) == "gelu" and activation_of(activations.NewGELUActivation()) is None
    assert activation_of(activations.GELUActivation(use_gelu_python=True)) is None and activation_of(nn.Tanh()) is None


@pytest.mark.parametrize("pool", [nn.MaxPool2d(3, 2, 1), nn.MaxPool2d((2, 3), ceil_mode=True), nn.MaxPool2d(2, 1, dilation=2)], ids=repr)
@pytest.mark.parametrize("channels", [3, 12])
def test_max_pooling_runs_channels_last_and_gives_the_same(pool, channels, tmp_path):
    make = lambda: nn.Sequential(nn.Conv2d(2, channels, 3), copy.deepcopy(pool), nn.Conv2d(channels, 4, 1))  # noqa: E731
    model, x = seeded(make, (2, 2, 11, 13))
    plain, fused = both(model, pc.Int8Static(), x)
    assert type(plain[1]) is nn.MaxPool2d and type(fused[1]) is ChannelsLastMaxPool2d
    for layout in (torch.contiguous_format, torch.channels_last):
        value = x.to(memory_format=layout)
        assert torch.equal(fused(value), plain(value)) and fused(value).stride() == plain(value).stride()
    y = torch.randn(2, channels, 9, 11)
    y[0, 0, 3, 3] = float("nan")
    grads = []
    for layer in (pool, fused[1]):
        leaf = y.clone().requires_grad_()
        result = layer(leaf)
        assert result.is_contiguous() and result[0, 0].isnan().any()
        torch.testing.assert_close(result, pool(y), rtol=0, atol=0, equal_nan=True)
        result.nan_to_num(0.0).square().sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)
    pc.save(fused, tmp_path / "model.safetensors")
    loaded = pc.load(tmp_path / "model.safetensors", make())
    assert type(loaded[1]) is ChannelsLastMaxPool2d and torch.equal(loaded(x), fused(x))


def test_max_pooling_stays_where_it_must():
    class Indices(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.pool = nn.Conv2d(2, 8, 3), nn.MaxPool2d(2, return_indices=True)

        def forward(self, x):
            return self.pool(self.conv(x))[0]

    x = torch.randn(1, 2, 8, 8)
    assert type(pc.quantize(Indices(), pc.Int8Dynamic(), example_inputs=x).pool) is nn.MaxPool2d
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.MaxPool2d(2), nn.MaxPool2d(2))
    model[1].register_forward_hook(lambda *_: None)
    kept = pc.quantize(model, pc.Int8Dynamic(), ignore=["2"], example_inputs=x)
    assert [type(m) for m in kept[1:]] == [nn.MaxPool2d, nn.MaxPool2d]
    linear = pc.quantize(nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32, 4)), pc.Int8Dynamic())
    assert type(linear[0]) is nn.MaxPool2d
