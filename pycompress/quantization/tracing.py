"""Who reads whose output: ``torch.fx`` graphs of a model or of parts of it, and where they are sure to show all that happens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import fx, nn

from .calls import Call, Calls, every
from .tracer import LEAVES, is_leaf, optional_arguments, trace

Paths = dict[str, nn.Module]


class Traced:
    """A graph of ``root``, which is the model or a part of it. ``closed``: modules that the trace did not look into, beside leaves."""

    def __init__(self, root: nn.Module, graph: fx.Graph, closed: set[nn.Module]) -> None:
        self.root, self.graph, self.closed = root, graph, closed
        self.order = [module for node in graph.nodes if (module := self.module(node)) is not None]
        """The modules that the graph calls, in order."""
        self.calls = Counter(self.order)
        # What a module that the graph does not look into calls is not known.
        self._elsewhere = {part for module in self.calls for part in module.modules() if part is not module}

    def module(self, node: fx.Node) -> nn.Module | None:
        return self.root.get_submodule(str(node.target)) if node.op == "call_module" else None

    def called_once(self, module: nn.Module) -> bool:
        """Whether the graph calls the module once and nothing else does."""
        return self.calls[module] == 1 and module not in self._elsewhere

    def read_directly(self, module: nn.Module) -> bool:
        """Whether the graph looks into the module past its call: reads its weight, or runs its ``forward`` itself."""
        inside = set(module.modules())
        for node in self.graph.nodes:
            if node.op == "get_attr" and self.root.get_submodule(str(node.target).rpartition(".")[0]) in inside:
                return True
            if self.module(node) in inside - {module}:
                return True
        return False

    def follows(self, run: Call, paths: Paths) -> bool:
        """Whether a real call of ``root`` called just these modules in this order."""
        order = [module for module in self.order if not isinstance(module, torch.jit.ScriptModule)]  # no run sees their calls
        return list(self._leaves(run, paths)) == order

    def note_other_callers(self, calls: Calls, paths: Paths) -> None:
        """From here on modules that were also called from outside of ``root`` are not ``called_once``."""
        total = Counter(paths.get(call.path) for call in every(calls))
        self._elsewhere |= {module for module, often in self.calls.items() if total[module] != often * total[self.root]}

    def _leaves(self, call: Call, paths: Paths) -> Iterator[nn.Module | None]:
        for inner in call.inner:
            module = paths.get(inner.path)
            if module is None or module in self.closed or is_leaf(module):
                yield module
            else:
                yield from self._leaves(inner, paths)


def graphs(model: nn.Module, calls: Calls | None) -> Iterator[tuple[Traced, ...]]:
    """The graphs of the model, or of the largest parts of it that can be traced.

    Several graphs of one root show its courses, with all arguments given and with optional ones left out: what holds has to hold in all.
    ``calls``: those of real runs. Graphs are used if every run agrees with one of them. Without runs only graphs of the model itself are:
    in a model that cannot be traced nobody knows which code calls its parts, and how.
    """
    whole = _courses(model, set())
    paths = dict(model.named_modules(remove_duplicate=False))
    if None not in whole and (calls is None or _agree(whole, calls, paths)):
        yield whole  # type: ignore[misc]
        return
    parts = _parts(model)
    if calls is None:
        if parts.get(model) and None not in parts[model]:
            yield parts[model]  # type: ignore[misc]
        return
    pending, seen = [model], set()
    while pending:
        module = pending.pop()
        if module in seen:
            continue
        seen.add(module)
        courses = tuple(course for course in parts.get(module, ()) if course is not None)
        if _agree(courses, calls, paths):
            yield courses
            pending += [called for course in courses for called in course.calls]
        else:
            pending += module.children()


Found = TypeVar("Found")


def in_all(courses: tuple[Traced, ...], find: Callable[[Traced], Iterable[Found]]) -> list[Found]:
    """What is found in each of the graphs, each once."""
    first, *others = [dict.fromkeys(find(traced)) for traced in courses]
    return [found for found in first if all(found in other for other in others)]


def _agree(courses: tuple[Traced | None, ...], calls: Calls, paths: Paths) -> bool:
    """Whether there were real calls, and each followed one of the courses. Notes in them what else calls their modules."""
    known = [course for course in courses if course is not None]
    for course in known:
        course.note_other_callers(calls, paths)
    runs = [call for call in every(calls) if known and paths.get(call.path) is known[0].root]
    return bool(runs) and all(any(course.follows(run, paths) for course in known) for run in runs)


def _courses(module: nn.Module, closed: set[nn.Module]) -> tuple[Traced | None, ...]:
    """With all arguments given and, if there are optional ones, with those left out; None for what cannot be traced. In training mode, too,
    where that can be traced: results are for evaluation mode, but in training they should not be far off without need."""
    graphs = [trace(module, closed=closed)]
    if optional_arguments(module):
        graphs.append(trace(module, closed=closed, defaults=True))
    training = trace(module, closed=closed, training=True) if any(graphs) else None
    if training is not None:
        graphs.append(training)
    return tuple(None if graph is None else Traced(module, graph, set(closed)) for graph in graphs)


def _parts(model: nn.Module) -> dict[nn.Module, tuple[Traced | None, ...]]:
    """The graphs of all modules that call others, around those in them that cannot be traced."""
    closed: set[nn.Module] = set()
    parts: dict[nn.Module, tuple[Traced | None, ...]] = {}
    for module in _inside_out(model, set()):
        parts[module] = _courses(module, closed)
        if not any(parts[module]):
            closed.add(module)
    return parts


def _inside_out(module: nn.Module, seen: set[nn.Module]) -> Iterator[nn.Module]:
    """Modules with children, but layers, each behind those in it."""
    if module in seen or isinstance(module, LEAVES):
        return
    seen.add(module)
    for child in module.children():
        yield from _inside_out(child, seen)
    if any(True for _ in module.children()):
        yield module
