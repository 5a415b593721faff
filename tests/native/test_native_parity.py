"""Every kernel of this machine against the scalar one, under AddressSanitizer and UndefinedBehaviorSanitizer."""

import sys
from pathlib import Path

import pytest
from support.parity_program import build, run, tool


@pytest.mark.skipif(sys.platform != "linux", reason="the sanitizers are set up for GCC and Clang on Linux")
def test_kernels_agree_and_stay_inside_their_buffers(tmp_path):
    tool("c++", "g++", "clang++")
    program = build(tmp_path, "-DPYCOMPRESS_SANITIZE=ON", "-DCMAKE_CXX_FLAGS_RELEASE=-O1")
    output = run(program, UBSAN_OPTIONS="print_stacktrace=1", ASAN_OPTIONS="detect_stack_use_after_return=1")
    for suite in Path(__file__).parent.glob("parity_*.cpp"):
        assert f"{suite.stem.removeprefix('parity_')}, 1 threads" in output
    assert output.rstrip().endswith("\n0 failures")


@pytest.mark.skipif(sys.platform != "linux", reason="the sanitizers are set up for GCC and Clang on Linux")
def test_the_program_can_fail(tmp_path):
    """A sanitizer that is silently off would pass everything."""
    source = tmp_path / "overrun.cpp"
    source.write_text("int main(int n, char**) { int* p = new int[n]; p[n] = 1; return p[0] * 0; }\n")
    compiler = tool("c++", "g++", "clang++")
    program = tmp_path / "overrun"
    run(compiler, "-fsanitize=address,undefined", "-fno-sanitize-recover=all", source, "-o", program)
    with pytest.raises(AssertionError, match="heap-buffer-overflow"):
        run(program)
