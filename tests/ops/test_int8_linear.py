import math
import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.guard import guarded, linux_only
from support.kernels import all_kernels, native_kernels

from pycompress.ops import int8_linear, int8_linear_reference, native, quantize_affine, quantize_weight, symmetric_scale

SHAPES = [(1, 1, 1), (1, 65, 129), (3, 7, 5), (6, 64, 64), (13, 130, 257), (50, 33, 1000), (130, 17, 66)]
QUANTIZATION = [
    {},
    {"asymmetric": True},
    {"x_scale": 0.02},
    {"x_scale": 0.013, "x_zero_point": -31},
    {"x_scale": 0.03, "x_zero_point": 127},
]
KERNELS = all_kernels("int8_matmul")


def make(m, n, k, dtype=torch.float32):
    weight, scale = quantize_weight(torch.randn(n, k))
    return torch.randn(m, k).to(dtype), weight, scale, torch.randn(n)


def rounding_bound(expected, dtype=torch.float32):
    """The epilogue has three float32 roundings of at most eps/2 each, relative to terms no larger than |y| + |bias|."""
    size = expected.float().abs().max().item() + 8
    return 4 * torch.finfo(torch.float32).eps * size + torch.finfo(dtype).eps * size * (dtype != torch.float32)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("quantization", QUANTIZATION)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_equals_the_reference(m, n, k, quantization, kernel):
    x, weight, scale, bias = make(m, n, k)
    expected = int8_linear_reference(x, weight, scale, bias, **quantization)
    torch.testing.assert_close(
        int8_linear(x, weight, scale, bias, kernel=kernel, **quantization), expected, rtol=0, atol=rounding_bound(expected)
    )


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("quantization", QUANTIZATION)
def test_integers_are_exact(kernel, quantization):
    """With scales that are powers of two the epilogue is exact, so the integers inside show in the output."""
    weight = torch.randint(-127, 128, (33, 70), dtype=torch.int8)
    x = torch.randn(9, 70) * 2
    zero_point = quantization.get("x_zero_point")
    if "x_scale" in quantization:
        quantization = {**quantization, "x_scale": 2.0**-5}
    elif "asymmetric" in quantization:
        zero_point = -28
        x.clamp_(-100 * 2.0**-5, 155 * 2.0**-5)  # 255 steps of 2**-5, zero at step 100
        x[:, 3], x[:, 5] = -100 * 2.0**-5, 155 * 2.0**-5
    else:
        x.clamp_(-127 * 2.0**-5, 127 * 2.0**-5)
        x[:, 3] = 127 * 2.0**-5  # largest value of each row: the dynamic scale becomes 2**-5 exactly
    q = quantize_affine(x, torch.tensor(2.0**-5), zero_point or 0, -127 if zero_point is None else -128) - (zero_point or 0)
    expected = (q.long() @ weight.long().T).float() * 2.0**-7
    assert torch.equal(int8_linear(x, weight, torch.full((33,), 2.0**-2), kernel=kernel, **quantization), expected)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize(("m", "n", "k"), [(125, 150, 1100), (7, 64, 70), (26, 80, 513), (241, 17, 64)])
def test_integers_are_exact_across_blocks_and_panels(m, n, k, activation, kernel):
    """More rows than a block, more depth than an AVX2 panel widens at once, panels of every width; scales are powers of two."""
    weight = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    q = torch.randint(-127, 128, (m, k))
    q[:, -1] = 127  # the largest value of each row: its scale is 2**-5 exactly
    bias = torch.arange(n) * 2.0**-7
    expected = (q @ weight.long().T).float() * 2.0**-7 + bias
    y = int8_linear(q * 2.0**-5, weight, torch.full((n,), 2.0**-2), bias, activation=activation, kernel=kernel)
    assert torch.equal(y, expected.relu() if activation else expected)


