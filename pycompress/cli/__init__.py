"""The ``pycompress`` command: one file per subcommand, each imports what it needs when it runs.

Built on typer and rich (the extra ``cli``). ``pycompress doctor`` and ``--version`` work without them, so that a broken or
partial installation can still say what is wrong with it.
"""

from __future__ import annotations

import sys

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; ``arguments`` defaults to ``sys.argv[1:]``."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        from .app import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        _without_typer(arguments, error.name)
    else:
        app(arguments, prog_name="pycompress")


def version_line() -> str:
    from .. import __version__

    return f"pycompress {__version__}"


def _without_typer(arguments: list[str], missing: str) -> None:
    if arguments == ["--version"]:
        sys.stdout.write(version_line() + "\n")
        return
    if arguments[:1] != ["doctor"] or not set(arguments[1:]) <= {"--json"}:
        sys.exit(f"pycompress: this command needs the package {missing}, which is not installed; pip install 'pycompress[cli]'")
    from ..doctor import render

    sys.stdout.write(render(as_json="--json" in arguments) + "\n")
