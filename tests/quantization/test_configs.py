"""Configs check themselves when they are written."""

from __future__ import annotations

import dataclasses
import pickle

import pytest

from pycompress.quantization import Codebook, FakeQuant, Int8Dynamic, Int8Static, Int8WeightOnly
from pycompress.quantization.scheme import Scheme, from_rows, to_rows

ALL = [
    Int8Dynamic(),
    Int8Dynamic(symmetric=False),
    Int8Static(),
    Int8Static(observer="percentile", symmetric=True, observer_options={"percentile": 99.0}),
    Int8WeightOnly(),
    FakeQuant(bits=3, granularity="group", group_size=8, activation_bits=8),
    Codebook(bits=2, kind="apot"),
]


@pytest.mark.parametrize("config", ALL, ids=repr)
def test_frozen_equal_hashable_and_picklable(config):
    twin = dataclasses.replace(config)
    assert twin == config and hash(twin) == hash(config)
    assert pickle.loads(pickle.dumps(config)) == config
    for field in dataclasses.fields(config):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, field.name, 1)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: Int8Static(observer="median"), ValueError, "Int8Static: unknown observer 'median', expected one of entropy, minmax"),
        (lambda: Int8Static(observer_options={"bins": 8}), TypeError, "Int8Static: .*bins"),
        (lambda: Int8Static(observer="percentile", observer_options={"percentile": 10}), ValueError, "Int8Static: .*percentile must be"),
        (lambda: Int8Static(observer_options=[1]), TypeError, "observer_options must be a mapping, got list"),
        (lambda: Int8Dynamic(symmetric=1), TypeError, "Int8Dynamic: symmetric must be True or False, got 1"),
        (lambda: Int8Static(symmetric="no"), TypeError, "symmetric must be True or False, got 'no'"),
        (lambda: FakeQuant(bits=1), ValueError, "FakeQuant: bits must be an int from 2 to 16, got 1"),
        (lambda: FakeQuant(bits=True), ValueError, "bits must be an int from 2 to 16, got True"),
        (lambda: FakeQuant(granularity="row"), ValueError, "granularity must be one of tensor, channel, group, got 'row'"),
        (lambda: FakeQuant(granularity="group"), ValueError, "group_size must be an int from 1 to .*, got None"),
        (lambda: FakeQuant(group_size=8), ValueError, "group_size needs granularity='group', got granularity='channel'"),
        (lambda: FakeQuant(observer="entropy"), ValueError, "axis must be None, this observer works per tensor only"),
        (lambda: FakeQuant(activation_symmetric=False), ValueError, "activation_symmetric needs activation_bits"),
        (lambda: FakeQuant(activation_bits=8, activation_symmetric=False), ValueError, "activation_granularity must be 'tensor'"),
        (lambda: FakeQuant(activation_bits=99), ValueError, "activation_bits must be an int from 2 to 16, got 99"),
        (lambda: Codebook(kind="huffman"), ValueError, "unknown codebook kind 'huffman', expected one of apot, kmeans, nf4, pot"),
        (lambda: Codebook(bits=3, kind="nf4"), ValueError, "Codebook: bits must be 4 for kind='nf4', got 3"),
        (lambda: Codebook(bits=9), ValueError, "Codebook: bits must be an int from 2 to 8, got 9"),
        (lambda: Codebook(granularity="token"), ValueError, "granularity must be one of tensor, channel, group, got 'token'"),
        (lambda: Codebook(group_size=3), ValueError, "group_size needs granularity='group'"),
    ],
)
def test_bad_values(make, error, text):
    with pytest.raises(error, match=text):
        make()


def test_options_are_copied():
    options = {"percentile": 99.0}
    config = Int8Static(observer="percentile", observer_options=options)
    options["percentile"] = 0
    assert config.observer_options == {"percentile": 99.0}


@pytest.mark.parametrize(
    ("bits", "symmetric", "limits"), [(8, True, (-127, 127)), (8, False, (-128, 127)), (2, True, (-1, 1)), (4, False, (-8, 7))]
)
def test_integer_range(bits, symmetric, limits):
    scheme = Scheme(bits=bits, symmetric=symmetric)
    assert (scheme.quant_min, scheme.quant_max) == limits


@pytest.mark.parametrize("shape", [(3, 7), (2, 3, 5, 5), (5, 1), (1, 1)])
@pytest.mark.parametrize(("granularity", "size"), [("tensor", None), ("channel", None), ("group", 4), ("group", 100)])
def test_rows_and_back(shape, granularity, size):
    import torch

    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    rows = to_rows(x, granularity, size)
    assert rows.dim() == 2
    assert torch.equal(from_rows(rows, x.shape), x)
    if granularity == "group":
        assert rows.shape[1] == size and rows.shape[0] % shape[0] == 0
