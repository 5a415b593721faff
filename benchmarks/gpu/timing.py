"""Times functions on a GPU with events and appends rows to ``benchmarks/results/gpu_<op>.csv``.

Each rival is captured into a CUDA graph if that works (the loop then costs no host time), else launched from Python. Between
repetitions a buffer larger than the L2 cache is overwritten, so that inputs come from memory. The row holds the median of
``repeats`` times, the quartiles, and how close it comes to the time that the bytes alone would take at the bandwidth of a copy
measured in the same process.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parents[1] / "results"
FIELDS = ["case", "rival", "ms", "q1", "q3", "floor_fraction", "peak_mb", "error", "mode", "gpu", "torch", "date"]


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


def row(op: str, case: str, rival: str, step: Callable[[], Any], floor_ms: float, error: float, write: bool) -> None:
    """Measure, print and, with ``write``, append."""
    memory = peak_megabytes(step)
    times, mode = event_times(step)
    q1, middle, q3 = statistics.quantiles(times, n=4)
    values = [
        case, rival, f"{middle:.4f}", f"{q1:.4f}", f"{q3:.4f}", f"{floor_ms / middle:.3f}", f"{memory:.1f}", f"{error:.2e}", mode,
        torch.cuda.get_device_name(), torch.__version__, datetime.now(timezone.utc).date().isoformat(),
    ]  # fmt: skip
    print(f"{case:>14} {rival:<16} {middle:9.3f} ms  {floor_ms / middle:6.2f} of the floor  {memory:9.1f} MB  error {error:.1e}  ({mode})")
    if write:
        path = RESULTS / f"gpu_{op}.csv"
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(FIELDS)
            writer.writerow(values)