ROWS = {
    "narrow": lambda m, k: torch.randn(m, k) * 12,
    "bell": lambda m, k: torch.randn(m, k) * 40,
    "heavy tails": lambda m, k: torch.randn(m, k) ** 5 * 2,
    "two values": lambda m, k: torch.randint(0, 2, (m, k)) * 254.0 - 127,
    "edges": lambda m, k: torch.tensor([0.0, 1, -1, 31, 32, -32, 63, 64, -64, 126, 127, -127])[torch.randint(12, (m, k))],
    "mixed": lambda m, k: torch.randn(m, k) * torch.tensor([12.0, 12, 12, 12, 40, 1e4])[torch.randint(6, (m, 1))],
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("zero_point", [None, 0, 100, -128])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 48, 260), (5, 35, 128), (23, 20, 129), (130, 17, 515)])
def test_integers_are_exact_for_rows_of_every_kind(m, n, k, rows, zero_point, kernel):
    """The AVX2 kernel stores rows as bytes whose products cannot saturate, with corrections, or as int16: by their values."""
    weight = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    weight[0], weight[1], weight[2] = 127, -127, -128  # the sums that saturate first
    low = -127 if zero_point is None else -128 - zero_point
    high = 127 if zero_point is None else 127 - zero_point
    q = ROWS[rows](m, k).round().clamp(low, high).long()
    quantization = {}
    if zero_point is None:
        q[:, -1] = 127  # the largest value of each row: its scale is 2**-5 exactly
    else:
        quantization = {"x_scale": 2.0**-5, "x_zero_point": zero_point}
    y = int8_linear(q * 2.0**-5, weight, torch.full((n,), 2.0**-2), kernel=kernel, **quantization)
    assert torch.equal(y, (q @ weight.long().T).float() * 2.0**-7)


@pytest.mark.parametrize("kernel", KERNELS)
def test_rounds_half_to_even(kernel):
    halves = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, 127.0]])
    eye = torch.eye(8, dtype=torch.int8)
    expected = torch.tensor([[0.0, 2, 2, 0, -2, -2, 126, 127]])
    assert torch.equal(int8_linear(halves, eye, torch.ones(8), kernel=kernel), expected)
    assert torch.equal(int8_linear(halves, eye, torch.ones(8), x_scale=1.0, kernel=kernel), expected)


@pytest.mark.parametrize("kernel", KERNELS)
def test_static_quantization_clamps(kernel):
    x = torch.tensor([[1e30, -1e30, 1000.0, -1000.0, 127.4, -128.6]])
    eye = torch.eye(6, dtype=torch.int8)
    y = int8_linear(x, eye, torch.ones(6), x_scale=1.0, kernel=kernel)
    assert y.tolist() == [[127, -127, 127, -127, 127, -127]]
    y = int8_linear(x, eye, torch.ones(6), x_scale=1.0, x_zero_point=-3, kernel=kernel)
    assert y.tolist() == [[130, -125, 130, -125, 127, -125]]


@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_with_nan_or_inf_come_out_as_nan_and_no_other(kernel):
    x, weight, scale, bias = make(9, 20, 37)
    clean = int8_linear(x, weight, scale, bias, kernel=kernel)
    x[1, 36], x[4, 0], x[7, 5] = math.nan, math.inf, -math.inf
    for quantization in ({}, {"x_scale": 0.02}):
        y = int8_linear(x, weight, scale, bias, kernel=kernel, **quantization)
        assert y.isnan().all(dim=1).tolist() == [r in (1, 4, 7) for r in range(9)]
        assert y.isnan().any(dim=1).sum() == 3
    y = int8_linear(x, weight, scale, bias, kernel=kernel)
    assert torch.equal(y[0], clean[0])
    relu = int8_linear(x, weight, scale, bias, activation="relu", kernel=kernel)
    assert relu[1].isnan().all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_zero_and_tiny_rows(kernel):
    x, weight, scale, bias = make(4, 5, 19)
    x[1], x[2] = 0, 1e-40
    y = int8_linear(x, weight, scale, bias, kernel=kernel)
    assert torch.equal(y[1], bias)
    assert torch.equal(y[2], bias)
    x[3] = 3e38
    assert int8_linear(x, weight, scale * 1e-6, bias, kernel=kernel)[3].isfinite().all()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "relu6", "hardswish"])
