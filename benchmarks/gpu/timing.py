"""Times functions on a GPU with events and adds rows to ``benchmarks/results/gpu_<op>.csv``.

Each rival is captured into a CUDA graph if that works (the loop then costs no host time), else launched from Python. Between
repetitions a buffer larger than the L2 cache is overwritten, so that inputs come from memory.

Rows are those of ``harness.py``, with the GPU's name for the processor, and two columns more: ``floor_fraction``, how close the median
comes to the time that the roofline allows (bytes at the bandwidth of a copy, products at the speed of a large one, both measured in the
same process), and ``mode``, graph or eager. The first rival of a case is the one that speedups are relative to; their quartiles are the
rival's own.
"""

from __future__ import annotations

import functools
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import harness

RESULTS = harness.HERE / "results"
FIELDS = [*harness.FIELDS, "floor_fraction", "mode"]
RIVALS = ("torchao", "liger-kernel", "triton")
"""Distributions whose versions a row names, if they are installed."""


def event_times(step: Callable[[], Any], repeats: int = 30) -> tuple[list[float], str]:
    """Milliseconds per call, cold L2, and whether they are of a graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
        stream.synchronize()
        graph: torch.cuda.CUDAGraph | None = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=stream):
                step()
        except RuntimeError:  # it waits for the device, or allocates in ways that a graph cannot hold
            graph = None
            torch.cuda.synchronize()
        run = step if graph is None else graph.replay
        flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
        times = []
        for _ in range(repeats):
            flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
    return times, "eager" if graph is None else "graph"


def copy_bandwidth() -> float:
    """Bytes per millisecond, read and written, of copying 1 GiB."""
    source = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    times, _ = event_times(lambda: target.copy_(source), 10)
    return 2 * source.numel() / statistics.median(times)


def peak_megabytes(step: Callable[[], Any]) -> float:
    """What one call allocates beyond what was there, at most."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


@functools.cache
def machine() -> dict[str, str]:
    """The columns that say what was measured on what."""
    major, minor = torch.cuda.get_device_capability()
    versions = [f"torch {torch.__version__}", f"CUDA {torch.version.cuda}"]
    for name in RIVALS:
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return {
        "cpu": torch.cuda.get_device_name(), "isa": f"sm_{major}{minor}", "versions": ", ".join(versions), "commit": harness.commit(),
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


_baseline: dict[tuple[str, str], float] = {}
"""Op and case -> median milliseconds of its first rival."""


def row(op: str, case: str, rival: str, step: Callable[[], Any], floor_ms: float, error: float, write: bool) -> dict[str, Any]:
    """Measure, print and, with ``write``, add to the results. ``error`` NaN: not compared."""
    memory = peak_megabytes(step)
    times, mode = event_times(step)
    q1, middle, q3 = statistics.quantiles(times, n=4)
    baseline = _baseline.setdefault((op, case), middle)
    first = baseline == middle
    values = {
        "case": case, "rival": rival.strip(), "threads": 1, "ms": f"{middle:.4g}", "speedup": f"{baseline / middle:.3f}",
        "speedup_q1": f"{1.0 if first else baseline / q3:.3f}", "speedup_q3": f"{1.0 if first else baseline / q1:.3f}",
        "error": "" if error != error else f"{error:.5f}", "mac_per_cycle": "", "ghz": "", **machine(), "peak_mb": f"{memory:.4g}",
        "floor_fraction": f"{floor_ms / middle:.3f}", "mode": mode,
    }  # fmt: skip
    print(
        f"{case:>18} {rival:<26} {middle:9.3f} ms  {baseline / middle:6.2f}x  {floor_ms / middle:5.2f} of the roofline  "
        f"{memory:9.1f} MB  error {error:.1e}  ({mode})",
        flush=True,
    )
    if write:  # at once, so that an interrupted run keeps what it has measured
        harness.write(RESULTS / f"gpu_{op}.csv", [values], FIELDS)
    return values


def try_rival(name: str, build: Callable[[], Callable[[], Any]]) -> Callable[[], Any] | None:
    """A rival's function, or None with its reason printed: not installed, or not for this GPU, shape or version."""
    try:
        step = build()
        step()
        torch.cuda.synchronize()
    except (ImportError, AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        print(f"{name}: not run: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
        return None
    return step
