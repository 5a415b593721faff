"""Weights that pruning does not see, because no layer it knows owns them. Their owners and the reason are told, not passed over."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from ..nn.surgery import Ignore, select


def unseen(model: nn.Module, ignore: Ignore = ()) -> dict[str, str]:
    """Names of modules with weights that no mask is put on -> why not."""
    found = {}
    for name, module in select(model, (nn.Module,), ignore).items():
        reason = _reason(module)
        if reason is not None:
            found[name] = reason
    return found


def untraceable(model: nn.Module) -> dict[str, str]:
    """Names of modules that torch-pruning cannot follow channels through -> their type. It can through LSTM."""
    strange = {name: module for name, module in model.named_modules() if isinstance(module, (nn.RNN, nn.GRU)) or _is_conv1d(module)}
    return {name: f"a {type(module).__name__}" for name, module in strange.items()}


def attention_outputs(layers: Mapping[str, nn.Module], model: nn.Module) -> list[str]:
    """Those of ``layers`` that are the ``out_proj`` of an ``nn.MultiheadAttention``, which reads their weights and never calls them."""
    inner = {module.out_proj for module in model.modules() if isinstance(module, nn.MultiheadAttention)}
    return [name for name, layer in layers.items() if layer in inner]


def by_reason(reasons: Mapping[str, str]) -> list[str]:
    """``'a', 'b': reason``: every reason once, after the names that have it."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    return [f"{_shortened(who)}: {reason}" for reason, who in names.items()]


def _reason(module: nn.Module) -> str | None:
    if isinstance(module, nn.MultiheadAttention):
        return "the query, key and value weights of nn.MultiheadAttention belong to no layer and stay dense, only out_proj can be pruned"
    if isinstance(module, nn.RNNBase):
        return f"the weights of nn.{type(module).__name__} are not pruned"
    if _is_conv1d(module):
        return "transformers' Conv1D, which keeps its weight as (in, out), is not pruned: put an nn.Linear with the transpose in its place"
    return None


def _is_conv1d(module: nn.Module) -> bool:
    """Told by its name and attributes: transformers is not imported here."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _shortened(names: Iterable[str]) -> str:
    first, *rest = (repr(name) for name in names)
    if len(rest) < 4:
        return ", ".join([first, *rest])
    return f"{first}, {rest[0]} and {len(rest) - 1} more"
