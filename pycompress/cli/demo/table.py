"""The demo's table, what it leaves to be said, and its files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from rich import box
from rich.table import Table

from ...analysis import compare
from ...analysis.units import short
from ...atomic import atomic_path
from .steps import BATCHES, Results, Row


def build(results: Results) -> Table:
    threads = results.settings.threads
    table = Table(
        box=box.SIMPLE_HEAVY, caption=f"{results.held_out} held-out digits; {threads} thread{'s' * (threads != 1)}; MACs per image"
    )
    table.add_column("model")
    for header in ("accuracy", "parameters", "file", "MACs", *(f"batch {size}" for size in BATCHES)):
        table.add_column(header, justify="right")
    for row in results.rows.values():
        table.add_row(*cells(row))
    return table


def cells(row: Row) -> list[str]:
    return [
        row.name,
        f"{row.accuracy:.2%}",
        f"{row.params:,}",
        short(row.file_bytes, "B"),
        short(row.macs),
        *(f"{row.latency[size]:.3g} ms" for size in BATCHES),
    ]


def notes(results: Results) -> Iterator[str]:
    """The way from the first row to the last, the promises, and every step that did not make the model faster, with the reason."""
    first, last = results.rows["ensemble"], results.rows["int8"]
    smaller = f"{first.params / last.params:.0f}x fewer parameters, {first.file_bytes / last.file_bytes:.0f}x smaller file"
    faster = " and ".join(f"{first.latency[size] / last.latency[size]:.1f}x faster at batch {size}" for size in BATCHES)
    yield f"From the ensemble to int8: {smaller}, {first.macs / last.macs:.0f}x fewer MACs, {faster}."
    yield "The int8 model was loaded back from its file and gives identical outputs."
    for bar in results.bars():
        yield f"{'ok    ' if bar.met else 'MISSED'}  {bar.text}"
    for before, after in (("ensemble", "distilled"), ("distilled", "pruned"), ("pruned", "int8")):
        for size in BATCHES:
            yield from _not_faster(results.rows[before], results.rows[after], size)
    yield f"Took {results.seconds:.0f} s."


def _not_faster(before: Row, after: Row, size: int) -> Iterator[str]:
    """Says so if a step brought less than 5 % at this batch size, and where the time goes instead."""
    if after.latency[size] < 0.95 * before.latency[size]:
        return
    report = after.reports[size]
    yield (
        f"Not faster: '{after.name}' takes {after.latency[size]:.3g} ms at batch {size}, '{before.name}' {before.latency[size]:.3g} ms, "
        f"with {before.macs / after.macs:.1f}x fewer MACs."
    )
    timed = sorted(((layer.latency.median, layer) for layer in report.layers if layer.latency), key=lambda pair: -pair[0])
    for seconds, layer in timed[:3]:
        yield f"  {seconds * 1e3:.3g} ms in {layer.name} ({layer.format}, kernel {layer.kernel})"
    if report.other_latency is not None:
        yield f"  {report.other_latency.median * 1e3:.3g} ms outside the layers (activations, additions, Python)"
    if size == 1:
        share = after.latency[BATCHES[-1]] / BATCHES[-1]
        yield f"  In a batch of {BATCHES[-1]} an image takes {share:.2g} ms; the rest is the fixed cost of calling {len(timed)} layers"
    for reason in dict.fromkeys(layer.reason for layer in report.layers if layer.reason):
        yield f"  because {reason}"


def write(results: Results, out: Path) -> None:
    """``table.json`` and ``report.html`` in the folder."""
    rows = [
        {"model": row.name, "accuracy": row.accuracy, "wrong": row.wrong, "parameters": row.params, "file_bytes": row.file_bytes,
         "macs": row.macs, "latency_ms": {str(size): row.latency[size] for size in BATCHES}}
        for row in results.rows.values()
    ]  # fmt: skip
    bars = [{"text": bar.text, "met": bar.met} for bar in results.bars()]
    with atomic_path(out / "table.json") as temporary:
        temporary.write_text(
            json.dumps({"held_out": results.held_out, "seed": results.settings.seed, "rows": rows, "bars": bars}, indent=2)
        )
    facts = [(row.name, row.reports[BATCHES[-1]]) for row in results.rows.values()]
    shown = {row.name: cells(row) for row in results.rows.values()}
    extra = {"accuracy": {name: row[1] for name, row in shown.items()}, "file": {name: row[3] for name, row in shown.items()}}
    compare(facts, extra=extra).html(out / "report.html", title="pycompress demo: handwritten digits")
