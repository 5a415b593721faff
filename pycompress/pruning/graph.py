"""Which layers lose a channel together, and cutting channels out of them: the only file that knows torch-pruning.

torch-pruning (DepGraph, Fang et al. 2023, arXiv:2301.12900) traces the autograd graph and follows a channel through residual
additions, concatenations, grouped convolutions, normalisation and flattening. Here all index sets of one event are taken from a
single trace and merged before the first layer is touched, so they stay valid, can be saved, and can be applied to a twin of the
model without tracing it again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ..analysis.inputs import split_inputs
from .inputs import tensors_in

Cuts = dict[tuple[str, str], tuple[int, list[int]]]
"""(module or parameter name, ``"out"`` or ``"in"``) -> (dimension, for parameters and LayerNorm; indices to remove)."""


@dataclass(frozen=True, eq=False)
class Member:
    """A layer that loses channels with a group: ``indices[i]`` of its own channels belongs to channel ``roots[i]`` of the group."""

    name: str
    side: str
    indices: list[int]
    roots: list[int]


@dataclass(frozen=True, eq=False)
class Group:
    """Channels that leave several layers at once. ``root`` is the layer whose output channels number them."""

    root: str
    channels: int
    members: tuple[Member, ...]
    unit: int
    """Channels leave in sets of this many, evenly spaced: grouped layers keep groups of equal size, halves (``chunk``) still match."""
    fixed: str | None
    """Why these channels have to stay, or None."""

    def outputs(self) -> list[str]:
        """Layers whose output channels go."""
        return [member.name for member in self.members if member.side == "out"]


class ChannelGraph:
    """The groups of a model. Traces a copy, so the model itself is not touched, frozen parameters included."""

    def __init__(self, model: nn.Module, example_inputs: Any) -> None:
        from torch_pruning import DependencyGraph, ops

        args, kwargs = split_inputs("Pruner", example_inputs)
        twin = deepcopy(model)
        for parameter in twin.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        outputs: list[Tensor] = []

        def forward(traced: nn.Module, _: Any) -> list[Tensor]:
            outputs.extend(tensor for tensor in tensors_in(traced(*args, **kwargs)) if tensor.grad_fn is not None)
            if not outputs:
                raise RuntimeError("no tensor of the output depends on a parameter")
            return outputs

        with torch.enable_grad():
            self._graph = DependencyGraph().build_dependency(twin, args, forward_fn=forward, verbose=False)
        ends = {output.grad_fn for output in outputs}
        self._ends = {
            id(node)
            for node in self._graph.module2node.values()
            if node.type == ops.OPTYPE.OUTPUT or node.grad_fn in ends or not node.outputs
        }
        self._modules = {module: name for name, module in twin.named_modules()}
        self._roots: dict[str, nn.Module] = {}
        self._handlers: dict[str, Any] = {}
        self.groups = [self._describe(group) for group in list(self._graph.get_all_groups())]

    def cut(self, group: Group, channels: Iterable[int]) -> Cuts:
        """What has to be cut out of which layer to remove ``channels`` of a group."""
        found = self._graph.get_pruning_group(self._roots[group.root], self._handlers[group.root], sorted(channels))
        cuts: Cuts = {}
        for dependency, indices in found:
            name = self._name(dependency.target.module)
            if name is not None:
                merge_cuts(cuts, {(name, self._side(dependency)): (dependency.target.pruning_dim, list(indices))})
        return cuts

    def _describe(self, found: Any) -> Group:
        root_module, handler = found[0].dep.target.module, found[0].dep.handler
        root = self._modules[root_module]
        self._roots[root], self._handlers[root] = root_module, handler
        channels = len(found[0].idxs)
        members, unit, fixed = [], 1, None
        for item in found:
            dependency, indices = item.dep, list(item.idxs)
            module, side = dependency.target.module, self._side(dependency)
            if side == "out" and id(dependency.target) in self._ends:
                fixed = fixed or "its channels are an output of the model"
            name = self._name(module)
            if name is None:
                continue
            members.append(Member(name, side, indices, list(item.root_idxs)))
            sets = _channel_sets(module)
            if sets > 1:
                unit = math.lcm(unit, sets)
                if len(indices) != channels or channels % unit:
                    fixed = fixed or f"its channels do not line up with the groups of {name!r}"
            if isinstance(module, _ConvTransposeNd) and sets > 1:
                fixed = fixed or f"{name!r} is a grouped transposed convolution"
            if isinstance(module, nn.MultiheadAttention):
                fixed = fixed or f"the heads of {name!r} need them"
        unit = math.lcm(unit, len(self._leaving(root, [0])))
        if fixed is None and not self._in_even_sets(root, channels, unit):
            fixed = "a slice, chunk or reshape ties them to each other in a way that cannot be followed"
        return Group(root, channels, tuple(members), unit, fixed)

    def _leaving(self, root: str, channels: Iterable[int]) -> set[int]:
        """Channels of the root that go with ``channels``: more of them where the network splits a layer's output, as in ``chunk``."""
        found = self._graph.get_pruning_group(self._roots[root], self._handlers[root], list(channels))
        return {i for item in found for i in item.idxs if item.dep.target.module is self._roots[root] and self._side(item.dep) == "out"}

    def _in_even_sets(self, root: str, channels: int, unit: int) -> bool:
        """Whether channels p, p + size, p + 2 size, ... leave together and with no others, for all p < size = channels / unit."""
        if channels % unit:
            return False
        size = channels // unit
        for positions in (range(0, size, 2), range((size + 1) // 2)):  # neighbours, and far apart
            wanted = {position + k * size for position in positions for k in range(unit)}
            if self._leaving(root, wanted) != wanted:
                return False
        return True

    def _side(self, dependency: Any) -> str:
        return "out" if self._graph.is_out_channel_pruning_fn(dependency.handler) else "in"

    def _name(self, target: Any) -> str | None:
        """Name of a module or free parameter; None for what torch-pruning puts into the graph for operations such as ``cat``."""
        return self._graph._param_to_name.get(target) if isinstance(target, nn.Parameter) else self._modules.get(target)


def _channel_sets(module: Any) -> int:
    """How many sets of equal size the channels of a layer fall into."""
    if isinstance(module, _ConvNd) and module.groups != module.out_channels:
        return module.groups
    return module.num_groups if isinstance(module, nn.GroupNorm) else 1


def merge_cuts(cuts: Cuts, more: Cuts) -> None:
    """Add ``more`` to ``cuts`` in place; indices of both count channels before any of them is removed."""
    for key, (dimension, indices) in more.items():
        present = cuts[key][1] if key in cuts else []
        cuts[key] = (dimension, sorted({*present, *indices}))


def part_named(model: nn.Module, name: str) -> nn.Module | nn.Parameter:
    """The module or parameter of that path; the model itself for an empty one."""
    owner, _, last = name.rpartition(".")
    return getattr(model.get_submodule(owner), last) if name else model


@torch.no_grad()
def apply_cuts(model: nn.Module, cuts: Cuts) -> None:
    """Remove channels from the layers of a model, in place. Parameters are replaced by smaller ones; requires_grad is kept."""
    from torch_pruning import ops
    from torch_pruning.pruner.function import PrunerBox

    wants_gradient = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    # All tools are chosen first: a grouped convolution may look like a depthwise one once its first cut is made.
    jobs = []
    for (name, side), (dimension, indices) in cuts.items():
        target = part_named(model, name)
        jobs.append((name, target, PrunerBox[ops.module2type(target)], side, dimension, indices))
    for name, target, tool, side, dimension, indices in jobs:
        tool.pruning_dim = dimension
        result = (tool.prune_out_channels if side == "out" else tool.prune_in_channels)(target, indices)
        if isinstance(target, nn.Parameter):
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, result)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(wants_gradient[name])


def plain_cuts(cuts: Cuts) -> list[list[Any]]:
    """Lists and numbers only, for a state_dict."""
    return [[name, side, dimension, indices] for (name, side), (dimension, indices) in cuts.items()]


def cuts_of(plain: Iterable[Iterable[Any]]) -> Cuts:
    return {(name, side): (dimension, list(indices)) for name, side, dimension, indices in plain}
