"""Which modules a model really calls: the run against which a trace is checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from ..nn.surgery import all_names


class Call(NamedTuple):
    """One call of a module, by the first of its paths, and the calls made inside it, in order."""

    path: str
    inner: tuple[Call, ...]


Calls = set[Call]
"""The different outermost calls that were seen. Normally all are calls of the model itself, whose path is ""."""


@contextmanager
def recording(model: nn.Module) -> Iterator[Calls]:
    """Records all calls of modules of ``model`` while the block runs, but of those that ``torch.jit`` made, which take no hooks.

    >>> with recording(model) as calls: model(x)
    """
    seen: Calls = set()
    open_calls: list[list[Call]] = []

    def begin(*_: Any) -> None:
        open_calls.append([])

    def end_of(path: str) -> Callable[..., None]:
        def end(*_: Any) -> None:
            call = Call(path, tuple(open_calls.pop()))
            if open_calls:
                open_calls[-1].append(call)
            else:
                seen.add(call)

        return end

    handles = []
    for module, paths in all_names(model).items():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        handles += [module.register_forward_pre_hook(begin, prepend=True), module.register_forward_hook(end_of(paths[0]), always_call=True)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def every(calls: Calls) -> Iterator[Call]:
    """All calls, the outer and the inner ones."""
    for call in calls:
        yield call
        yield from every(call.inner)  # type: ignore[arg-type]  # a tuple of calls does as well
