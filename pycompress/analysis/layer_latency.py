"""Where the time of a model goes: each layer's own time, taken by forward hooks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from time import perf_counter
from typing import Any

from torch import nn

from ..nn.untouched import devices, untouched
from .cost import no_fast_path
from .inputs import check_model, split_inputs
from .latency import Latency, measure, synchronizer


def measure_layers(
    model: nn.Module,
    example_inputs: Any,
    layers: Mapping[str, nn.Module],
    *,
    warmup: int = 3,
    budget: float = 1.0,
    threads: int | None = None,
) -> tuple[dict[str, Latency], Latency]:
    """Seconds per run spent in each of ``layers``, and in everything else.

    A layer's time is without that of other ``layers`` inside it, and is the sum over its calls if it is shared. Hooks
    cost a microsecond or so per layer, on a GPU they also wait for each layer to finish: the parts tell the shares, not
    the whole; time that with :func:`measure_latency`. Layers that did not run are left out.
    """
    check_model("measure_layers", model)
    args, kwargs = split_inputs("measure_layers", example_inputs)
    clock = _Clock(synchronizer(devices(model)))
    runs: list[tuple[float, dict[str, float]]] = []

    def run() -> None:
        clock.own = defaultdict(float)
        start = clock.now()
        getattr(model, "_orig_mod", model)(*args, **kwargs)
        runs.append((clock.now() - start, clock.own))

    handles = [handle for name, layer in layers.items() for handle in clock.watch(name, layer)]
    try:
        with untouched(model), no_fast_path():
            timed = measure(run, warmup=warmup, budget=budget, threads=threads).runs
    finally:
        for handle in handles:
            handle.remove()
    runs = runs[-timed:]  # without the warm-up
    names = dict.fromkeys(name for _, own in runs for name in own)
    each = {name: Latency.of([own[name] for _, own in runs]) for name in names}
    return each, Latency.of([max(total - sum(own.values()), 0.0) for total, own in runs])


class _Clock:
    def __init__(self, sync: Any) -> None:
        self.sync = sync
        self.own: dict[str, float] = defaultdict(float)
        self.open: list[list[float]] = []  # start and time spent in inner layers, for each layer that is running

    def now(self) -> float:
        self.sync()
        return perf_counter()

    def watch(self, name: str, layer: nn.Module) -> list[Any]:
        def enter(module: nn.Module, args: Any) -> None:
            self.open.append([self.now(), 0.0])

        def leave(module: nn.Module, args: Any, out: Any) -> None:
            start, inner = self.open.pop()
            total = self.now() - start
            self.own[name] += total - inner
            if self.open:
                self.open[-1][1] += total

        return [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)]
