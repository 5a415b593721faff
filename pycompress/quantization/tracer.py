"""``torch.fx`` traces that leave nothing behind: not in the model, not in what other threads are running."""

from __future__ import annotations

import gc
import inspect
import threading
import weakref
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import fx, nn

from ..nn.base import CompressedModule
from .activations import activation_of
from .copying import copy_model
from .overrides import has_hooks

LEAVES = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    CompressedModule,
)
"""Modules that a trace never looks inside."""

# fx patches nn.Module while it traces, and takes its patches off in reverse order: two traces at once would leave one in place.
_ONE_AT_A_TIME = threading.RLock()


def trace(module: nn.Module, *, closed: Collection[nn.Module] = (), defaults: bool = False, training: bool = False) -> fx.Graph | None:
    """The graph of a module, None if it cannot be traced. ``closed``: modules not to look inside, beside leaves. ``defaults``: optional
    arguments have their default values; if False all arguments are given. ``training``: in training mode, else in evaluation mode.

    A copy is traced, so that whatever the forward stores stays out of the model. What it stores has a reader in the graph, as someone may
    look at it later.
    """
    if "forward" in vars(module):  # of the module to trace, fx takes the forward of the class
        return None
    with _ONE_AT_A_TIME:
        try:
            copies: dict[int, Any] = {}
            twin = _copy(module, copies).train(training)
            tracer = _Tracer({copies[id(part)] for part in closed if id(part) in copies})
            graph = tracer.trace(twin, optional_arguments(module) if defaults else None)
        except Exception:  # a forward may raise anything when it meets proxies; "cannot be traced" is an answer here, not an error
            return None
        for node in tracer.kept_by_the_model():
            graph.call_function(stored, (node,))
        return graph


def optional_arguments(module: nn.Module) -> dict[str, Any]:
    """Arguments of ``forward`` with a default that decides about its course: None, a flag, a number or a word."""
    parameters = inspect.signature(type(module).forward).parameters.values()
    return {p.name: p.default for p in parameters if p.default is None or isinstance(p.default, (bool, int, float, str))}


def is_leaf(module: nn.Module) -> bool:
    """Whether traces note the call of this module and do not look inside: layers, activations, other modules of torch, compiled ones, and
    those with hooks, which would run."""
    known = isinstance(module, (*LEAVES, torch.jit.ScriptModule)) or activation_of(module) is not None
    return known or has_hooks(module) or fx.Tracer().is_leaf_module(module, "")


def stored(value: Any) -> Any:
    """Stands in a graph for whoever looks at a value that a forward stored, as in ``self.features = x``."""
    return value


def _copy(module: nn.Module, copies: dict[int, Any]) -> nn.Module:
    """A copy. Parameters, and the buffers of modules that are never looked into, are shared; ``copies`` receives the copy of each module
    by id."""
    for part in module.modules():
        shared = [*part._parameters.values(), *(part._buffers.values() if isinstance(part, LEAVES) else ())]
        copies.update((id(tensor), tensor) for tensor in shared if tensor is not None)
    return copy_model(module, copies)


class _Tracer(fx.Tracer):
    """Records calls of its own thread, and never looks inside layers."""

    def __init__(self, closed: Collection[nn.Module]) -> None:
        super().__init__()
        self._closed = closed
        self._thread = threading.get_ident()
        self._proxies: list[weakref.ref[fx.Proxy]] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m in self._closed or is_leaf(m)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # What fx patches is nn.Module itself, so modules that another thread calls meanwhile come here, too.
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        proxy = super().proxy(node)
        self._proxies.append(weakref.ref(proxy))
        return proxy

    def kept_by_the_model(self) -> list[fx.Node]:
        """Nodes whose values outlive the trace, so that the forward has stored them somewhere."""
        if self._alive():
            gc.collect()  # those in circles of references are not stored
        return self._alive()

    def _alive(self) -> list[fx.Node]:
        proxies = [reference() for reference in self._proxies]
        return [proxy.node for proxy in proxies if proxy is not None]
