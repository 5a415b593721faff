"""Every way a file can be wrong gives one CheckpointError that names the file, and leaves the skeleton as it was."""

from __future__ import annotations

import contextlib
import json
import struct
import tracemalloc

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from pycompress.io import CheckpointError, load, read_manifest, save
from pycompress.nn import Int8Linear


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.heads = 2
        self.fc = nn.Linear(16, 10)
        self.last = nn.Linear(10, 2, bias=False)
        self.tied = nn.Linear(10, 2, bias=False)
        self.tied.weight = self.last.weight
        self.shared = self.last

    def forward(self, x):
        return self.last(self.fc(self.norm(self.conv(x)).flatten(1)))


def model():
    net = Net().eval()
    net.fc = Int8Linear.from_float(net.fc)
    return net


def split(path):
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def join(path, header, data):
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def edit(path, change):
    """Rewrite the manifest (or what change returns in its place) and leave the rest of the file valid."""
    header, data = split(path)
    manifest = json.loads(header["__metadata__"]["pycompress"])
    result = change(manifest)
    header["__metadata__"]["pycompress"] = result if isinstance(result, str) else json.dumps(manifest)
    join(path, header, data)


@pytest.fixture
def path(tmp_path):
    save(model(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def rejects(path, text, skeleton=None):
    skeleton = Net() if skeleton is None else skeleton
    before = {name: tensor.clone() for name, tensor in skeleton.state_dict().items()}
    structure = repr(skeleton), [module.training for module in skeleton.modules()], getattr(skeleton, "heads", None)
    with pytest.raises(CheckpointError, match=text) as caught:
        load(path, skeleton)
    message = str(caught.value)
    assert message.startswith(f"load: {path}: "), message
    assert message.count(str(path)) == 1 and len(message) < 700
    assert structure == (repr(skeleton), [module.training for module in skeleton.modules()], getattr(skeleton, "heads", None))
    for name, tensor in skeleton.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert isinstance(caught.value, ValueError)


def test_the_file_itself_loads(path):
    edit(path, lambda manifest: None)
    assert load(path, Net()).shared is not None


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 200, -1, -100])
def test_cut_short(path, size):
    raw = path.read_bytes()
    path.write_bytes(raw[:size])
    rejects(path, "is not a safetensors file, or damaged or cut short")


@pytest.mark.parametrize(
    "raw", [b"PK\x03\x04 a zip file of torch.save", b"\xff" * 64, struct.pack("<Q", 2**40) + b"{}"], ids=["zip", "ff", "huge header"]
)
def test_other_files(path, raw):
    path.write_bytes(raw)
    rejects(path, "is not a safetensors file, or damaged or cut short")


def test_too_long(path):
    path.write_bytes(path.read_bytes() + b"more")
    rejects(path, "is not a safetensors file, or damaged or cut short")


def test_a_missing_file_is_an_ordinary_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        load(tmp_path / "none.safetensors", Net())
    with pytest.raises(CheckpointError, match="is a folder"):
        load(tmp_path, Net())


def test_a_safetensors_file_of_somebody_else(path):
    for metadata in (None, {"format": "pt"}):
        save_file({"weight": torch.ones(2)}, path, metadata=metadata)
        rejects(path, "has no pycompress manifest, was it written by pycompress.save?")


def nest(depth):
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "its manifest is not JSON"),
        ("{", "its manifest is not JSON"),
        (nest(100_000), "its manifest is not JSON"),
        ('{"format": "a", "format": "b"}', "its manifest is not JSON .*appears twice"),
        ("[]", "its manifest must be an object, got list"),
        ("3", "its manifest must be an object, got int"),
        ("{}", "its manifest must have 'format' of type str, got nothing"),
        ('{"format": "other"}', "its manifest has the format 'other', expected 'pycompress'"),
    ],
)
def test_no_manifest_at_all(path, text, message):
    edit(path, lambda manifest: text)
    rejects(path, message)


