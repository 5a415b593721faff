"""Channel permutation before N:M pruning: channels that compete for the same places are moved apart, the network computes the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ..analysis.inputs import check_model, split_inputs
from ..nn.surgery import Ignore, check_ignore, select
from ..progress import track
from .checks import check_plain, check_positive, check_weights, tied
from .criteria import SCORABLE
from .graph import ChannelGraph, Group, part_named
from .inputs import check_runs, tensors_in
from .patterns import NM, parse_pattern
from .permutation_search import kept_magnitude, search_order

Moves = list[tuple[str, str, int, list[int]]]
"""(module or parameter name, name of the tensor in it, dimension, old index at each new place)."""

TOLERANCE = 1e-4
"""Relative change (L2) of the outputs, in float32, above which a permutation is not the identity that it should be. Other orders of
summation change them by 1e-6; a channel that is read at the wrong place by 1e-1."""


@dataclass(frozen=True)
class GroupPermutation:
    """One set of channels: the layers that read them, and the weight magnitude the pattern keeps there."""

    root: str
    """Layer whose output channels they are."""
    readers: tuple[str, ...]
    before: float
    """Share of the readers' weight magnitude that the pattern keeps in the old order, in [0, 1]."""
    after: float
    reason: str | None
    """Why the channels stay in their order, or None."""


@dataclass(frozen=True)
class PermutationSummary:
    """What ``permute_channels`` did; ``print(summary)`` shows a table."""

    pattern: str
    groups: tuple[GroupPermutation, ...]
    before: float
    """Share of the magnitude of all layers the pattern is for that it keeps, in [0, 1]."""
    after: float

    def __str__(self) -> str:
        rows = [
            f"{group.root}: {group.before:.2%} -> {group.after:.2%} ({', '.join(group.readers)})"
            if group.reason is None
            else f"{group.root}: as it was, {group.reason}"
            for group in self.groups
        ]
        return "\n".join([*rows, f"kept magnitude under {self.pattern}: {self.before:.2%} -> {self.after:.2%}"])


def permute_channels(
    model: nn.Module,
    example_inputs: Any,
    *,
    pattern: str = "2:4",
    ignore: Ignore = (),
    max_rounds: int = 100,
    progress: bool | None = None,
) -> PermutationSummary:
    """Reorder channels so that N:M pruning keeps more weight magnitude; the network's function does not change. In place.

    The input channels of a layer are reordered together with the outputs, biases and normalisations that produce them, in every
    layer that shares them. Each order is first tried on a copy with perturbed weights, which has to give the same outputs. Channels
    stay where the network ties them (its outputs, grouped layers, attention heads, shared parameters) and where a kernel of more
    than one weight reads them, whose groups of M lie within a channel for the most part; the summary says so.

    - ``model``: with plain weights, before masks and fake quantization. Parameters keep their identity, an optimizer's momentum
      does not follow, so permute before training.
    - ``pattern``: ``"N:M"``; ``ignore``: layers that will not be pruned, as for ``Pruner``; they move along but do not count.
    - ``max_rounds``: rounds of swaps per set of channels; the search ends earlier at a local maximum. Deterministic.

    ``ValueError`` for a wrong argument, ``RuntimeError`` if the model cannot be traced; the model is unchanged then.
    Source: Pool and Yu, "Channel Permutations for N:M Sparsity", NeurIPS 2021.

    >>> print(permute_channels(model, x))
    >>> model = prune(model, x, pattern="2:4")  # or both in one: prune(model, x, pattern="2:4", permute=True)
    """
    where = "permute_channels"
    check_model(where, model)
    kind = parse_pattern(where, pattern)
    if not isinstance(kind, NM):
        raise ValueError(f"{where}: pattern must be 'N:M' with numbers, such as '2:4', got {pattern!r}")
    check_positive(where, "max_rounds", max_rounds)
    layers = select(model, kind.types, check_ignore(where, model, ignore))
    if not layers:
        raise ValueError(f"{where}: model must have a layer to prune that is not ignored, got none")
    everything = select(model, SCORABLE)
    check_weights(where, everything)
    check_plain(where, everything)
    check_runs(where, model, example_inputs)
    try:
        graph = ChannelGraph(model, example_inputs)
    except Exception as error:
        raise RuntimeError(
            f"{where}: it must be possible to trace the model, got {type(error).__name__}: {error}; the model is unchanged"
        ) from error

    twin = deepcopy(model).float().eval()
    shared = tied(model)
    before = _total(twin, layers, kind)
    done, applied = [], []
    for group in track(graph.groups, "permute channels", progress=progress):
        found, moves = _permute_group(twin, graph, group, layers, shared, kind, example_inputs, max_rounds)
        if found is not None:
            done.append(found)
        applied += moves
    _apply(model, applied)
    return PermutationSummary(pattern, tuple(done), before, _total(twin, layers, kind))


