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
    """Whether torch is compiling or exporting; eager calls skip the dispatcher and save about 2 us."""
    return torch.compiler.is_compiling()
