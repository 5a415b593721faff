"""Who reads whose output: ``torch.fx`` graphs of a model, or of those parts of it that can be traced."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx, nn

from ..nn.base import CompressedModule
from ..nn.surgery import all_names

LEAVES = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    CompressedModule,
)
"""Modules that a trace never looks inside."""


class _Tracer(fx.Tracer):
    """Records calls of layers and never looks inside them; ``shallow`` also leaves every other module closed."""

    def __init__(self, shallow: bool) -> None:
        super().__init__()
        self.shallow = shallow

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self.shallow or isinstance(m, LEAVES) or super().is_leaf_module(m, module_qualified_name)


def trace(module: nn.Module, shallow: bool) -> fx.Graph | None:
    try:
        return _Tracer(shallow).trace(module)
    except Exception:  # a forward may raise anything when it meets proxies; "cannot be traced" is an answer here, not an error
        return None


@dataclass(frozen=True)
class Traced:
    """A graph of ``root``, which is the model or a part of it."""

    root: nn.Module
    graph: fx.Graph
    calls: Counter[nn.Module]
    """How often all graphs of the model together call each module."""
    whole: set[nn.Module] | None
    """Modules whose every call is in the graphs: those with one path if the model as a whole could not be traced; None: all."""

    def module(self, node: fx.Node) -> nn.Module | None:
        return self.root.get_submodule(str(node.target)) if node.op == "call_module" else None

    def called_once(self, module: nn.Module) -> bool:
        return self.calls[module] == 1 and (self.whole is None or module in self.whole)

    def read_directly(self, module: nn.Module) -> bool:
        """Whether the graph reads a tensor of the module past its forward, such as its weight."""
        return any(n.op == "get_attr" and self.root.get_submodule(str(n.target).rpartition(".")[0]) is module for n in self.graph.nodes)


def graphs(model: nn.Module) -> Iterator[Traced]:
    """The graph of the model or, where it cannot be traced, the graphs of all its modules that can be."""
    whole = trace(model, shallow=False)
    if whole is not None:
        yield Traced(model, whole, _calls([(model, whole)]), None)
        return
    # A module with several parents or paths may be called from places that a partial trace does not see.
    single = {module for module, paths in all_names(model).items() if len(paths) == 1}
    parts = []
    for module in model.modules():
        if isinstance(module, LEAVES) or not any(True for _ in module.children()):
            continue
        graph = trace(module, shallow=True)
        if graph is not None:
            parts.append((module, graph))
    calls = _calls(parts)
    yield from (Traced(module, graph, calls, single) for module, graph in parts)


def _calls(parts: list[tuple[nn.Module, fx.Graph]]) -> Counter[nn.Module]:
    return Counter(root.get_submodule(str(node.target)) for root, graph in parts for node in graph.nodes if node.op == "call_module")
