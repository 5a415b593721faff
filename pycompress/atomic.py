"""Write a file so that a reader sees the old one or the whole new one, never half of it."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path in the folder of ``path``; what was written there takes the place of ``path`` at the end.

    On an exception the temporary file is removed and ``path`` stays as it was. A symbolic link keeps pointing where it
    did, an existing file keeps its permissions, a new one gets those of any newly created file.

    >>> with atomic_path("results.json") as temporary:
    ...     temporary.write_text("{}")
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(f"{os.fspath(path)} is a directory, expected the name of a file")
    temporary = target.with_name(f".{target.name[:100]}.{secrets.token_hex(4)}.tmp")
    temporary.open("xb").close()
    try:
        # The writer may put a file of its own (with its own permissions) in the place of the one just made.
        mode = stat.S_IMODE((target if target.exists() else temporary).stat().st_mode)
        yield temporary
        os.chmod(temporary, mode)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # makes the rename itself survive a power cut
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
