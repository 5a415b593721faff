"""An iterator whose first batch was looked at, and must still be trained on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


class Peeked:
    """Yields ``first`` and what is left of ``iterator``; every further iteration asks the iterator for a new one.

    That gives the iterator's own answer: a generator is used up then, loaders that are their own iterator start again.
    """

    def __init__(self, first: Any, iterator: Iterator[Any]) -> None:
        self.waiting = [first]
        self.iterator = iterator

    def __iter__(self) -> Iterator[Any]:
        if not self.waiting:
            yield from self.iterator
            return
        yield self.waiting.pop()  # only now: progress bars make iterators that they do not use
        while True:  # no for: it asks for an iterator, and some start again then
            try:
                batch = next(self.iterator)
            except StopIteration:
                return
            yield batch

    def __len__(self) -> int:
        return len(self.iterator)  # type: ignore[arg-type]  # TypeError where there is none, as for the iterator itself
