"""Times rivals in interleaved rounds, each in a process of its own, and adds rows to ``benchmarks/results/<op>.csv``.

A benchmark script gives a table of cases, a table of rivals and the float result they are compared with:

    def main():
        harness.run("int8_conv2d", cases=CASES, rivals=RIVALS, expected=expected, work=macs, baseline="torch fp32")

- one rival per process, idle (blocked on a pipe) while another one runs, so that spinning workers rob nobody
- rounds A B C A B C ...; a row holds the median of the per-round ratios to the baseline, and their quartiles
- every rival's result is compared with the float result before it is timed
- MAC/c uses the clock measured in that round's process by a chain of dependent rotations, if a C compiler is at hand
- ``--avx2-only`` shows every rival a CPU without AVX-512, AVX-VNNI and AMX (``avx2_only.c``), whatever it asks the CPU with
- peak MB (``memory=True``): what one more call needs beyond the inputs, results included, as the operating system sees it, measured in one
  more process per rival and case (Linux only)
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import functools
import gc
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

FIELDS = [
    "case", "rival", "threads", "ms", "speedup", "speedup_q1", "speedup_q3", "error", "mac_per_cycle", "ghz", "cpu", "isa", "versions",
    "commit", "date", "peak_mb",
]  # fmt: skip


@dataclass(frozen=True)
class Rival:
    """``build(case)`` returns the function to time; what it returns is compared with ``expected(case)``."""

    build: Callable[[dict[str, Any]], Callable[[], Any]]
    env: Mapping[str, str] = field(default_factory=dict)
    compare: bool = True
    """False if the function's result is not the float output (an int8 chain, say)."""


