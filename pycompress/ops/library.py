"""Registration of ops with torch, so that ``torch.compile`` and ``torch.export`` see each call as one opaque node."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("pycompress", "DEF")  # kept alive: ops vanish with it


def define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Enter ``torch.ops.pycompress.<name>`` with its implementation for every device and its shape function.

    Returns the op's default overload. ``schema`` is torch's, e.g. ``"int8_matmul(Tensor a, Tensor b, str kernel) -> Tensor"``.
    Outputs must be new contiguous tensors, never views of an input.
    """
    name = schema.split("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pycompress::{name}", fake, lib=_library)
    return getattr(torch.ops.pycompress, name).default


def tracing() -> bool:
    """Whether torch is compiling or exporting."""
    return torch.compiler.is_compiling()


_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))
_jit_trace, _modes, _transforms = (
    torch._C._get_tracing_state,
    torch._C._len_torch_dispatch_stack,
    torch._C._functorch.peek_interpreter_stack,
)


def dispatched(x: torch.Tensor) -> bool:
    """Whether a call on ``x`` must go through torch's dispatcher, i.e. to the registered op: while something records or replaces calls
    (torch.compile, torch.jit.trace, make_fx, torch.vmap, FakeTensorMode and other modes), and for tensors that are more than memory with
    strides (DTensor and other subclasses, negative views). All others save the 2 us that it takes; these questions take 0.25."""
    if torch.compiler.is_compiling():
        return True
    return type(x) not in _PLAIN or _modes() != 0 or _jit_trace() is not None or _transforms() is not None or x.is_neg()