def test_activations(activation, kernel):
    x, weight, scale, bias = make(40, 70, 33)
    plain = int8_linear(x, weight, scale, bias, kernel=kernel)
    expected = getattr(F, activation)(plain)
    y = int8_linear(x, weight, scale, bias, activation=activation, kernel=kernel)
    torch.testing.assert_close(y, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_activations_far_out(activation, kernel):
    values = torch.tensor([[-1e30, -100.0, -20.0, -5.0, -1e-3, 0.0, 1e-3, 5.0, 20.0, 100.0, 1e30]])
    n = values.shape[1]
    y = int8_linear(torch.zeros(1, 4), torch.zeros(n, 4, dtype=torch.int8), torch.ones(n), values[0], activation=activation, kernel=kernel)
    torch.testing.assert_close(y, getattr(F, activation)(values), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quantization", QUANTIZATION[:4])
def test_half_precision(quantization, dtype, kernel):
    x, weight, scale, bias = make(11, 75, 130, dtype)
    y = int8_linear(x, weight, scale, bias, kernel=kernel, **quantization)
    expected = int8_linear_reference(x.float(), weight, scale, bias, **quantization)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected, rtol=0, atol=rounding_bound(expected, dtype))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_half_rows_with_nan_or_inf(activation, dtype, kernel):
    x, weight, scale, bias = make(31, 83, 50, dtype)
    clean = int8_linear(x, weight, scale, bias, activation=activation, kernel=kernel)
    x[1, 49], x[30, 0] = math.nan, math.inf
    y = int8_linear(x, weight, scale, bias, activation=activation, kernel=kernel)
    assert y[[1, 30]].isnan().all()
    assert torch.equal(y[2:30], clean[2:30])


@pytest.mark.parametrize("kernel", native_kernels("int8_matmul"))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_value_survives(dtype, kernel):
    """Identity weights and a power-of-two scale: outputs are the inputs, rounded as torch rounds them."""
    everything = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    finite = everything[everything.isfinite()].float()
    n = 64
    values = finite[: finite.numel() // n * n].view(-1, n)
    zeros, weight = torch.zeros(1, 4, dtype=dtype), torch.zeros(n, 4, dtype=torch.int8)
    for row in values[:: max(1, values.shape[0] // 97)]:
        y = int8_linear(zeros, weight, torch.ones(n), row * 1.001, kernel=kernel)
        assert torch.equal(y[0], (row * 1.001).to(dtype))


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=30, deadline=None)
@given(m=st.integers(1, 30), n=st.integers(1, 100), k=st.integers(1, 200), magnitude=st.integers(-30, 30), seed=st.integers(0, 2**31))
def test_error_against_float(kernel, m, n, k, magnitude, seed):
    """|y - float| <= sum over k of |x| * step_w / 2 + |w| * step_x / 2 + both steps / 4, at any magnitude."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator) * 2.0**magnitude
    w = torch.randn(n, k, generator=generator)
    weight, scale = quantize_weight(w)
    step = symmetric_scale(x.abs().amax(1))
    bound = (x.abs().sum(1)[:, None] * scale + step[:, None] * w.abs().sum(1) + k * step[:, None] * scale / 2) / 2
    error = (int8_linear(x, weight, scale, kernel=kernel) - x @ w.T).abs()
    assert (error <= bound * (1 + 1e-4)).all()


@linux_only
@pytest.mark.parametrize("kernel", native_kernels("int8_matmul"))
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (7, 17, 63), (13, 65, 31), (2, 129, 70)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stays_inside_its_buffers(m, n, k, dtype, kernel):
    x, weight, scale, bias = make(m, n, k, dtype)
    expected = int8_linear(x, weight, scale, bias, kernel=kernel)
    assert torch.equal(int8_linear(guarded(x), guarded(weight), guarded(scale), guarded(bias), kernel=kernel), expected)


@pytest.mark.parametrize("kernel", KERNELS)
def test_shapes_and_strides(kernel):
    x, weight, scale, bias = make(24, 10, 30)
    y = int8_linear(x, weight, scale, bias, kernel=kernel)
    assert torch.equal(int8_linear(x.view(2, 3, 4, 30), weight, scale, bias, kernel=kernel), y.view(2, 3, 4, 10))
    assert torch.equal(int8_linear(x[0], weight, scale, bias, kernel=kernel), y[0])
    assert torch.equal(int8_linear(x[::3], weight, scale, bias, kernel=kernel), y[::3])
    assert torch.equal(int8_linear(x.T.contiguous().T, weight, scale, bias, kernel=kernel), y)
    assert int8_linear(x[:0], weight, scale, bias, kernel=kernel).shape == (0, 10)
    assert int8_linear(x.new_zeros(2, 0, 30), weight, scale, bias, kernel=kernel).shape == (2, 0, 10)


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_depth_gives_the_bias(kernel):
    y = int8_linear(torch.zeros(3, 0), torch.zeros(4, 0, dtype=torch.int8), torch.ones(4), torch.arange(4.0), kernel=kernel)
    assert torch.equal(y, torch.arange(4.0).expand(3, 4))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kernel", native_kernels("int8_matmul"))
@pytest.mark.parametrize(("m", "n", "k"), [(1, 3000, 300), (5, 700, 300), (40, 256, 300), (3000, 40, 64), (70, 1000, 4096)])
def test_threads_do_not_change_a_bit(m, n, k, kernel, threads):
    x, weight, scale, bias = make(m, n, k)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        y = int8_linear(x, weight, scale, bias, kernel=kernel)
    finally:
        torch.set_num_threads(before)
    expected = int8_linear_reference(x, weight, scale, bias)
    torch.testing.assert_close(y, expected, rtol=0, atol=rounding_bound(expected))


def test_many_python_threads_get_the_same_bits():
    x, weight, scale, bias = make(33, 300, 200)
    expected = int8_linear(x, weight, scale, bias)
    wrong = []

    def call():
        for _ in range(20):
            if not torch.equal(int8_linear(x, weight, scale, bias), expected):
                wrong.append(1)

    workers = [threading.Thread(target=call) for _ in range(8)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert not wrong


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_gradient_is_straight_through(activation, kernel):
    x, weight, scale, bias = make(6, 9, 14)
    upstream = torch.randn(6, 9)
    x.requires_grad_()
    y = int8_linear(x, weight, scale, bias, activation=activation, kernel=kernel)
    y.backward(upstream)
    before = int8_linear(x.detach(), weight, scale, bias, kernel=kernel).requires_grad_()
    if activation:
        getattr(F, activation)(before).backward(upstream)
        upstream = before.grad
    torch.testing.assert_close(x.grad, upstream @ (weight.float() * scale[:, None]))


BAD = {
    "x of wrong width": (
        {"x": torch.randn(64, 512), "weight": torch.zeros(256, 768, dtype=torch.int8), "scale": torch.ones(256)},
        ValueError,
        r"weight must be \(N, 512\) to match x \(64, 512\), got \(256, 768\)",
    ),
    "x without dimensions": ({"x": torch.tensor(1.0)}, ValueError, r"weight must be \(N, \?\) to match x \(\)"),
    "integer x": (
        {"x": torch.zeros(2, 8, dtype=torch.int32)},
        TypeError,
        "x must be a float32, bfloat16 or float16 tensor, got torch.int32",
    ),
    "double x": ({"x": torch.zeros(2, 8, dtype=torch.float64)}, TypeError, "got torch.float64"),
    "float weight": ({"weight": torch.zeros(4, 8)}, TypeError, "weight must be an int8 tensor, got torch.float32"),
    "weight of one dimension": ({"weight": torch.zeros(8, dtype=torch.int8)}, ValueError, "weight must have 2 dimensions"),
    "short scale": ({"scale": torch.ones(3)}, ValueError, r"scale must be \(4,\) to match weight \(4, 8\), got \(3,\)"),
    "half scale": ({"scale": torch.ones(4).half()}, TypeError, "scale must be float32, got torch.float16"),
    "long bias": ({"bias": torch.ones(5)}, ValueError, r"bias must be \(4,\)"),
    "integer bias": ({"bias": torch.ones(4, dtype=torch.int32)}, TypeError, "bias must be floating point, got torch.int32"),
    "zero static scale": ({"x_scale": 0.0}, ValueError, "x_scale must be a finite number"),
    "NaN static scale": ({"x_scale": math.nan}, ValueError, "x_scale must be a finite number .* got nan"),
    "infinite static scale": ({"x_scale": math.inf}, ValueError, "x_scale must be a finite number"),
    "zero point without scale": ({"x_zero_point": 3}, ValueError, "x_zero_point needs a static x_scale"),
    "zero point out of range": (
        {"x_scale": 1.0, "x_zero_point": 128},
        ValueError,
        "x_zero_point must be an integer from -128 to 127, got 128",
    ),
    "asymmetric static without zero point": ({"x_scale": 1.0, "asymmetric": True}, ValueError, "needs an x_zero_point"),
    "unknown activation": (
        {"activation": "tanh"},
        ValueError,
        "must be None, 'relu', .* 'relu6' or 'hardswish', got 'tanh'",
    ),
    "unknown kernel": ({"kernel": "sse9"}, ValueError, "kernel must be one of"),
    "deep zero point": (
        {"x": torch.zeros(1, 66312), "weight": torch.zeros(4, 66312, dtype=torch.int8), "x_scale": 1.0, "x_zero_point": 1},
        ValueError,
        "K must be at most 66311",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, error, text = BAD[case]
    good = {"x": torch.zeros(2, 8), "weight": torch.zeros(4, 8, dtype=torch.int8), "scale": torch.ones(4)}
    int8_linear(**good)
    with pytest.raises(error, match="int8_linear: .*" + text):
        int8_linear(**{**good, **change})


@pytest.mark.skipif(native.module is None, reason="no extension")
def test_the_extension_refuses_what_is_no_call():
    call, options = native.module.int8_linear, (4, 8, True, False, 0.0, 0, -127, 0)
    plan = native.module.int8_linear_plan("", *options)
    with pytest.raises(TypeError, match="int8_linear: expected a plan and 8 integers, got 1 arguments"):
        call(plan)
    with pytest.raises(TypeError):
        call(plan, 1, 2, 3, 4, 5, 6, 7, "8")
    for wrong in (object(), native.module.int4_linear_plan("", 4, 8, 32, False, False, 0)):
        with pytest.raises(ValueError, match="PyCapsule"):
            call(wrong, *range(8))
    with pytest.raises(ValueError, match="no kernel 'sse9'"):
        native.module.int8_linear_plan("sse9", *options)


@pytest.mark.parametrize("quantization", QUANTIZATION[:4])
def test_torch_sees_one_op(quantization):
    x, weight, scale, bias = make(5, 12, 20)
    expected = int8_linear(x, weight, scale, bias, **quantization)

    def call(x):
        return int8_linear(x, weight, scale, bias, **quantization)

    assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(x), expected)
    from pycompress.ops.int8_matmul import pack_weight

    for kernel in {native.kernels("int8_matmul")[0], native.REFERENCE}:
        packed = pack_weight(weight, kernel)
        arguments = (
            packed,
            scale,
            bias,
            12,
            20,
            quantization.get("x_scale"),
            quantization.get("x_zero_point"),
            quantization.get("asymmetric", False),
            "none",
            kernel,
        )
        torch.library.opcheck(torch.ops.pycompress.int8_linear.default, (x, *arguments))
        torch.library.opcheck(torch.ops.pycompress.int8_linear.default, (torch.randn(20, 5).T, *arguments))
        torch.library.opcheck(torch.ops.pycompress.int8_pack.default, (weight, kernel))


def test_compiled_training_step_has_the_same_gradient():
    x, weight, scale, bias = make(5, 12, 20)
    step = torch.compile(lambda x: int8_linear(x, weight, scale, bias), fullgraph=True, backend="aot_eager")
    eager, compiled = x.clone().requires_grad_(), x.clone().requires_grad_()
    int8_linear(eager, weight, scale, bias).sum().backward()
    step(compiled).sum().backward()
    torch.testing.assert_close(compiled.grad, eager.grad)