def _permute_group(
    twin: nn.Module,
    graph: ChannelGraph,
    group: Group,
    layers: Mapping[str, nn.Module],
    shared: set[str],
    kind: NM,
    example_inputs: Any,
    max_rounds: int,
) -> tuple[GroupPermutation | None, Moves]:
    """Permute one group of ``twin``; nothing is said of a group that no layer of ``layers`` reads."""
    readers = [member.name for member in group.members if member.side == "in" and member.name in layers]
    if not readers:
        return None, []

    def stays(reason: str) -> tuple[GroupPermutation, Moves]:
        kept = _share(twin, readers, kind)
        return GroupPermutation(group.root, tuple(readers), kept, kept, reason), []

    if group.fixed is not None:
        return stays(group.fixed)
    if group.unit > 1:
        return stays(f"they belong together in sets of {group.unit}")
    sharing = next((member.name for member in group.members if member.name in shared), None)
    if sharing is not None:
        return stays(f"{sharing!r} shares its parameters with another layer")
    odd = next((member.name for member in group.members if not _movable(part_named(twin, member.name))), None)
    if odd is not None:
        return stays(f"no rule for {odd!r} ({type(part_named(twin, odd)).__name__})")
    columns = [slice_ for name in readers if (slice_ := _columns(twin, group, name, kind.m)) is not None]
    if not columns:
        return stays("their readers have kernels of several weights, or see them at other places")
    old = _share(twin, readers, kind)
    order = search_order(torch.cat(columns), kind.n, kind.m, max_rounds=max_rounds)
    if torch.equal(order, torch.arange(group.channels)):
        return stays("no swap keeps more")
    moves = _moves(graph, group, order.tolist(), twin)
    if isinstance(moves, str):
        return stays(moves)
    trial = deepcopy(twin)
    _apply(trial, moves)
    new = _share(trial, readers, kind)
    if new <= old:
        return stays("no order found keeps more")
    if not _same_function(twin, moves, example_inputs):
        return stays("the network reads them in a way that cannot be followed: its outputs would change")
    _apply(twin, moves)
    return GroupPermutation(group.root, tuple(readers), old, new, None), moves


def _columns(model: nn.Module, group: Group, name: str, m: int) -> Tensor | None:
    """Magnitudes (rows, channels) with which a layer reads the group's channels; None unless groups of M are M channels of it."""
    layer = model.get_submodule(name)
    members = [member for member in group.members if member.name == name and member.side == "in"]
    weight = layer.weight.detach().abs()  # type: ignore[union-attr, operator]
    if len(members) != 1 or weight[0, 0].numel() != 1 or (isinstance(layer, _ConvNd) and layer.groups != 1):
        return None
    indices, roots = members[0].indices, members[0].roots
    start = indices[0]
    if start % m or roots != list(range(group.channels)) or indices != list(range(start, start + group.channels)):
        return None
    return weight.flatten(1)[:, start : start + group.channels]


def _movable(part: Any) -> bool:
    if isinstance(part, _ConvTransposeNd):
        return part.groups == 1
    if isinstance(part, _ConvNd):
        return part.groups == 1 or part.groups == part.in_channels == part.out_channels
    if isinstance(part, nn.LayerNorm):
        return len(part.normalized_shape) == 1
    if isinstance(part, nn.GroupNorm):
        return part.num_groups == 1
    return isinstance(part, (nn.Parameter, nn.Linear, nn.Embedding, _NormBase, nn.PReLU))


