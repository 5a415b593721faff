"""The typer application: one line per command."""

from __future__ import annotations

from typing import Annotated

import typer

from . import bench, demo, doctor, report, version_line


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(version_line())
        raise typer.Exit


app = typer.Typer(
    name="pycompress",
    help="Model compression for PyTorch: smaller and faster on the machine in front of you, and just as right.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)] = False,
) -> None:
    """Options of the program itself, before any command."""


app.command("demo")(demo.command)
app.command("doctor")(doctor.command)
app.command("report")(report.command)
app.command("bench")(bench.command)
