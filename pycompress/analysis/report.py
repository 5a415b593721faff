"""``pycompress.report``: per layer and in total what a model stores, what it computes, which kernel runs, how long it takes."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..nn.base import CompressedModule, get_note
from ..nn.untouched import devices
from .cost import Cost, LayerCost, cost, slots
from .formulas import nonzeros
from .inputs import check_model, split_inputs
from .latency import Latency, check_budget, measure_latency, torch_threads
from .layer_latency import measure_layers
from .units import milliseconds, percent, short, table


@dataclass(frozen=True)
class LayerReport:
    """One row of a report. Counts as in :class:`pycompress.analysis.LayerCost`, ``latency`` in seconds per run."""

    name: str
    type: str
    format: str
    kernel: str
    params: int
    bytes: int
    macs: int | None
    effective_macs: int | None
    sparsity: float | None
    calls: int
    latency: Latency | None
    reason: str | None
    """Why no faster format or kernel runs here."""
    tied_to: str | None


@dataclass(frozen=True)
class Report:
    """Facts about a model. ``print`` it, or use :meth:`text`, :meth:`to_json`, :meth:`html`."""

    model: str
    layers: tuple[LayerReport, ...]
    params: int
    bytes: int
    macs: int
    effective_macs: int
    uncounted: tuple[str, ...]
    """Layers whose multiply-accumulates are unknown; the totals lack them."""
    latency: Latency | None
    """Of the whole model, without hooks. None if nothing was measured."""
    other_latency: Latency | None
    """Time outside the layers: activations, reshapes, Python, and the hooks that took the layers' times."""
    threads: int
    device: str
    torch: str

    def __str__(self) -> str:
        return self.text()

    def text(self) -> str:
        """An aligned table, the totals, and the reasons."""
        rows = self.rows()
        blocks = [self.title(), table(HEADERS, rows, LEFT, rules=[len(rows) - 1]), "\n".join(self.notes())]
        return "\n\n".join(block for block in blocks if block)

    def rows(self) -> list[list[str]]:
        """The cells of the table under ``HEADERS``, the totals last."""
        rows = [_cells(layer, self._reasons()) for layer in self.layers]
        if self.other_latency is not None:
            rows.append(["(everything else)", *[""] * 8, milliseconds(self.other_latency.median), ""])
        total = ["total", "", "", "", short(self.params), short(self.bytes, "B"), short(self.macs), short(self.effective_macs), ""]
        rows.append([*total, milliseconds(self.latency.median) if self.latency else "", ""])
        return rows

    def title(self) -> str:
        return f"{self.model} on {self.device}, {self.threads} thread{'s' * (self.threads != 1)}, torch {self.torch}"

    def notes(self) -> list[str]:
        """The lines under the table."""
        lines = [f"whole model, without hooks: {self.latency}"] if self.latency else []
        if self.uncounted:
            lines.append(f"MACs not counted, totals lack them: {', '.join(name or '(root)' for name in self.uncounted)}")
        lines += [f"[{index}] {reason}" for index, reason in enumerate(self._reasons(), 1)]
        return lines

    def _reasons(self) -> list[str]:
        return list(dict.fromkeys(layer.reason for layer in self.layers if layer.reason))

    def to_json(self) -> str:
        """Everything as JSON; latencies in seconds."""
        return json.dumps(asdict(self), indent=2)

    def html(self, path: str | os.PathLike[str], *, title: str | None = None) -> Path:
        """Write one self-contained page with plots. Returns its path."""
        from .html import write_page

        return write_page(path, title or f"{self.model}: report", [(self.model, self)])


HEADERS = ("layer", "type", "format", "kernel", "params", "bytes", "MACs", "non-zero", "zeros", "ms", "note")
LEFT = (0, 1, 2, 3, 10)  # columns of text


def _cells(layer: LayerReport, reasons: list[str]) -> list[str]:
    notes = [f"[{reasons.index(layer.reason) + 1}]"] if layer.reason else []
    notes += [f"tied to {layer.tied_to}"] if layer.tied_to else []
    notes += ["not called"] if not layer.calls else []
    notes += [f"{layer.calls} calls"] if layer.calls > 1 else []
    unknown = "not counted"
    return [
        layer.name or "(root)",
        layer.type,
        layer.format,
        layer.kernel,
        short(layer.params),
        short(layer.bytes, "B"),
        unknown if layer.macs is None else short(layer.macs),
        unknown if layer.effective_macs is None else short(layer.effective_macs),
        percent(layer.sparsity),
        milliseconds(layer.latency.median) if layer.latency else "",
        ", ".join(notes),
    ]


