"""Several models in one table: teacher beside student, float beside int8."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from torch import nn

from .report import Report, report
from .units import milliseconds, short, table

Value = float | int | str | None
Extra = Mapping[str, Mapping[str, Value] | Sequence[Value]]


@dataclass(frozen=True)
class Comparison:
    """Reports of several models by name, in order; ratios are against the first one."""

    reports: tuple[tuple[str, Report], ...]
    extra: dict[str, tuple[Value, ...]]
    """Further columns, e.g. ``{"accuracy": (0.99, 0.98)}``."""

    def __str__(self) -> str:
        return self.text()

    def text(self) -> str:
        return table(self.headers(), self.rows(), left=(0,))

    def headers(self) -> tuple[str, ...]:
        measured = ("ms", "faster") if self._measured() else ()
        return ("model", *self.extra, "params", "bytes", "smaller", "MACs", "non-zero", *measured)

    def rows(self) -> list[list[str]]:
        first = self.reports[0][1]
        rows = []
        for index, (name, each) in enumerate(self.reports):
            row = [name, *(_shown(values[index]) for values in self.extra.values())]
            row += [short(each.params), short(each.bytes, "B"), _ratio(first.bytes, each.bytes)]
            row += [short(each.macs), short(each.effective_macs)]
            if self._measured():
                row.append(milliseconds(each.latency.median) if each.latency else "")
                row.append(_ratio(first.latency.median, each.latency.median) if first.latency and each.latency else "")
            rows.append(row)
        return rows

    def to_json(self) -> str:
        """Everything as JSON: a list with name, report and extra values of each model."""
        entries = [
            {"name": name, "extra": {key: values[index] for key, values in self.extra.items()}, "report": asdict(each)}
            for index, (name, each) in enumerate(self.reports)
        ]
        return json.dumps(entries, indent=2)

    def html(self, path: str | os.PathLike[str], *, title: str = "Model comparison") -> Path:
        """Write one self-contained page: the table, plots, and each model's report. Returns its path."""
        from .html import write_page

        return write_page(path, title, self.reports, self)

    def _measured(self) -> bool:
        return any(each.latency for _, each in self.reports)


def compare(
    models: Iterable[tuple[str, nn.Module | Report]], example_inputs: Any = None, *, extra: Extra | None = None, **options: Any
) -> Comparison:
    """Report on several models and put them side by side.

    ``models``: pairs of a name and a model, or a :class:`Report` taken before (``example_inputs`` is needed for models
    only). ``extra``: further columns, name -> values in the order of the models, or by model name (missing ones stay
    empty). ``options`` go to :func:`report`.

    >>> print(compare([("teacher", a), ("student", b)], x, extra={"accuracy": [0.991, 0.987]}))
    """
    pairs = list(models.items() if isinstance(models, Mapping) else models)
    if not pairs:
        raise ValueError("compare: models must hold at least one model, got none")
    names = [name for name, _ in pairs]
    for name, model in pairs:
        if not isinstance(name, str) or names.count(name) > 1:
            raise ValueError(f"compare: models must have different names, got {name!r}{' twice' * isinstance(name, str)}")
        if not isinstance(model, (nn.Module, Report)):
            raise TypeError(f"compare: models must be torch.nn.Module or Report, got {type(model).__name__} for {name!r}")
    columns = {header: _column(header, values, names) for header, values in (extra or {}).items()}
    reports = tuple((name, m if isinstance(m, Report) else report(m, example_inputs, **options)) for name, m in pairs)
    return Comparison(reports, columns)


def _column(header: str, values: Mapping[str, Value] | Sequence[Value], names: list[str]) -> tuple[Value, ...]:
    if isinstance(values, Mapping):
        unknown = [name for name in values if name not in names]
        if unknown:
            raise ValueError(f"compare: extra[{header!r}] must have keys out of {names}, got {unknown[0]!r}")
        column = tuple(values.get(name) for name in names)
    else:
        column = tuple(values)
        if len(column) != len(names):
            raise ValueError(f"compare: extra[{header!r}] must have {len(names)} values, got {len(column)}")
    for value in column:
        if not isinstance(value, (Real, str, type(None))):
            raise TypeError(f"compare: extra[{header!r}] must hold numbers, strings or None, got {type(value).__name__}")
    return tuple(value if isinstance(value, (int, str, type(None))) else float(value) for value in column)


def _shown(value: Value) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _ratio(first: float, this: float) -> str:
    return f"{first / this:.3g}x" if this else ""
