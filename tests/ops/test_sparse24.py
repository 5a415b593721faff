import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pycompress.ops import sparse24_check, sparse24_compress, sparse24_mask, sparse24_to_dense
from pycompress.ops.sparse24 import pack_indices, parse_nm, unpack_indices

PATTERNS = ["2:4", "1:4", "2:8", "1:2", "4:8", "3:5", "1:16"]


def bits(t):
    """Values with -0.0 and NaN made comparable."""
    return t if t.dtype == torch.int8 else t.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


@settings(max_examples=150, deadline=None)
@given(
    pattern=st.sampled_from(PATTERNS),
    n=st.integers(0, 9),
    k=st.integers(0, 40),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int8]),
)
def test_to_dense_gives_the_masked_weight(pattern, n, k, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-128, 128, (n, k), generator=generator).to(dtype)
    mask = sparse24_mask(torch.rand(n, k, generator=generator), pattern)
    mask &= torch.rand(n, k, generator=generator) < 0.9  # fewer than allowed is fine
    values, indices = sparse24_compress(weight, mask, pattern=pattern)
    p = parse_nm("test", pattern)
    assert values.shape == (n, math.ceil(k / p.m) * p.n)
    assert indices.shape == (n, math.ceil(values.shape[1] * p.bits / 8))
    assert values.dtype == dtype
    sparse24_check("test", values, indices, k, pattern=pattern)
    masked = torch.where(mask, weight, torch.zeros((), dtype=dtype))
    assert torch.equal(sparse24_to_dense(values, indices, k, pattern=pattern), masked)
    again, same = sparse24_compress(masked, pattern=pattern)  # without a mask: read off the zeros
    assert torch.equal(sparse24_to_dense(again, same, k, pattern=pattern), masked)


def test_the_format_is_nvidias():
    values, indices = sparse24_compress(torch.tensor([[0.0, 5.0, 0.0, 7.0, 1.0, 2.0, 0.0, 0.0, 0.0, 0.0, 3.0, 4.0, 0.0, 6.0, 8.0, 0.0]]))
    assert values.tolist() == [[5, 7, 1, 2, 3, 4, 6, 8]]
    # positions (1, 3) (0, 1) | (2, 3) (1, 2), two bits each, the first in the lowest bits
    assert indices.tolist() == [[1 | 3 << 2 | 0 << 4 | 1 << 6, 2 | 3 << 2 | 1 << 4 | 2 << 6]]


def test_half_the_values_and_an_eighth_of_a_byte_per_weight():
    values, indices = sparse24_compress(torch.zeros(64, 1024))
    assert values.numel() * 4 + indices.numel() <= 0.57 * 64 * 1024 * 4
    values, indices = sparse24_compress(torch.zeros(64, 1024, dtype=torch.int8))
    assert values.numel() + indices.numel() <= 0.63 * 64 * 1024


def test_negative_zero_and_nan_survive():
    nan = float("nan")
    weight = torch.tensor([[0.0, -0.0, 0.0, 3.0], [nan, 0.0, -0.0, 0.0], [0.0, nan, 0.0, -nan], [-0.0, 0.0, 0.0, -0.0]])
    values, indices = sparse24_compress(weight)
    assert torch.equal(bits(sparse24_to_dense(values, indices, 4)), bits(weight))
    mask = torch.tensor([[True, True, False, False]]).expand(4, 4)
    kept = torch.where(mask, weight, 0.0)
    assert torch.equal(bits(sparse24_to_dense(*sparse24_compress(weight, mask), 4)), bits(kept))


def test_a_masked_nan_is_gone():
    values, indices = sparse24_compress(torch.tensor([[float("nan"), 1.0, 2.0, 3.0]]), torch.tensor([[False, True, True, False]]))
    assert sparse24_to_dense(values, indices, 4).tolist() == [[0, 1, 2, 0]]


def test_rows_of_zeros_and_empty_groups():
    values, indices = sparse24_compress(torch.zeros(3, 7))
    assert not values.any()
    sparse24_check("test", values, indices, 7)
    assert not sparse24_to_dense(values, indices, 7).any()


@pytest.mark.parametrize(
    ("scores", "pattern", "expected"),
    [
        ([1.0, 4.0, 2.0, 3.0], "2:4", [0, 1, 0, 1]),
        ([1.0, 1.0, 1.0, 1.0], "2:4", [1, 1, 0, 0]),
        ([1.0, float("nan"), 2.0, 3.0], "1:4", [0, 1, 0, 0]),
        ([-5.0, -3.0, -4.0, -6.0, -1.0], "2:4", [0, 1, 1, 0, 1]),
    ],
)
def test_mask_keeps_the_highest(scores, pattern, expected):
    assert sparse24_mask(torch.tensor([scores]), pattern).int().tolist() == [expected]


