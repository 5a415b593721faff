"""Numbers as people read them, and an aligned text table."""

from __future__ import annotations

from collections.abc import Container, Sequence

_STEPS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def short(value: float | None, unit: str = "") -> str:
    """1234567 -> "1.23 M", with unit "B" -> "1.23 MB". Powers of 1000; None -> "?"."""
    if value is None:
        return "?"
    for step, prefix in _STEPS:
        if abs(value) >= 0.9995 * step:
            return f"{value / step:.3g} {prefix}{unit}"
    return f"{value:.0f} {unit}".rstrip()


def percent(share: float | None) -> str:
    return "" if share is None else f"{share * 100:.3g} %"


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], left: Container[int], rules: Sequence[int] = ()) -> str:
    """Columns padded to their widest cell; those in ``left`` to the left, the others to the right. A rule goes
    under the headers and before each row index in ``rules``."""
    widths = [max(len(row[i]) for row in (headers, *rows)) for i in range(len(headers))]

    def line(cells: Sequence[str]) -> str:
        return "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width) for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    lines = [line(headers), rule]
    for index, row in enumerate(rows):
        lines += [rule] * (index in rules) + [line(row)]
    return "\n".join(lines)
