"""``pycompress report``: what a model stores and computes, which kernels run it, and how long each layer takes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .model import check_runs, check_writable, make_inputs, open_model


def command(
    source: Annotated[str, typer.Argument(help="module:factory, or a file written by pycompress.save.")],
    shapes: Annotated[
        list[str], typer.Option("--input", "-i", help="Shape of an input: 1,3,224,224 (normal floats) or ids:1,128:30000 (token ids).")
    ],
    skeleton: Annotated[str | None, typer.Option(help="module:factory of the uncompressed architecture, for a file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write a self-contained page.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads for the measurement.")] = None,
    measure: Annotated[bool, typer.Option(help="Measure latency.")] = True,
    seed: Annotated[int, typer.Option(help="Seed of the inputs.")] = 0,
) -> None:
    """Per layer: format, kernel that runs, parameters, bytes, MACs, time, and the reason for any fallback."""
    from .. import report

    if html is not None:
        check_writable("--html", html)
    model, inputs = open_model(source, skeleton), make_inputs(shapes, seed)
    check_runs(model, inputs, shapes)
    facts = report(model, inputs, measure=measure, threads=threads)
    if html is not None:
        facts.html(html)
    typer.echo(facts.to_json() if as_json else facts.text())
