"""Bar charts as inline SVG that take their colours from the page, so that they follow its dark mode."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Sequence

# Colours no chart uses otherwise; replaced by what the page's style sheet says.
_TEXT, _BAR = "#010203", "#040506"


def has_matplotlib() -> bool:
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def bars(title: str, labels: Sequence[str], values: Sequence[float], shown: Sequence[str]) -> str:
    """Horizontal bars, first label on top, ``shown`` written behind each bar. Needs matplotlib."""
    import matplotlib
    from matplotlib.figure import Figure

    # Text stays text (small, selectable); the salt makes ids equal from run to run and different from chart to chart.
    salt = hashlib.sha256(repr((title, labels, values)).encode()).hexdigest()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "font.family": "sans-serif", "font.size": 9}):
        figure = Figure(figsize=(5.2, 0.55 + 0.24 * len(labels)), layout="constrained")
        axes = figure.add_subplot()
        positions = range(len(labels))
        axes.barh(positions, values, color=_BAR, height=0.7)
        axes.set_yticks(positions, [_shortened(label) for label in labels], color=_TEXT, parse_math=False)
        axes.set_title(title, loc="left", color=_TEXT, fontsize=10, fontweight="bold", parse_math=False)
        axes.invert_yaxis()
        axes.set_xticks([])
        axes.spines[:].set_visible(False)
        axes.tick_params(left=False)
        axes.set_xlim(0, 1.25 * max([*values, 0]) or 1)  # room for the numbers
        for position, value, text in zip(positions, values, shown, strict=True):
            axes.annotate(
                text, (value, position), xytext=(3, 0), textcoords="offset points", va="center", color=_TEXT, fontsize=8, parse_math=False
            )
        buffer = io.StringIO()
        empty = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=empty)
    return _inline(buffer.getvalue(), title)


def _shortened(label: str, limit: int = 36) -> str:
    """Paths differ at their ends, so the end stays."""
    return label if len(label) <= limit else "..." + label[3 - limit :]


def _inline(svg: str, title: str) -> str:
    """Drop the XML prologue and the fixed size, put in the page's colours."""
    from html import escape

    svg = svg[svg.index("<svg") :]
    head, rest = svg.split(">", 1)
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    svg = f'{head} role="img" aria-label="{escape(title, quote=True)}">{rest}'
    # matplotlib names every group; the names would repeat from chart to chart on a page, and only some are referred to.
    used = set(re.findall(r"#([\w-]+)", svg))
    svg = re.sub(r' id="([^"]*)"', lambda match: match.group() if match.group(1) in used else "", svg)
    return svg.replace(_TEXT, "currentColor").replace(_BAR, "var(--bar)")
