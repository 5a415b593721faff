"""``int8_conv2d`` on several threads, in several Python threads and after a fork."""

import os
import threading

import pytest
import torch
from support.int8_conv2d import DEPTHWISE, LAYOUTS, NATIVE, PLAIN, PLANES, WINOGRAD, make, name

from pycompress.ops import int8_conv2d


@pytest.mark.parametrize("kernel", NATIVE)
@pytest.mark.parametrize(
    "case",
    [
        (2, 64, 30, 31, 96, *WINOGRAD[0][5:]),
        (2, 48, 29, 30, 70, *PLAIN[5][5:]),
        (2, 96, 30, 30, 96, *DEPTHWISE[0][5:9], 96),
        (2, 64, 29, 31, 70, *PLAIN[6][5:]),
        (1, 512, 5, 9, 200, *PLAIN[6][5:]),
        (3, 140, 20, 31, 131, *PLAIN[6][5:]),
        (2, 3, 90, 91, 24, *PLAIN[3][5:]),
        (2, 64, 30, 31, 64, *PLANES[2][5:9], 16),
    ],
    ids=name,
)
def test_threads_do_not_change_the_result(case, kernel):
    x, weight, scale, options = make(case)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results += [int8_conv2d(x.to(memory_format=layout), weight, scale * 1.1, kernel=kernel, **options) for layout in LAYOUTS]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("kernel", NATIVE)
def test_eight_python_threads_at_once(kernel):
    cases = [
        make((2, 32, 20, 21, 40, *WINOGRAD[0][5:])),
        make((2, 24, 20, 21, 40, *PLAIN[5][5:])),
        make((2, 40, 20, 21, 40, *DEPTHWISE[0][5:9], 40)),
    ]
    expected = [int8_conv2d(x, weight, scale, kernel=kernel, **options) for x, weight, scale, options in cases]
    wrong = []

    def work(seed):
        for i in range(12):
            x, weight, scale, options = cases[(seed + i) % 3]
            if not torch.equal(int8_conv2d(x, weight, scale, kernel=kernel, **options), expected[(seed + i) % 3]):
                wrong.append((seed, i))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kernel", NATIVE)
def test_after_fork(kernel):
    x, weight, scale, options = make((2, 64, 30, 30, 64, *WINOGRAD[0][5:]))
    expected = int8_conv2d(x, weight, scale, kernel=kernel, **options)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(int8_conv2d(x, weight, scale, kernel=kernel, **options), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0
