"""SmoothQuant: move outliers of activations into the weights that follow."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from textwrap import shorten
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode, resolve_name

from ...analysis.inputs import check_model
from ...nn.base import set_note
from ...nn.surgery import Ignore, all_names, check_ignore, ignored
from ..calibration import Forward, evaluating, run_batches
from ..copying import copy_model
from ..types import Norm
from .base import algorithm


@algorithm("smoothquant", stage="before", needs_data=True)
def smoothquant(
    model: nn.Module,
    data: Iterable[Any],
    *,
    alpha: float = 0.5,
    ignore: Ignore = (),
    inplace: bool = False,
    example_inputs: Any = None,
    forward: Forward | None = None,
    progress: bool | None = None,
) -> nn.Module:
    """Divide the output of each normalization by s and multiply the Linear layers that read it by s; the float model computes the same.

    For each channel j: s_j = max|x_j|^alpha / max|W_j|^(1 - alpha), the maximum of W taken over all readers. ``alpha``: 0 moves nothing of
    the activations' outliers into the weights, 1 all. Taken are LayerNorm and RMSNorm (any class of that name with a ``weight``)
    whose output only Linear layers read, as observed while running ``data``; others are left as they are, with a note. ``ignore``: layers
    not to touch. Warns if there is nothing to do.
    Source: Xiao et al. 2023, arXiv 2211.10438, equation 4.

    >>> model = smoothquant(model, data)
    """
    where = "smoothquant"
    check_model(where, model)
    if not 0 <= alpha <= 1:
        raise ValueError(f"{where}: alpha must be in [0, 1], got {alpha}")
    entries = check_ignore(where, model, ignore)
    skip = [paths[0] for module, paths in all_names(model).items() if any(ignored(path, module, entries) for path in paths)]
    if not inplace:
        model = copy_model(model)
    skipped = {model.get_submodule(name) for name in skip}
    norms = [module for module in model.modules() if _is_norm(module)]
    watch = _Watch(model, norms)
    with watch, evaluating(model):
        run_batches(where, model, data, example_inputs=example_inputs, forward=forward, progress=progress)
    owners = _parameter_owners(model)
    names, left = all_names(model), {}
    for norm in norms:
        seen = watch.outputs.get(norm)
        reason = _obstacle(norm, seen, skipped, owners)
        if seen is not None and reason is None:
            if not torch.isfinite(seen.amax).all():
                raise ValueError(f"{where}: activations must be finite, got NaN or Inf behind a {type(norm).__name__}")
            if not _smooth(norm, list(seen.readers), seen.amax, seen.sample, alpha):
                reason = "its output does not scale with its weight"
        if reason is not None:
            left[names[norm][0]] = reason
            set_note(norm, f"not smoothed: {reason}")
    if len(left) == len(norms):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left.items()) or "the model has no LayerNorm or RMSNorm"
        warnings.warn(f"{where}: nothing to do, the model stays as it is ({shorten(reasons, 400)})", stacklevel=2)
    return model


def _obstacle(norm: Norm, seen: _Output | None, skipped: set[nn.Module], owners: dict[int, list[nn.Module]]) -> str | None:
    """Why this normalization cannot be smoothed, or None."""
    if seen is None:
        return "it was not called"
    touched = [norm, *seen.readers]
    if any(module in skipped for module in touched):
        return "it or a layer behind it is named in ignore"
    if any(parametrize.is_parametrized(module) for module in touched):
        return "it or a layer behind it is parametrized"
    if any(len(owners[id(parameter)]) > 1 for module in touched for parameter in module.parameters(recurse=False)):
        return "it or a layer behind it shares a parameter with another layer"
    if not seen.only_linear or not seen.readers:
        return "its output is not read by nn.Linear layers alone"
    return None


@dataclass
class _Output:
    """What was seen of one normalization's output."""

    amax: Tensor
    sample: Tensor
    readers: dict[nn.Linear, None] = field(default_factory=dict)
    only_linear: bool = True


