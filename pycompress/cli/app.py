"""The typer application: one line per command."""

from __future__ import annotations

import typer

from . import bench, demo, doctor, report

app = typer.Typer(
    name="pycompress",
    help="Model compression for PyTorch: smaller and faster on the machine in front of you, and just as right.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("demo")(demo.command)
app.command("doctor")(doctor.command)
app.command("report")(report.command)
app.command("bench")(bench.command)
