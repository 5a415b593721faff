"""``pycompress doctor``: what this installation can do here, and why a native part is missing."""

from __future__ import annotations

from typing import Annotated

import typer


def command(as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False) -> None:
    """Versions, CPU features, the kernel of each op, threads, and why any native part is missing."""
    from ..doctor import render

    typer.echo(render(as_json))
