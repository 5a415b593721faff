"""Fixed and learned codebooks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pycompress.quantization import CODEBOOKS
from pycompress.quantization.codebook import CodebookQuantize, additive_power_of_two, kmeans_rows, nf4, power_of_two

BITS = {"kmeans": 3, "nf4": 4, "pot": 4, "apot": 4}


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
@pytest.mark.parametrize("kind", CODEBOOKS)
def test_contract(kind, granularity):
    weight = normal(6, 5, 3, 3)
    weight[0] = 0
    weight[1, :, 0] = 0
    quantizer = CodebookQuantize(BITS[kind], kind, granularity, 16 if granularity == "group" else None)
    y = quantizer(weight)
    assert y.shape == weight.shape and y.dtype == weight.dtype
    assert (y[weight == 0] == 0).all()
    assert (y * weight >= 0).all() or kind == "kmeans"
    assert (y - weight).norm() < 0.35 * weight.norm()
    if kind != "kmeans":  # k-means learns a new codebook from y
        torch.testing.assert_close(quantizer(y), y, rtol=1e-6, atol=0)
    assert quantizer(weight[:0]).shape == (0, 5, 3, 3)


@pytest.mark.parametrize("kind", CODEBOOKS)
def test_number_of_values(kind):
    y = CodebookQuantize(BITS[kind], kind, "tensor")(normal(50, 50))
    assert len(y.unique()) <= 2 ** BITS[kind]


@pytest.mark.parametrize("table", [nf4(), power_of_two(2), power_of_two(5), *(additive_power_of_two(b) for b in range(2, 9))])
def test_tables_are_sorted_unit_and_contain_zero(table):
    assert (table.diff() > 0).all()
    assert table.abs().max() == 1 and (table == 0).any()


def test_power_of_two_values():
    assert power_of_two(3).tolist() == [-1, -0.5, -0.25, 0, 0.25, 0.5, 1]


def test_additive_power_of_two_values():
    """Magnitudes of the authors' tables (build_power_value, 2 and 4 bits): one term, two terms."""
    assert additive_power_of_two(3).tolist() == [-1, -0.5, -0.25, 0, 0.25, 0.5, 1]
    sums = sorted({a + b for a in (0, 2**-1, 2**-3, 2**-5) for b in (0, 2**-2, 2**-4, 2**-6)})
    magnitudes = additive_power_of_two(5)[15:]
    torch.testing.assert_close(magnitudes, torch.tensor(sums) / max(sums))


def test_nf4_quantiles():
    """16 values, 7 negative below 0, 8 positive, ends at -1 and 1."""
    table = nf4()
    assert len(table) == 16 and table[0] == -1 and table[7] == 0 and table[15] == 1


def test_kmeans_is_a_local_optimum():
    rows = normal(3, 400)
    y = kmeans_rows(rows, 8)
    for row, quantized in zip(rows, y, strict=True):
        centers = quantized.unique()
        nearest = centers[(row[:, None] - centers).abs().argmin(dim=1)]
        torch.testing.assert_close(nearest, quantized)
        for center in centers:
            torch.testing.assert_close(row[quantized == center].mean(), center, rtol=1e-4, atol=1e-5)


def test_kmeans_is_exact_when_values_are_few():
    rows = torch.tensor([[0.0, 1.0, 4.0, 9.0, 1.0, 9.0], [5.0, 5.0, 5.0, 5.0, 5.0, 5.0]])
    assert torch.equal(kmeans_rows(rows, 4), rows)


def test_kmeans_beats_uniform_rounding():
    from pycompress.quantization import FakeQuantize, Scheme

    weight = normal(8, 300) ** 3
    uniform = FakeQuantize(Scheme(bits=3, granularity="channel"))(weight)
    learned = CodebookQuantize(3, "kmeans", "channel")(weight)
    assert (learned - weight).norm() < 0.8 * (uniform - weight).norm()