def run(
    op: str,
    *,
    cases: Sequence[dict[str, Any]],
    rivals: Mapping[str, Rival],
    expected: Callable[[dict[str, Any]], Any],
    work: Callable[[dict[str, Any]], float],
    baseline: str,
    memory: bool = False,
) -> None:
    """Command line of a benchmark script. Each case has a unique ``"name"``; ``work`` counts its multiply-accumulates."""
    parser = argparse.ArgumentParser(description=f"Benchmark of {op}")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.05, help="time per rival and round")
    parser.add_argument("--rivals", default="", help="comma-separated parts of rival names; the baseline always runs")
    parser.add_argument("--cases", default="", help="comma-separated parts of case names")
    parser.add_argument("--write", action="store_true", help="add the rows to benchmarks/results")
    parser.add_argument(
        "--avx2-only", action="store_true", help="hide AVX-512 and VNNI from every rival (Linux, a CPU with CPUID faulting)"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        _serve(rivals[args.worker], cases, expected, args.threads)
        return
    hidden = contextlib.ExitStack()
    if args.avx2_only:
        os.environ["LD_PRELOAD"] = str(hidden.enter_context(_avx2_only()))  # for the workers; this process goes on as it is
    wanted = {name for name in rivals if name == baseline or _matches(name, args.rivals)}
    workers = {name: _Worker(name, rivals[name].env, args.threads) for name in rivals if name in wanted}
    rows = []
    try:
        for index, case in enumerate(cases):
            if _matches(case["name"], args.cases):
                peaks = {name: _peak(name, rivals[name].env, args.threads, index) for name in workers} if memory else {}
                new = _case(case, index, workers, baseline, work(case), peaks, args)
                rows += new
                if args.write:  # at once, so that an interrupted run keeps what it has measured
                    write(HERE / "results" / f"{op}.csv", new)
    finally:
        for worker in workers.values():
            worker.close()
        hidden.close()
    if args.write:
        print(f"\n{len(rows)} rows in results/{op}.csv")


def _matches(name: str, parts: str) -> bool:
    return not parts or any(part in name for part in parts.split(","))


def _peak(name: str, env: Mapping[str, str], threads: int, index: int) -> float | None:
    """Megabytes that one call needs at its peak. Every block from 64 KiB on comes from, and goes back to, the operating system."""
    worker = _Worker(name, {**env, "MALLOC_MMAP_THRESHOLD_": "65536"}, threads)
    try:
        return worker.ask({"peak": index}).get("peak")
    finally:
        worker.close()


def _case(case, index, workers, baseline, macs, peaks, args) -> list[dict[str, Any]]:
    print(f"\n{case['name']}  ({macs / 1e6:.0f} M MAC, {args.threads} thread{'s' if args.threads > 1 else ''})")
    errors, live = {}, {}
    for name, worker in workers.items():
        answer = worker.ask({"case": index})
        if "failed" in answer:
            print(f"  {name:34s} not run: {answer['failed']}")
        else:
            errors[name], live[name] = answer["error"], worker
    times: dict[str, list[float]] = {name: [] for name in live}
    clocks = []
    for _ in range(args.rounds):
        for name, worker in list(live.items()):
            answer = worker.ask({"seconds": args.seconds})
            if "failed" in answer:
                print(f"  {name:34s} given up: {answer['failed']}")
                del live[name], times[name]
                continue
            times[name].append(answer["time"])
            clocks.append(answer["ghz"])
    if baseline not in live:
        raise SystemExit(f"{case['name']}: the baseline {baseline} did not run")
    clock = statistics.median(clocks) if all(clocks) else None
    rows = []
    for name, values in times.items():
        ratios = [b / t for b, t in zip(times[baseline], values, strict=True)]
        q1, middle, q3 = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        seconds = statistics.median(values)
        rate = macs / seconds / clock / 1e9 if clock else None
        rows.append(
            {"case": case["name"], "rival": name, "threads": args.threads, "ms": f"{seconds * 1e3:.4g}", "speedup": f"{middle:.3f}",
             "speedup_q1": f"{q1:.3f}", "speedup_q3": f"{q3:.3f}", "error": "" if errors[name] is None else f"{errors[name]:.5f}",
             "mac_per_cycle": f"{rate:.1f}" if rate else "", "ghz": f"{clock:.2f}" if clock else "", **_machine(args.avx2_only),
             "peak_mb": "" if peaks.get(name) is None else f"{peaks[name]:.4g}"}
        )  # fmt: skip
        shown = "" if errors[name] is None else f"error {errors[name]:.4f}"
        shown += "" if peaks.get(name) is None else f"  peak {peaks[name]:.1f} MB"
        print(f"  {name:34s} {seconds * 1e3:9.3f} ms  {middle:6.2f}x [{q1:.2f} {q3:.2f}]  {rate or 0:6.1f} MAC/c  {shown}", flush=True)
    return rows


@functools.cache
def _machine(avx2_only: bool = False) -> dict[str, str]:
    import torch

    from pycompress.ops import native

    cpu = platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
        cpu += next((" family " + line.split(":")[1].strip() for line in lines if line.startswith("cpu family")), "")
        cpu += next((" model " + line.split(":")[1].strip() for line in lines if line.startswith("model\t")), "")
    versions = f"torch {torch.__version__}"
    with contextlib.suppress(ImportError):
        import onnxruntime

        versions += f", onnxruntime {onnxruntime.__version__}"
    isas = native.module.isa_available() if native.module else ["none"]
    if avx2_only:
        cpu, isas = f"{cpu} as AVX2", ["avx2"]
    return {"cpu": cpu, "isa": isas[-1], "versions": versions, "commit": commit(), "date": time.strftime("%Y-%m-%d")}


def commit() -> str:
    git = subprocess.run(["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return git.stdout.strip()


def write(path: Path, rows: list[dict[str, Any]], fields: Sequence[str] = FIELDS) -> None:
    """Replaces rows of the same case, rival, threads and processor, keeps the others."""

    def key(row: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(str(row[name]) for name in ("case", "rival", "threads", "cpu"))

    new = {key(row) for row in rows}
    old = []
    if path.exists():
        with path.open(newline="") as file:
            old = [row for row in csv.DictReader(file) if key(row) not in new]
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*old, *rows])
    os.replace(temporary, path)


class _Worker:
    def __init__(self, rival: str, env: Mapping[str, str], threads: int) -> None:
        command = [sys.executable, sys.argv[0], "--worker", rival, "--threads", str(threads)]
        full = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), **env}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=full)

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        return json.loads(answer) if answer else {"failed": f"the process ended ({self.process.poll()})"}

    def close(self) -> None:
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait(timeout=30)


