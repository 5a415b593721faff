"""Fusion at convert: activations into the layers before them, and convolutions that hand int8 to the next one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import fx, nn

from ..nn.channels_last_max_pool import ChannelsLastMaxPool2d
from ..nn.int8_conv2d import Int8Conv2d
from ..nn.relu_unless_int8 import ReLUUnlessInt8
from ..nn.state import layers
from ..nn.surgery import replace
from ..ops.affine import quantize_affine
from .activations import activation_of
from .calls import Calls
from .overrides import has_hooks, own_method
from .tracing import Traced, graphs, in_all
from .types import Layer


@dataclass(frozen=True)
class _Chain:
    """What can be fused behind one layer."""

    activation: str = "none"
    called: nn.Module | None = None
    """The activation module, which has nothing left to do for this layer."""
    called_once: bool = True
    out_scale: float | None = None
    out_zero_point: int | None = None


def fuse(
    model: nn.Module, made: Mapping[Layer, nn.Module], keep: Callable[[nn.Module], bool], calls: Calls | None
) -> tuple[nn.Module, dict[Layer, nn.Module]]:
    """Fuse into the new layers what follows the prepared ones in ``model``. Returns the model and the layers to put in their places.

    - nn.ReLU, nn.ReLU6, nn.GELU (exact), nn.SiLU and nn.Hardswish behind a layer whose result it alone reads become the layer's
      ``activation``; an ``nn.Identity`` takes the module's place
    - an ``Int8Conv2d`` whose result, after such an activation, only static int8 convolutions with one common scale read, gives them int8
      on that scale. The integers are those that they would have made of the float result, so nothing changes but the traffic
    - in a model with an ``Int8Conv2d``, ``nn.MaxPool2d`` becomes ``ChannelsLastMaxPool2d``

    ``made``: prepared layer -> new layer. ``keep(module)``: activations to leave alone. ``calls``: those of real runs, see ``graphs``.
    Pairs are found as ``fold_batch_norm`` finds its; activations called as functions, ``F.relu(x)``, are not seen.
    """
    replaced: dict[nn.Module, nn.Module] = {}
    fused = dict(made)
    for courses in graphs(model, calls):
        for layer, chain in in_all(courses, lambda traced: _chains(traced, made, keep)):
            new = fused[layer]
            if chain.out_scale is not None:
                assert isinstance(new, Int8Conv2d)
                new = new.with_int8_output(chain.out_scale, chain.out_zero_point)
            new.activation = chain.activation
            fused[layer] = new
            if chain.called is not None:
                replaced[chain.called] = nn.Identity() if chain.called_once else ReLUUnlessInt8(chain.called.inplace)
    if any(isinstance(layer, Int8Conv2d) for layer in made.values()):
        replaced |= {
            pool: _fast(pool)
            for pool in layers(model).values()
            if type(pool) is nn.MaxPool2d and not pool.return_indices and _may_go(pool, keep)
        }
    for old, new in replaced.items():
        model = replace(model, old, new)
    return model, fused


def _fast(pool: nn.MaxPool2d) -> ChannelsLastMaxPool2d:
    sizes = (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
    return ChannelsLastMaxPool2d(*sizes, ceil_mode=pool.ceil_mode).train(pool.training)


def _chains(traced: Traced, made: Mapping[Layer, nn.Module], keep: Callable[[nn.Module], bool]) -> Iterator[tuple[Layer, _Chain]]:
    """Layers of a graph and what can be fused behind them."""
    for node in traced.graph.nodes:
        layer = traced.module(node)
        if layer in made and traced.called_once(layer) and not traced.read_directly(layer):
            chain = _behind(traced, node, made, keep)
            if chain is not None:
                yield layer, chain


def _behind(traced: Traced, node: fx.Node, made: Mapping[Layer, nn.Module], keep: Callable[[nn.Module], bool]) -> _Chain | None:
    new = made[traced.module(node)]
    if getattr(new, "activation", None) != "none":
        return None
    last, called = _through_identities(traced, node), None
    reader = _only_reader(last)
    module = traced.module(reader) if reader is not None else None
    if module is not None and activation_of(module) is not None and _may_go(module, keep):
        called, last = module, _through_identities(traced, reader)
    once = called is None or traced.called_once(called)
    target = _int8_target(traced, last, made) if isinstance(new, Int8Conv2d) and (once or type(called) is nn.ReLU) else None
    activation = activation_of(called) or "none"
    if target is not None:
        if activation == "relu6" and _saturates_at(6.0, *target):
            activation = "relu"  # which costs less, and the clipping of the integers does the rest
        return _Chain(activation, called, once, *target)
    return _Chain(activation, called) if called is not None and once else None


def _may_go(module: nn.Module, keep: Callable[[nn.Module], bool]) -> bool:
    """Whether something else may take the place of this module, which is of one of torch's types."""
    return not keep(module) and not has_hooks(module) and own_method(module, type(module)) is None


def _only_reader(node: fx.Node) -> fx.Node | None:
    reader = next(iter(node.users), None)
    return reader if len(node.users) == 1 and reader is not None and reader.args == (node,) and not reader.kwargs else None


def _through_identities(traced: Traced, node: fx.Node) -> fx.Node:
    """The last of the nodes behind this one that hold the same tensor for one reader each."""
    while (reader := _only_reader(node)) is not None and _is_identity(traced.module(reader)):
        node = reader
    return node


def _is_identity(module: nn.Module | None) -> bool:
    """Whether nobody notices what goes through this module."""
    return type(module) is nn.Identity and not has_hooks(module) and own_method(module, nn.Identity) is None


def _int8_target(traced: Traced, node: fx.Node, made: Mapping[Layer, nn.Module]) -> tuple[float, int | None] | None:
    """Scale and zero point on which all readers of a node quantize it, None if they do not agree or one of them reads floats."""
    targets = set()
    for reader in node.users:
        layer = traced.module(reader)
        new = made.get(layer) if layer is not None else None
        if not isinstance(new, Int8Conv2d) or not new.static or reader.args != (node,) or layer.weight.dtype != torch.float32:
            return None
        targets.add((new._x_scale, new._x_zero_point))
    return targets.pop() if len(targets) == 1 else None


def _saturates_at(limit: float, scale: float, zero_point: int | None) -> bool:
    """Whether everything from ``limit`` on is the largest integer, so that rounding to int8 clips there, too."""
    return int(quantize_affine(torch.tensor(limit), torch.tensor(scale), zero_point or 0, -128, 127)) == 127