def report(
    model: nn.Module,
    example_inputs: Any,
    *,
    measure: bool = True,
    threads: int | None = None,
    warmup: int = 3,
    budget: float = 1.0,
) -> Report:
    """Take stock of a model.

    ``example_inputs``: a tensor, a tuple of positional arguments or a dict of keyword arguments. ``measure=False`` leaves
    the times out. Otherwise the whole model is timed for ``budget`` seconds and, in further runs of together as much
    time, each layer with forward hooks; ``warmup`` runs go before each. ``threads`` sets torch's threads for the
    measurement. The model is run in evaluation mode without gradients and stays as it was.

    >>> print(report(model, torch.randn(1, 3, 224, 224)))
    >>> report(model, {"input_ids": ids}).html("report.html")
    """
    check_model("report", model)
    split_inputs("report", example_inputs)
    check_budget("report", warmup, budget, threads)
    with torch_threads(threads):
        counted = cost(model, example_inputs)
        whole = other = None
        times: dict[str, Latency] = {}
        if measure:
            whole = measure_latency(model, example_inputs, warmup=warmup, budget=budget)
            layers = {layer.name: layer.module for layer in counted.layers}
            times, other = measure_layers(model, example_inputs, layers, warmup=min(warmup, 1), budget=budget)
        used_threads = torch.get_num_threads()
    return _assemble(model, counted, times, whole, other, used_threads)


def _assemble(
    model: nn.Module, counted: Cost, times: dict[str, Latency], whole: Latency | None, other: Latency | None, threads: int
) -> Report:
    return Report(
        model=type(getattr(model, "_orig_mod", model)).__name__,
        layers=tuple(_layer(layer, times.get(layer.name)) for layer in counted.layers),
        params=counted.params,
        bytes=counted.bytes,
        macs=counted.macs,
        effective_macs=counted.effective_macs,
        uncounted=counted.uncounted,
        latency=whole,
        other_latency=other,
        threads=threads,
        device=", ".join(sorted(str(device) for device in devices(model))) or "cpu",
        torch=torch.__version__,
    )


def _layer(layer: LayerCost, latency: Latency | None) -> LayerReport:
    module = layer.module
    if isinstance(module, CompressedModule):
        stored, kernel, fallback = module.format or type(module).__name__, module.kernel, module.fallback_reason
    else:
        stored, kernel, fallback = _float_format(module), "torch", None
    return LayerReport(
        name=layer.name,
        type=parametrize.type_before_parametrizations(module).__name__,
        format=stored,
        kernel=kernel,
        params=layer.params,
        bytes=layer.bytes,
        macs=layer.macs,
        effective_macs=layer.effective_macs,
        sparsity=layer.sparsity,
        calls=layer.calls,
        latency=latency,
        reason="; ".join(reason for reason in (fallback, get_note(module)) if reason) or None,
        tied_to=layer.tied_to,
    )


_SHORT_DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}


def _float_format(module: nn.Module) -> str:
    """Element type and what is applied to the weight on the fly: "fp32 dense", "bf16 masked 50 %", "fp32 FakeQuant"."""
    own = list(slots(module))
    if not own:
        return ""
    dtype = max(own, key=lambda slot: slot.is_parameter and slot.tensor.numel()).tensor.dtype
    helpers: list[str] = []
    for parts in getattr(module, "parametrizations", {}).values() if parametrize.is_parametrized(module) else ():
        for part in parts:
            mask = part._buffers.get("mask")
            removed = None if mask is None else 1 - nonzeros(mask) / max(mask.numel(), 1)
            helpers.append(type(part).__name__ if removed is None else f"masked {percent(removed)}")
    return f"{_SHORT_DTYPES.get(dtype, str(dtype).removeprefix('torch.'))} {' + '.join(dict.fromkeys(helpers)) or 'dense'}"