def _moves(graph: ChannelGraph, group: Group, order: Sequence[int], model: nn.Module) -> Moves | str:
    """What has to be moved so that channel ``order[p]`` stands at place p, or why it cannot be."""
    dimensions = {key: dimension for key, (dimension, _) in graph.cut(group, [0]).items()}
    places: dict[tuple[str, str], dict[int, list[int]]] = {}
    for member in group.members:
        of_root = places.setdefault((member.name, member.side), {})
        for index, root in zip(member.indices, member.roots, strict=True):
            of_root.setdefault(root, []).append(index)
    moves: Moves = []
    moved = set()
    for (name, side), of_root in places.items():
        if len({len(indices) for indices in of_root.values()}) != 1 or len(of_root) != group.channels:
            return f"{name!r} does not read all of them alike"
        part = part_named(model, name)
        tensors = _tensors(part, side, dimensions.get((name, side), 0))
        for tensor, dimension in tensors:
            if (name, tensor, dimension) in moved:  # a depthwise convolution's channels are inputs and outputs
                continue
            moved.add((name, tensor, dimension))
            values = part if isinstance(part, nn.Parameter) else getattr(part, tensor)
            source = list(range(values.shape[dimension]))
            for place, root in enumerate(order):
                for to, of in zip(of_root[place], of_root[root], strict=True):
                    source[to] = of
            moves.append((name, tensor, dimension, source))
    return moves


def _tensors(part: Any, side: str, dimension: int) -> list[tuple[str, int]]:
    """Names and dimensions of a layer's tensors that hold its input or output channels."""
    if isinstance(part, nn.Parameter):
        return [("", dimension)]
    if isinstance(part, nn.Embedding):
        return [("weight", 1)]
    if isinstance(part, _ConvTransposeNd):
        found = [("weight", 0 if side == "in" else 1)]
    elif isinstance(part, nn.Linear) or (isinstance(part, _ConvNd) and part.groups == 1):
        found = [("weight", 1 if side == "in" else 0)]
    elif isinstance(part, nn.PReLU):
        return [("weight", 0)] if part.num_parameters > 1 else []
    else:  # depthwise convolutions and normalisations: one value or filter per channel
        found, side = [("weight", 0), ("running_mean", 0), ("running_var", 0)], "out"
    if side == "out":
        found.append(("bias", 0))
    return [(name, axis) for name, axis in found if getattr(part, name, None) is not None]


@torch.no_grad()
def _apply(model: nn.Module, moves: Moves) -> None:
    for name, tensor, dimension, source in moves:
        part = part_named(model, name)
        values = part if isinstance(part, nn.Parameter) else getattr(part, tensor)
        values.copy_(values.index_select(dimension, torch.tensor(source, device=values.device)))


@torch.no_grad()
def _same_function(model: nn.Module, moves: Moves, example_inputs: Any) -> bool:
    """Whether the moves leave the outputs of a model of this structure, with no weight at zero or one, as they are."""
    args, kwargs = split_inputs("permute_channels", example_inputs)
    noisy = deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    for values in (*noisy.parameters(), *(b for n, b in noisy.named_buffers() if n.endswith(("running_mean", "running_var")))):
        if values.is_floating_point():
            scale = 0.1 * values.square().mean().sqrt() + 0.01
            values += scale * torch.rand(values.shape, generator=generator).to(values)  # upwards: variances stay positive
    clean = tensors_in(noisy(*args, **kwargs))
    _apply(noisy, moves)
    moved = tensors_in(noisy(*args, **kwargs))
    return all(not a.is_floating_point() or float((a - b).norm()) <= TOLERANCE * float(a.norm()) for a, b in zip(clean, moved, strict=True))


def _share(model: nn.Module, names: Sequence[str], kind: NM) -> float:
    """Share of the layers' magnitude that the pattern keeps."""
    kept = total = 0.0
    for name in names:
        magnitude = model.get_submodule(name).weight.detach().abs().flatten(1)  # type: ignore[union-attr, operator]
        kept += kept_magnitude(magnitude, kind.n, kind.m)
        total += float(magnitude.sum(dtype=torch.float64))
    return kept / total if total else 1.0


def _total(model: nn.Module, layers: Mapping[str, nn.Module], kind: NM) -> float:
    return _share(model, list(layers), kind)
