import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.guard import guarded, linux_only
from support.kernels import all_kernels, native_kernels

from pycompress.ops import int8_matmul, native
from pycompress.ops.int8_matmul import pack_weight, unpack_weight

# Around every tile border (scalar 4 x 8, AVX2 6 x 16, VNNI 6 x 64) and depth group (2, 4), plus primes and 1.
SHAPES = [
    (1, 1, 1),
    (1, 64, 4),
    (2, 3, 5),
    (5, 15, 3),
    (6, 16, 2),
    (7, 17, 63),
    (12, 64, 64),
    (13, 65, 31),
    (4, 130, 257),
    (61, 47, 129),
    (100, 200, 7),
]


def random_int8(*shape, generator=None):
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)


@pytest.mark.parametrize("kernel", all_kernels("int8_matmul"))
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_equals_the_integer_product(m, n, k, kernel):
    a, b = random_int8(m, k), random_int8(n, k)
    expected = (a.long() @ b.long().T).int()
    assert expected.abs().max() > 0
    assert torch.equal(int8_matmul(a, b, kernel=kernel), expected)


@pytest.mark.parametrize("kernel", all_kernels("int8_matmul"))
@pytest.mark.parametrize("k", [2, 512, 131071])
@pytest.mark.parametrize(("left", "right"), [(-128, -128), (127, 127), (-128, 127), (127, -128)])
def test_extremes_neither_saturate_nor_overflow(left, right, k, kernel):
    a, b = torch.full((7, k), left, dtype=torch.int8), torch.full((17, k), right, dtype=torch.int8)
    assert torch.equal(int8_matmul(a, b, kernel=kernel), torch.full((7, 17), left * right * k, dtype=torch.int32))


@pytest.mark.parametrize("kernel", all_kernels("int8_matmul"))
@pytest.mark.parametrize(("m", "n", "k"), [(0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0)])
def test_empty_dimensions(m, n, k, kernel):
    out = int8_matmul(random_int8(m, k), random_int8(n, k), kernel=kernel)
    assert out.shape == (m, n)
    assert out.dtype == torch.int32
    assert not out.any()


@pytest.mark.parametrize("kernel", all_kernels("int8_matmul"))
def test_strided_operands(kernel):
    a, b = random_int8(40, 60), random_int8(50, 60)
    expected = (a[3:20:2, 5:36].long() @ b[1:30:3, 5:36].long().T).int()
    assert torch.equal(int8_matmul(a[3:20:2, 5:36], b[1:30:3, 5:36], kernel=kernel), expected)
    assert torch.equal(int8_matmul(a.T, b[:, :40], kernel=kernel), (a.T.long() @ b[:, :40].long().T).int())


@pytest.mark.parametrize("kernel", all_kernels("int8_matmul"))
@settings(max_examples=40, deadline=None)
@given(m=st.integers(1, 40), n=st.integers(1, 140), k=st.integers(1, 300), seed=st.integers(0, 2**31))
def test_any_shape(kernel, m, n, k, seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = random_int8(m, k, generator=generator), random_int8(n, k, generator=generator)
    assert torch.equal(int8_matmul(a, b, kernel=kernel), (a.long() @ b.long().T).int())


@linux_only
@pytest.mark.parametrize("kernel", native_kernels("int8_matmul"))
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (7, 17, 63), (13, 65, 31), (3, 100, 130)])
def test_stays_inside_its_buffers(m, n, k, kernel):
    a, b = random_int8(m, k), random_int8(n, k)
    assert torch.equal(int8_matmul(guarded(a), guarded(b), kernel=kernel), (a.long() @ b.long().T).int())


@pytest.mark.parametrize("kernel", all_kernels("int8_matmul"))
@pytest.mark.parametrize(("n", "k"), [(1, 1), (17, 63), (65, 31), (128, 256)])
def test_packing_loses_nothing(n, k, kernel):
    weight = random_int8(n, k)
    assert torch.equal(unpack_weight(pack_weight(weight, kernel), n, k, kernel), weight)


@pytest.mark.parametrize(
    ("a", "b", "error", "text"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int8), TypeError, "a must be an int8 tensor, got torch.float32"),
        (torch.zeros(2, 3, dtype=torch.int8), [1], TypeError, "b must be an int8 tensor, got list"),
        (torch.zeros(3, dtype=torch.int8), torch.zeros(2, 3, dtype=torch.int8), ValueError, r"a must have 2 dimensions, got shape \(3,\)"),
        (
            torch.zeros(2, 3, dtype=torch.int8),
            torch.zeros(5, 4, dtype=torch.int8),
            ValueError,
            r"b must be \(N, 3\) to match a \(2, 3\), got \(5, 4\)",
        ),
        (torch.zeros(1, 131072, dtype=torch.int8), torch.zeros(1, 131072, dtype=torch.int8), ValueError, "K must be at most 131071"),
    ],
)
def test_bad_input(a, b, error, text):
    with pytest.raises(error, match="int8_matmul: " + text):
        int8_matmul(a, b)


def test_unknown_kernel_names_the_known_ones():
    a = torch.zeros(2, 3, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"kernel must be one of .*reference on this machine, got 'warp9'"):
        int8_matmul(a, a, kernel="warp9")


def test_torch_sees_one_op():
    a, b = random_int8(5, 9), random_int8(4, 9)
    compiled = torch.compile(int8_matmul, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(a, b), int8_matmul(a, b))
    op = torch.ops.pycompress.int8_matmul.default
    torch.library.opcheck(op, (a, b, native.kernels("int8_matmul")[0]))
    torch.library.opcheck(op, (random_int8(9, 5).T, b, native.REFERENCE))