def put(*keys_and_value):
    *keys, last, value = keys_and_value

    def change(manifest):
        for key in keys:
            manifest = manifest[key]
        manifest[last] = value

    return change


def drop(*keys):
    *keys, last = keys

    def change(manifest):
        for key in keys:
            manifest = manifest[key]
        del manifest[last]

    return change


TAMPERED = {
    "newer version": (put("version", 2), r"has format version 2 \(pycompress .*\), this pycompress reads up to 1: update it"),
    "old version": (put("version", 0), "has format version 0, which does not exist"),
    "version type": (put("version", True), "must have 'version' of type int, got bool"),
    "modules type": (put("modules", []), "must have 'modules' of type dict, got list"),
    "module type": (put("modules", "conv", 3), "entry for module 'conv' must be an object, got int"),
    "no class": (drop("modules", "conv", "type"), "entry for module 'conv' must have 'type' of type str, got nothing"),
    "dtype of a weight": (
        put("modules", "fc", "weight_dtype", "I8"),
        "module 'fc' must have a floating-point 'weight_dtype', got 'I8'",
    ),
    "no dtype of a weight": (put("modules", "fc", "weight_dtype", [1]), r"must have a floating-point 'weight_dtype', got \[1\]"),
    "note type": (put("modules", "conv", "note", 3), "entry for module 'conv' must have 'note' of type str, got int"),
    "attributes type": (put("modules", "conv", "attributes", 3), "must have 'attributes' of type dict, got int"),
    "attribute type": (put("modules", "", "attributes", "heads", {"a": 1}), "must have simple attributes, got dict for 'heads'"),
    "nested attribute": (put("modules", "", "attributes", "heads", [[1]]), "must have simple attributes, got list for 'heads'"),
    "none type": (put("modules", "conv", "none", [3]), "must have names in 'none' and 'transient'"),
    "config type": (put("modules", "fc", "config", None), "must have 'config' of type dict, got NoneType"),
    "metadata type": (put("metadata", "x"), "must have 'metadata' of type dict, got str"),
    "shared type": (put("shared", {"shared": 1}), "must have only strings in 'shared'"),
    "tensors type": (put("tensors", 1.5), "must have 'tensors' of type dict, got float"),
    "tensor type": (put("tensors", "conv.weight", {"dtype": "F32"}), "tensor 'conv.weight' must be a list of dtype, shape"),
    "tensor shape": (put("tensors", "conv.weight", ["F32", [4, 1, 3, -3]]), "must have a shape of non-negative integers"),
    "tensor dtype": (put("tensors", "conv.weight", ["F31", [4, 1, 3, 3]]), "has the unknown dtype 'F31'"),
    "tensor dtype type": (put("tensors", "conv.weight", [["F32"], [4, 1, 3, 3]]), "has the unknown dtype"),
    "tensor order": (put("tensors", "conv.weight", ["F32", [4, 1, 3, 3], [0, 1, 2, 2]]), "must have a permutation of the dimensions"),
    "tensor order type": (
        put("tensors", "conv.weight", ["F32", [4, 1, 3, 3], [0, 1, 2, "a"]]),
        "must have a permutation of the dimensions",
    ),
    "other shape": (put("tensors", "conv.weight", ["F32", [36]]), r"is F32 \[4, 1, 3, 3\], the manifest says F32 \[36\]"),
    "other dtype": (put("tensors", "conv.weight", ["I32", [4, 1, 3, 3]]), "the manifest says I32"),
    "huge shape": (put("tensors", "conv.weight", ["F32", [2**40, 2**40]]), "the manifest says F32"),
    "missing tensor": (drop("tensors", "conv.weight"), "'conv.weight': the file has it, the manifest does not list it"),
    "extra tensor": (put("tensors", "conv.extra", ["F32", [1]]), "'conv.extra': the manifest lists it, the file lacks it"),
    "unknown class": (put("modules", "fc", "type", "Int9Linear"), "'fc' has the unknown layer class 'Int9Linear', known are .*Int8Linear"),
    "a class of torch": (put("modules", "conv", "type", "Transformer"), "skeleton has a Conv2d at 'conv', the file a Transformer"),
    "a path as class": (put("modules", "fc", "type", "os.system"), "unknown layer class 'os.system'"),
    "other root": (put("modules", "", "type", "Web"), "the skeleton has a Net at 'its root', the file a Web"),
    "no root": (drop("modules", ""), "does not describe the root module"),
    "missing module": (drop("modules", "norm"), "the skeleton has a module 'norm'"),
    "unknown module": (put("modules", "nor", {"type": "Linear"}), "the skeleton has no module 'nor'"),
    "strange path": (put("modules", "../../etc", {"type": "Linear"}), "the skeleton has no module '../../etc'"),
    "module in a layer": (put("modules", "fc.weight", {"type": "Linear"}), "the skeleton has no module 'fc.weight'"),
    "config, unknown": (put("modules", "fc", "config", "code", "x"), r"'fc' cannot be built as Int8Linear \(TypeError"),
    "config, lacking": (put("modules", "fc", "config", {}), r"'fc' cannot be built as Int8Linear \(TypeError"),
    "config, wrong": (put("modules", "fc", "config", "activation", "explode"), r"'fc' cannot be built as Int8Linear \(ValueError"),
    "config, size": (
        put("modules", "fc", "config", "in_features", 15),
        "tensor 'fc.weight' must be torch.int8 .10, 15. for its Int8Linear",
    ),
    "config, huge": (put("modules", "fc", "config", "out_features", 10**9), "tensor 'fc.* must be torch.* for its Int8Linear"),
    "config, beyond": (put("modules", "fc", "config", "out_features", 10**30), "'fc' cannot be built as Int8Linear"),
    "config, bias": (put("modules", "fc", "config", "bias", False), "has an unexpected tensor 'fc.bias'"),
    "config, static": (put("modules", "fc", "config", "static", True), "lacks the tensor 'fc.x_scale'"),
    "number to list": (put("modules", "", "attributes", "heads", [2]), r"'' has heads = 2 in the skeleton, it cannot become \[2\]"),
    "number to flag": (put("modules", "", "attributes", "heads", True), "heads = 2 in the skeleton, it cannot become True"),
    "number to text": (put("modules", "", "attributes", "heads", "two"), "heads = 2 in the skeleton, it cannot become 'two'"),
    "not shared": (put("shared", {}), r"skeleton and file do not share the same modules \('shared'\)"),
    "shared elsewhere": (put("shared", {"shared": "conv"}), "do not share the same modules"),
    "shared with nobody": (put("shared", {"shared": "x"}), "shares module 'shared' with 'x'"),
    "not tied": (put("tied", {}), "lacks the tensor 'tied.weight'"),
    "tied to nothing": (put("tied", {"tied.weight": "x"}), "ties 'tied.weight' to 'x'"),
    "tied twice": (put("tied", {"fc.bias": "conv.bias"}), "ties 'fc.bias' to 'conv.bias'"),
    "tied to another shape": (put("tied", {"tied.weight": "conv.weight"}), "'tied.weight' has 4 dimensions, 2 in the skeleton"),
    "tied to another dtype": (
        put("tied", {"tied.weight": "norm.num_batches_tracked"}),
        "'tied.weight' has dtype torch.int64, torch.float32 in the skeleton",
    ),
    "tied beside": (put("tied", {"tied.weight": "last.weight", "tied.extra": "last.weight"}), "unexpected tensor 'tied.extra'"),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_tampered(path, case):
    change, message = TAMPERED[case]
    edit(path, change)
    rejects(path, message)


def test_huge_sizes_take_no_memory(path):
    edit(path, put("modules", "fc", "config", "out_features", 10**9))
    tracemalloc.start()
    rejects(path, "for its Int8Linear")
    assert tracemalloc.get_traced_memory()[1] < 50e6  # Python's own; torch would have failed to get 16 GB
    tracemalloc.stop()


def test_attributes_cannot_touch_what_is_private(path):
    def change(manifest):
        own = manifest["modules"][""]["attributes"]
        own.update({"training": True, "_modules": 1, "_forward_hooks": None, "__class__": "x", "forward": 3, "note": 5})

    edit(path, change)
    loaded = load(path, Net())
    assert not loaded.training and callable(loaded.forward) and len(loaded._modules) == 6
    assert not hasattr(loaded, "note")


def test_text_cannot_enter_modules_that_are_not_torchs(path):
    class Command(Net):
        def __init__(self):
            super().__init__()
            self.command = "ls"

    Command.__name__ = "Net"
    edit(path, put("modules", "", "attributes", "command", "rm"))
    rejects(path, "command = 'ls' in the skeleton, it cannot become 'rm'", Command())


def test_the_wrong_skeleton(path):
    rejects(path, "the skeleton has a Linear at 'its root', the file a Net", nn.Linear(1, 1))
    wider = Net()
    wider.more = nn.Linear(1, 1)
    rejects(path, r"the skeleton has a module 'more' \(Linear\) that the file does not know", wider)
    wider = Net()
    wider.norm.register_buffer("seen", torch.zeros(3))
    rejects(path, "lacks the tensor 'norm.seen'", wider)
    narrower = Net()
    del narrower.norm
    rejects(path, "the skeleton has no module 'norm'", narrower)
    narrower = Net()
    del narrower.norm.running_mean
    rejects(path, "has an unexpected tensor 'norm.running_mean'", narrower)
    with pytest.raises(TypeError, match=r"load: skeleton must be a torch.nn.Module or None, got type"):
        load(path, Net)


def test_without_skeleton_the_error_names_the_architecture(path):
    with pytest.raises(ValueError, match=r"load needs skeleton: an instance of .*test_bad_files.Net as it was before compression, .*Net\("):
        load(path)


def test_a_skeleton_on_meta_with_a_buffer_the_file_lacks(path):
    with torch.device("meta"):
        skeleton = Net()
        skeleton.norm.register_buffer("table", torch.zeros(3), persistent=False)
    with pytest.raises(CheckpointError, match=r"lacks the buffer 'norm.table', and the skeleton's is on the meta device"):
        load(path, skeleton)


def test_read_manifest_checks_as_well(path):
    edit(path, put("version", 7))
    with pytest.raises(CheckpointError, match=r"load: .*model.safetensors: has format version 7"):
        read_manifest(path)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "model.safetensors"
    save(model(), path)
    raw = path.read_bytes()
    return path, raw, 8 + struct.unpack("<Q", raw[:8])[0]


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_flipped_bytes_in_the_header(good, data):
    path, raw, end = good
    changed = bytearray(raw)
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(changed)
    try:
        loaded = load(path, Net())
    except CheckpointError:
        return
    assert isinstance(loaded, Net) and loaded.fc.weight.shape == (10, 16)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["fc", "conv", "", "Int8Linear", "F32", 10**30, -1]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["", "fc", "type", "config", "none", "x"]), inner, max_size=4)
    ),
    max_leaves=8,
)


def places(value, trail=()):
    yield trail
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*trail, key))


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_value_anywhere_in_the_manifest(good, data):
    path, raw, _ = good
    path.write_bytes(raw)
    manifest = json.loads(split(path)[0]["__metadata__"]["pycompress"])
    *trail, last = data.draw(st.sampled_from([place for place in places(manifest) if place]))
    edit(path, put(*trail, last, data.draw(JSON)))
    with contextlib.suppress(CheckpointError):
        load(path, Net())
