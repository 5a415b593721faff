"""Outputs of named modules, taken by forward hooks that are gone afterwards."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .unwrap import unwrap


def check_paths(where: str, who: str, model: nn.Module, paths: Iterable[str]) -> None:
    """Raise ``ValueError`` for a path that names no module of the model."""
    names = dict(unwrap(model).named_modules(remove_duplicate=False))
    for path in paths:
        if path not in names:
            near = difflib.get_close_matches(path, names, n=3, cutoff=0.4) or [name for name in names if name][:8]
            raise ValueError(f"{where}: {who} has no module {path!r}; did you mean {', '.join(map(repr, near))}?")


@contextmanager
def record_outputs(who: str, model: nn.Module, paths: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Collect what the modules at ``paths`` return while the model runs inside the ``with`` block.

    The outputs are in the dictionary when the block ends, as copies: an in-place operation behind the module
    (``ReLU(inplace=True)`` after a batch norm) would overwrite what it returned. A module that ran several times (a shared
    activation, say) or not at all raises ``ValueError``, because which output is meant would be a guess.
    """
    base = unwrap(model)
    seen: dict[str, list[Tensor]] = {path: [] for path in paths}

    def keep(path: str, output: Any) -> None:
        seen[path].append(first_tensor(f"{who} module {path!r}", output).clone())

    handles = [
        base.get_submodule(path).register_forward_hook(lambda _module, _inputs, output, path=path: keep(path, output)) for path in seen
    ]
    outputs: dict[str, Tensor] = {}
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
    for path, values in seen.items():
        if len(values) != 1:
            raise ValueError(f"{who} module {path!r} must run once per forward to be read, got {len(values)} runs")
        outputs[path] = values[0]


def first_tensor(where: str, output: Any) -> Tensor:
    """A module's output as one tensor: itself, the first entry of a tuple, or a model output's ``last_hidden_state``."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping) and isinstance(output.get("last_hidden_state"), Tensor):
        return output["last_hidden_state"]
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0]
    raise TypeError(f"{where} must return a tensor or a tuple that starts with one, got {type(output).__name__}")
