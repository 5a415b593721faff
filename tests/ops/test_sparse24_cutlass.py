import pytest
import torch

from pycompress.ops import sparse24_compress, sparse24_from_cutlass, sparse24_mask, sparse24_to_cutlass, sparse24_to_dense

torch_layout = pytest.importorskip("torch.sparse._semi_structured_conversions")
CASES = [(torch.float16, 32, 64), (torch.bfloat16, 64, 32), (torch.int8, 16, 64), (torch.int8, 48, 192), (torch.float16, 96, 160)]


def make(dtype, n, k):
    dense = torch.randint(-9, 10, (n, k)).to(dtype)
    return dense, sparse24_mask(torch.rand(n, k))


@pytest.mark.parametrize(("dtype", "n", "k"), CASES)
def test_torch_reads_what_we_write(dtype, n, k):
    dense, mask = make(dtype, n, k)
    packed, meta = sparse24_to_cutlass(*sparse24_compress(dense, mask))
    assert torch.equal(torch_layout.sparse_semi_structured_to_dense_cutlass(packed, meta), torch.where(mask, dense, 0).to(dtype))


@pytest.mark.parametrize(("dtype", "n", "k"), CASES)
def test_we_read_what_torch_writes(dtype, n, k):
    dense, mask = make(dtype, n, k)
    masked = torch.where(mask, dense, 0).to(dtype)
    values, indices = sparse24_from_cutlass(*torch_layout.sparse_semi_structured_from_dense_cutlass(masked))
    assert torch.equal(sparse24_to_dense(values, indices, k), masked)


@pytest.mark.parametrize(
    ("values", "n", "k", "error", "text"),
    [
        (torch.float32, 32, 64, TypeError, "values must be float16, bfloat16 or int8, got torch.float32"),
        (torch.float16, 16, 64, ValueError, "N must be a multiple of 32 and K of 32 for torch.float16, got N=16 and K=64"),
        (torch.int8, 16, 32, ValueError, "N must be a multiple of 16 and K of 64 for torch.int8, got N=16 and K=32"),
    ],
)
def test_bad_input(values, n, k, error, text):
    with pytest.raises(error, match="sparse24_to_cutlass: " + text):
        sparse24_to_cutlass(*sparse24_compress(torch.zeros(n, k, dtype=values)))


def test_corrupted_metadata_is_refused():
    packed, meta = sparse24_to_cutlass(*sparse24_compress(torch.zeros(32, 64, dtype=torch.float16)))
    with pytest.raises(ValueError, match="sparse24_from_cutlass: indices must rise strictly"):
        sparse24_from_cutlass(packed, torch.zeros_like(meta))
