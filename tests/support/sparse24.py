"""Random 2:4 weights for the tests of ops and layers."""

import torch
from torch import Tensor

from pycompress.ops import sparse24_compress, sparse24_mask

# One below, at and above every border: tile heights 1..16, panels of 8 and 16 outputs, blocks of 32 and 64 k, windows of 64 k, column tiles
# of 16, 32 and 64 rows, blocks of 1024 k; plus primes and K that are no multiple of 4.
SHAPES = [
    *((m, 17, 69) for m in (1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 31, 33)),
    *((3, n, 36) for n in (1, 7, 8, 9, 15, 16, 31, 65)),
    *((5, 9, k) for k in range(1, 21)),
    *((33, 19, k) for k in (31, 32, 33, 63, 64, 65, 95, 97)),
    (47, 33, 40),
    (48, 16, 96),
    (49, 5, 100),
    (64, 130, 68),
    (65, 129, 127),
    (111, 140, 36),
    (130, 24, 260),
    (40, 20, 1100),
    (9, 40, 2080),
    (80, 18, 100),
    (96, 24, 132),
    (128, 150, 68),
    (145, 33, 100),
]
EMPTY = [(0, 3, 4), (3, 0, 4), (3, 4, 0), (70, 4, 0), (0, 0, 0)]


def sparse_int8(n: int, k: int, pattern: str = "2:4") -> tuple[Tensor, Tensor, Tensor]:
    """A dense int8 weight of any value, -128 included, that has the pattern, and its compressed form."""
    mask = sparse24_mask(torch.rand(n, k), pattern)
    dense = torch.where(mask, torch.randint(-128, 128, (n, k), dtype=torch.int8), 0).to(torch.int8)
    return dense, *sparse24_compress(dense, mask, pattern=pattern)


def sparse_float(n: int, k: int, pattern: str = "2:4") -> tuple[Tensor, Tensor, Tensor]:
    """A dense float weight that has the pattern, and its compressed form."""
    mask = sparse24_mask(torch.rand(n, k), pattern)
    dense = torch.where(mask, torch.randn(n, k), 0)
    return dense, *sparse24_compress(dense, mask, pattern=pattern)
