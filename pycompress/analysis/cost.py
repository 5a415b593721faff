"""Parameters, bytes and multiply-accumulates of a model, layer by layer, from one run on example inputs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from ..nn.base import CompressedModule
from ..nn.state import Slot, layers, own_slots
from ..nn.untouched import untouched
from .formulas import dense_layer, formula_for, nonzeros
from .inputs import check_model, split_inputs


@dataclass(frozen=True)
class LayerCost:
    """One layer. Counts are of the tensors in use: masks and fake quantization are applied, not added."""

    name: str
    module: nn.Module
    params: int
    bytes: int
    """What a checkpoint holds for this layer: parameters and persistent buffers."""
    macs: int | None
    """Dense-equivalent multiply-accumulates of one run, None where they could not be counted."""
    effective_macs: int | None
    """The same without products with a zero weight."""
    sparsity: float | None
    """Share of zeros in the weights (tensors of two or more dimensions), None if there are none."""
    calls: int
    tied_to: str | None
    """The layer under which tensors shared with this one are counted in the totals."""


@dataclass(frozen=True)
class Cost:
    """All layers that own tensors or multiply matrices, and the totals; tied tensors and shared modules count once."""

    layers: tuple[LayerCost, ...]
    params: int
    bytes: int
    macs: int
    effective_macs: int
    uncounted: tuple[str, ...]
    """Layers with parameters that ran but whose multiply-accumulates are unknown; the totals lack them."""


def cost(model: nn.Module, example_inputs: Any) -> Cost:
    """Count what ``model(example_inputs)`` stores and computes. The model stays as it was.

    Layers of torch.nn and compressed layers are counted by formula. Matrix products, convolutions and attention that a
    module computes itself are counted operator by operator and belong to the innermost module that runs them.
    """
    check_model("cost", model)
    args, kwargs = split_inputs("cost", example_inputs)
    tally = _Tally()
    found = units(model)
    with untouched(model), no_fast_path():
        handles = [handle for name, module in found.items() for handle in tally.watch(name, module)]
        try:
            with tally:
                getattr(model, "_orig_mod", model)(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        owners: dict[Hashable, str] = {}
        rows = [row for name, module in found.items() if (row := _row(name, module, tally, owners)) is not None]
        params, size = _totals(found)
    return Cost(
        tuple(rows),
        params,
        size,
        sum(row.macs or 0 for row in rows),
        sum(row.effective_macs or 0 for row in rows),
        tuple(row.name for row in rows if row.macs is None),
    )


def units(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that are looked at one by one: all of them once, except what sits inside a layer and is no layer itself.

    That is the output projection of nn.MultiheadAttention, which is never called, and observers that hang in a layer
    while it trains: helpers like masks, which are not counted either.
    """
    found = layers(getattr(model, "_orig_mod", model))
    inside: set[nn.Module] = set()
    for module in found.values():
        parts = set(module.modules()) - {module}
        if isinstance(module, nn.MultiheadAttention):
            inside |= parts
        elif parts and formula_for(module) is not None:
            inside.update(part for part in parts if not any(formula_for(each) for each in part.modules()))
    return {name: module for name, module in found.items() if module not in inside}


def slots(module: nn.Module) -> Iterator[Slot]:
    """The tensors of one unit."""
    for part in layers(module).values() if isinstance(module, nn.MultiheadAttention) else (module,):
        yield from own_slots(part)


@contextmanager
def no_fast_path() -> Iterator[None]:
    """Transformer layers call their parts one by one instead of one fused function that no hook sees."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class _Tally(TorchDispatchMode):
    """Counts calls and multiply-accumulates per module while the model runs."""

    def __init__(self) -> None:
        super().__init__()
        self.running: list[str] = []
        self.by_formula: set[str] = set()
        self.calls: dict[str, int] = defaultdict(int)
        self.dense: dict[str, int] = defaultdict(int)
        self.nonzero: dict[str, int] = defaultdict(int)

    def watch(self, name: str, module: nn.Module) -> list[Any]:
        formula = formula_for(module)
        if formula is not None:
            self.by_formula.add(name)

        def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
            self.running.append(name)
            self.calls[name] += 1

        def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            if formula is not None:
                self.dense[name] += formula(module, args, kwargs, out, torch.Tensor.numel)
                self.nonzero[name] += formula(module, args, kwargs, out, nonzeros)
            self.running.pop()

        return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, with_kwargs=True)]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.running and self.running[-1] not in self.by_formula:
            self.dense[self.running[-1]] += _operator_macs(getattr(func, "_overloadpacket", func), args, kwargs or {}, out)
        return out


def _operator_macs(packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    aten = torch.ops.aten
    if packet in flop_registry:
        return flop_registry[packet](*args, **kwargs, out_val=out) // 2
    if packet is aten._scaled_dot_product_flash_attention_for_cpu:
        return sdpa_flop_count(*(each.shape for each in args[:3])) // 2
    if packet is aten._int_mm:
        return out.numel() * args[0].shape[1]
    if packet is aten.mv or packet is aten.dot:
        return args[0].numel()
    return 0


def _row(name: str, module: nn.Module, tally: _Tally, owners: dict[Hashable, str]) -> LayerCost | None:
    own = list(slots(module))
    dense = tally.dense[name]
    if not own and not dense:
        return None
    tied_to = next((owners[slot.identity] for slot in own if slot.identity in owners), None)
    for slot in own:
        owners.setdefault(slot.identity, name)

    matrices = [slot.tensor for slot in own if slot.is_parameter and slot.tensor.dim() >= 2]
    if isinstance(module, CompressedModule):
        weight = getattr(dense_layer(module), "weight", None)
        matrices = [] if weight is None else [weight]
    elements = sum(weight.numel() for weight in matrices)
    kept = sum(nonzeros(weight) for weight in matrices)

    macs: int | None = dense
    effective: int | None = tally.nonzero[name]
    if name not in tally.by_formula:
        unknown = dense == 0 and tally.calls[name] > 0 and any(slot.is_parameter for slot in own)
        macs = None if unknown else dense
        effective = None if unknown else round(dense * kept / elements) if elements else dense
    params, size = _stored(module, own)
    return LayerCost(name, module, params, size, macs, effective, 1 - kept / elements if elements else None, tally.calls[name], tied_to)


def _stored(module: nn.Module, own: list[Slot]) -> tuple[int, int]:
    if isinstance(module, CompressedModule):
        return module.num_params(), module.num_bytes()
    params = sum(slot.tensor.numel() for slot in own if slot.is_parameter)
    return params, sum(slot.tensor.numel() * slot.tensor.element_size() for slot in own)


def _totals(found: dict[str, nn.Module]) -> tuple[int, int]:
    params = size = 0
    seen: set[Hashable] = set()
    for module in found.values():
        own = [slot for slot in slots(module) if slot.identity not in seen]
        seen.update(slot.identity for slot in own)
        more_params, more_bytes = _stored(module, own)
        params += more_params
        size += more_bytes
    return params, size