@given(bits=st.integers(1, 8), count=st.integers(0, 50), seed=st.integers(0, 2**31))
@settings(deadline=None)
def test_index_packing_loses_nothing(bits, count, seed):
    positions = torch.randint(0, 2**bits, (3, count), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(unpack_indices(pack_indices(positions, bits), count, bits), positions)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((torch.ones(2, 4),), ValueError, r"weight must keep at most 2 of every 4 along K, got 4 in row 0, columns 0 to 3"),
        (
            (torch.ones(2, 7), torch.tensor([[1, 1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 1, 1, 1]]).bool()),
            ValueError,
            "mask must keep.*got 3 in row 1, columns 4 to 6",
        ),
        ((torch.ones(2, 4), torch.ones(2, 4)), TypeError, "mask must be a bool tensor, got torch.float32"),
        ((torch.ones(2, 4), torch.ones(4, 2).bool()), ValueError, r"mask must be \(2, 4\) on cpu like weight, got \(4, 2\) on cpu"),
        ((torch.ones(2, 4, dtype=torch.int32),), TypeError, "weight must be a floating or int8 tensor, got torch.int32"),
        ((torch.ones(4),), ValueError, r"weight must have 2 dimensions, got shape \(4,\)"),
        (([1.0],), TypeError, "weight must be a floating or int8 tensor, got list"),
    ],
)
def test_bad_weight_or_mask(arguments, error, text):
    with pytest.raises(error, match="sparse24_compress: " + text):
        sparse24_compress(*arguments)


@pytest.mark.parametrize("pattern", ["2:2", "4:2", "0:4", "2-4", "2:4:8", "", None, 24, "1:300"])
def test_bad_pattern(pattern):
    with pytest.raises(ValueError, match="pattern must be 'N:M' with 0 < N < M <= 256, such as '2:4', got"):
        sparse24_compress(torch.zeros(2, 4), pattern=pattern)


def test_every_byte_is_valid_or_refused():
    """All 256 patterns of two groups: accepted exactly if the positions rise."""
    values = torch.ones(1, 4)
    for byte in range(256):
        indices = torch.tensor([[byte]], dtype=torch.uint8)
        a, b, c, d = (byte >> s & 3 for s in (0, 2, 4, 6))
        if a < b and c < d:
            dense = sparse24_to_dense(values, indices, 8)
            assert dense.nonzero()[:, 1].tolist() == [a, b, 4 + c, 4 + d]
        else:
            with pytest.raises(ValueError, match=r"test: indices must rise strictly inside 0\.\.3 in every group, got \["):
                sparse24_check("test", values, indices, 8)


@pytest.mark.parametrize(
    ("values", "indices", "k", "pattern", "error", "text"),
    [
        (
            torch.ones(1, 2),
            torch.tensor([[0x44]], dtype=torch.uint8),
            4,
            "2:4",
            ValueError,
            "indices must have zero bits behind the last index",
        ),
        (torch.ones(1, 2), torch.tensor([[4]], dtype=torch.uint8), 1, "2:4", ValueError, "values must be 0 behind K=1, got others"),
        (torch.ones(1, 2), torch.tensor([[7]], dtype=torch.uint8), 5, "2:5", ValueError, "indices must rise strictly"),
        (
            torch.ones(1, 3),
            torch.tensor([[4]], dtype=torch.uint8),
            4,
            "2:4",
            ValueError,
            r"with K=4 must be \(1, 2\) and \(1, 1\), got \(1, 3\)",
        ),
        (torch.ones(1, 2), torch.tensor([[4]], dtype=torch.int8), 4, "2:4", TypeError, "indices must be a uint8 tensor, got torch.int8"),
        (
            torch.ones(1, 2),
            torch.tensor([[4]], dtype=torch.uint8, device="meta"),
            4,
            "2:4",
            ValueError,
            "indices must be on cpu like values, got meta",
        ),
    ],
)
def test_corrupted_weights_are_refused(values, indices, k, pattern, error, text):
    with pytest.raises(error, match=text):
        sparse24_check("test", values, indices, k, pattern=pattern)
    with pytest.raises(error, match=text):
        sparse24_to_dense(values, indices, k, pattern=pattern)