def _serve(rival: Rival, cases, expected, threads: int) -> None:
    """A worker: builds cases and times them on request. Replies on a private copy of stdout, because rivals print."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(threads)
    call: Callable[[], Any] = lambda: None  # noqa: E731
    for line in sys.stdin:
        question = json.loads(line)
        try:
            if "peak" in question:
                call = rival.build(cases[question["peak"]])
                with torch.no_grad():
                    answer = {"peak": _measure_peak(call)}
            elif "case" in question:
                case = cases[question["case"]]
                call = rival.build(case)
                with torch.no_grad():
                    answer = {"error": relative_error(call(), expected(case)) if rival.compare else None}
                    _time(call, 0.1)
            else:
                with torch.no_grad():
                    answer = {"ghz": _ghz(), "time": _time(call, question["seconds"])}
        except Exception as error:  # reported by the parent as "not run", with the reason
            if os.environ.get("PYCOMPRESS_BENCH_TRACE"):
                traceback.print_exc()
            answer = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:160]}
        replies.write(json.dumps(answer) + "\n")
        replies.flush()


@contextlib.contextmanager
def _avx2_only() -> Iterator[Path]:
    """A library that hides what goes beyond AVX2 from the programs that preload it."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "avx2_only.so")
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", str(HERE / "avx2_only.c"), "-o", str(library)], check=True)
        test = subprocess.run(["true"], env={**os.environ, "LD_PRELOAD": str(library)}, check=False)
        if test.returncode:
            raise SystemExit("--avx2-only: this CPU or kernel offers no CPUID faulting")
        yield library


def relative_error(result: Any, reference: Any) -> float:
    """||result - reference|| / ||reference||, in float64."""
    import torch

    y, r = (torch.as_tensor(t).double() for t in (result, reference))
    if y.shape != r.shape:
        raise ValueError(f"result has shape {tuple(y.shape)}, the float result {tuple(r.shape)}")
    return float((y - r).norm() / r.norm())


def _measure_peak(call: Callable[[], Any]) -> float | None:
    """Resident megabytes at the peak of the second call, above those before it. The first one compiles and packs."""
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not clear.exists():
        return None
    call()
    gc.collect()
    clear.write_text("5")  # resets VmHWM
    before = _kilobytes(status, "VmRSS")
    result = call()
    peak = _kilobytes(status, "VmHWM") - before
    del result
    return peak / 1000


def _kilobytes(status: Path, name: str) -> float:
    """In units of 1000 bytes; the kernel counts in 1024."""
    line = next(line for line in status.read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1.024


def _time(call: Callable[[], Any], seconds: float) -> float:
    """Median seconds per call; short calls are timed in batches of about 200 us."""
    call()
    start = time.perf_counter()
    call()
    batch = max(1, int(200e-6 / max(time.perf_counter() - start, 1e-9)))
    samples, end = [], time.perf_counter() + seconds
    while not samples or time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(batch):
            call()
        samples.append((time.perf_counter() - start) / batch)
    return statistics.median(samples)


_CHAIN = """#include <time.h>
double ghz(void) {
  struct timespec a, b;
  unsigned long long x = 1, n = 200000;
  clock_gettime(CLOCK_MONOTONIC, &a);
#define STEP x = (x << 7) | (x >> 57); __asm__ volatile("" : "+r"(x));
  for (unsigned long long i = 0; i < n; ++i) { STEP STEP STEP STEP }
  clock_gettime(CLOCK_MONOTONIC, &b);
  return 4.0 * n / ((b.tv_sec - a.tv_sec) * 1e9 + (b.tv_nsec - a.tv_nsec));
}"""


@functools.cache
def _chain() -> Callable[[], float] | None:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or sys.platform == "win32":
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "chain.c"), Path(folder, "chain.so")
        source.write_text(_CHAIN)
        env = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # gcc takes SIGSEGV for itself
        command = [compiler, "-O2", "-shared", "-fPIC", str(source), "-o", str(library)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=env)
        function = ctypes.CDLL(str(library)).ghz
    function.restype = ctypes.c_double
    return function


def _ghz() -> float | None:
    """The clock now: rotations that depend on one another take one cycle each. (Additions of constants do not: Golden Cove and later
    Intel cores do several of them at once while renaming registers.)"""
    chain = _chain()
    return chain() if chain else None
