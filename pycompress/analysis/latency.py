"""How long a call takes: warm up, repeat within a time budget, report the median and the spread."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import nn

from ..nn.untouched import devices, untouched
from .inputs import check_model, split_inputs

_MAX_RUNS = 10_000


@dataclass(frozen=True)
class Latency:
    """Seconds per call: median and quartiles of ``runs`` repeated calls."""

    median: float
    q25: float
    q75: float
    runs: int

    @property
    def iqr(self) -> float:
        """Interquartile range: half of all calls took a time inside it."""
        return self.q75 - self.q25

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Latency:
        if not seconds:
            raise ValueError("Latency.of: seconds must not be empty")
        quartiles = torch.quantile(torch.tensor(seconds, dtype=torch.float64), torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
        q25, median, q75 = quartiles.tolist()
        return cls(median, q25, q75, len(seconds))

    def __str__(self) -> str:
        return f"{self.median * 1e3:.4g} ms ({self.q25 * 1e3:.4g} to {self.q75 * 1e3:.4g}, {self.runs} runs)"


def measure(
    call: Callable[[], Any],
    *,
    warmup: int = 3,
    budget: float = 1.0,
    min_runs: int = 3,
    threads: int | None = None,
    sync: Callable[[], None] = lambda: None,
) -> Latency:
    """Time ``call()`` repeatedly.

    Up to ``warmup`` calls run first, untimed, fewer if they use up the budget. Then calls are timed until ``budget``
    seconds are over, at least ``min_runs`` of them whatever they take. ``threads`` sets torch's intra-op threads for
    the measurement only. ``sync`` waits for work that a call merely queued (GPU).

    >>> measure(lambda: x @ x, threads=1).median
    """
    check_budget("measure", warmup, budget, threads)
    if not isinstance(min_runs, int) or min_runs < 1:
        raise ValueError(f"measure: min_runs must be a positive integer, got {min_runs!r}")
    with torch_threads(threads):
        deadline = perf_counter() + budget
        for _ in range(warmup):
            call()
            sync()
            if perf_counter() > deadline:
                break
        seconds: list[float] = []
        deadline = perf_counter() + budget
        while len(seconds) < min_runs or (perf_counter() < deadline and len(seconds) < _MAX_RUNS):
            start = perf_counter()
            call()
            sync()
            seconds.append(perf_counter() - start)
    return Latency.of(seconds)


def measure_latency(
    model: nn.Module,
    example_inputs: Any,
    *,
    warmup: int = 3,
    budget: float = 1.0,
    min_runs: int = 3,
    threads: int | None = None,
) -> Latency:
    """Latency of ``model(example_inputs)`` in evaluation mode without gradients. The model stays as it was.

    ``example_inputs``: a tensor, a tuple of positional arguments or a dict of keyword arguments; other arguments as in
    :func:`measure`.

    >>> print(measure_latency(model, torch.randn(1, 1, 8, 8)))
    0.21 ms (0.2 to 0.22, 4613 runs)
    """
    check_model("measure_latency", model)
    args, kwargs = split_inputs("measure_latency", example_inputs)
    with untouched(model):
        return measure(
            lambda: model(*args, **kwargs),
            warmup=warmup,
            budget=budget,
            min_runs=min_runs,
            threads=threads,
            sync=synchronizer(devices(model)),
        )


def check_budget(where: str, warmup: int, budget: float, threads: int | None) -> None:
    if not isinstance(warmup, int) or warmup < 0:
        raise ValueError(f"{where}: warmup must be a non-negative integer, got {warmup!r}")
    if not isinstance(budget, (int, float)) or not 0 <= budget < float("inf"):
        raise ValueError(f"{where}: budget must be a non-negative number of seconds, got {budget!r}")
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise ValueError(f"{where}: threads must be a positive integer or None, got {threads!r}")


@contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Run a block with that many intra-op threads; None leaves torch's setting."""
    before = torch.get_num_threads()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


def synchronizer(used: Iterable[torch.device]) -> Callable[[], None]:
    """A function that waits until all queued work on the given devices is done; on a CPU nothing is ever queued."""
    waits: list[Callable[[], None]] = []
    for device in used:
        backend = getattr(torch, device.type, None)
        if device.type == "mps":
            waits.append(torch.mps.synchronize)
        elif device.type not in ("cpu", "meta") and hasattr(backend, "synchronize"):
            waits.append(lambda backend=backend, device=device: backend.synchronize(device))  # type: ignore[misc]

    def wait() -> None:
        for each in waits:
            each()

    return wait
