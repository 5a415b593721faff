"""Progress bars for long work: one switch, one look, silent where nobody watches."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def track(items: Iterable[T], description: str, *, total: int | None = None, progress: bool | None = None) -> Iterator[T]:
    """Iterate over ``items`` behind a tqdm bar.

    ``progress``: True shows the bar, False hides it, None (default) shows it on a terminal only.
    """
    from tqdm.auto import tqdm

    hidden = not sys.stderr.isatty() if progress is None else not progress
    return iter(tqdm(items, desc=description, total=total, disable=hidden, leave=False, dynamic_ncols=True))