class _Watch(TorchFunctionMode):
    """Sees every torch function that runs, hence everything that reads the output of a normalization, traceable model or not."""

    def __init__(self, model: nn.Module, norms: list[nn.Module]) -> None:
        super().__init__()
        self.outputs: dict[nn.Module, _Output] = {}
        self._alive: dict[int, tuple[Tensor, nn.Module]] = {}  # holds the tensors, so that an id is not used twice
        self._linears = {id(module.weight): module for module in model.modules() if type(module) is nn.Linear}
        self._model, self._norms = model, norms
        self._handles: list[Any] = []
        self._inside = 0

    def __enter__(self) -> _Watch:
        for norm in self._norms:
            self._handles.append(norm.register_forward_hook(self._remember))
        self._handles.append(self._model.register_forward_hook(self._end_of_call))
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._alive.clear()
        super().__exit__(*exception)

    def _remember(self, norm: Norm, args: Any, output: Any) -> None:
        if not isinstance(output, Tensor) or output.numel() == 0:
            return
        with torch._C.DisableTorchFunction():
            amax = output.detach().abs().flatten(0, -2).amax(dim=0).float()
            if norm not in self.outputs:
                self.outputs[norm] = _Output(amax, args[0].detach().flatten(0, -2)[:8].clone())
            else:
                self.outputs[norm].amax = torch.maximum(self.outputs[norm].amax, amax)
        self._alive[id(output)] = (output, norm)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._alive:
            linear = self._linears.get(id(args[1])) if function is F.linear and len(args) > 1 else None
            for tensor in _tensors((args, kwargs)):
                known = self._alive.get(id(tensor))
                if known is None:
                    continue
                seen = self.outputs[known[1]]
                if linear is not None and tensor is args[0]:
                    seen.readers[linear] = None
                elif not _only_asks(function):
                    seen.only_linear = False
        return function(*args, **kwargs)

    def _end_of_call(self, model: nn.Module, args: Any, output: Any) -> None:
        """The model's own output is read by the caller."""
        for tensor in _tensors(output):
            if id(tensor) in self._alive:
                self.outputs[self._alive[id(tensor)][1]].only_linear = False
        self._alive.clear()


_QUESTIONS = frozenset(
    [f"{name}.__get__" for name in ("shape", "dtype", "device", "ndim", "is_nested", "requires_grad", "is_cuda", "is_sparse")]
    + ["size", "dim", "numel", "stride", "is_floating_point", "is_contiguous", "__len__"]
)


def _only_asks(function: Any) -> bool:
    """Properties and questions (shape, dtype, dim(), ...) read no values."""
    return (resolve_name(function) or "").removeprefix("torch.Tensor.") in _QUESTIONS


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    named = isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm")
    return named and isinstance(weight, Tensor) and weight.dim() == 1


def _parameter_owners(model: nn.Module) -> dict[int, list[nn.Module]]:
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(module)
    return owners


@torch.no_grad()
def _smooth(norm: Norm, readers: list[nn.Linear], amax: Tensor, sample: Tensor, alpha: float) -> bool:
    """In place; False, with nothing changed, if the normalization does not scale with its weight."""
    weight = torch.stack([reader.weight.abs().amax(dim=0).float() for reader in readers]).amax(dim=0)
    scale = amax.pow(alpha) / weight.pow(1 - alpha)
    # A channel that is always 0, or that nobody reads, has no size to balance.
    scale = torch.where((amax > 0) & (weight > 0), scale, torch.ones_like(scale)).clamp(min=1e-5)
    own = [parameter for parameter in (norm.weight, getattr(norm, "bias", None)) if parameter is not None]
    kept, before = [parameter.clone() for parameter in own], norm(sample)
    for parameter in own:
        parameter.div_(scale)
    # Some classes named RMSNorm multiply by 1 + weight; they do not scale like this and are left as they are.
    if not torch.allclose(norm(sample) * scale, before, rtol=1e-2, atol=1e-3 * float(before.abs().max())):
        for parameter, old in zip(own, kept, strict=True):
            parameter.copy_(old)
        return False
    for reader in readers:
        reader.weight.mul_(scale)
    return True
