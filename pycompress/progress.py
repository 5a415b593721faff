"""Progress bars for long work: one switch, one look, silent where nobody watches."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sized
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")


def track(items: Iterable[T], description: str, *, total: int | None = None, progress: bool | None = None) -> Iterator[T]:
    """Iterate over ``items`` behind a tqdm bar.

    ``progress``: True shows the bar, False hides it, None (default) shows it on a terminal only.
    """
    from tqdm.auto import tqdm

    hidden = not sys.stderr.isatty() if progress is None else not progress
    if total is None and isinstance(items, Sized):
        with suppress(TypeError):  # a DataLoader over a data set without length has __len__ all the same
            total = len(items)
    # Of anything but an iterator tqdm.auto takes two, and a DataLoader starts its workers for each.
    return iter(tqdm(iter(items), desc=description, total=total, disable=hidden, leave=False, dynamic_ncols=True))
