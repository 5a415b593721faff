"""``pycompress demo``: an image classifier made smaller and faster with all three techniques, on real handwritten digits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    out: Annotated[Path, typer.Option(help="Folder for the models, the table and the HTML report.")] = Path("demo_out"),
    seed: Annotated[int, typer.Option(min=0, help="Split, initial weights and training; the same seed gives the same table.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="Threads for the latency columns.")] = 1,
    check: Annotated[bool, typer.Option("--check", help="Exit with 1 if an accuracy or size bar is missed.")] = False,
) -> None:
    """Teachers, distillation, pruning, int8, save and load on handwritten digits: one table, under two minutes."""
    import importlib.util

    missing = [name for name in ("sklearn", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise typer.BadParameter(f"the demo needs {' and '.join(missing)}, not installed here: pip install 'pycompress[demo]'")
    from rich.console import Console

    from . import table
    from .steps import Settings, run

    # Wide enough for the table also where nobody watches (a pipe has 80 columns).
    console = Console(highlight=False, width=None if Console().is_terminal else 120)
    results = run(Settings(seed=seed, threads=threads), out, lambda line: console.print(line))
    console.print(table.build(results))
    for line in table.notes(results):
        console.print(line, soft_wrap=True)
    table.write(results, out)
    console.print(f"\nfull report: {out / 'report.html'}")
    if check and not all(bar.met for bar in results.bars()):
        raise typer.Exit(1)
