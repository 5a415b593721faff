"""``int8_linear`` on several threads and in several Python threads."""

import threading

import pytest
import torch
from support.int8_linear import make
from support.kernels import native_kernels
from support.rounding import rounding_bound

from pycompress.ops import int8_linear, int8_linear_reference


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
