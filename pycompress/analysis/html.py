"""One self-contained page: no scripts, no fonts, nothing is loaded from anywhere."""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from ..atomic import atomic_path
from .plots import bars, has_matplotlib
from .report import HEADERS, LEFT, LayerReport, Report
from .units import milliseconds, short

if TYPE_CHECKING:
    from .compare import Comparison

_TOP = 20  # bars in a chart of layers; the rest is summed up in one more

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --paper: #fdfdfc; --soft: #6b7280; --line: #e2e4e8; --band: #f4f5f7; --bar: #3e7cb1; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --paper: #16181b; --soft: #9aa2ad; --line: #2c3036; --band: #1e2125; --bar: #6fa8dc; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 2rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; overflow-wrap: anywhere; }
p { margin: .25rem 0; } .soft { color: var(--soft); } ul { padding-left: 1.25rem; margin: .75rem 0; } li { overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: 1rem 0; border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; text-align: right; white-space: nowrap; border-top: 1px solid var(--line); }
th { border-top: 0; font-weight: 600; color: var(--soft); background: var(--band); }
.text { text-align: left; } tbody tr:hover { background: var(--band); }
tr.total td { font-weight: 600; border-top: 2px solid var(--line); }
.plots { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); align-items: start; }
.plots figure { margin: 0; } .plots svg { width: 100%; height: auto; color: var(--ink); }
""".strip()


def write_page(
    path: str | os.PathLike[str], title: str, reports: Sequence[tuple[str, Report]], comparison: Comparison | None = None
) -> Path:
    """Write the page for one report or for a comparison of several, atomically. Returns its path."""
    page = render(title, reports, comparison)
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8", newline="\n")
    return Path(path)


def render(title: str, reports: Sequence[tuple[str, Report]], comparison: Comparison | None = None) -> str:
    """The page as text."""
    parts = [f"<h1>{escape(title)}</h1>"]
    if not has_matplotlib():
        parts.append('<p class="soft">Plots need matplotlib: <code>pip install "pycompress[report]"</code></p>')
    if comparison is not None:
        parts.append(_table(comparison.headers(), comparison.rows(), left=(0,)))
        parts.append(_plots(_model_charts(comparison)))
    for name, report in reports:
        parts.append("<section>" + (f"<h2>{escape(name)}</h2>" if comparison is not None else ""))
        parts.append(f'<p class="soft">{escape(report.title())}</p>')
        parts.append("".join(f"<p>{escape(line)}</p>" for line in report.notes()[:1] if report.latency))
        parts.append(_table(HEADERS, report.rows(), LEFT, total=True))
        notes = report.notes()[1 if report.latency else 0 :]
        parts.append(f"<ul>{''.join(f'<li>{escape(note)}</li>' for note in notes)}</ul>" if notes else "")
        parts.append(_plots(_layer_charts(report)) + "</section>")
    body = "\n".join(part for part in parts if part)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>
{_STYLE}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]], left: Container[int], total: bool = False) -> str:
    def line(tag: str, cells: Sequence[str]) -> str:
        marks = (' class="text"' if i in left else "" for i in range(len(cells)))
        return "".join(f"<{tag}{mark}>{escape(cell)}</{tag}>" for mark, cell in zip(marks, cells, strict=True))

    lines = [f"<tr>{line('td', row)}</tr>" for row in rows]
    if total:
        lines[-1] = lines[-1].replace("<tr>", '<tr class="total">', 1)
    body = "\n".join(lines)
    head = line("th", headers)
    return f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


Chart = tuple[str, list[tuple[str, float, str]]]


def _plots(charts: list[Chart]) -> str:
    drawn = [bars(title, *map(list, zip(*rows, strict=True))) for title, rows in charts if rows and has_matplotlib()]
    return f'<div class="plots">{"".join(f"<figure>{svg}</figure>" for svg in drawn)}</div>' if drawn else ""


def _layer_charts(report: Report) -> list[Chart]:
    layers = report.layers
    seconds = [(layer.name, layer.latency.median) for layer in layers if layer.latency]
    if report.other_latency:
        seconds.append(("(everything else)", report.other_latency.median))
    return [
        ("Bytes by layer", _largest([(_name(layer), float(layer.bytes)) for layer in layers], lambda value: short(value, "B"))),
        ("MACs by layer, zeros skipped", _largest([(_name(layer), float(layer.effective_macs or 0)) for layer in layers], short)),
        ("Milliseconds by layer", _largest(seconds, milliseconds)),
    ]


def _name(layer: LayerReport) -> str:
    return layer.name or "(root)"


def _largest(pairs: list[tuple[str, float]], show: Callable[[float], str]) -> list[tuple[str, float, str]]:
    """In the model's order: the layers that matter, and the sum of the others."""
    pairs = [pair for pair in pairs if pair[1] > 0]
    kept = set(sorted(range(len(pairs)), key=lambda i: -pairs[i][1])[:_TOP])
    rows = [(name, value, show(value)) for i, (name, value) in enumerate(pairs) if i in kept]
    rest = [value for i, (_, value) in enumerate(pairs) if i not in kept]
    return rows + ([(f"({len(rest)} others)", sum(rest), show(sum(rest)))] if rest else [])


def _model_charts(comparison: Comparison) -> list[Chart]:
    reports = comparison.reports
    charts: list[Chart] = [
        ("Parameters", [(name, float(each.params), short(each.params)) for name, each in reports]),
        ("Bytes", [(name, float(each.bytes), short(each.bytes, "B")) for name, each in reports]),
        ("MACs, zeros skipped", [(name, float(each.effective_macs), short(each.effective_macs)) for name, each in reports]),
        ("Milliseconds", [(name, each.latency.median, milliseconds(each.latency.median)) for name, each in reports if each.latency]),
    ]
    for header, values in comparison.extra.items():
        numbers = [(name, value) for (name, _), value in zip(reports, values, strict=True) if isinstance(value, (int, float))]
        charts.append((header, [(name, float(value), f"{value:.4g}") for name, value in numbers]))
    return charts
